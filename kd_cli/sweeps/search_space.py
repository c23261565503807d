"""What a search varies, from the words of Hydra's override grammar."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep

from kd_cli.errors import ConfigError


@dataclass(frozen=True)
class Interval:
    """Numbers from `low` to `high`, both included; whole ones in steps of `step`."""

    low: float
    high: float
    log: bool = False
    step: int | None = None  # None for real numbers


@dataclass(frozen=True)
class Choices:
    """Values as words of the command line."""

    words: tuple[str, ...]


@dataclass
class Space:
    """The keys that are searched, the overrides that stay, and the seeds that each trial is trained with."""

    searched: dict[str, Interval | Choices] = field(default_factory=dict)
    fixed: list[str] = field(default_factory=list)
    seeds: list[str] = field(default_factory=list)  # overrides, one for each job of a trial

    @classmethod
    def of(cls, overrides: Sequence[Override]) -> Space:
        """The space of the overrides; a later one replaces an earlier one of its key. Raises ConfigError."""
        space = cls()
        for override in {override.get_key_element(): override for override in overrides}.values():
            key = override.get_key_element()
            if not override.is_sweep_override():
                space.fixed.append(f"{key}={override.get_value_element_as_str()}")
            elif key == "seed":
                if not override.is_discrete_sweep():
                    raise ConfigError(
                        "a search trains every trial with each seed, and seed is an interval", hint="'seed=range(3)'"
                    )
                space.seeds = [f"seed={word}" for word in override.sweep_string_iterator()]
            else:
                space.searched[key] = searched(key, override)
        if not space.searched:
            raise ConfigError(
                "there is nothing to search: no key has several values",
                hint="'T=tag(log,interval(1,20))' searches an interval, method=dkd,dist some values",
            )
        return space

    def jobs(self, words: dict[str, str]) -> list[list[str]]:
        """The overrides of a trial's jobs, one for each seed, for the value of each searched key."""
        own = [*self.fixed, *(f"{key}={word}" for key, word in words.items())]
        return [[*own, seed] for seed in self.seeds] or [own]


def searched(key: str, override: Override) -> Interval | Choices:
    """The values of one key. Raises ConfigError."""
    sweep, log = override.value(), "log" in getattr(override.value(), "tags", ())
    if isinstance(sweep, IntervalSweep):
        assert sweep.start is not None
        assert sweep.end is not None
        whole = isinstance(sweep.start, int) and isinstance(sweep.end, int)
        if not sweep.start < sweep.end or (log and sweep.start <= 0):
            wanted = "from above 0 up" if log else "from a number to a larger one"
            raise ConfigError(f"{key} is the interval from {sweep.start:g} to {sweep.end:g}; it must go {wanted}")
        return Interval(sweep.start, sweep.end, log, 1 if whole else None)
    if isinstance(sweep, RangeSweep):
        numbers = list(sweep.range())
        if len(numbers) > 1 and all(isinstance(number, int) for number in numbers):
            numbers.sort()
            step = int(numbers[1] - numbers[0])
            if not (log and (step > 1 or numbers[0] < 1)):
                return Interval(numbers[0], numbers[-1], log, step)
    words = tuple(override.sweep_string_iterator())
    if log:
        raise ConfigError(
            f"{key} has single values, which have no logarithmic scale", hint=f"'{key}=tag(log,interval(1,20))'"
        )
    return Choices(words)
