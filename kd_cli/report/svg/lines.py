"""Line charts: a value against a number, with error bars and baselines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kd_cli.report.svg.marks import (
    WIDTH,
    circle,
    drawing,
    element,
    line_class,
    path,
    text_at,
    text_width,
    tooltip,
    vertical_name,
)
from kd_cli.report.svg.scales import Scale, log_ticks, number, scale, ticks

SERIES = 8  # colours that a reader can keep apart, and so lines with a colour of their own
HEIGHT = 340


@dataclass(frozen=True)
class Point:
    """A value at x; std is the length of its error bar, title what hovering shows."""

    x: float
    y: float
    std: float | None = None
    title: str = ""


@dataclass(frozen=True)
class Series:
    """Points joined by a line. Style: line, dashed, thin, bare (no marks), or level: a baseline with a band.

    A level with the same value everywhere is drawn across the whole chart.
    """

    name: str
    points: Sequence[Point]
    colour: str = "c0"
    style: str = "line"
    marks: bool = True


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    width: int = WIDTH,
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] | None = None,
) -> Markup:
    """Lines with error bars of one standard deviation; empty without points. Logarithmic axes need values above 0."""
    points = [p for s in series for p in s.points]
    if not points:
        return Markup("")
    x_low, x_high = min(p.x for p in points), max(p.x for p in points)
    y_low, y_high, y_marks = _y_axis(points, log=log_y)
    left = max(54.0, 30 + max((text_width(number(mark)) for mark in y_marks), default=0.0))
    right, top, floor = width - 14, 12, HEIGHT - 44
    place_x = scale(x_low, x_high, left + 16, right - 16, log=log_x)
    in_y = scale(y_low, y_high, floor, top, log=log_y)

    def place_y(value: float) -> float:  # error bars end at the frame
        return min(max(in_y(value), top), floor)

    x_marks = x_ticks or (log_ticks(x_low, x_high) if log_x and x_high > x_low else ticks(x_low, x_high, width // 100))
    out = []
    for mark in y_marks:
        y = place_y(mark)
        out += [path("grid", f"M{left:.1f} {y:.1f}H{right}"), text_at(left - 8, y + 4, number(mark), "end")]
    out += _x_axis(x_marks, place_x, left, right, floor)
    out += [text_at((left + right) / 2, HEIGHT - 6, x_label), vertical_name((top + floor) / 2, y_label)]
    offsets = _offsets(series, place_x)
    behind = ("level", "thin")  # drawn first
    for s in sorted(series, key=lambda s: behind.index(s.style) if s.style in behind else len(behind)):
        out.append(_series(s, place_x, place_y, offsets.get(id(s), 0.0), (left, right)))
    return drawing(out, width, HEIGHT, title, kind="chart")


def _x_axis(marks: Sequence[float], place: Scale, left: float, right: float, floor: float) -> list[str]:
    out, free = [], -math.inf
    for mark in sorted(marks):
        x, half = place(mark), text_width(number(mark)) / 2
        if not left <= x <= right:
            continue
        out.append(path("axis", f"M{x:.1f} {floor}v5"))
        if x - half > free:  # a label that would run into the one before it is left out
            out.append(text_at(x, floor + 19, number(mark)))
            free = x + half + 4
    return [*out, path("axis", f"M{left:.1f} {floor}H{right}")]


def _y_axis(points: Sequence[Point], *, log: bool) -> tuple[float, float, list[float]]:
    """The ends of the axis and its marks. Error bars below 0 are cut off at 0 where all values are positive."""
    if log:
        low, high = min(p.y for p in points) / 1.1, max(p.y for p in points) * 1.1
        marks = log_ticks(low, high) if high / low > 4 else ticks(low, high)
        return low, high, [mark for mark in marks if low <= mark <= high]
    low, high = min(p.y - (p.std or 0) for p in points), max(p.y + (p.std or 0) for p in points)
    margin = 0.03 * (high - low)  # no line lies on the frame
    low, high = (max(low - margin, 0.0) if min(p.y for p in points) >= 0 else low - margin), high + margin
    marks = ticks(low, high)
    return marks[0], marks[-1], marks


def _offsets(series: Sequence[Series], place_x: Scale) -> dict[int, float]:
    """By how much each series with error bars is moved sideways, so that the bars do not hide each other."""
    barred = [s for s in series if s.style != "level" and any(p.std for p in s.points)]
    places = sorted({place_x(p.x) for s in barred for p in s.points})
    gap = min((b - a for a, b in itertools.pairwise(places)), default=math.inf)
    step = min(4.0, 0.6 * gap / max(len(barred), 1))
    return {id(s): (i - (len(barred) - 1) / 2) * step for i, s in enumerate(barred)}


def _series(s: Series, place_x: Scale, place_y: Scale, offset: float, span: tuple[float, float]) -> str:
    points = sorted(s.points, key=lambda p: p.x)
    spots = [(place_x(p.x) + offset, place_y(p.y), p) for p in points]
    out = []
    if s.style == "level":
        if len({(p.y, p.std) for p in points}) == 1:
            spots = [(end, place_y(points[0].y), points[0]) for end in span]
        out.append(_band(spots, place_y))
    tip = tooltip(points[0].title or s.name if s.style == "level" else s.name)
    if len(spots) > 1:
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in spots)
        out.append(element("polyline", tip, class_=line_class(s.style), points=joined))
    if s.marks and s.style != "level":
        kind, radius = ("ring", 3.5) if s.style == "dashed" else ("dot", 4.5)
        for x, y, p in spots:
            if p.std:
                high, low = place_y(p.y + p.std), place_y(max(p.y - p.std, 0) if p.y >= 0 else p.y - p.std)
                caps = "".join(f"M{x - 4:.1f} {end:.1f}h8" for end in (low, high))
                out.append(path("whisker", f"M{x:.1f} {low:.1f}V{high:.1f}{caps}"))
            out += [circle(kind, x, y, radius), circle("touch", x, y, 11, tooltip(p.title or s.name))]
    elif len(spots) == 1:
        out.append(circle("dot", spots[0][0], spots[0][1], 4, tip))
    return element("g", "".join(out), class_=s.colour)


def _band(spots: Sequence[tuple[float, float, Point]], place_y: Scale) -> str:
    """The band of one standard deviation around a baseline."""
    if not any(p.std for _, _, p in spots):
        return ""
    upper = [f"{x:.1f},{place_y(p.y + (p.std or 0)):.1f}" for x, _, p in spots]
    lower = [f"{x:.1f},{place_y(max(p.y - (p.std or 0), 0)):.1f}" for x, _, p in reversed(spots)]
    return element("polygon", class_="area", points=" ".join(upper + lower))
