"""kd-cli: knowledge distillation from the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kd_cli.vision import repair_torchvision

if TYPE_CHECKING:
    from kd_cli.export.load import load_student as load_student

__all__ = ["load_student"]

repair_torchvision()  # before any module of the user's is imported; it imports nothing yet


def __getattr__(name: str) -> Any:  # torch is imported when it is needed, not by `kd-run --help`
    if name == "load_student":
        from kd_cli.export.load import load_student

        return load_student
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
