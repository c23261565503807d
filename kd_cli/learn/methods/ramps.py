"""Numbers that change during training: weights and temperatures of methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.errors import ConfigError
from kd_cli.numeric import is_number

SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class Ramp:
    """A number that goes from `start` to `end` between two shares of the training, `begin` and `until`.

    It is constant before and after. `shape` is linear, or cosine: half a cosine, which begins and ends slowly.
    """

    start: float = 0.0
    end: float = 1.0
    begin: float = 0.0
    until: float = 1.0
    shape: str = "linear"

    def __post_init__(self) -> None:
        for name in ("start", "end"):
            value = getattr(self, name)
            if not is_number(value) or value < 0:
                raise ConfigError(f"a ramp's {name} is {value!r}; it must be a number, at least 0")
        if not (is_number(self.begin) and is_number(self.until) and 0 <= self.begin < self.until <= 1):
            raise ConfigError(
                f"a ramp goes from begin={self.begin} until={self.until}; they must be shares of the training, "
                "0 <= begin < until <= 1"
            )
        if self.shape not in SHAPES:
            raise ConfigError(f"a ramp's shape is {self.shape!r}; it must be {' or '.join(SHAPES)}")

    def __call__(self, progress: float) -> float:
        """The number after the share `progress` of all steps."""
        share = min(1.0, max(0.0, (progress - self.begin) / (self.until - self.begin)))
        if self.shape == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return (1 - share) * self.start + share * self.end


class Factors(nn.Module):
    """A factor for each of S students: numbers, which may be ramps."""

    def __init__(self, values: Sequence[float | Ramp]) -> None:
        super().__init__()
        self.values = list(values)
        self.constant = not any(isinstance(value, Ramp) for value in values)
        self.recordable = self.constant  # a ramp is evaluated in Python in every step
        self.at_start: Tensor
        self.register_buffer("at_start", torch.tensor(self.at(0.0), dtype=torch.float64), persistent=False)

    @classmethod
    def of(cls, value: Any, name: str, *, above_zero: bool = False) -> Factors:
        """The factor of one student. Raises ConfigError, with the configuration's key `name`, for no such number."""
        if not isinstance(value, Ramp) and not (is_number(value) and value >= 0):
            raise ConfigError(f"method.{name} is {value!r}; it must be a number of at least 0, or a Ramp")
        least = min(value.start, value.end) if isinstance(value, Ramp) else value
        if above_zero and not least > 0:
            raise ConfigError(f"method.{name} reaches 0; a factor on the temperature must stay above 0")
        return cls([value])

    @classmethod
    def stack(cls, factors: Sequence[Factors]) -> Factors:
        """The factors of several students."""
        return cls([value for one in factors for value in one.values])

    def at(self, progress: float) -> list[float]:
        """The factors at this share of the training."""
        return [value(progress) if isinstance(value, Ramp) else float(value) for value in self.values]

    def forward(self, progress: float) -> Tensor:
        """The factors at this share of the training, [S]."""
        return self.at_start if self.constant else self.at_start.new_tensor(self.at(progress))
