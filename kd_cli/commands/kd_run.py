"""The `kd-run` command. Nothing heavy is imported before it is needed: `--help` and completion answer at once."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_cli.commands import cores
from kd_cli.commands import help as help_page
from kd_cli.commands.arguments import MULTIRUN, conf_dirs, split_arguments
from kd_cli.commands.endings import exit_unread
from kd_cli.commands.messages import explain
from kd_cli.commands.output import allow_any_text, printable
from kd_cli.commands.preload import preload_torch
from kd_cli.config.options import conf_dir, refuse_shadowed, shared_nodes
from kd_cli.errors import ConfigError
from kd_cli.processes import Place, command_name, launched


def entry() -> None:
    """Call `main` in a process of its own."""
    try:
        main()
    finally:
        end_without_collecting()


def end_without_collecting() -> None:
    """Keep Python from looking through all that torch has made before it ends, which takes half a second.

    Not where triton is imported: triton 3.9 then prints every object that is not collected on standard error.
    """
    if "triton" in sys.modules:
        gc.unfreeze()  # see keep_imports
    else:
        gc.freeze()


def main() -> None:
    """Entry point of `kd-run` and `python -m kd_cli`. Exits with 1 after an error, and shows no traceback for it."""
    allow_any_text()
    flags, overrides = split_arguments(sys.argv[1:])
    place = launched()
    argv = sys.argv[1:] = flags + overrides  # Hydra accepts overrides on one side of a flag only
    launchers = [argument.partition("=")[2] for argument in argv if argument.startswith("hydra/launcher=")]
    cores.share(os.environ, several=bool(MULTIRUN & set(argv)) and launchers[-1:] not in ([], ["fused"], ["basic"]))
    cores.keep_memory()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come back to us, and `explain` writes the message
    sys.path.append(os.getcwd())  # a user's own models and methods
    try:
        if "--version" in argv:
            print(versions(), flush=True)
        elif "--help" in argv or "-h" in argv:
            print(help_page.page(conf_dirs(argv), overrides), flush=True)
        elif place is None:
            run(argv)
        else:
            run_as_one_of_several(place, argv)
    except KeyboardInterrupt as interrupt:
        print(f"\n{interrupted(interrupt)}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        exit_unread()
    except Exception as error:
        message = explain(error, argv)
        if message is None:
            raise
        sys.exit(f"error: {printable(message)}")


def run_as_one_of_several(place: Place, argv: Sequence[str]) -> None:
    """Run what the arguments say where torchrun has started several processes; all but the first take part in it."""
    from kd_cli.runs.several import follow, leading
    from kd_cli.sweeps.task import Task

    if not place.leads:
        sys.exit(follow(place))
    with leading(place) as Task.leader:
        run(argv)


def versions() -> str:
    """Return the versions of kd-cli and torch, which is not imported for it."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in ("kd-cli", "torch"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join(found)


def run(argv: Sequence[str]) -> None:
    """Run what the arguments say, through Hydra, and report on a sweep at its end."""
    from kd_cli.commands.end_of_sweep import end_sweep
    from kd_cli.sweeps.sweep_folder import RunFailed

    try:
        try:
            _run_hydra(argv)
        except RunFailed as failed:
            raise failed.error from None
    except (Exception, SystemExit) as error:
        end_sweep(error)  # exits when jobs failed and the error was one of theirs
        raise
    end_sweep()


def _run_hydra(argv: Sequence[str]) -> None:
    from kd_cli.sweeps.signals import Stop
    from kd_cli.sweeps.sweep_folder import resumed_arguments
    from kd_cli.sweeps.task import Task, resume_run

    Stop.listen()
    resumed = [argument.partition("=")[2] for argument in argv if argument.startswith("resume=")]
    if resumed and not MULTIRUN & set(argv):
        if len(argv) > 1:
            raise ConfigError(
                "resume= goes on with a run as it was begun, and accepts no other argument",
                hint=f"kd-run resume={resumed[0]}",
            )
        repeated = resumed_arguments(Path(resumed[0]))
        if repeated is None:
            resume_run(Path(resumed[0]))
            return
        argv = repeated
        sys.argv[1:] = repeated
    prepare(argv)
    to_run = all(argument in MULTIRUN for argument in argv if argument.startswith("-"))  # not to show something
    if to_run:
        preload_torch()
    call_hydra(Task(), may_set_mode=not to_run or any(_may_set_mode(argument) for argument in argv))


def call_hydra(task: Any, *, may_set_mode: bool) -> None:
    """Call Hydra's main function with the task, as its version wants to be called."""
    import hydra

    from kd_cli.sweeps.hydra_internals.compositions import one_composition

    base: dict[str, Any] = {}
    if hydra.__version__.startswith("1.3"):
        base["version_base"] = "1.3"
    else:  # there is one behaviour only; and our own callback needs no list of what may be executed
        warnings.filterwarnings("ignore", r"hydra\.utils\.instantiate\(\) resolved _target_='kd_cli\.", UserWarning)
    with contextlib.nullcontext() if may_set_mode else one_composition():
        hydra.main(config_path=str(conf_dir()), config_name="config", **base)(task)()


def _may_set_mode(argument: str) -> bool:
    return "hydra" in argument or argument.lstrip("+").startswith("experiment")


def interrupted(interrupt: KeyboardInterrupt) -> str:
    """Return the message after Ctrl-C: how far the run came, and how to go on."""
    from kd_cli.sweeps.sweep_folder import SweepNotes
    from kd_cli.sweeps.task import Task

    folder = SweepNotes.folder or Task.folder
    text = f"interrupted{': ' if str(interrupt) else ''}{interrupt}"
    if folder is None:
        return text
    return f"{text}\n\nhint: {command_name()} resume={os.path.relpath(folder)} goes on from there"


def prepare(argv: Sequence[str]) -> None:
    """Register with Hydra what it must know before it composes: schema, shared options, plug-ins, resolvers."""
    from kd_cli.config.schema import Schema
    from kd_cli.sweeps import launcher, searcher
    from kd_cli.sweeps.hydra_internals.registration import store_node
    from kd_cli.sweeps.names import register_resolvers

    register_resolvers()
    launcher.register()
    searcher.register()
    store_node("kd_schema", Schema)
    folders = conf_dirs(argv)
    refuse_shadowed(folders, split_arguments(argv)[1])
    for group, name, node in shared_nodes(folders):
        store_node(name, node, group)


if __name__ == "__main__":
    main()
