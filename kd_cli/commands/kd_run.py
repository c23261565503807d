"""The `kd-run` command. Nothing heavy is imported before it is needed: `--help` and completion answer at once."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from kd_cli.commands import cores
from kd_cli.commands import help as help_page
from kd_cli.commands.preload import preload_torch
from kd_cli.errors import ConfigError, KdError, first_line
from kd_cli.nearest import did_you_mean
from kd_cli.shipped import USER, raised_by

NAMED = 20  # jobs that failed, at the end of a sweep
MULTIRUN = {"-m", "--multirun"}
TAKES_A_WORD = {
    *("--cfg", "-c", "--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p"),
    "--experimental-rerun",
}


def entry() -> None:
    """`main` as a process of its own."""
    try:
        main()
    finally:
        gc.freeze()  # else Python looks through all that torch has made before it ends, for half a second


def main() -> None:
    """Entry point of `kd-run` and `python -m kd_cli`. Exits with 1 after an error, told without a traceback."""
    argv = sys.argv[1:] = flags_first(sys.argv[1:])
    launchers = [word.partition("=")[2] for word in argv if word.startswith("hydra/launcher=")]
    cores.share(os.environ, several=bool(MULTIRUN & set(argv)) and launchers[-1:] not in ([], ["fused"], ["basic"]))
    cores.keep_memory()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come back to us, who know how to tell them
    sys.path.append(os.getcwd())  # a user's own models and methods
    try:
        if "--help" in argv or "-h" in argv:
            print(help_page.page(conf_dirs(argv)), flush=True)
            return
        try:
            _hydra(argv)
        except (Exception, SystemExit) as error:
            if swept():
                end_sweep(error)  # exits when jobs failed and the error was one of theirs
            raise
        else:
            if swept():
                end_sweep()
    except KeyboardInterrupt as interrupt:
        print(f"\n{stopped(interrupt)}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        message = explain(error, argv)
        if message is None:
            raise
        sys.exit(f"error: {message}")


def flags_first(argv: Sequence[str]) -> list[str]:
    """The words with the flags in front: Hydra takes overrides on one side of a flag only, people write both."""
    flags: list[str] = []
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        if not word.startswith("-"):
            overrides.append(word)
            continue
        flags.append(word)
        if word in TAKES_A_WORD:
            flags += itertools.islice(words, 1)
    return flags + overrides


def _hydra(argv: Sequence[str]) -> None:
    """Run what the words say, through Hydra, or go on with what was interrupted."""
    import hydra

    from kd_cli.sweeps.signals import Stop
    from kd_cli.sweeps.task import Task, resume_run, sweep_command

    Stop.listen()
    resumed = [word.partition("=")[2] for word in argv if word.startswith("resume=")]
    if resumed and not MULTIRUN & set(argv):
        if len(argv) > 1:
            raise ConfigError(
                "resume= goes on with a run as it was begun, and takes nothing beside it",
                hint=f"kd-run resume={resumed[0]}",
            )
        repeated = sweep_command(Path(resumed[0]))
        if repeated is None:
            resume_run(Path(resumed[0]))
            return
        argv = repeated
        sys.argv[1:] = repeated
    prepare(argv)
    plain = all(word in MULTIRUN for word in argv if word.startswith("-"))  # to run, not to show something
    if plain:
        preload_torch()
    mode = not plain or any("hydra" in word or word.lstrip("+").startswith("experiment") for word in argv)
    with contextlib.nullcontext() if mode else composed_once():
        hydra.main(version_base="1.3", config_path=str(help_page.conf_dir()), config_name="config")(Task())()


@contextlib.contextmanager
def composed_once() -> Iterator[None]:
    """The block in which Hydra does not compose everything to see whether `hydra.mode` is set, and then once more.

    Only a word on Hydra itself, an experiment, or somebody's own configuration can have set it.
    """
    from hydra._internal.hydra import Hydra

    look = Hydra.get_mode
    Hydra.get_mode = lambda *args, **keys: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = look  # type: ignore[method-assign]


def stopped(interrupt: KeyboardInterrupt) -> str:
    """What to tell after Ctrl-C: how far it came, and how to go on."""
    from kd_cli.sweeps.task import SweepNotes, Task

    folder = SweepNotes.folder or Task.folder
    text = f"interrupted{': ' if str(interrupt) else ''}{interrupt}"
    return text if folder is None else f"{text}\n\nhint: kd-run resume={os.path.relpath(folder)} goes on from there"


def swept() -> Path | None:
    """The directory of the sweep that this process has run, if it has."""
    from kd_cli.sweeps.task import SweepNotes

    return SweepNotes.folder if SweepNotes.folder and any(SweepNotes.folder.glob("*/.hydra")) else None


def end_sweep(error: BaseException | None = None) -> None:
    """Print the answer of a sweep and write its files; exits with 1 when a job failed.

    Returns when the error that ended the sweep is no job's own, which has been told.
    """
    from kd_cli.report.pages import write_report
    from kd_cli.sweeps.task import FAILED

    folder = swept()
    assert folder is not None
    (folder / FAILED).unlink(missing_ok=True)
    written = write_report([folder], folder)
    print(f"\n{written.table}\n\nwritten to {os.path.relpath(folder)}: sweep.csv, sweep.html")
    draw_after(folder)
    if bad := [run for run in written.runs if run.status != "completed"]:
        lines = []
        for run in bad:
            cause = (run.cause or "").rpartition(f"{run.path.name}: ")[2]
            lines.append(f"  {os.path.relpath(run.path)}: {run.status}{f', {cause}' if cause else ''}")
        more = [f"  and {len(bad) - NAMED} more"] if len(bad) > NAMED else []
        told = "\n".join([*lines[:NAMED], *more])
        failed = f"\nerror: {len(bad)} of {len(written.runs)} jobs did not complete\n{told}"
        causes = [run.cause for run in bad if run.cause]
        if error is None or isinstance(error, SystemExit) or any(_caused(error, cause) for cause in causes):
            sys.exit(failed)
        print(failed + "\n", file=sys.stderr)


def _caused(error: BaseException, cause: str) -> bool:
    """Whether a job's log ends with this error."""
    return not str(error) or first_line(error) in cause


def draw_after(folder: Path) -> None:
    """What the configuration wants drawn from a sweep's runs."""
    from kd_cli.config.build import build
    from kd_cli.sweeps.task import SweepNotes

    if SweepNotes.after is not None:
        files = build(SweepNotes.after, folder, where="after_sweep")
        print("and " + ", ".join(os.path.relpath(file) for file in files))


def prepare(argv: Sequence[str]) -> None:
    """Register with Hydra what it must know before it composes: schema, mirrored groups, launcher, resolvers."""
    from hydra.core.config_store import ConfigStore

    from kd_cli.config.schema import OWN_KEYS, Schema
    from kd_cli.sweeps.launcher import register
    from kd_cli.sweeps.names import register_resolvers

    register_resolvers()
    register()
    store = ConfigStore.instance()
    store.store(name="kd_schema", node=Schema)
    folders = conf_dirs(argv)
    available = help_page.groups(folders)
    for group, source in help_page.SHARED_OPTIONS.items():
        for name in available.get(source, {}):
            if available[group][name].parent.name == group:  # a file of its own
                continue
            node = {"defaults": [f"/{source}/{name}@_here_", "_self_"], **OWN_KEYS.get(group, {})}
            store.store(group=group, name=name, node=node)


def conf_dirs(argv: Sequence[str]) -> list[Path]:
    """The packaged configuration and the user's own `--config-dir`."""
    folders = [help_page.conf_dir()]
    for i, word in enumerate(argv):
        flag, _, value = word.partition("=")
        if flag in ("--config-dir", "-cd"):
            folder = Path(value or " ".join(argv[i + 1 : i + 2]))
            if folder.is_dir():
                folders.append(folder.absolute())
    return folders


# ---------------------------------------------------------------- errors for a person


def explain(error: BaseException, argv: Sequence[str]) -> str | None:
    """The message for a person, or None when the error is a bug and its traceback is wanted."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from kd_cli.errors import StorageError
    from kd_cli.storage.files import storage

    if isinstance(error, KdError):
        return str(error)
    if raised_by(error) == USER:
        return None
    if isinstance(error, HydraException | OmegaConfBaseException):
        return explain_hydra(error, argv)
    if not isinstance(error, OSError) and _raised_in(error, ("hydra", "omegaconf")):
        return (
            str(error) or f"Hydra does not take these words ({type(error).__name__})"
        )  # Hydra's own checks of an override raise what they like
    full = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # these come without the file's name
    if isinstance(error, OSError) and error.errno is not None and (error.filename is not None or error.errno in full):
        try:
            with storage(Path(os.fsdecode(error.filename or "the run's files"))):
                raise error
        except StorageError as told:
            return str(told)
    return None


def explain_hydra(error: BaseException, argv: Sequence[str]) -> str:
    """Hydra's message, with the nearest key or option for a mistyped one."""
    text = str(error)
    folders = conf_dirs(argv)
    if match := re.search(r"Error merging override (.*)", text):
        return f"{match[1]}: {_type_error(error) or error.__cause__ or text}"
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        hint = did_you_mean(key, help_page.key_names(folders)) or "kd-run --help lists every key"
        return str(ConfigError(f"there is no key {key!r}", hint=hint))
    if match := re.search(r"(?:Could not find|In '.*': Could not (?:find|load)) '([^']+)'", text):
        group, _, name = match[1].rpartition("/")
        names = sorted(set(re.findall(r"^\t(\S+)$", text, re.M)) | set(help_page.groups(folders).get(group, {})))
        listed = f"{group} can be {', '.join(names)}"
        close = did_you_mean(name, names)
        return str(ConfigError(f"there is no option {group}={name}", hint=f"{close} {listed}" if close else listed))
    if match := re.search(r"Key '([^']+)' (?:not in|is not in struct)", text):
        close = did_you_mean(match[1], help_page.key_names(folders))
        return str(ConfigError(f"there is no key {match[1]!r}", hint=close or "kd-run --help lists every key"))
    return text


def _raised_in(error: BaseException, packages: tuple[str, ...]) -> bool:
    """Whether the innermost frame of the traceback belongs to one of these packages."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").split(".")[0] in packages


def _type_error(error: BaseException) -> str | None:
    """OmegaConf's complaint about a value's type behind a failed override, else None."""
    from omegaconf.errors import ValidationError

    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ValidationError):
            return first_line(cause)
        cause = cause.__cause__
    return None


if __name__ == "__main__":
    main()
