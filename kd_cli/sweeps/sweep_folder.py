"""What a sweep notes in its own folder: the command that began it, to resume it, and what ends it early."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kd_cli import processes
from kd_cli.errors import ConfigError, StorageError
from kd_cli.storage.files import read_json, storage, write_json
from kd_cli.storage.run_dir import BEGUN, note_command, refuse_other_run
from kd_cli.sweeps.names import SWEPT

MULTIRUN, LOG = "multirun.yaml", "run.log"  # what Hydra leaves beside .hydra
FAILED = ".failed"  # of a sweep under way with fail_fast: its jobs, in whatever process, begin no more
COMMAND = ".command.json"  # of a sweep: Hydra writes multirun.yaml anew at each resumption, and not in one piece


class RunFailed(BaseException):
    """Carries a run's error past Hydra, which would print the run's overrides before it raises the error."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(str(error))
        self.error = error


class SweepNotes(Callback):
    """Notes where a run or sweep writes, so that the command can report on it when it has ended, however it ended."""

    folder: Path | None = None  # of this process's sweep
    new = False  # whether this process made the run's or the sweep's folder
    command = ""  # of a resumed sweep: the command that began it
    after: Any = None  # the node of a function that draws from the sweep's runs

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse the directory of another run before Hydra writes its own files there."""
        path = Path(str(config.hydra.run.dir))
        try:
            refuse_other_run(path)
            SweepNotes.new = not any(path.glob("*"))
            if not config.dry_run and config.instead is None:
                note_command(path, command())
        except StorageError as error:
            raise RunFailed(error) from error  # Hydra would make a warning of an Exception

    def on_run_end(self, config: DictConfig, job_return: JobReturn | None = None, **kwargs: Any) -> None:
        """Raise a failed run's error. Hydra calls this callback last: the first in the configuration ends last."""
        if job_return is None or job_return.status != JobStatus.FAILED:
            return
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # where Hydra prints the overrides
                _ = job_return.return_value
        except Exception as error:
            raise RunFailed(error) from error

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Note the sweep's folder, the command that began it, and which keys it varies."""
        if processes.launched() is not None:
            raise RunFailed(no_sweep())
        folder = Path(str(config.hydra.sweep.dir))
        parsed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        searched = OmegaConf.select(config, "hydra.sweeper.params") or {}
        swept = [*(o.get_key_element() for o in parsed if o.is_sweep_override()), *map(str, searched)]
        os.environ[SWEPT] = ",".join(swept)
        SweepNotes.after = OmegaConf.to_container(config.after_sweep) if config.get("after_sweep") else None
        SweepNotes.command = ""
        (folder / FAILED).unlink(missing_ok=True)
        if config.dry_run:
            SweepNotes.folder = None
            return
        SweepNotes.new = not any(folder.glob("*"))
        try:
            note_sweep(folder, config)
        except StorageError as error:
            SweepNotes.folder = None
            raise RunFailed(error) from error  # Hydra would make a warning of an Exception
        SweepNotes.folder = folder

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Remove what Hydra has written for a dry run."""
        if config.dry_run:
            leave_nothing(Path(str(config.hydra.sweep.dir)))


def no_sweep() -> ConfigError:
    """Return the error for a sweep under torchrun."""
    return ConfigError(
        f"torchrun has started {processes.count()} processes, which train one run together, and this is a sweep",
        hint="kd-run -m trains a sweep's runs in one process; torchrun is for each run by itself",
    )


def command() -> str:
    """Return the command that began what this process runs."""
    return SweepNotes.command or f"{processes.command_name()} {shlex.join(sys.argv[1:])}".strip()


def note_sweep(folder: Path, config: DictConfig) -> None:
    """Note how a sweep was begun. StorageError when the folder is another sweep's."""
    if (folder / COMMAND).exists():
        if config.resume is None:
            raise StorageError(
                f"{folder} already holds a sweep",
                hint=f"kd-run resume={folder} goes on with it; hydra.sweep.dir= names another folder",
            )
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            SweepNotes.command = str(read_json(folder / COMMAND)["command"])
        return
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / COMMAND, {"command": command(), "words": sweep_arguments(config)})


def sweep_arguments(config: Any) -> list[str]:
    """Return the arguments that a sweep's configuration was composed from, except for where it writes."""
    hydra = config.hydra
    folders = [s.path for s in hydra.runtime.config_sources if s.provider == "command-line"]
    overrides = map(str, [*hydra.overrides.hydra, *hydra.overrides.task])
    kept = [
        override for override in overrides if not override.startswith(("resume=", "hydra.mode=", "hydra.sweep.dir="))
    ]
    return [*(argument for folder in folders for argument in ("--config-dir", folder)), *kept]


def resumed_arguments(path: Path) -> list[str] | None:
    """Return the arguments of `kd-run` that go on with a sweep; None when the directory is not a sweep's."""
    noted = path / COMMAND
    if not noted.is_file() and not (path / MULTIRUN).is_file():
        return None
    try:
        if noted.is_file():
            arguments = [str(argument) for argument in read_json(noted)["words"]]
        else:
            noted = path / MULTIRUN
            arguments = sweep_arguments(OmegaConf.load(noted))
    except (OSError, ValueError, KeyError, TypeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{noted} cannot be read: {error}", hint="start the sweep anew") from error
    return ["-m", *arguments, f"resume={path}"]


def leave_nothing(folder: Path, *, begun: bool = False) -> bool:
    """Remove what Hydra has put into a folder, the folder, and empty folders above it.

    With `begun`, what kd-cli notes at the beginning of a run or sweep goes as well. Return False, and remove nothing,
    where the folder holds anything else: a run, or files that were there before.
    """
    ours = (MULTIRUN, LOG, BEGUN, COMMAND) if begun else (MULTIRUN, LOG)
    files = [path for path in folder.glob("**/*") if path.is_file()]
    if any(path.parent.name != ".hydra" and path.name not in ours for path in files):
        return False
    for handler in list(logging.getLogger().handlers):
        if isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).is_relative_to(folder.absolute()):
            logging.getLogger().removeHandler(handler)  # it would open the file again
            handler.close()  # a file that is open cannot be removed everywhere
    shutil.rmtree(folder, ignore_errors=True)
    here = Path.cwd()
    for above in folder.absolute().parents:
        if not above.is_relative_to(here) or above == here:
            break
        try:
            above.rmdir()
        except OSError:  # there is something else in it
            break
    return True
