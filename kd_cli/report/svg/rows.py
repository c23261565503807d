"""Row charts: a value for each name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kd_cli.report.svg.marks import (
    WIDTH,
    box,
    circle,
    drawing,
    element,
    line_class,
    path,
    text_at,
    text_width,
    tooltip,
)
from kd_cli.report.svg.scales import number, scale, ticks

ROW = 28  # the height of a row


@dataclass(frozen=True)
class Row:
    """A named value; std is the length of its error bar, title what hovering shows; a chosen name is bold."""

    name: str
    value: float
    std: float | None = None
    title: str = ""
    colour: str = "c0"
    chosen: bool = False


def row_chart(
    rows: Sequence[Row], *, title: str, x_label: str, width: int = WIDTH, levels: Sequence[Row] = ()
) -> Markup:
    """A dot with its error bar in each row; levels are baselines drawn across all rows. Empty without values."""
    everything = [*rows, *levels]
    if not everything:
        return Markup("")
    left = min(24 + max((text_width(row.name, bold=True) for row in rows), default=0.0), width * 0.45)
    right, top = width - 16, 10
    floor = top + ROW * len(rows)
    low, high = (f(row.value + sign * (row.std or 0) for row in everything) for f, sign in ((min, -1), (max, 1)))
    if min(row.value for row in everything) >= 0:
        low = max(low, 0.0)
    marks = ticks(low, high, max(3, width // 130))
    place = scale(marks[0], marks[-1], left + 12, right - 12)
    out = []
    for mark in marks:
        x = place(mark)
        out += [path("grid", f"M{x:.1f} {top}V{floor}"), text_at(x, floor + 18, number(mark))]
    out.append(text_at((left + right) / 2, floor + 38, x_label))

    def ends(row: Row) -> tuple[float, float]:
        return place(max(row.value - (row.std or 0), marks[0])), place(row.value + (row.std or 0))

    for row in levels:
        start, end = ends(row)
        line = path(line_class("level"), f"M{place(row.value):.1f} {top}V{floor}", tooltip(row.title or row.name))
        out.append(element("g", box("area", start, top, end - start, floor - top) + line, class_=row.colour))
    for i, row in enumerate(rows):
        y = top + ROW * (i + 0.5)
        out.append(text_at(left - 6, y + 4, row.name, "end", kind="strong" if row.chosen else "name", room=left - 16))
        start, end = ends(row)
        bar = f"M{start:.1f} {y}H{end:.1f}" + "".join(f"M{x:.1f} {y - 4}v8" for x in (start, end))
        dot = circle("dot", place(row.value), y, 5.5, tooltip(row.title or row.name))
        out.append(element("g", (path("whisker", bar) if row.std else "") + dot, class_=row.colour))
    return drawing(out, width, floor + 44, title, kind="chart")
