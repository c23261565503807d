"""Checks of the arguments that the model builders share."""

from __future__ import annotations

from collections.abc import Sequence

from kd_cli.errors import ConfigError
from kd_cli.numeric import is_number, is_whole


def share(key: str, value: float) -> float:
    if not is_number(value) or not 0 <= value < 1:
        raise ConfigError(f"{key} is {value!r}; it must be a number, at least 0 and below 1")
    return float(value)


def sizes(key: str, values: Sequence[int]) -> list[int]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ConfigError(
            f"{key} is {values!r}; it must be a list of whole numbers", hint=f"for example {key}=[300,100]"
        )
    for value in values:
        if not is_whole(value) or value < 1:
            raise ConfigError(f"{key} has {value!r}; it must be a whole number, 1 or more")
    return list(values)


def check_sizes(input_shape: tuple[int, ...], num_classes: int) -> None:
    sizes("input_shape", input_shape)
    sizes("num_classes", [num_classes])


def by(shape: Sequence[int]) -> str:
    """A shape in words: 64x8x8."""
    return "x".join(str(size) for size in shape)
