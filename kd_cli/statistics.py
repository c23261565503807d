"""Means over seeds, and what distillation was worth. Nothing of this package and no torch is imported here."""

from __future__ import annotations

import functools
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


class Difference(NamedTuple):
    """Mean of paired differences, half the width of its 95 % interval (None where there is none), number of pairs."""

    mean: float
    half: float | None
    n: int

    @property
    def sign(self) -> int:
        """-1 or 1 where the interval lies on one side of zero; 0 where it holds zero, or where there is none."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return -1 if self.mean < 0 else 1


def paired(differences: Sequence[float]) -> Difference | None:
    """The mean of paired differences with Student's 95 % interval; None without differences.

    There is no interval for one difference, nor where all are equal: a spread of zero among a few counts of errors is
    a coincidence, and not a certainty.
    """
    if not differences:
        return None
    mean, std, n = mean_std(differences)
    if not std:
        return Difference(mean, None, n)
    return Difference(mean, t_quantile(n - 1) * std / math.sqrt(n), n)


@functools.cache
def t_quantile(degrees: int, inside: float = 0.95) -> float:
    """The t that a Student's t variable of `degrees` degrees of freedom stays within, on both sides, this often.

    Solves the finite sums of Abramowitz and Stegun (1964), 26.7.3 and 26.7.4, for the angle arctan(t / sqrt(degrees)).
    """
    low, high = 0.0, math.pi / 2
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if _t_inside(middle, degrees) < inside else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _t_inside(angle: float, degrees: int) -> float:
    """The probability of |t| <= sqrt(degrees) tan(angle)."""
    odd = degrees % 2
    sine, cosine = math.sin(angle), math.cos(angle)
    term = total = sine * (cosine if odd else 1.0)
    for k in range(2 + odd, degrees, 2):
        term *= cosine**2 * (k - 1) / k
        total += term
    if not odd:
        return total
    return (angle + (total if degrees > 1 else 0.0)) * 2 / math.pi
