"""Means over seeds, and what distillation was worth. Nothing of this package and no torch is imported here."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Stat(NamedTuple):
    """Mean, standard deviation (n - 1 in the denominator; None for one value) and number of values."""

    mean: float
    std: float | None
    n: int


def mean_std(values: Sequence[float]) -> Stat:
    """The Stat of the values. Raises ValueError when there are none."""
    n = len(values)
    if n == 0:
        raise ValueError("mean_std needs at least one value, got none")
    mean = math.fsum(values) / n
    if n == 1:
        return Stat(mean, None, n)
    return Stat(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)), n)


def stat(values: Iterable[float | None]) -> Stat | None:
    """The Stat of the values that are not None; None when there is no such value."""
    known = [value for value in values if value is not None]
    return mean_std(known) if known else None


def gap_closed(teacher_errors: float, alone_errors: float, student_errors: float) -> float | None:
    """Share of the gap between the student alone and the teacher that distillation closed.

    1: as good as the teacher; 0: no better than alone; negative: worse than alone; above 1: better than the teacher.
    None when the teacher is no better than the student alone, so that there is no gap.
    """
    if teacher_errors >= alone_errors:
        return None
    return (alone_errors - student_errors) / (alone_errors - teacher_errors)
