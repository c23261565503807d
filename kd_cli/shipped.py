"""Whose code it is: this package's and its libraries', or the user's own. Nothing heavy is imported here."""

from __future__ import annotations

import functools
import sysconfig
from pathlib import Path

SHIPPED = ("kd_cli", "torch", "torchvision")  # packages whose code is not the user's own
INSTALLED = {"site-packages", "dist-packages"}


def is_shipped(name: str) -> bool:
    """Return whether a dotted name belongs to this package, torch or torchvision."""
    return name.split(".")[0] in SHIPPED


@functools.cache
def is_users_file(file: str) -> bool:
    """Return whether a source file is the user's own: neither Python's, nor this package's, nor installed."""
    path = Path(file)
    if not path.is_absolute() or INSTALLED & set(path.parts) or not path.is_file():  # "<frozen ...>", "<string>"
        return False
    folders = [Path(__file__).parent, *(Path(sysconfig.get_paths()[name]) for name in ("stdlib", "platstdlib"))]
    return not any(path.is_relative_to(folder) for folder in folders)


def raised_by_user(error: BaseException) -> bool:
    """Return whether the user's own code raised an error, or called what raised it.

    The innermost frame that is the user's or this package's decides; Python and installed libraries are passed over.
    """
    whose = False
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        if str(frame.f_globals.get("__name__", "")).split(".")[0] == "kd_cli":
            whose = False
        elif is_users_file(frame.f_code.co_filename):
            whose = True
        trace = trace.tb_next
    return whose
