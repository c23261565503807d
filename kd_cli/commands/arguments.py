"""The arguments of `kd-run`: flags of Hydra, and overrides of the configuration."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

from kd_cli.config.options import conf_dir

MULTIRUN = {"-m", "--multirun"}
TAKES_A_VALUE = {
    *("--cfg", "-c", "--config-dir", "-cd", "--config-path", "-cp", "--config-name", "-cn", "--package", "-p"),
    "--experimental-rerun",
}


def split_arguments(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the flags, with their values, and the overrides; people write them in any order."""
    flags: list[str] = []
    overrides: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        flags.append(argument)
        if argument in TAKES_A_VALUE:
            flags += itertools.islice(arguments, 1)
    return flags, overrides


def conf_dirs(argv: Sequence[str]) -> list[Path]:
    """Return the packaged configuration's folder and the user's own `--config-dir`."""
    folders = [conf_dir()]
    for i, argument in enumerate(argv):
        flag, _, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            folder = Path(value or " ".join(argv[i + 1 : i + 2]))
            if folder.is_dir():
                folders.append(folder.absolute())
    return folders
