"""Charts as SVG text: numbers in, a string out. Colours are the page's, by the classes of `CSS`."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

WIDE, NARROW = 1000, 380  # every chart is drawn at both widths; the page shows the one that can be read
_Place = Callable[[float], float]
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
.faint{--c:color-mix(in oklab, var(--soft) 45%, var(--card))}
svg { display:block; width:100%; height:auto; font:12.5px system-ui, sans-serif; }
svg text { fill:var(--soft); } svg .strong { fill:var(--ink); font-weight:600; } svg .name { fill:var(--ink); }
.grid { stroke:var(--grid); } .axis { stroke:var(--soft); } .ideal { stroke:var(--soft); stroke-dasharray:2 4; }
.line { fill:none; stroke:var(--c); stroke-width:2; stroke-linejoin:round; stroke-linecap:round; }
.thin { stroke-width:1.2; } .dashed { stroke-dasharray:6 4; } .dotted { stroke-dasharray:1 5; }
.area { fill:var(--c); opacity:.13; } .bar { fill:var(--c); } .whisker { fill:none; stroke:var(--c); stroke-width:1.5; }
.dot { fill:var(--c); stroke:var(--card); stroke-width:1.5; }
.ring { fill:var(--card); stroke:var(--c); stroke-width:2; } .touch { fill:transparent; }
.cell { stroke:var(--card); stroke-width:2; }
.chosen { fill:none; stroke:var(--c1); stroke-width:3; }
.key { display:flex; flex-wrap:wrap; gap:.2rem 1.1rem; margin:0 0 .5rem; padding:0; list-style:none; }
.key { font-size:.85rem; }
.key li { display:flex; align-items:center; gap:.4rem; } .key svg { width:26px; height:12px; flex:none; }
.wide { display:block } .narrow { display:none }
@media (max-width:720px) { .wide { display:none } .narrow { display:block } .narrow svg { max-width:560px !important } }
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
    """Points to join. Style: line, dashed, thin, or level: a baseline with a band, as wide as the chart if constant."""

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
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
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
) -> str:
    """Lines with error bars of one standard deviation. Logarithmic axes need values above 0."""
    points = [p for s in series for p in s.points]
    if not points:
        return ""
    left, right, top, floor = 54, width - 14, 12, height - 44
    x_low, x_high = min(p.x for p in points), max(p.x for p in points)
    y_low, y_high, y_marks = _y_axis(points, log=log_y)
    place_x = _scale(x_low, x_high, left + 16, right - 16, log=log_x)
    place_y = _scale(y_low, y_high, floor, top, log=log_y)
    x_marks = x_ticks or (log_ticks(x_low, x_high) if log_x and x_high > x_low else ticks(x_low, x_high, width // 100))
    out = []
    for mark in y_marks:
        y = place_y(mark)
        out.append(f'<path class="grid" d="M{left} {y:.1f}H{right}"/>')
        out.append(_text(left - 8, y + 4, number(mark) + unit, "end"))
    free = -math.inf
    for mark in sorted(x_marks):
        x, name = place_x(mark), number(mark)
        if not left <= x <= right:
            continue
        out.append(f'<path class="axis" d="M{x:.1f} {floor}v5"/>')
        if x - 3.6 * len(name) > free:  # a label that would run into the one before it is left out
            out.append(_text(x, floor + 19, name))
            free = x + 3.6 * len(name) + 4
    out.append(f'<path class="axis" d="M{left} {floor}H{right}"/>')
    out.append(_text((left + right) / 2, height - 6, x_label))
    out.append(_axis_name((top + floor) / 2, y_label))
    barred = [s for s in series if s.style != "level" and any(p.std for p in s.points)]
    places = sorted({place_x(p.x) for s in barred for p in s.points})
    gap = min((b - a for a, b in itertools.pairwise(places)), default=math.inf)
    apart = min(4.0, 0.6 * gap / max(len(barred), 1))  # side by side, so that error bars do not hide each other
    behind = ("level", "thin")
    for s in sorted(series, key=lambda s: behind.index(s.style) if s.style in behind else len(behind)):
        dodge = (barred.index(s) - (len(barred) - 1) / 2) * apart if s in barred else 0.0
        out.append(_drawn(s, place_x, place_y, dodge, (left, right)))
    return _svg(out, width, height, title)


def _y_axis(points: Sequence[Point], *, log: bool) -> tuple[float, float, list[float]]:
    """The ends of the axis and its marks; error bars that reach below 0 are cut there when no value does."""
    if log:
        low, high = min(p.y for p in points) / 1.1, max(p.y for p in points) * 1.1
        marks = log_ticks(low, high) if high / low > 4 else ticks(low, high)
        return low, high, [mark for mark in marks if low <= mark <= high]
    low, high = min(p.y - (p.std or 0) for p in points), max(p.y + (p.std or 0) for p in points)
    air = 0.03 * (high - low)  # no line lies on the frame
    low, high = (max(low - air, 0.0) if min(p.y for p in points) >= 0 else low - air), high + air
    marks = ticks(low, high)
    return marks[0], marks[-1], marks


def _drawn(s: Series, place_x: _Place, place_y: _Place, dodge: float, span: tuple[float, float]) -> str:
    points = sorted(s.points, key=lambda p: p.x)
    spots = [(place_x(p.x) + dodge, place_y(p.y), p) for p in points]
    out = [f'<g class="{s.colour}">']
    if s.style == "level":
        if len({(p.y, p.std) for p in points}) == 1:
            spots = [(end, place_y(points[0].y), points[0]) for end in span]
        if any(p.std for p in points):
            upper = [f"{x:.1f},{place_y(p.y + (p.std or 0)):.1f}" for x, _, p in spots]
            lower = [f"{x:.1f},{place_y(max(p.y - (p.std or 0), 0)):.1f}" for x, _, p in reversed(spots)]
            out.append(f'<polygon class="area" points="{" ".join(upper + lower)}"/>')
    tip = _tip(points[0].title or s.name if s.style == "level" else s.name)
    if len(spots) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in spots)
        out.append(f'<polyline class="{_line(s.style)}" points="{path}">{tip}</polyline>')
    if s.marks and s.style != "level":
        kind, r = ("ring", 3.5) if s.style == "dashed" else ("dot", 4.5)
        for x, y, p in spots:
            if p.std:
                high, low = place_y(p.y + p.std), place_y(max(p.y - p.std, 0) if p.y >= 0 else p.y - p.std)
                ends = "".join(f"M{x - 4:.1f} {end:.1f}h8" for end in (low, high))
                out.append(f'<path class="whisker" d="M{x:.1f} {low:.1f}V{high:.1f}{ends}"/>')
            out.append(_circle(kind, x, y, r) + _circle("touch", x, y, 11, _tip(p.title or s.name)))
    elif len(spots) == 1:
        out.append(_circle("dot", spots[0][0], spots[0][1], 4, tip))
    return "".join(out) + "</g>"


def row_chart(
    rows: Sequence[Row], *, title: str, x_label: str, width: int = WIDE, unit: str = "", levels: Sequence[Row] = ()
) -> str:
    """A dot and its error bar in each row: for values with names. Levels are drawn across all rows."""
    everything = [*rows, *levels]
    if not everything:
        return ""
    above = width < 500  # no room beside the rows: names go above them
    letter = 7.4  # of a bold name
    left = 12.0 if above else min(24 + letter * max((len(row.name) for row in rows), default=0), width * 0.45)
    right, top, tall = width - 16, 10, 40 if above else 28
    floor = top + tall * len(rows)
    low, high = (f(row.value + sign * (row.std or 0) for row in everything) for f, sign in ((min, -1), (max, 1)))
    if min(row.value for row in everything) >= 0:
        low = max(low, 0.0)
    marks = ticks(low, high, max(3, width // 130))
    place = _scale(marks[0], marks[-1], left + 12, right - 12)
    out = []
    for mark in marks:
        x = place(mark)
        out.append(f'<path class="grid" d="M{x:.1f} {top}V{floor}"/>' + _text(x, floor + 18, number(mark) + unit))
    out.append(_text((left + right) / 2, floor + 38, x_label))

    def ends(row: Row) -> tuple[float, float]:
        return place(max(row.value - (row.std or 0), marks[0])), place(row.value + (row.std or 0))

    for row in levels:
        start, end = ends(row)
        out.append(f'<g class="{row.colour}">{_box("area", start, top, end - start, floor - top)}')
        tip = _tip(row.title or row.name)
        out.append(f'<path class="{_line("level")}" d="M{place(row.value):.1f} {top}V{floor}">{tip}</path></g>')
    for i, row in enumerate(rows):
        y = top + tall * (i + 0.5) + (8 if above else 0)
        kind = "strong" if row.chosen else "name"
        if above:
            out.append(_text(left, y - 12, row.name, "start", kind=kind, most=int((width - left) / letter)))
        else:
            out.append(_text(left - 6, y + 4, row.name, "end", kind=kind, most=int((left - 16) / letter)))
        start, end = ends(row)
        out.append(f'<g class="{row.colour}">')
        if row.std:
            caps = "".join(f"M{x:.1f} {y - 4}v8" for x in (start, end))
            out.append(f'<path class="whisker" d="M{start:.1f} {y}H{end:.1f}{caps}"/>')
        out.append(_circle("dot", place(row.value), y, 5.5, _tip(row.title or row.name)) + "</g>")
    return _svg(out, width, floor + 44, title)


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
    """Cells (column, row) -> (value, text, hover), stronger in colour for larger values; the chosen one is framed."""
    left, top = min(42 + 6.6 * max(map(len, rows), default=0), width * 0.35), 4
    step = (width - left - 6) / max(len(columns), 1)
    tall = 40 if len(rows) <= 8 else 28
    floor = top + tall * len(rows)
    values = [value for value, _, _ in cells.values()]
    low, high = min(values, default=0), max(values, default=1)
    out = []
    for (i, j), (value, text, tip) in cells.items():
        share = (value - low) / (high - low) if high > low else 0.0
        x, y = left + i * step, top + j * tall
        fill = f' style="fill:color-mix(in oklab, var(--hot) {100 * share:.0f}%, var(--cold))" rx="4"'
        out.append(f"<g>{_tip(tip)}{_box('cell', x, y, step, tall, more=fill)}")
        if 6.6 * len(text) < step:
            ink = f' style="fill:var(--on-{"hot" if share > 0.5 else "cold"})"'
            out.append(_text(x + step / 2, y + tall / 2 + 4, text, more=ink))
        out.append("</g>")
    if chosen is not None:
        x, y = left + chosen[0] * step, top + chosen[1] * tall
        out.append(_box("chosen", x + 1.5, y + 1.5, step - 3, tall - 3, more=' rx="4"'))
    longest = max(map(len, columns), default=0)
    every = max(math.ceil(7 * longest / step), 1) if longest <= 6 else 1  # numbers are left out, words are shortened
    for i, name in enumerate(columns):
        if i % every:
            continue
        out.append(_text(left + (i + 0.5) * step, floor + 17, name, kind="name", most=max(int(every * step / 6.4), 1)))
    for j, name in enumerate(rows):
        middle = top + (j + 0.5) * tall + 4
        out.append(_text(left - 8, middle, name, "end", kind="name", most=max(int((left - 30) / 6.4), 1)))
    out.append(_text(left + step * len(columns) / 2, floor + 38, x_label) + _axis_name((top + floor) / 2, y_label))
    return _svg(out, width, floor + 44, title)


def reliability_diagram(roles: Sequence[tuple[str, str, Sequence[dict]]], *, title: str, width: int = 420) -> str:
    """Accuracy against confidence for (name, colour, bins); a mark's area is its share of the examples.

    Bins hold count, confidence and accuracy, the last two None where the count is 0.
    """
    left, right, top = 54, width - 22, 14
    floor = top + right - left
    place_x, place_y = _scale(0, 1, left, right), _scale(0, 1, floor, top)
    out = []
    for mark in (0, 0.2, 0.4, 0.6, 0.8, 1):
        out.append(f'<path class="grid" d="M{left} {place_y(mark):.1f}H{right}"/>')
        out.append(_text(left - 8, place_y(mark) + 4, f"{mark:.0%}", "end"))
        out.append(_text(place_x(mark), floor + 18, f"{mark:.0%}"))
    out.append(f'<path class="ideal" d="M{left} {floor}L{right} {top}"/>')
    out.append(_text((left + right) / 2, floor + 38, "confidence") + _axis_name((top + floor) / 2, "accuracy"))
    for name, colour, bins in roles:
        full = [b for b in bins if b["count"]]
        total = sum(b["count"] for b in full)
        spots = [(place_x(b["confidence"]), place_y(b["accuracy"]), b) for b in full]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in spots)
        out.append(f'<g class="{colour}"><polyline class="{_line("thin")}" points="{path}"/>')
        for x, y, b in spots:
            tip = f"{name}: {b['count']:,} examples, confidence {b['confidence']:.1%}, accuracy {b['accuracy']:.1%}"
            out.append(_circle("dot", x, y, 3 + 9 * math.sqrt(b["count"] / total), _tip(tip)))
        out.append("</g>")
    return _svg(out, width, floor + 44, title)


def distributions(rows: Sequence[tuple[str, float | None, float | None, bool]], *, title: str, width: int = 168) -> str:
    """Paired bars (class, teacher's probability, student's, whether it is the label); full width is probability 1."""
    left, tall = 10 + 6.6 * min(max((len(name) for name, *_ in rows), default=1), 9), 17
    out = [f'<path class="axis" d="M{left:.1f} 0V{tall * len(rows)}"/>']
    for i, (name, teacher, student, true) in enumerate(rows):
        y = i * tall
        out.append(_class_name(left - 5, y + 12.5, name, true))
        there = [(role, p) for role, p in (("teacher", teacher), ("student", student)) if p is not None]
        each = 12 / max(len(there), 1)
        for k, (role, p) in enumerate(there):
            out.append(_probability(role, p, name, left, y + 2.5 + k * each, width - 2 - left, each))
    return _svg(out, width, tall * len(rows) + 2, title)


# A page has some fifty such charts of the same classes, and a sweep a thousand such pages, of one teacher; and most
# classes have no probability to speak of.


@functools.lru_cache(4096)
def _class_name(x: float, y: float, name: str, true: bool) -> str:
    return _text(x, y, name, "end", kind="strong" if true else "name", most=9)


@functools.lru_cache(1 << 14)
def _probability(role: str, p: float, name: str, x: float, y: float, most: float, height: float) -> str:
    tip = f"<title>{escape(name)}: {role} {p:.2%}</title>"
    return _box(f"bar {role}", x, y, max(p * most, 0.5), height, tip)


def parts(shares: Sequence[tuple[str, int, str]], *, title: str, width: int = WIDE) -> str:
    """One bar split into (name, count, colour)."""
    total = sum(count for _, count, _ in shares) or 1
    out, x = [], 0.0
    for name, count, colour in shares:
        long = width * count / total
        out.append(_box(f"bar {colour}", x, 0, long - 1.5, 26, _tip(f"{name}: {count:,} ({count / total:.1%})")))
        x += long
    return _svg(out, width, 26, title)


def legend(entries: Sequence[tuple[str, str, str]]) -> str:
    """The key to a chart: (name, colour, style of line, or block); a list that wraps."""
    items = []
    for name, colour, style in entries:
        mark = f'<path class="{_line(style)}" d="M2 6H24"/>' if style != "block" else _box("bar", 6, 1, 14, 10)
        mark += _circle("dot", 13, 6, 4) if style == "line" else ""
        picture = f'<svg viewBox="0 0 26 12" aria-hidden="true">{mark}</svg>'
        items.append(f'<li class="{colour}">{picture}{escape(name)}</li>')
    return f'<ul class="key">{"".join(items)}</ul>'


def _line(style: str) -> str:
    return "line" + {"level": " dashed", "dashed": " dotted", "thin": " thin"}.get(style, "")


def _scale(low: float, high: float, start: float, end: float, *, log: bool = False) -> _Place:
    if log:
        inner = _scale(math.log(low), math.log(high), start, end)
        return lambda value: inner(math.log(max(value, low * 1e-3)))
    if high <= low:
        return lambda value: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _tip(text: str) -> str:
    return f"<title>{escape(text)}</title>"


def _text(
    x: float, y: float, text: str, anchor: str = "middle", *, kind: str = "", most: int = 0, more: str = ""
) -> str:
    """Words at a place; at most so many letters, and then the whole on hovering."""
    short = text if not most or len(text) <= most else text[: max(most - 1, 1)] + "…"
    whole = _tip(text) if short != text else ""
    style = f'class="{kind}" ' if kind else ""
    return f'<text {style}x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{more}>{escape(short)}{whole}</text>'


def _circle(kind: str, x: float, y: float, r: float, tip: str = "") -> str:
    return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}">{tip}</circle>'


def _box(kind: str, x: float, y: float, width: float, height: float, tip: str = "", more: str = "") -> str:
    size = f'width="{max(width, 0):.1f}" height="{max(height, 0):.1f}"'
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" {size}{more}>{tip}</rect>'


def _axis_name(y: float, text: str) -> str:
    return _text(13, y, text, more=f' transform="rotate(-90 13 {y:.1f})"')


def _svg(parts: Sequence[str], width: float, height: float, title: str) -> str:
    size = f'viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px"'
    return f'<svg {size} role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
