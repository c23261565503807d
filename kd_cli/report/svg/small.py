"""The small charts of a run's page, and the legend of any chart."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from kd_cli.report.svg.marks import (
    WIDTH,
    box,
    circle,
    drawing,
    element,
    escape,
    line_class,
    path,
    text_at,
    text_width,
    tooltip,
    vertical_name,
)
from kd_cli.report.svg.scales import scale

CLASS_NAME = 72.0  # the room for a class's name beside its bars, at most


def reliability_diagram(
    roles: Sequence[tuple[str, str, Sequence[Mapping[str, Any]]]], *, title: str, width: int = 420
) -> Markup:
    """Accuracy against confidence for (name, colour, bins); a mark's area is its share of the examples.

    Bins hold count, confidence and accuracy, the last two None where the count is 0.
    """
    left, right, top = 60, width - 22, 14
    floor = top + right - left
    place_x, place_y = scale(0, 1, left, right), scale(0, 1, floor, top)
    out = []
    for mark in (0, 0.2, 0.4, 0.6, 0.8, 1):
        out.append(path("grid", f"M{left} {place_y(mark):.1f}H{right}"))
        out.append(text_at(left - 8, place_y(mark) + 4, f"{mark:.0%}", "end"))
        out.append(text_at(place_x(mark), floor + 18, f"{mark:.0%}"))
    out.append(path("ideal", f"M{left} {floor}L{right} {top}"))
    out += [text_at((left + right) / 2, floor + 38, "confidence"), vertical_name((top + floor) / 2, "accuracy")]
    for name, colour, bins in roles:
        full = [b for b in bins if b["count"]]
        total = sum(b["count"] for b in full)
        spots = [(place_x(b["confidence"]), place_y(b["accuracy"]), b) for b in full]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in spots)
        marks = [element("polyline", class_=line_class("thin"), points=joined)]
        for x, y, b in spots:
            tip = f"{name}: {b['count']:,} examples, confidence {b['confidence']:.1%}, accuracy {b['accuracy']:.1%}"
            marks.append(circle("dot", x, y, 3 + 9 * math.sqrt(b["count"] / total), tooltip(tip)))
        out.append(element("g", "".join(marks), class_=colour))
    return drawing(out, width, floor + 44, title)


def distributions(
    rows: Sequence[tuple[str, float | None, float | None, bool]], *, title: str, width: int = 168
) -> Markup:
    """Paired bars of (class, teacher's probability, student's, whether it is the label); full width is 1."""
    widest = max((text_width(name, bold=true) for name, _, _, true in rows), default=8.0)
    left, tall = 8 + min(widest, CLASS_NAME), 17
    out = [path("axis", f"M{left:.1f} 0V{tall * len(rows)}")]
    for i, (name, teacher, student, true) in enumerate(rows):
        y = i * tall
        out.append(_class_name(left - 5, y + 12.5, name, true))
        known = [(role, p) for role, p in (("teacher", teacher), ("student", student)) if p is not None]
        height = 12 / max(len(known), 1)
        for k, (role, p) in enumerate(known):
            out.append(_probability(role, p, name, left, y + 2.5 + k * height, width - 2 - left, height))
    return drawing(out, width, tall * len(rows) + 2, title)


# A page has some fifty such charts of the same classes, and a sweep a thousand such pages with the same teacher; and
# most probabilities are next to 0: elements that were written once are kept.


@functools.lru_cache(4096)
def _class_name(x: float, y: float, name: str, true: bool) -> str:
    return text_at(x, y, name, "end", kind="strong" if true else "name", room=CLASS_NAME)


@functools.lru_cache(1 << 14)
def _probability(role: str, p: float, name: str, x: float, y: float, most: float, height: float) -> str:
    return box(f"bar {role}", x, y, max(p * most, 0.5), height, tooltip(f"{name}: {role} {p:.2%}"))


def parts(shares: Sequence[tuple[str, int, str]], *, title: str, width: int = WIDTH) -> Markup:
    """One bar split into (name, count, colour)."""
    total = sum(count for _, count, _ in shares) or 1
    out, x = [], 0.0
    for name, count, colour in shares:
        long = width * count / total
        tip = tooltip(f"{name}: {count:,} ({count / total:.1%})")
        out.append(box(f"bar {colour}", x, 0, long - 1.5, 26, tip))
        x += long
    return drawing(out, width, 26, title, kind="wide")


def legend(entries: Sequence[tuple[str, str, str]]) -> Markup:
    """The legend of a chart, a list that wraps: (name, colour, a line's style, or block)."""
    items = []
    for name, colour, style in entries:
        mark = box("bar", 6, 1, 14, 10) if style == "block" else path(line_class(style), "M2 6H24")
        mark += circle("dot", 13, 6, 4) if style == "line" else ""
        icon = element("svg", mark, viewBox="0 0 26 12", aria_hidden="true")
        items.append(element("li", icon + escape(name), class_=colour))
    return Markup(element("ul", "".join(items), class_="key"))
