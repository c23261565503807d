"""Charts: well-formed, to scale, escaped, with round numbers on their axes."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from kd_cli.report.svg.heat import HeatCell, heat_map
from kd_cli.report.svg.lines import Point, Series, line_chart
from kd_cli.report.svg.marks import shorten, text_width
from kd_cli.report.svg.rows import Row, row_chart
from kd_cli.report.svg.scales import log_ticks, number, ticks
from kd_cli.report.svg.small import distributions, legend, parts, reliability_diagram

NASTY = "<script>\"&'"
LABELS = {"title": NASTY, "x_label": NASTY, "y_label": NASTY}


def circles(svg: str, kind: str) -> list[tuple[float, float]]:
    """The centres of the circles of a class, in the order they are drawn."""
    found = re.findall(rf'<circle class="{kind}" cx="([\d.]+)" cy="([\d.]+)"', svg)
    return [(float(x), float(y)) for x, y in found]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((0, 10), [0, 2, 4, 6, 8, 10]),
        ((3, 97), [0, 20, 40, 60, 80, 100]),
        ((0.11, 0.29), [0.1, 0.15, 0.2, 0.25, 0.3]),
        ((-1, 1), [-1, -0.5, 0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_cover_the_values(ends: tuple[float, float], expected: list[float]) -> None:
    assert ticks(*ends) == pytest.approx(expected)


def test_one_value_still_has_an_axis() -> None:
    for value in (0.0, 5.0, 1e-9):
        marks = ticks(value, value)
        assert marks[0] <= value < marks[-1]


def test_logarithmic_ticks_are_powers_with_few_between() -> None:
    assert log_ticks(1, 20) == [1, 2, 5, 10, 20]
    assert log_ticks(1e-5, 1) == [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1]


@pytest.mark.parametrize(
    ("value", "word"), [(1000.0, "1,000"), (0.5, "0.5"), (1e30, "1e30"), (1e-5, "1e-5"), (0.0, "0")]
)
def test_numbers_are_short(value: float, word: str) -> None:
    assert number(value) == word


def test_a_logarithmic_axis_spaces_ratios_evenly() -> None:
    points = [Point(x, 1.0) for x in (1, 10, 100)]
    xs = [x for x, _ in circles(line_chart([Series("a", points)], **LABELS, log_x=True), "dot")]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)


def test_larger_values_are_higher_and_error_bars_are_one_std() -> None:
    svg = line_chart([Series("a", [Point(0, 10, 2.0), Point(1, 20, 5.0)])], **LABELS)
    (_, low), (_, high) = circles(svg, "dot")
    assert high < low
    bars = [(float(a), float(b)) for a, b in re.findall(r'class="whisker" d="M[\d.]+ ([\d.]+)V([\d.]+)', svg)]
    lengths = [bottom - top for bottom, top in bars]
    assert lengths[1] / lengths[0] == pytest.approx(2.5, rel=0.02)
    assert lengths[0] == pytest.approx((low - high) * 4 / 10, rel=0.02)


def test_a_constant_baseline_is_as_wide_as_the_chart() -> None:
    student = Series("student", [Point(1, 3), Point(2, 4)])
    level = Series("alone", [Point(1, 5, 1.0), Point(2, 5, 1.0)], "alone", "level")
    svg = line_chart([student, level], **LABELS, width=500)
    (line,) = re.findall(r'<polyline class="line dashed" points="([^"]+)"', svg)
    xs = [float(pair.split(",")[0]) for pair in line.split()]
    assert (min(xs), max(xs)) == (54, 486)


@pytest.mark.parametrize("width", [380, 1000])
def test_every_chart_is_well_formed_and_escaped(width: int) -> None:
    points = [Point(1, 2, 0.5, NASTY), Point(2, 3, None, NASTY)]
    bins = [{"count": 0, "confidence": None, "accuracy": None}, {"count": 3, "confidence": 0.9, "accuracy": 0.8}]
    drawn = [
        line_chart([Series(NASTY, points), Series(NASTY, points, style="level")], **LABELS, width=width),
        line_chart([Series(NASTY, points, style="dashed", marks=False)], **LABELS, width=width, log_y=True),
        row_chart(
            [Row(NASTY, 1.0, 0.2, NASTY, chosen=True)], levels=[Row(NASTY, 2)], title="t", x_label="x", width=width
        ),
        heat_map(
            {(0, 0): HeatCell(1.0, NASTY, NASTY)},
            columns=[NASTY],
            rows=[NASTY * 9],
            **LABELS,
            width=width,
            chosen=(0, 0),
        ),
        reliability_diagram([(NASTY, "c0", bins)], title=NASTY, width=width),
        distributions([(NASTY * 3, 0.2, 0.8, True), ("b", None, 0.2, False)], title=NASTY),
        parts([(NASTY, 3, "c0"), ("none", 0, "c1")], title=NASTY, width=width),
        legend([(NASTY, "c0", style) for style in ("line", "level", "block")]),
    ]
    for svg in drawn:
        root = ElementTree.fromstring(svg)
        assert "<script" not in svg
        numbers = [
            v for e in root.iter() for k, v in e.attrib.items() if k in ("x", "y", "cx", "cy", "r", "width", "height")
        ]
        assert all(math.isfinite(float(value)) for value in numbers)


def test_nothing_to_draw_is_nothing() -> None:
    assert line_chart([], **LABELS) == ""
    assert line_chart([Series("a", [])], **LABELS) == ""
    assert row_chart([], title="t", x_label="x") == ""


def test_bars_are_as_long_as_probabilities() -> None:
    svg = distributions([("a", 0.25, None, True), ("b", 0.75, None, False)], title="t")
    widths = [float(w) for w in re.findall(r'<rect class="bar teacher"[^>]* width="([\d.]+)"', svg)]
    assert widths[1] / widths[0] == pytest.approx(3, rel=0.01)


def test_the_strongest_cell_is_the_largest() -> None:
    cells = {(0, 0): HeatCell(1.0, "1", ""), (1, 0): HeatCell(3.0, "3", ""), (2, 0): HeatCell(2.0, "2", "")}
    svg = heat_map(cells, columns=["a", "b", "c"], rows=["r"], title="t", x_label="x", y_label="y")
    assert re.findall(r"var\(--hot\) (\d+)%", svg) == ["0", "100", "50"]


def test_long_tick_labels_make_room_for_the_name_of_the_axis() -> None:
    svg = line_chart([Series("a", [Point(0, 0), Point(1, 99_999)])], **LABELS)
    ends = [float(x) for x in re.findall(r'<text x="([\d.]+)"[^>]* text-anchor="end">[\d,]+<', svg)]
    assert len(ends) == 4
    assert all(end - text_width("150,000") > 20 for end in ends)  # the name, turned, reaches to about 19


def test_text_is_shortened_to_its_room() -> None:
    assert shorten("automobile", 200) == "automobile"
    short = shorten("Wwwwwwwwww", 60)
    assert short.endswith("…")
    assert text_width(short) <= 60
    assert shorten("abc", 0) == "a…"


def test_class_names_of_wide_letters_begin_inside_their_chart() -> None:
    svg = distributions([("MWMWMWMWMW", 0.5, 0.5, True), ("iii", 0.5, 0.5, False)], title="t")
    for x, name in re.findall(r'<text [^>]*x="([\d.]+)"[^>]*>([^<]+)<', svg):
        assert float(x) - text_width(name, bold=True) >= 0
    assert "<title>MWMWMWMWMW</title>" in svg
