"""Charts as SVG text: numbers in, a string out. Colours are the page's, by the classes of `CSS`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDE, NARROW = 760, 380  # every chart is drawn at both widths; the page shows the one that can be read
LINES = 8  # as many colours as can be told apart

CSS = """
:root { --ink:#1c2330; --soft:#5c6675; --grid:#e3e7ed; --page:#fbfcfd; --card:#fff; --edge:#d9dee6; --accent:#0067b8;
  --c0:#0067b8; --c1:#c44f00; --c2:#00795c; --c3:#a04a94; --c4:#2590c4; --c5:#7a6200; --c6:#9c2f3f; --c7:#5d5bb0;
  --teacher:#a87200; --alone:#6b7280; --cold:#f1f5fa; --hot:#0b5cad; --on-cold:#1c2330; --on-hot:#fff; }
@media (prefers-color-scheme: dark) { :root { --ink:#e7ebf2; --soft:#9ba6b6; --grid:#2c3442; --page:#10141b;
  --card:#171c25; --edge:#2c3442; --accent:#69b5ff;
  --c0:#69b5ff; --c1:#ff945c; --c2:#45cfa3; --c3:#dd9fe3; --c4:#9adcff; --c5:#d8c24c; --c6:#ff8d98; --c7:#aeacff;
  --teacher:#efb949; --alone:#a5aebb; --cold:#1d2633; --hot:#7cc0ff; --on-cold:#e7ebf2; --on-hot:#0c1420; } }
.c0{--c:var(--c0)} .c1{--c:var(--c1)} .c2{--c:var(--c2)} .c3{--c:var(--c3)} .c4{--c:var(--c4)} .c5{--c:var(--c5)}
.c6{--c:var(--c6)} .c7{--c:var(--c7)} .teacher{--c:var(--teacher)} .alone{--c:var(--alone)} .student{--c:var(--c0)}
.faint{--c:var(--edge)}
svg { display:block; width:100%; height:auto; font:12px system-ui, sans-serif; }
svg text { fill:var(--soft); } svg .strong { fill:var(--ink); font-weight:600; } svg .name { fill:var(--ink); }
.grid { stroke:var(--grid); } .axis { stroke:var(--soft); } .ideal { stroke:var(--soft); stroke-dasharray:2 4; }
.line { fill:none; stroke:var(--c); stroke-width:2; stroke-linejoin:round; stroke-linecap:round; }
.thin { stroke-width:1.2; } .dashed { stroke-dasharray:6 4; } .dotted { stroke-dasharray:1 5; }
.area { fill:var(--c); opacity:.13; } .bar { fill:var(--c); } .whisker { stroke:var(--c); stroke-width:1.5; }
.dot { fill:var(--c); stroke:var(--card); stroke-width:1.5; } .ring { fill:var(--card); stroke:var(--c); stroke-width:2; }
.touch { fill:transparent; } .cell { stroke:var(--card); stroke-width:2; } .chosen { fill:none; stroke:var(--c1); stroke-width:3; }
.key { display:flex; flex-wrap:wrap; gap:.2rem 1.1rem; margin:0 0 .5rem; padding:0; list-style:none; font-size:.85rem; }
.key li { display:flex; align-items:center; gap:.4rem; } .key svg { width:26px; height:12px; flex:none; }
.wide { display:block } .narrow { display:none }
@media (max-width:640px) { .wide { display:none } .narrow { display:block } }
"""


@dataclass(frozen=True)
class Point:
    """A value at x; std draws the error bar, title is what hovering tells."""

    x: float
    y: float
    std: float | None = None
    title: str = ""


@dataclass(frozen=True)
class Series:
    """Points to join. Style: line, dashed, thin, or level (a baseline with a band, as wide as the chart if constant)."""

    name: str
    points: Sequence[Point]
    colour: str = "c0"
    style: str = "line"
    marks: bool = True


@dataclass(frozen=True)
class Row:
    """A named value of a row chart; chosen stands out."""

    name: str
    value: float
    std: float | None = None
    title: str = ""
    colour: str = "c0"
    chosen: bool = False


def both(draw: Callable[[int], str]) -> str:
    """A chart at both widths, of which the page shows one."""
    return f'<div class="wide">{draw(WIDE)}</div><div class="narrow">{draw(NARROW)}</div>'


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover low to high: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        high = low + (abs(low) or 1.0) * 0.1
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic axis inside low to high: powers of ten with 2 and 5 between them if few."""
    span = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    many = [m * 10.0**e for e in span for m in (1, 2, 5)]
    inside = [v for v in many if low * 0.999 <= v <= high * 1.001]
    if len(inside) > 7:
        inside = [v for v in inside if math.log10(v) == round(math.log10(v))]
    return [float(f"{v:.12g}") for v in inside]


def number(value: float) -> str:
    """A tick's label."""
    if value and (abs(value) >= 1e6 or abs(value) < 1e-4):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.10g}"


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str,
    y_label: str,
    width: int = WIDE,
    height: int = 360,
    log_x: bool = False,
    log_y: bool = False,
    x_ticks: Sequence[float] | None = None,
    unit: str = "",
    y_range: tuple[float, float] | None = None,
) -> str:
    """Lines with error bars of one standard deviation. Logarithmic axes need values above 0."""
    points = [p for s in series for p in s.points]
    if not points:
        return ""
    left, right, top, bottom = 52, 14, 12, 44
    x_low, x_high = min(p.x for p in points), max(p.x for p in points)
    if log_y:
        y_low, y_high = min(p.y for p in points), max(p.y for p in points)
        y_marks = log_ticks(y_low, y_high) if y_high / y_low > 4 else ticks(y_low, y_high)
        y_low, y_high = y_low / 1.1, y_high * 1.1
        y_marks = [mark for mark in y_marks if y_low <= mark <= y_high]
    else:
        ends = y_range or (min(p.y - (p.std or 0) for p in points), max(p.y + (p.std or 0) for p in points))
        if not y_range and min(p.y for p in points) >= 0:
            ends = max(ends[0], 0.0), ends[1]
        y_marks = ticks(*ends)
        y_low, y_high = y_marks[0], y_marks[-1]
    place_x = _scale(x_low, x_high, left + 16, width - right - 16, log=log_x)
    place_y = _scale(y_low, y_high, height - bottom, top, log=log_y)
    x_marks = x_ticks or (log_ticks(x_low, x_high) if log_x and x_high > x_low else ticks(x_low, x_high, width // 110))
    out = []
    for mark in y_marks:
        y = place_y(mark)
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{number(mark)}{unit}</text>')
    free = -1e9
    for mark in sorted(x_marks):
        x, name = place_x(mark), number(mark)
        if not left <= x <= width - right:
            continue
        out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{height - bottom}" y2="{height - bottom + 5}"/>')
        if x - 3.6 * len(name) > free:  # a label that would run into the one before it is left out
            out.append(f'<text x="{x:.1f}" y="{height - bottom + 19}" text-anchor="middle">{name}</text>')
            free = x + 3.6 * len(name) + 4
    out.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{height - bottom}" y2="{height - bottom}"/>')
    out.append(f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    middle = (top + height - bottom) / 2
    out.append(
        f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">{escape(y_label)}</text>'
    )
    barred = [s for s in series if s.style != "level" and any(p.std for p in s.points)]
    for s in sorted(series, key=lambda s: ("level", "thin").index(s.style) if s.style in ("level", "thin") else 2):
        dodge = (barred.index(s) - (len(barred) - 1) / 2) * 4 if s in barred else 0.0
        out.append(_drawn(s, place_x, place_y, dodge, (left, width - right)))
    return _svg(out, width, height, title)


def _drawn(s: Series, place_x: Callable, place_y: Callable, dodge: float, span: tuple[float, float]) -> str:
    points = sorted(s.points, key=lambda p: p.x)
    spots = [(place_x(p.x) + dodge, place_y(p.y), p) for p in points]
    out = [f'<g class="{s.colour}">']
    if s.style == "level":
        if len({(p.y, p.std) for p in points}) == 1:
            p = points[0]
            spots = [(span[0], place_y(p.y), p), (span[1], place_y(p.y), p)]
        if any(p.std for p in points):
            upper = [f"{x:.1f},{place_y(p.y + (p.std or 0)):.1f}" for x, _, p in spots]
            lower = [f"{x:.1f},{place_y(max(p.y - (p.std or 0), 0)):.1f}" for x, _, p in reversed(spots)]
            out.append(f'<polygon class="area" points="{" ".join(upper + lower)}"/>')
    style = {"level": " dashed", "dashed": " dotted", "thin": " thin"}.get(s.style, "")
    told = f"<title>{escape(s.name)}</title>"
    if len(spots) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in spots)
        out.append(f'<polyline class="line{style}" points="{path}">{told}</polyline>')
    if s.marks and s.style != "level":
        shape = "ring" if s.style == "dashed" else "dot"
        for x, y, p in spots:
            tip = f"<title>{escape(p.title or s.name)}</title>"
            if p.std:
                high, low = place_y(p.y + p.std), place_y(max(p.y - p.std, 0) if p.y >= 0 else p.y - p.std)
                out.append(
                    f'<path class="whisker" fill="none" d="M{x:.1f} {low:.1f}V{high:.1f}M{x - 4:.1f} {low:.1f}h8M{x - 4:.1f} {high:.1f}h8"/>'
                )
            out.append(f'<circle class="{shape}" cx="{x:.1f}" cy="{y:.1f}" r="{3.5 if shape == "ring" else 4.5}"/>')
            out.append(f'<circle class="touch" cx="{x:.1f}" cy="{y:.1f}" r="11">{tip}</circle>')
    elif len(spots) == 1:
        x, y, _ = spots[0]
        out.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4">{told}</circle>')
    return "".join(out) + "</g>"


def row_chart(
    rows: Sequence[Row], *, title: str, x_label: str, width: int = WIDE, unit: str = "", levels: Sequence[Row] = ()
) -> str:
    """A dot and its error bar in each row: for values with names. Levels are drawn across all rows."""
    everything = [*rows, *levels]
    if not everything:
        return ""
    above = width < 500  # no room beside the rows: names go above them
    longest = max(len(row.name) for row in rows) if rows else 0
    left = 12 if above else min(20 + 6.6 * longest, width * 0.45)
    right, top, tall = 16, 10, 40 if above else 28
    height = top + tall * len(rows) + 44
    low = min(row.value - (row.std or 0) for row in everything)
    high = max(row.value + (row.std or 0) for row in everything)
    marks = ticks(max(low, 0.0) if min(row.value for row in everything) >= 0 else low, high, max(3, width // 130))
    place = _scale(marks[0], marks[-1], left + 12, width - right - 12)
    floor = top + tall * len(rows)
    out = []
    for mark in marks:
        x = place(mark)
        out.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{floor}"/>')
        out.append(f'<text x="{x:.1f}" y="{floor + 18}" text-anchor="middle">{number(mark)}{unit}</text>')
    out.append(
        f'<text x="{(left + width - right) / 2:.1f}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    for row in levels:
        x, tip = place(row.value), f"<title>{escape(row.title or row.name)}</title>"
        out.append(f'<g class="{row.colour}">')
        if row.std:
            start, end = place(max(row.value - row.std, marks[0])), place(row.value + row.std)
            out.append(
                f'<rect class="area" x="{start:.1f}" y="{top}" width="{end - start:.1f}" height="{floor - top}"/>'
            )
        out.append(f'<line class="line dashed" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{floor}">{tip}</line></g>')
    room = int((width - left if above else left - 16) / 6.4)
    for i, row in enumerate(rows):
        y = top + tall * (i + 0.5) + (8 if above else 0)
        style = "strong" if row.chosen else "name"
        name = row.name if len(row.name) <= room else row.name[: room - 1] + "…"
        words = (
            f'<text class="{style}" x="{left}" y="{y - 12}">'
            if above
            else f'<text class="{style}" x="{left - 6:.1f}" y="{y + 4}" text-anchor="end">'
        )
        out.append(f"{words}{escape(name)}<title>{escape(row.name)}</title></text>")
        x, tip = place(row.value), f"<title>{escape(row.title or row.name)}</title>"
        out.append(f'<g class="{row.colour}">')
        if row.std:
            start, end = place(max(row.value - row.std, marks[0])), place(row.value + row.std)
            out.append(
                f'<path class="whisker" d="M{start:.1f} {y}H{end:.1f}M{start:.1f} {y - 4}v8M{end:.1f} {y - 4}v8"/>'
            )
        out.append(f'<circle class="dot" cx="{x:.1f}" cy="{y}" r="5.5">{tip}</circle></g>')
    return _svg(out, width, height, title)


def heat_map(
    cells: dict[tuple[int, int], tuple[float, str, str]],
    *,
    columns: Sequence[str],
    rows: Sequence[str],
    title: str,
    x_label: str,
    y_label: str,
    width: int = WIDE,
    chosen: tuple[int, int] | None = None,
) -> str:
    """Cells (column, row) -> (value, text, hover), darker for larger values; the chosen one is framed."""
    longest = max(map(len, rows), default=0)
    left, right, top, bottom = min(40 + 6.6 * longest, width * 0.35), 6, 4, 44
    step = (width - left - right) / max(len(columns), 1)
    tall = 40 if len(rows) <= 8 else 28
    height = top + tall * len(rows) + bottom
    values = [value for value, _, _ in cells.values()]
    low, high = min(values, default=0), max(values, default=1)
    out = []
    for (i, j), (value, text, tip) in cells.items():
        share = (value - low) / (high - low) if high > low else 0.0
        x, y = left + i * step, top + j * tall
        fill = f"fill:color-mix(in oklab, var(--hot) {100 * share:.0f}%, var(--cold))"
        ink = f"fill:var(--on-{'hot' if share > 0.5 else 'cold'})"
        out.append(
            f'<g><title>{escape(tip)}</title><rect class="cell" x="{x:.1f}" y="{y}" width="{step:.1f}" height="{tall}" rx="4" style="{fill}"/>'
        )
        if 6.6 * len(text) < step:
            out.append(
                f'<text x="{x + step / 2:.1f}" y="{y + tall / 2 + 4}" text-anchor="middle" style="{ink}">{escape(text)}</text>'
            )
        out.append("</g>")
    if chosen is not None:
        x, y = left + chosen[0] * step, top + chosen[1] * tall
        out.append(
            f'<rect class="chosen" x="{x + 1.5:.1f}" y="{y + 1.5}" width="{step - 3:.1f}" height="{tall - 3}" rx="4"/>'
        )
    room = max(int(step / 6.4), 1)
    for i, name in enumerate(columns):
        short = name if len(name) <= room else name[: room - 1] + "…"
        out.append(
            f'<text class="name" x="{left + (i + 0.5) * step:.1f}" y="{height - bottom + 17}" text-anchor="middle">{escape(short)}<title>{escape(name)}</title></text>'
        )
    for j, name in enumerate(rows):
        fits = int((left - 30) / 6.4)
        short = name if len(name) <= fits else name[: fits - 1] + "…"
        out.append(
            f'<text class="name" x="{left - 8:.1f}" y="{top + (j + 0.5) * tall + 4}" text-anchor="end">{escape(short)}<title>{escape(name)}</title></text>'
        )
    middle = top + tall * len(rows) / 2
    out.append(
        f'<text x="{left + step * len(columns) / 2:.1f}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>'
    )
    out.append(
        f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">{escape(y_label)}</text>'
    )
    return _svg(out, width, height, title)


def reliability_diagram(roles: Sequence[tuple[str, str, Sequence[dict]]], *, title: str, width: int = 420) -> str:
    """Accuracy against confidence for (name, colour, bins); a mark's area is its share of the examples.

    Bins hold count, confidence and accuracy, the last two None where the count is 0.
    """
    left, right, top, bottom = 52, 14, 12, 44
    height = width - left - right + top + bottom
    place_x, place_y = _scale(0, 1, left, width - right), _scale(0, 1, height - bottom, top)
    out = []
    for mark in (0, 0.2, 0.4, 0.6, 0.8, 1):
        x, y = place_x(mark), place_y(mark)
        out.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{mark:.0%}</text>')
        out.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" text-anchor="middle">{mark:.0%}</text>')
    out.append(f'<line class="ideal" x1="{place_x(0)}" y1="{place_y(0)}" x2="{place_x(1)}" y2="{place_y(1)}"/>')
    out.append(f'<text x="{(left + width - right) / 2}" y="{height - 6}" text-anchor="middle">confidence</text>')
    middle = (top + height - bottom) / 2
    out.append(f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">accuracy</text>')
    for name, colour, bins in roles:
        full = [b for b in bins if b["count"]]
        total = sum(b["count"] for b in full)
        spots = [(place_x(b["confidence"]), place_y(b["accuracy"]), b) for b in full]
        out.append(f'<g class="{colour}">')
        if len(spots) > 1:
            out.append(f'<polyline class="line thin" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y, _ in spots)}"/>')
        for x, y, b in spots:
            tip = f"{name}: {b['count']:,} examples, confidence {b['confidence']:.1%}, accuracy {b['accuracy']:.1%}"
            out.append(
                f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{3 + 9 * math.sqrt(b["count"] / total):.1f}"><title>{escape(tip)}</title></circle>'
            )
        out.append("</g>")
    return _svg(out, width, height, title)


def distributions(rows: Sequence[tuple[str, float | None, float | None, bool]], *, title: str, width: int = 168) -> str:
    """Paired bars (class, teacher's probability, student's, whether it is the label); full width is probability 1."""
    longest = min(max((len(name) for name, *_ in rows), default=1), 9)
    left, tall = 10 + 6.6 * longest, 17
    place = _scale(0, 1, left, width - 2)
    out = [f'<line class="axis" x1="{left}" x2="{left}" y1="0" y2="{tall * len(rows)}"/>']
    for i, (name, teacher, student, true) in enumerate(rows):
        y = i * tall
        short = name if len(name) <= 9 else name[:8] + "…"
        out.append(
            f'<text class="{"strong" if true else "name"}" x="{left - 5}" y="{y + 12.5}" text-anchor="end">{escape(short)}<title>{escape(name)}</title></text>'
        )
        there = [(role, p) for role, p in (("teacher", teacher), ("student", student)) if p is not None]
        each = 12 / max(len(there), 1)
        for k, (role, p) in enumerate(there):
            tip = f"{name}: {role} {p:.2%}"
            out.append(
                f'<rect class="bar {role}" x="{left}" y="{y + 2.5 + k * each:.1f}" width="{max(place(p) - left, 0.5):.1f}" height="{each:.1f}"><title>{escape(tip)}</title></rect>'
            )
    return _svg(out, width, tall * len(rows) + 2, title)


def parts(shares: Sequence[tuple[str, int, str, str]], *, title: str, width: int = WIDE) -> str:
    """One bar split into (name, count, colour class, opacity)."""
    total = sum(count for _, count, _, _ in shares) or 1
    out, x = [], 0.0
    for name, count, colour, opacity in shares:
        long = width * count / total
        tip = f"{name}: {count:,} ({count / total:.1%})"
        out.append(
            f'<g class="{colour}"><rect class="bar" x="{x:.1f}" y="0" width="{max(long - 1.5, 0):.1f}" height="26" opacity="{opacity}"><title>{escape(tip)}</title></rect></g>'
        )
        x += long
    return _svg(out, width, 26, title)


def legend(entries: Sequence[tuple[str, str, str]]) -> str:
    """The key to a chart: (name, colour, style); a list that wraps."""
    items = []
    for name, colour, style in entries:
        dash = {"level": " dashed", "dashed": " dotted", "thin": " thin"}.get(style, "")
        if style == "block":
            mark = '<rect class="bar" x="6" y="1" width="14" height="10" rx="2"/>'
        else:
            mark = f'<line class="line{dash}" x1="2" x2="24" y1="6" y2="6"/>'
        if style == "line":
            mark += '<circle class="dot" cx="13" cy="6" r="4"/>'
        items.append(
            f'<li class="{colour}"><svg viewBox="0 0 26 12" aria-hidden="true">{mark}</svg>{escape(name)}</li>'
        )
    return f'<ul class="key">{"".join(items)}</ul>'


def _scale(low: float, high: float, start: float, end: float, *, log: bool = False) -> Callable[[float], float]:
    if log:
        inner = _scale(math.log(low), math.log(high), start, end)
        return lambda value: inner(math.log(max(value, low * 1e-3)))
    if high <= low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _svg(parts: Sequence[str], width: float, height: float, title: str) -> str:
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )
