"""Heat maps: a value for each pair of names."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kd_cli.report.svg.marks import WIDTH, box, drawing, element, text_at, text_width, tooltip, vertical_name


@dataclass(frozen=True)
class HeatCell:
    """A value, the text in its cell, and what hovering shows."""

    value: float
    text: str
    title: str


def heat_map(
    cells: Mapping[tuple[int, int], HeatCell],
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    title: str,
    x_label: str,
    y_label: str,
    width: int = WIDTH,
    chosen: tuple[int, int] | None = None,
) -> Markup:
    """Cells by (column, row), stronger in colour for larger values; the chosen one is framed."""
    left, top = min(42 + max(map(text_width, rows), default=0.0), width * 0.35), 4
    step = (width - left - 6) / max(len(columns), 1)
    tall = 40 if len(rows) <= 8 else 28
    floor = top + tall * len(rows)
    low = min((cell.value for cell in cells.values()), default=0.0)
    high = max((cell.value for cell in cells.values()), default=1.0)
    out = []
    for (i, j), cell in cells.items():
        share = (cell.value - low) / (high - low) if high > low else 0.0
        out.append(_cell(cell, share, left + i * step, top + j * tall, step, tall))
    if chosen is not None:
        x, y = left + chosen[0] * step, top + chosen[1] * tall
        out.append(box("chosen", x + 1.5, y + 1.5, step - 3, tall - 3, rx="4"))
    out += _column_names(columns, left, step, floor + 17)
    for j, name in enumerate(rows):
        out.append(text_at(left - 8, top + (j + 0.5) * tall + 4, name, "end", kind="name", room=left - 30))
    out.append(text_at(left + step * len(columns) / 2, floor + 38, x_label))
    out.append(vertical_name((top + floor) / 2, y_label))
    return drawing(out, width, floor + 44, title, kind="chart" if width >= WIDTH else "")


@functools.lru_cache(4096)  # most cells of a sweep's pages are the same few
def _cell(cell: HeatCell, share: float, x: float, y: float, width: float, height: float) -> str:
    fill = f"fill:color-mix(in oklab, var(--hot) {100 * share:.0f}%, var(--cold))"
    out = tooltip(cell.title) + box("cell", x, y, width, height, style=fill, rx="4")
    if text_width(cell.text) < width:
        ink = f"fill:var(--on-{'hot' if share > 0.5 else 'cold'})"
        out += text_at(x + width / 2, y + height / 2 + 4, cell.text, style=ink)
    return element("g", out)


def _column_names(columns: Sequence[str], left: float, step: float, y: float) -> list[str]:
    """Short names (numbers) that are too many are shown now and then; long ones are shortened."""
    short = max(map(len, columns), default=0) <= 6
    every = max(math.ceil((max(map(text_width, columns), default=0.0) + 4) / step), 1) if short else 1
    return [
        text_at(left + (i + 0.5) * step, y, name, kind="name", room=max(every * step - 2, 8))
        for i, name in enumerate(columns)
        if i % every == 0
    ]
