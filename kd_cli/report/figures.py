"""The charts of test results: error against a swept number, by name, and as a map of two swept keys."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kd_cli.numeric import is_number
from kd_cli.report.compare import Comparison, Setting, baselines, distinguishing, families, order
from kd_cli.report.svg.heat import HeatCell, heat_map
from kd_cli.report.svg.lines import SERIES, Point, Series, line_chart
from kd_cli.report.svg.rows import Row, row_chart
from kd_cli.report.svg.small import legend
from kd_cli.report.words import from_to, label, name_of, plus_minus, show
from kd_cli.roles import ROLE_NAMES
from kd_cli.statistics import Stat

ROWS = 40  # of a row chart; the table has all
BASELINES = (("student_alone", "alone"), ("teacher", "teacher"))  # roles and their colours

NOTHING = Markup("")
Legend = list[tuple[str, str, str]]
Lines = dict[str, list[Setting]]


@dataclass(frozen=True)
class Figure:
    """A chart with its heading, its legend and a note below it."""

    heading: str
    chart: Markup
    note: str = ""
    legend: Markup = NOTHING


def axis_of(comparison: Comparison) -> str | None:
    """The key for the horizontal axis: T if swept, else the number with the most values; None when there is none."""
    found = {key: {show(s.values[key]) for s in comparison.settings} for key in comparison.keys}
    numbers = [key for key in comparison.keys if all(is_number(s.values[key]) for s in comparison.settings)]
    if "T" in numbers:
        return "T"
    return max(numbers, key=lambda key: len(found[key]), default=None)


def is_logarithmic(values: Iterable[float]) -> bool:
    """Whether an axis with these values is to be logarithmic."""
    values = list(values)
    return bool(values) and min(values) > 0 and max(values) / min(values) >= 8


def by_validation(setting: Setting) -> float:
    """A sorting key, the best first. Test results are no key: without validation all are equal."""
    value = setting.student.get("val_accuracy")
    return -value.mean if value else 0.0


def error_figure(comparison: Comparison) -> Figure:
    """Test errors against the swept number, or by name where no number is swept."""
    axis = axis_of(comparison)
    done = [s for s in comparison.settings if s.n]
    if axis is None or len({s.values[axis] for s in done}) < 2:
        return _error_rows(comparison, done)
    return _error_lines(comparison, done, axis)


def _error_rate(stats: dict[str, Stat], measure: str = "accuracy") -> Stat | None:
    """The error rate in percent, from an accuracy."""
    value = stats.get(measure)
    return value and Stat(100 * (1 - value.mean), None if value.std is None else 100 * value.std, value.n)


def _hover(name: str, rate: Stat, stats: dict[str, Stat] | None = None) -> str:
    errors = plus_minus(stats["errors"]) + " errors, " if stats and "errors" in stats else ""
    return f"{name}: {errors}{plus_minus(rate, '.2f')} %, n = {rate.n}"


# ---------------------------------------------------------------- against a number


def _error_lines(comparison: Comparison, done: Sequence[Setting], axis: str) -> Figure:
    others = [key for key in comparison.keys if key != axis]
    naming = distinguishing(others, [setting.values for setting in done])
    lines: Lines = {}
    for setting in done:
        lines.setdefault(label({key: setting.values[key] for key in naming}), []).append(setting)
    ranked = sorted(lines, key=lambda name: min(map(by_validation, lines[name])))
    kept = {name: group for name, group in lines.items() if name in ranked[:SERIES]}
    series, key = _student_lines(kept, axis)
    for role, colour in BASELINES:
        more, entry = _baseline_lines(kept, axis, role, colour)
        series += more
        key += entry
    settings = [setting for group in kept.values() for setting in group]
    values = sorted({float(s.values[axis]) for s in settings})
    log = is_logarithmic(values)
    chart = line_chart(
        series,
        title=f"error against {axis}",
        x_label=("temperature T" if axis == "T" else axis) + (" (logarithmic)" if log else ""),
        y_label="errors, %",
        log_x=log,
        x_ticks=values if len(values) <= 24 else None,
    )
    note = _spread_note(
        {s.n for s in settings}, "Error bars and bands are ± one standard deviation over seeds", "point"
    )
    if any(s.style == "dashed" for s in series):
        note += " Filled marks: test; rings: validation."
    if len(lines) > len(kept):
        note += f" The {len(kept)} best of {len(lines)} lines by validation are drawn; the table has all."
    return Figure(f"Error against {axis}", chart, note, legend(key))


def _spread_note(ns: set[int], error_bars: str, what: str = "") -> str:
    if ns == {1}:
        seed = f"One seed for each {what}" if what else "One seed"
        return f"{seed} (n = 1): no error bars, and differences may be chance."
    return f"{error_bars}, n = {from_to(ns)}."


def _student_lines(lines: Lines, axis: str) -> tuple[list[Series], Legend]:
    """Each line's test errors and, where the lines are few, its validation errors."""
    series: list[Series] = []
    key: Legend = []
    for i, (name, group) in enumerate(lines.items()):
        for measure, kind, style in (("accuracy", "test", "line"), ("val_accuracy", "validation", "dashed")):
            if style == "dashed" and len(lines) > 3:
                continue  # twice as many lines would hide each other; the table has them
            points = []
            for setting in group:
                if rate := _error_rate(setting.student, measure):
                    tip = _hover(f"{setting.label}, {kind}", rate, setting.student if kind == "test" else None)
                    std = rate.std if kind == "test" else None
                    points.append(Point(float(setting.values[axis]), rate.mean, std, tip))
            if points:
                series.append(Series(f"{name or 'student'}, {kind}", points, f"c{i}", style))
        key.append((name or "student", f"c{i}", "line"))
    return series, key


def _baseline_lines(lines: Lines, axis: str, role: str, colour: str) -> tuple[list[Series], Legend]:
    """The distinct models of a role, each as a baseline; a student alone in the colour of the one line it is for."""
    word, kept = ROLE_NAMES[role], list(lines)
    series: list[Series] = []
    levels = _levels(lines, role, axis)
    for names, group in levels:
        points = []
        for x, stats in sorted(group.items()):
            if rate := _error_rate(stats):
                tip = _hover(f"{word} ({'; '.join(names)})" if len(levels) > 1 else word, rate, stats)
                points.append(Point(x, rate.mean, rate.std if len(levels) == 1 else None, tip))
        own = f"c{kept.index(names[0])}" if len(names) == 1 < len(levels) and role != "teacher" else colour
        series.append(Series(word, points, own, "level"))
    if not levels:
        return [], []
    mixed = any(s.colour != colour for s in series)
    return series, [(word + (", in its student's colour where it has but one" if mixed else ""), colour, "level")]


def _levels(lines: Lines, role: str, axis: str) -> list[tuple[tuple[str, ...], dict[float, dict[str, Stat]]]]:
    """The distinct baselines: the lines that each belongs to, and its results at each value of the axis."""
    found = families((s for group in lines.values() for s in group), role)
    family = {id(setting): k for k, (members, _) in enumerate(found) for setting in members}
    levels: list[tuple[list[str], dict[float, int]]] = []
    for name, group in lines.items():
        own = {float(s.values[axis]): family[id(s)] for s in group if id(s) in family}
        for names, known in levels:
            if own and all(known.get(x, k) == k for x, k in own.items()):
                names.append(name)
                known |= own
                break
        else:
            if own:
                levels.append(([name], own))
    return [(tuple(names), {x: found[k][1] for x, k in known.items()}) for names, known in levels]


# ---------------------------------------------------------------- by name


def _error_rows(comparison: Comparison, done: Sequence[Setting]) -> Figure:
    """A row for each setting, the best by validation first."""
    ranked = sorted(done, key=by_validation) if len(done) > 1 else list(done)
    rows: list[Row] = []
    levels: list[Row] = []
    for setting in ranked[:ROWS]:
        if rate := _error_rate(setting.student):
            name = name_of(setting, comparison) if len(done) > 1 else "student"
            chosen = setting is comparison.best and len(done) > 1
            rows.append(Row(name, rate.mean, rate.std, _hover(name, rate, setting.student), "c0", chosen))
    for role, colour in BASELINES:
        for which, stats in baselines(comparison, role):
            if rate := _error_rate(stats):
                name = f"{ROLE_NAMES[role]} ({which})" if which else ROLE_NAMES[role]
                row = Row(name, rate.mean, rate.std, _hover(name, rate, stats), colour)
                (levels if not which and len(done) > 1 else rows).append(row)
    note = _spread_note({s.n for s in done}, "± one standard deviation over seeds")
    if len(done) > 1:
        note += " The best by validation is at the top."
    if len(ranked) > ROWS:
        note += f" The first {ROWS} of {len(ranked)}; the table has all."
    key = [("student, test", "c0", "line"), *((row.name, row.colour, "level") for row in levels)]
    chart = row_chart(rows, levels=levels, title="test errors", x_label="test errors, %")
    return Figure("Test errors", chart, note, legend(key) if len(done) > 1 else NOTHING)


# ---------------------------------------------------------------- by two keys


def heat_figure(comparison: Comparison) -> Figure | None:
    """A map of two swept keys; None where other than two are swept, or one has a single value or too many."""
    if len(comparison.keys) != 2:
        return None
    first, second = comparison.keys
    columns, rows = (
        sorted({show(s.values[key]): s.values[key] for s in comparison.settings}.values(), key=order)
        for key in (first, second)
    )
    if not (2 <= len(columns) <= 30 and 2 <= len(rows) <= 30):
        return None
    names_x, names_y = [show(v) for v in columns], [show(v) for v in rows]
    cells, chosen = {}, None
    for setting in comparison.settings:
        place = names_x.index(show(setting.values[first])), names_y.index(show(setting.values[second]))
        if "errors" in setting.student:
            cells[place] = _heat_cell(setting)
        if setting is comparison.best:
            chosen = place
    chart = heat_map(
        cells,
        columns=names_x,
        rows=names_y,
        title=f"test errors by {first} and {second}",
        x_label=first,
        y_label=second,
        chosen=chosen,
    )
    note = f"Mean test errors of {comparison.size('test'):,}; the stronger the colour, the more."
    return Figure(f"{first} and {second}", chart, note + (" The frame: best by validation." if chosen else ""))


def _heat_cell(setting: Setting) -> HeatCell:
    errors = setting.student["errors"]
    tip = f"{setting.label}: {plus_minus(errors)} test errors, n = {errors.n}"
    if value := setting.student.get("val_accuracy"):
        tip += f"; validation accuracy {plus_minus(value, '.2%')}"
    return HeatCell(errors.mean, f"{errors.mean:,.0f}" if errors.mean >= 100 else f"{errors.mean:.3g}", tip)
