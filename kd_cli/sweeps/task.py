"""The task that Hydra runs: one job, or all jobs of a sweep together."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import logging.config
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kd_cli.config.read import run_config
from kd_cli.config.values import RunConfig
from kd_cli.errors import ConfigError, KdError, StorageError
from kd_cli.nearest import did_you_mean
from kd_cli.storage.run_dir import configuration_record, note_command, refuse_other_run
from kd_cli.sweeps.launcher import known_to_hydra, without_hydra
from kd_cli.sweeps.names import SWEPT, register_resolvers
from kd_cli.sweeps.signals import stopping

if TYPE_CHECKING:
    from kd_cli.runs.jobs import Job, Say
    from kd_cli.sweeps.launcher import SweepJob

log = logging.getLogger("kd_cli")

MULTIRUN, LOG = "multirun.yaml", "run.log"  # what Hydra leaves beside .hydra
FAILED = ".failed"  # of a sweep under way with fail_fast: its jobs, in whatever process, begin no more
WORDS = ".command.json"  # of a sweep: Hydra writes multirun.yaml anew at each resumption, and not in one piece


class SweepNotes(Callback):
    """Notes where a sweep writes, so that the command can report on it when it has ended, however it ended."""

    folder: Path | None = None
    command = ""  # of a sweep that is resumed, when it was begun
    after: Any = None  # the node of a function that draws from the sweep's runs

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Refuse the directory of another run before Hydra writes its own files there."""
        try:
            path = Path(str(config.hydra.run.dir))
            refuse_other_run(path)
            if not config.dry_run:
                note_command(path, command())
        except StorageError as error:
            raise SystemExit(f"error: {error}") from error  # Hydra would make a warning of an Exception

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        parsed = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
        searched = OmegaConf.select(config, "hydra.sweeper.params") or {}
        swept = [*(o.get_key_element() for o in parsed if o.is_sweep_override()), *map(str, searched)]
        os.environ[SWEPT] = ",".join(swept)
        SweepNotes.after = OmegaConf.to_container(config.after_sweep) if config.get("after_sweep") else None
        SweepNotes.command = ""
        SweepNotes.folder = None if config.dry_run else Path(str(config.hydra.sweep.dir))
        (Path(str(config.hydra.sweep.dir)) / FAILED).unlink(missing_ok=True)
        if SweepNotes.folder is not None:
            try:
                note_words(SweepNotes.folder, config)
            except StorageError as error:
                SweepNotes.folder = None
                raise SystemExit(f"error: {error}") from error  # Hydra would make a warning of an Exception

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        if config.dry_run:
            leave_nothing(Path(str(config.hydra.sweep.dir)))


class Task:
    """Trains what a composed configuration says. Returns the student's validation error, for sweepers that search."""

    folder: Path | None = None  # of the run that was last begun here

    def __reduce__(self) -> tuple[Any, ...]:
        return _task_elsewhere, ()

    def __call__(self, cfg: DictConfig) -> float | None:
        """One job in its own directory: a run, or a job of a launcher that starts them one by one."""
        hydra = HydraConfig.get()
        path = Path(hydra.runtime.output_dir)
        if hydra.mode != RunMode.MULTIRUN:
            summary = self.run(cfg, path)
            if summary is not None:
                print_run(summary, path)
            return objective(summary or {})
        failed = Path(str(hydra.sweep.dir)) / FAILED
        if cfg.fail_fast and failed.exists():
            raise KdError("not run: another job failed, and fail_fast=true")
        try:
            return objective(self.run(cfg, path, number=int(hydra.job.num)) or {})
        except Exception as error:  # told now: Hydra tells of the first failure only, at the end
            log.error("%s", failure(path, error), exc_info=None if isinstance(error, KdError) else error)
            if cfg.fail_fast:
                failed.touch()
            raise

    def run(self, cfg: DictConfig, path: Path, *, number: int | None = None) -> dict[str, Any] | None:
        """Run one configuration, a sweep's job if it has a number; its summary, None for a dry run."""
        config = checked(cfg, HydraConfig.get())
        if number is not None and cfg.device == "auto":
            config = spread(config, number)

        from kd_cli.runs.jobs import Job
        from kd_cli.runs.run_many import dry_run, run_many

        job = Job(config, path, command(), on_completed=write_missing_page)
        Task.folder = path
        if cfg.dry_run:
            told = dry_run([job])[0]
            print(told if number is None else f"{path.name}: {told}")
            leave_nothing(path)
            return None
        run_many([job], stopping=stopping)
        if job.error is not None:
            raise job.error
        return job.summary

    def read(self, job: SweepJob, config: DictConfig) -> None:
        """A sweep's job as plain values, and whether its failure stops the others; `config` is used up."""
        hydra, stops = config.hydra, bool(config.fail_fast)
        job.read = None, stops
        try:
            job.read = checked(without_hydra(config), hydra), stops
        except KdError as error:
            job.error = error

    def together(self, jobs: list[SweepJob]) -> None:
        """All jobs of a sweep, which have been read: each gets its result or its error."""
        from kd_cli.runs.jobs import Job
        from kd_cli.runs.run_many import run_many

        started = time.monotonic()
        running: dict[int, SweepJob] = {}
        todo: list[Job] = []
        fail_fast = False
        for job in jobs:
            assert job.path is not None
            config, stops = job.read
            fail_fast = fail_fast or stops
            if config is None:
                assert job.error is not None
                note(job, logging.ERROR, failure(job.path, job.error), job.error)
                job.end()
            else:
                todo.append(Job(config, job.path, command(), saying(job), write_missing_page))
                running[id(todo[-1])] = job

        def finished(job: Job) -> None:
            sweep_job = running[id(job)]
            sweep_job.error, sweep_job.result = job.error, objective(job.summary)
            if job.error is not None:
                note(sweep_job, logging.ERROR, failure(job.path, job.error), job.error)
            sweep_job.end()

        if fail_fast and (refused := [job for job in jobs if job.error is not None]):
            stopped = KdError(f"not run: {refused[0].path} failed, and fail_fast=true")
            for sweep_job in running.values():
                sweep_job.error = stopped
            return
        run_many(todo, finished=finished, fail_fast=fail_fast, stopping=stopping)
        for one in todo:  # those that fail_fast has stopped were not told
            running[id(one)].error = one.error
        log.info("%d jobs in %.1f s", len(jobs), time.monotonic() - started)

    def dry_run(self, jobs: list[SweepJob]) -> None:
        """Print what the jobs of a sweep would do."""
        from kd_cli.runs.jobs import Job
        from kd_cli.runs.run_many import dry_run

        todo = []
        for job in jobs:
            config = job.config
            with known_to_hydra(config):
                hydra, folder = config.hydra, Path(str(config.hydra.sweep.dir))
                path = folder / str(hydra.sweep.subdir)
                todo.append(Job(checked(without_hydra(config), hydra), path, command()))
        for one, line in zip(todo, dry_run(todo), strict=True):
            print(f"{one.path.name}: {line}")


def _task_elsewhere() -> Task:
    """The task in another process, which has not come through the command line."""
    register_resolvers()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return Task()


def checked(cfg: DictConfig, hydra: Any) -> RunConfig:
    """The configuration as plain values. ConfigError for what Hydra itself lets pass."""
    from kd_cli.commands.help import conf_dir, groups

    folders = [conf_dir(), *(Path(s.path) for s in hydra.runtime.config_sources if s.provider == "command-line")]
    for override in hydra.overrides.task:
        group, _, name = str(override).partition("=")
        if group in ("training", "teacher_training") and name not in (known := groups(folders).get(group, {})):
            hint = f"{group} can be {', '.join(sorted(known))}"  # an optional group, which Hydra lets be unknown
            raise ConfigError(
                f"there is no option {group}={name}", hint=" ".join(filter(None, (did_you_mean(name, known), hint)))
            )
    record = configuration_record(OmegaConf.to_container(cfg), hydra.runtime.choices)  # type: ignore[arg-type]
    data = OmegaConf.select(cfg, "transfer.data")
    if data is not None:
        cfg = copy.deepcopy(cfg)
        cfg.transfer.data = data_node(OmegaConf.to_container(cfg, resolve=True)["transfer"]["data"], folders)  # type: ignore[index,call-overload]
    return dataclasses.replace(run_config(cfg, hydra.runtime.choices), record=record)


def data_node(given: Any, folders: list[Path]) -> Any:
    """A data set named by its option, alone or with keys of its own, as the node that its YAML file holds."""
    from kd_cli.commands.help import groups

    own = {"name": given} if isinstance(given, str) else given
    if not isinstance(own, dict) or "_target_" in own:
        return own
    known = groups(folders)["dataset"]
    name = own.get("name")
    if name not in known:
        raise ConfigError(
            f"transfer.data is {name!r}, and there is no such data set",
            hint=" ".join(filter(None, (did_you_mean(str(name), known), f"it can be {', '.join(sorted(known))}"))),
        )
    node = OmegaConf.to_container(OmegaConf.load(known[name]))
    assert isinstance(node, dict)
    node.pop("val_fraction", None)
    return node | {key: value for key, value in own.items() if key != "name"}


def resume_run(path: Path) -> None:
    """Go on with a run from its last saved epoch, by the configuration that it recorded itself."""
    from kd_cli.runs.jobs import Job
    from kd_cli.runs.run_many import run_many

    if (path.absolute().parent / MULTIRUN).is_file():
        raise ConfigError(
            f"resume is {path}, a job of a sweep, whose jobs are trained together",
            hint=f"kd-run resume={os.path.relpath(path.absolute().parent)} goes on with the sweep",
        )
    if not (path / ".hydra" / "overrides.yaml").is_file():  # the last that Hydra writes before a run begins
        raise ConfigError(
            f"resume is {path}, which holds no run or sweep",
            hint="name a directory with .hydra/ in it, or a sweep's with multirun.yaml",
        )
    try:
        cfg, recorded = (OmegaConf.load(path / ".hydra" / name) for name in ("config.yaml", "hydra.yaml"))
        assert isinstance(cfg, DictConfig)
        cfg.resume = str(path)
        recorded.hydra.runtime.output_dir = str(path.absolute())
        logs = OmegaConf.to_container(recorded.hydra.job_logging, resolve=True)
    except (OSError, ValueError, AssertionError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path / '.hydra'} cannot be read: {error}", hint="start the run anew") from error
    config = checked(cfg, recorded.hydra)
    logging.config.dictConfig(logs)  # type: ignore[arg-type]
    job = Job(config, path, command(), on_completed=write_missing_page)
    Task.folder = path
    run_many([job], stopping=stopping)
    if job.error is not None:
        raise job.error
    print_run(job.summary, path)


def sweep_command(path: Path) -> list[str] | None:
    """The words of the command that began a sweep, to repeat it; None when the directory is not a sweep's."""
    from kd_cli.storage.files import read_json

    noted = path / WORDS
    if not noted.is_file() and not (path / MULTIRUN).is_file():
        return None
    try:
        if noted.is_file():
            words = [str(word) for word in read_json(noted)["words"]]
        else:
            noted = path / MULTIRUN
            words = words_of(OmegaConf.load(noted))
    except (OSError, ValueError, KeyError, TypeError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{noted} cannot be read: {error}", hint="start the sweep anew") from error
    return ["-m", *words, f"resume={path}"]


def words_of(config: Any) -> list[str]:
    """The words of the command that a sweep's configuration was composed by, but where it writes."""
    hydra = config.hydra
    folders = [s.path for s in hydra.runtime.config_sources if s.provider == "command-line"]
    words = map(str, [*hydra.overrides.hydra, *hydra.overrides.task])
    kept = [word for word in words if not word.startswith(("resume=", "hydra.mode=", "hydra.sweep.dir="))]
    return [*(word for folder in folders for word in ("--config-dir", folder)), *kept]


def note_words(folder: Path, config: DictConfig) -> None:
    """Note how a sweep was begun. StorageError when the folder is another sweep's."""
    from kd_cli.storage.files import read_json, storage, write_json

    if (folder / WORDS).exists():
        if config.resume is None:
            raise StorageError(
                f"{folder} already holds a sweep",
                hint=f"kd-run resume={folder} goes on with it; hydra.sweep.dir= names another folder",
            )
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            SweepNotes.command = str(read_json(folder / WORDS)["command"])
        return
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / WORDS, {"command": command(), "words": words_of(config)})


def print_run(summary: dict[str, Any], path: Path) -> None:
    """The table that a run ends with, and where it is."""
    from kd_cli.report.tables import run_table

    print(run_table(summary))
    print(f"\nwritten to {os.path.relpath(path)}")


def leave_nothing(folder: Path) -> None:
    """Remove what Hydra has put into a folder, the folder, and those above it, unless there is something else in them.

    A run that is in the folder stays, as does one that was there before.
    """
    made = [path for path in folder.glob("**/*") if path.is_file()]
    if any(path.parent.name != ".hydra" and path.name not in (MULTIRUN, LOG) for path in made):
        return
    shutil.rmtree(folder)
    here = Path.cwd()
    for above in folder.absolute().parents:
        if not above.is_relative_to(here) or above == here:
            break
        try:
            above.rmdir()
        except OSError:  # there is something else in it
            break


def spread(config: RunConfig, number: int) -> RunConfig:
    """Jobs of a launcher that runs several at once, each on the next of the machine's GPUs."""
    import torch

    count = torch.cuda.device_count()
    return dataclasses.replace(config, device=f"cuda:{number % count}") if count > 1 else config


def objective(summary: dict[str, Any]) -> float | None:
    """What a searching sweeper minimises: the student's validation error in the last epoch."""
    val = (summary.get("student") or {}).get("val")
    return None if val is None or val["accuracy"] is None else 1 - val["accuracy"]


def command() -> str:
    """The command that began what this process runs."""
    return SweepNotes.command or shlex.join(["kd-run", *sys.argv[1:]])


def failure(path: Path, error: Exception) -> str:
    return f"failed: {os.path.relpath(path)}: {error}"


def saying(job: SweepJob) -> Say:
    """Write to a job's log, and to the terminal unless `shown` is false."""

    def say(message: str, *, shown: bool = True) -> None:
        note(job, logging.INFO, message, shown=shown)

    return say


def write_missing_page(path: Path) -> None:
    """Write the page of a completed run, unless it is there."""
    from kd_cli.report.pages import REPORT, write_run_page

    if not (path / REPORT).exists():
        write_run_page(path)


def note(job: SweepJob, level: int, message: str, error: Exception | None = None, *, shown: bool = True) -> None:
    """Log something of a job now, on the terminal if it is to be shown, and later in the job's own log."""
    exc_info = None if error is None or isinstance(error, KdError) else (type(error), error, error.__traceback__)
    record = log.makeRecord(log.name, level, __file__, 0, message, (), exc_info)
    job.records.append(record)
    if not shown:
        return
    prefix = "" if error is not None or job.path is None else f"{job.path.name}: "
    log.handle(log.makeRecord(log.name, level, __file__, 0, prefix + message, (), exc_info))
