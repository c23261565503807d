"""Whose code it is. Nothing heavy is imported here."""

from __future__ import annotations

SHIPPED = ("kd_cli", "torch", "torchvision")  # packages whose code is not the user's own


def is_shipped(name: str) -> bool:
    """Whether a dotted name is of code that is not the user's own."""
    return name.split(".")[0] in SHIPPED
