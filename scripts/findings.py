"""What sections of docs/RESULTS.md are made of: a table, a sentence, figures; numbers in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kd_cli.report.render import TEMPLATES
from kd_cli.report.svg.lines import Series, line_chart
from kd_cli.report.words import plus_minus
from kd_cli.statistics import Stat

Rows = list[list[str]]


@dataclass(frozen=True)
class Finding:
    """The results of an experiment: a table with its heads, a sentence made of the numbers, figures by name."""

    table: Rows
    sentence: str = ""
    figures: tuple[tuple[str, str], ...] = ()


def said(value: Stat | None, form: str = ",.1f") -> str:
    return plus_minus(value, form) if value is not None else "-"


def count(value: Stat | None) -> str:
    return str(value.n) if value is not None else "0"


def alone(chart: object) -> str:
    """A chart of a page as a file of its own, with its colours and a background."""
    css = (TEMPLATES / "charts.css").read_text()
    head, _, rest = str(chart).partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{css} svg {{ background:var(--page); }}</style>{rest}\n'


def figure(series: Sequence[Series], *, log_x: bool = True, **words: Any) -> str:
    """A line chart as a file of its own: with its colours, a background, and the lines' names below."""
    chart = str(line_chart(series, log_x=log_x, width=1000, **words))
    css = (TEMPLATES / "charts.css").read_text()
    style = f"<style>{css} svg {{ background:var(--page); }}</style>"
    apart = min(220, 930 // len(series))
    names = "".join(
        f'<text x="{60 + apart * k}" y="380" style="fill:var(--{one.colour})">&#9679; {one.name}</text>'
        for k, one in enumerate(series)
    )
    head, _, rest = chart.replace('viewBox="0 0 1000 340"', 'viewBox="0 0 1000 392"').partition(">")
    return f'{head} xmlns="http://www.w3.org/2000/svg">{style}{rest.removesuffix("</svg>")}{names}</svg>\n'
