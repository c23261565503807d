"""Whose code it is: this package's and its libraries', or the user's own. Nothing heavy is imported here."""

from __future__ import annotations

import dis
import functools
import sysconfig
from pathlib import Path

SHIPPED = ("kd_cli", "torch", "torchvision", "timm")  # packages whose code is not the user's own
INSTALLED = {"site-packages", "dist-packages"}


def is_shipped(name: str) -> bool:
    """Return whether a dotted name belongs to this package, torch, torchvision or timm."""
    return name.split(".")[0] in SHIPPED


@functools.cache
def is_users_file(file: str) -> bool:
    """Return whether a source file is the user's own: neither Python's, nor this package's, nor installed."""
    path = Path(file)
    if not path.is_absolute() or INSTALLED & set(path.parts) or not path.is_file():  # "<frozen ...>", "<string>"
        return False
    folders = [Path(__file__).parent, *(Path(sysconfig.get_paths()[name]) for name in ("stdlib", "platstdlib"))]
    return not any(path.is_relative_to(folder) for folder in folders)


USER = "the user"


def raised_by(error: BaseException) -> str:
    """Return whose code raised an error or called what raised it: USER, or the name of a module of this package.

    The innermost frame of either decides; Python's own frames and those of installed libraries are passed over.
    """
    whose = ""
    trace = error.__traceback__
    while trace is not None:
        frame = trace.tb_frame
        name = str(frame.f_globals.get("__name__", ""))
        if name.split(".")[0] == "kd_cli":
            whose = name
        elif is_users_file(frame.f_code.co_filename):
            whose = USER
        trace = trace.tb_next
    return whose


def raised_by_statement(error: BaseException) -> bool:
    """Return whether a `raise` of the user's own code raised an error, and not an operation that it called."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or not is_users_file(trace.tb_frame.f_code.co_filename):
        return False
    return trace.tb_frame.f_code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
