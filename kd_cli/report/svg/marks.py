"""SVG elements as text, and how wide text is. All text and attribute values are escaped here and nowhere else."""

from __future__ import annotations

import functools
import html
import unicodedata
from collections.abc import Iterable

from markupsafe import Markup

WIDTH = 800  # of a large chart, in its own units; charts.css scales it
FONT = 12.5  # the size of letters in these units, as in charts.css
# Widths of letters in units of the font size, those of DejaVu Sans: few system fonts are wider.
NARROW, WIDE, CAPITAL, USUAL = 0.42, 1.0, 0.79, 0.64
_WIDTHS = dict.fromkeys("iIjl.,:;'|!()[]{}\"ftr/\\- ", NARROW) | dict.fromkeys("mwMW@%…=+<>~#×±^", WIDE)
_ATTRIBUTES = {
    "class_": "class",
    "text_anchor": "text-anchor",
    "aria_label": "aria-label",
    "aria_hidden": "aria-hidden",
}

escape = functools.lru_cache(1 << 14)(html.escape)  # the same colours, classes and places come again and again


def element(name: str, content: str = "", **attributes: object) -> str:
    """An element around content that is SVG already; `class_` is written as class."""
    written = "".join(f' {_ATTRIBUTES.get(key, key)}="{escape(str(value))}"' for key, value in attributes.items())
    return f"<{name}{written}>{content}</{name}>"


def drawing(parts: Iterable[str], width: float, height: float, title: str, *, kind: str = "") -> Markup:
    """The whole chart, scaled to its place on the page; class "chart" in `kind` lets it grow and scroll."""
    limit = {"class_": kind} if kind else {"style": f"max-width:{width:g}px"}
    size = {"viewBox": f"0 0 {width:g} {height:g}", **limit}
    return Markup(element("svg", "".join(parts), **size, role="img", aria_label=title))


def tooltip(text: str) -> str:
    """What hovering over the element around it shows."""
    return element("title", escape(text))


def text_at(
    x: float,
    y: float,
    text: str,
    anchor: str = "middle",
    *,
    kind: str = "",
    room: float = 0.0,
    **more: object,
) -> str:
    """Text at a place; where it is wider than `room` it is shortened, and hovering shows all of it."""
    short = shorten(text, room, bold=kind == "strong") if room else text
    whole = tooltip(text) if short != text else ""
    style = {"class_": kind} if kind else {}
    return element("text", escape(short) + whole, **style, x=f"{x:.1f}", y=f"{y:.1f}", text_anchor=anchor, **more)


def circle(kind: str, x: float, y: float, radius: float, tip: str = "") -> str:
    return element("circle", tip, class_=kind, cx=f"{x:.1f}", cy=f"{y:.1f}", r=f"{radius:.1f}")


def box(kind: str, x: float, y: float, width: float, height: float, tip: str = "", **more: object) -> str:
    size = {"width": f"{max(width, 0):.1f}", "height": f"{max(height, 0):.1f}"}
    return element("rect", tip, class_=kind, x=f"{x:.1f}", y=f"{y:.1f}", **size, **more)


def path(kind: str, d: str, tip: str = "") -> str:
    return element("path", tip, class_=kind, d=d)


def vertical_name(y: float, text: str) -> str:
    """The name of a vertical axis, turned, at the left edge."""
    return text_at(13, y, text, transform=f"rotate(-90 13 {y:.1f})")


def line_class(style: str) -> str:
    """The CSS classes of a line: of a series, or of its mark in the legend."""
    return "line" + {"level": " dashed", "dashed": " dotted", "thin": " thin"}.get(style, "")


@functools.lru_cache(8192)
def text_width(text: str, *, bold: bool = False) -> float:
    """About how wide the text is drawn, rather too wide than too narrow."""
    return sum(map(_letter, text)) * FONT * (1.12 if bold else 1.0)


def _letter(letter: str) -> float:
    if letter in _WIDTHS:
        return _WIDTHS[letter]
    if unicodedata.east_asian_width(letter) in "WF":
        return WIDE
    return CAPITAL if letter.isupper() or not letter.isascii() else USUAL


@functools.lru_cache(8192)
def shorten(text: str, room: float, *, bold: bool = False) -> str:
    """The text, or as many of its first letters as fit into the room, at least one, with an ellipsis."""
    if text_width(text, bold=bold) <= room:
        return text
    kept = text[:-1]
    while len(kept) > 1 and text_width(kept + "…", bold=bold) > room:
        kept = kept[:-1]
    return kept + "…"
