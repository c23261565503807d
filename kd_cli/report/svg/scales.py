"""Axes: round numbers to mark, their labels, and the place of a value."""

from __future__ import annotations

import math
from collections.abc import Callable

Scale = Callable[[float], float]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover low to high: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        high = low + (abs(low) or 1.0) * 0.1
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") + 0.0 for i in range(first, last + 1)]  # + 0.0: no -0


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers inside low to high for a logarithmic axis: powers of ten, with 2 and 5 between them if few."""
    span = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    many = [m * 10.0**e for e in span for m in (1, 2, 5)]
    inside = [v for v in many if low * 0.999 <= v <= high * 1.001]
    if len(inside) > 7:
        inside = [v for v in inside if math.log10(v) == round(math.log10(v))]
    return [float(f"{v:.12g}") for v in inside]


def number(value: float) -> str:
    """A tick's label."""
    if value and (abs(value) >= 1e6 or abs(value) < 1e-4):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:,.10g}"


def scale(low: float, high: float, start: float, end: float, *, log: bool = False) -> Scale:
    """A function from values between low and high to places between start and end."""
    if log:
        inner = scale(math.log(low), math.log(high), start, end)
        return lambda value: inner(math.log(max(value, low * 1e-3)))
    if high <= low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)
