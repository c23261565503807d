"""Learning-rate schedules: the factor on the optimiser's learning rate at a share of the training done."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from kd_cli.errors import ConfigError


class Schedule(Protocol):
    """The factor on the optimiser's learning rate."""

    def __call__(self, progress: float) -> float:
        """`progress` in [0, 1): the share of all steps already made."""
        ...


@dataclass(frozen=True)
class _Warmup:
    warmup: float = 0.0  # the share of all steps in which the rate rises linearly from 0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"schedule.warmup is {self.warmup}; it must be at least 0 and below 1")

    def __call__(self, progress: float) -> float:
        if progress < self.warmup:
            return progress / self.warmup
        return self.after((progress - self.warmup) / (1 - self.warmup))

    def after(self, progress: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(_Warmup):
    """The same rate to the end."""

    def after(self, progress: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear(_Warmup):
    """Falls on a straight line to `final` times the rate."""

    final: float = 0.0

    def after(self, progress: float) -> float:
        return 1 - (1 - self.final) * progress


@dataclass(frozen=True)
class Cosine(_Warmup):
    """Falls on half a cosine to `final` times the rate (Loshchilov & Hutter 2017, without restarts)."""

    final: float = 0.0

    def after(self, progress: float) -> float:
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Step(_Warmup):
    """Times `factor` at each of the `milestones` (shares of the training)."""

    milestones: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1

    def after(self, progress: float) -> float:
        return self.factor ** sum(progress >= milestone for milestone in self.milestones)
