"""Pages about runs: one HTML file each, nothing in it from elsewhere, and links to the run directories around it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from kd_cli.errors import StorageError
from kd_cli.report import plots
from kd_cli.report.plots import Point, Row, Series
from kd_cli.report.tables import (
    LOG,
    ROLES,
    Comparison,
    Run,
    Setting,
    Stat,
    answer,
    baselines,
    collect,
    compare,
    counts,
    families,
    label,
    models_of,
    name_of,
    order,
    percent,
    plus_minus,
    read_run,
    relative,
    role_rows,
    show,
    stat,
    sweep_csv,
    sweep_table,
    tally,
    telling,
    value_of,
    verdict,
)
from kd_cli.storage.files import read_json, storage, tidy, write_text
from kd_cli.storage.run_dir import EXAMPLES, intact

REPORT = "report.html"
ROWS = 40  # of a row chart; more is what the table is for
FAINT = 60  # lines of learning curves that are drawn faintly
EPOCHS = 100  # points of a learning curve

STYLE = """
* { box-sizing:border-box; } html { color-scheme:light dark; }
body { margin:0 auto; max-width:1080px; padding:2rem 1.25rem 4rem; background:var(--page); color:var(--ink);
  font:16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size:1.05rem; font-weight:600; color:var(--soft); margin:0 0 1.5rem; overflow-wrap:anywhere; }
h2 { font-size:1.15rem; margin:2.2rem 0 .6rem; } h3 { font-size:1rem; margin:1.2rem 0 .4rem; }
a { color:var(--accent); } p { max-width:72ch; margin:.4rem 0; } code { font-size:.92em; overflow-wrap:anywhere; }
.headline { font-size:clamp(1.4rem, 4vw, 2rem); line-height:1.2; font-weight:650; letter-spacing:-.01em; }
.headline { margin:0 0 .5rem; overflow-wrap:anywhere; max-width:none; }
.headline::first-letter { text-transform:uppercase; }
.note { color:var(--soft); font-size:.88rem; } .warn { border-left:3px solid var(--c1); padding-left:.8rem; }
.figures { display:flex; flex-wrap:wrap; gap:.75rem; margin:1.2rem 0 0; padding:0; }
.figures div { flex:1 1 9rem; background:var(--card); border:1px solid var(--edge); border-top:3px solid var(--c);
  border-radius:8px; padding:.6rem .9rem; }
.figures dt { font-size:.85rem; color:var(--soft); } .figures dd { margin:0; }
.figures .value { font-size:1.5rem; font-weight:650; font-variant-numeric:tabular-nums; white-space:nowrap; }
.figures .more { font-size:.8rem; color:var(--soft); }
.card { background:var(--card); border:1px solid var(--edge); border-radius:10px; padding:1rem 1.1rem; margin:.6rem 0; }
.pair { display:grid; grid-template-columns:repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap:.8rem; }
.pair .card { margin:0; }
.scroll { overflow-x:auto; border:1px solid var(--edge); border-radius:10px; background:var(--card); }
.tall { max-height:80vh; overflow-y:auto; }
table { border-collapse:collapse; width:100%; font-size:.86rem; font-variant-numeric:tabular-nums; }
th, td { padding:.38rem .7rem; text-align:right; white-space:nowrap; border-bottom:1px solid var(--grid); }
th:first-child, td:first-child, .words { text-align:left; } tr:last-child td { border-bottom:0; }
thead th { position:sticky; top:0; background:var(--card); color:var(--soft); font-weight:600; z-index:1; }
th button { all:unset; cursor:pointer; white-space:nowrap; } th button:hover { color:var(--ink); }
th button:focus-visible { outline:2px solid var(--accent); outline-offset:3px; border-radius:2px; }
th button::after { content:"\\2195"; opacity:.35; margin-left:.3em; }
th[aria-sort=ascending] button::after { content:"\\2191"; opacity:1; }
th[aria-sort=descending] button::after { content:"\\2193"; opacity:1; }
tr.best td { background:color-mix(in oklab, var(--accent) 11%, transparent); font-weight:600; }
tr.level td { color:var(--soft); } .badge { color:var(--c1); font-weight:600; }
.beside { display:grid; grid-template-columns:repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap:.8rem 2rem; }
.example { display:grid; grid-template-columns:9.5rem 1fr; gap:.6rem 1.4rem; align-items:start; }
.example img { width:104px; height:auto; image-rendering:pixelated; border-radius:6px; background:#000; display:block; }
.example p { line-height:1.35; } .example dl { margin:.5rem 0; font-size:.88rem; } .example dt { color:var(--soft); }
.example dl { display:grid; grid-template-columns:auto 1fr; gap:0 .6rem; } .example dd { margin:0; font-weight:600; }
.panels { display:grid; grid-template-columns:repeat(auto-fit, minmax(108px, 1fr)); gap:.7rem .9rem; }
.panels figure { margin:0; max-width:190px; }
.panels figcaption { font-size:.8rem; color:var(--soft); text-align:center; margin-bottom:.2rem; }
.panels .own figcaption { color:var(--ink); font-weight:650; }
@media (max-width:720px) {
  .example { grid-template-columns:1fr; } .example > div:first-child { display:flex; gap:1rem; }
  .example img { width:84px; } body { padding:1.2rem .8rem 3rem; } .card { padding:.7rem; } }
.pair th { white-space:normal; }
details summary { cursor:pointer; } pre { overflow-x:auto; font-size:.82rem; }
@media print { .narrow { display:none } .scroll, .tall { max-height:none; overflow:visible } }
"""

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const rows = [...table.tBodies[0].rows].map(row => {
      const cell = row.cells[column], text = cell.dataset.v ?? cell.textContent.trim();
      return { row, text, number: text === "" ? NaN : Number(text) };
    });
    rows.sort((a, b) => {
      if (!a.text || !b.text) return !a.text - !b.text;  // the empty ones last, whichever way
      const numbers = !isNaN(a.number) && !isNaN(b.number);
      const order = numbers ? a.number - b.number : a.text.localeCompare(b.text, undefined, { numeric: true });
      return up ? order : -order;
    });
    table.tBodies[0].append(...rows.map(item => item.row));
  }));
}
"""


# ---------------------------------------------------------------- writing


@dataclass(frozen=True)
class Written:
    """What `write_report` left: the table for the terminal, the two files, and notes on what could not be read."""

    table: str
    csv: Path
    html: Path
    notes: tuple[str, ...]
    runs: tuple[Run, ...]


def write_report(paths: Iterable[str | Path], out_dir: str | Path, *, name: str = "sweep") -> Written:
    """Compare the runs in and under the paths; write NAME.csv and NAME.html into out_dir, which is made if need be.

    Raises DataError as `collect` does, StorageError where out_dir cannot be written.
    """
    runs, notes = collect(paths)
    comparisons = compare(runs)
    out = Path(out_dir)
    with storage(out):
        out.mkdir(parents=True, exist_ok=True)
    write_text(out / f"{name}.csv", sweep_csv(comparisons, out))
    write_text(out / f"{name}.html", sweep_page(comparisons, out, name=name, notes=notes))
    return Written(sweep_table(comparisons), out / f"{name}.csv", out / f"{name}.html", tuple(notes), tuple(runs))


def write_run_page(run_dir: str | Path, out_dir: str | Path | None = None) -> Path:
    """Write a run's report.html, into the run directory unless told otherwise, and return its path."""
    out = Path(run_dir if out_dir is None else out_dir)
    with storage(out):
        out.mkdir(parents=True, exist_ok=True)
    tidy(out)  # who was killed here may have been writing this page
    write_text(out / REPORT, run_page(run_dir, out))
    return out / REPORT


# ---------------------------------------------------------------- the page of a sweep


def sweep_page(comparisons: Sequence[Comparison], root: Path, *, name: str = "sweep", notes: Sequence[str] = ()) -> str:
    """One page for all comparisons; links are relative to root, where the page will lie."""
    runs = [run for comparison in comparisons for run in comparison.runs]
    where = escape(root.resolve().name or str(root))
    body = [f"<h1>kd-report: {where}, {escape(tally(runs))}</h1>"]
    for comparison in comparisons:
        body.append(_comparison(comparison, several=len(comparisons) > 1))
    body.append(f"<h2>Runs</h2>{_runs_table(comparisons, root)}")
    body.append(f'<p class="note">Everything in the table and more: <a href="{name}.csv">{name}.csv</a>.</p>')
    if notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        body.append(f'<h2>Left out</h2><ul class="note">{items}</ul>')
    return page(f"{root.resolve().name}: {tally(runs)}", body)


def _comparison(comparison: Comparison, *, several: bool) -> str:
    head, text = answer(comparison)
    out = ["<section>"]
    if several:
        out.append(f"<h2>{escape(comparison.dataset)}</h2>")
    out.append(f'<p class="headline">{escape(head)}</p><p>{escape(text).replace(" ± ", "&nbsp;±&nbsp;")}</p>')
    setting = comparison.best or (comparison.settings[0] if len(comparison.settings) == 1 else None)
    if setting is not None and setting.n:
        out.append(_figures(setting, comparison))
    lost = [s for s in comparison.settings if s.diverged]
    if lost:
        total = sum(s.diverged for s in lost)
        names = "; ".join(name_of(s, comparison) for s in lost[:6]) + (" and others" if len(lost) > 6 else "")
        have = "run diverged and is" if total == 1 else "runs diverged and are"
        out.append(f'<p class="note warn">{total} {have} in no mean: {escape(names)}.</p>')
    if repeats := sum(s.repeats for s in comparison.settings):
        have = "run repeats" if repeats == 1 else "runs repeat"
        out.append(
            f'<p class="note warn">{repeats} {have} another one, seeds included; the latest of each is counted.</p>'
        )
    if any(s.n for s in comparison.settings):
        out += [_errors(comparison), _heat(comparison)]
    out += [_curves(comparison), _gradients(comparison)]
    if len(comparison.settings) > 1:
        out.append(f"<h2>Settings</h2>{_settings_table(comparison)}")
    return "".join(out) + "</section>"


def _figures(setting: Setting, comparison: Comparison) -> str:
    total = comparison.size("test") or 0

    def errors(word: str, role: str, stats: dict[str, Stat]) -> str:
        value = stats.get("errors")
        if value is None:
            return ""
        more = f"errors of {total:,}, {value.mean / total:.2%}, n = {value.n}" if total else f"n = {value.n}"
        return _figure(word, plus_minus(value), more, role)

    tiles = errors("Student", "student", setting.student)
    tiles += errors("Student alone", "alone", setting.student_alone)
    tiles += errors("Teacher", "teacher", setting.teacher)
    if setting.gap_closed is not None:
        tiles += _figure("Gap closed", percent(setting.gap_closed), f"of mean errors, n = {setting.gap_n}", "c2")
    elif setting.saved:
        tiles += _figure("Errors saved", plus_minus(setting.saved), f"against alone, n = {setting.saved.n}", "c2")
    return f'<dl class="figures">{tiles}</dl>'


def _figure(name: str, value: str, more: str, colour: str) -> str:
    return (
        f'<div class="{colour}"><dt>{escape(name)}</dt><dd class="value">{escape(value)}</dd>'
        f'<dd class="more">{escape(more)}</dd></div>'
    )


# ---------------------------------------------------------------- errors against a swept key


def axis_of(comparison: Comparison) -> str | None:
    """The key for the horizontal axis: T if swept, else the number with the most values; None when there is none."""
    found = {key: {show(s.values[key]) for s in comparison.settings} for key in comparison.keys}
    numbers = [key for key in comparison.keys if all(_is_number(s.values[key]) for s in comparison.settings)]
    if "T" in numbers:
        return "T"
    return max(numbers, key=lambda key: len(found[key]), default=None)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_log(values: Iterable[float]) -> bool:
    values = list(values)
    return min(values) > 0 and max(values) / min(values) >= 8


def _rate(stats: dict[str, Stat], measure: str = "accuracy") -> Stat | None:
    """The error rate in percent, from an accuracy."""
    value = stats.get(measure)
    return value and Stat(100 * (1 - value.mean), None if value.std is None else 100 * value.std, value.n)


def _hover(name: str, rate: Stat, stats: dict[str, Stat] | None = None) -> str:
    errors = plus_minus(stats["errors"]) + " errors, " if stats and "errors" in stats else ""
    return f"{name}: {errors}{plus_minus(rate, '.2f')} %, n = {rate.n}"


def _errors(comparison: Comparison) -> str:
    axis = axis_of(comparison)
    done = [s for s in comparison.settings if s.n]
    if axis is None or len({s.values[axis] for s in done}) < 2:
        return _error_rows(comparison, done)
    others = [key for key in comparison.keys if key != axis]
    words = telling(others, [setting.values for setting in done])
    lines: dict[str, list[Setting]] = {}
    for setting in done:
        lines.setdefault(label({key: setting.values[key] for key in words}), []).append(setting)
    ranked = sorted(lines, key=lambda name: min(map(_by_validation, lines[name])))
    kept = [name for name in lines if name in ranked[: plots.LINES]]
    series: list[Series] = []
    key: list[tuple[str, str, str]] = []
    for i, name in enumerate(kept):
        colour = f"c{i}"
        for measure, kind, style in (("accuracy", "test", "line"), ("val_accuracy", "validation", "dashed")):
            if style == "dashed" and len(kept) > 3:
                continue  # twice as many lines would hide each other; the table has them
            points = []
            for setting in lines[name]:
                if rate := _rate(setting.student, measure):
                    tip = _hover(f"{setting.label}, {kind}", rate, setting.student if kind == "test" else None)
                    std = rate.std if kind == "test" else None
                    points.append(Point(float(setting.values[axis]), rate.mean, std, tip))
            if points:
                series.append(Series(f"{name or 'student'}, {kind}", points, colour, style))
        key.append((name or "student", colour, "line"))
    shown = [setting for name in kept for setting in lines[name]]
    for role, word, colour in (("student_alone", "student alone", "alone"), ("teacher", "teacher", "teacher")):
        levels = _levels({name: lines[name] for name in kept}, role, axis)
        for names, group in levels:
            points = []
            for x, stats in sorted(group.items()):
                if rate := _rate(stats):
                    tip = _hover(f"{word} ({'; '.join(names)})" if len(levels) > 1 else word, rate, stats)
                    points.append(Point(x, rate.mean, rate.std if len(levels) == 1 else None, tip))
            own = f"c{kept.index(names[0])}" if len(names) == 1 < len(levels) and role != "teacher" else colour
            series.append(Series(word, points, own, "level"))
        if levels:
            mixed = any(s.name == word and s.colour != colour for s in series)
            key.append((word + (", in its student's colour where it has but one" if mixed else ""), colour, "level"))
    values = sorted({float(s.values[axis]) for s in shown})
    log = _is_log(values)
    what = "temperature T" if axis == "T" else axis
    draw = plots.both(
        lambda width: plots.line_chart(
            series,
            title=f"error against {axis}",
            x_label=what + (" (logarithmic)" if log else ""),
            y_label="errors, %",
            width=width,
            log_x=log,
            x_ticks=values if len(values) <= 24 else None,
        )
    )
    spread = {s.n for s in shown}
    note = "Error bars and bands are ± one standard deviation over seeds"
    note += f", n = {min(spread)}" + (f" to {max(spread)}" if len(spread) > 1 else "") + "."
    if spread == {1}:
        note = "One seed for each point (n = 1): no error bars, and differences may be chance."
    if any(s.style == "dashed" for s in series):
        note += " Filled marks: test; rings: validation."
    if len(lines) > len(kept):
        note += f" The {len(kept)} best of {len(lines)} lines by validation are drawn; the table has all."
    title = f"Error against {escape(axis)}"
    return f'<h2>{title}</h2><div class="card">{plots.legend(key)}{draw}<p class="note">{escape(note)}</p></div>'


def _levels(
    lines: dict[str, list[Setting]], role: str, axis: str
) -> list[tuple[tuple[str, ...], dict[float, dict[str, Stat]]]]:
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


def _by_validation(setting: Setting) -> float:
    """A sorting key, the best first. Test results are no key: without validation all are equal."""
    value = setting.student.get("val_accuracy")
    return -value.mean if value else 0.0


def _error_rows(comparison: Comparison, done: Sequence[Setting]) -> str:
    """Values without a number to lay them along: a row each, the best by validation first."""
    ranked = sorted(done, key=_by_validation) if len(done) > 1 else list(done)
    rows: list[Row] = []
    levels: list[Row] = []
    for setting in ranked[:ROWS]:
        if rate := _rate(setting.student):
            name = name_of(setting, comparison) if len(done) > 1 else "student"
            chosen = setting is comparison.best and len(done) > 1
            rows.append(Row(name, rate.mean, rate.std, _hover(name, rate, setting.student), "c0", chosen))
    for role, word, colour in (("student_alone", "student alone", "alone"), ("teacher", "teacher", "teacher")):
        for which, stats in baselines(comparison, role):
            rate = _rate(stats)
            if rate is None:
                continue
            name = f"{word} ({which})" if which else word
            row = Row(name, rate.mean, rate.std, _hover(name, rate, stats), colour)
            (levels if not which and len(done) > 1 else rows).append(row)
    key = [("student, test", "c0", "line"), *((row.name, row.colour, "level") for row in levels)]
    draw = plots.both(
        lambda width: plots.row_chart(rows, levels=levels, title="test errors", x_label="test errors, %", width=width)
    )
    ns = {s.n for s in done}
    note = f"± one standard deviation over seeds, n = {min(ns)}" + (f" to {max(ns)}" if len(ns) > 1 else "") + "."
    if ns == {1}:
        note = "One seed (n = 1): no error bars, and differences may be chance."
    if len(done) > 1:
        note += " The best by validation is at the top."
    if len(ranked) > ROWS:
        note += f" The first {ROWS} of {len(ranked)}; the table has all."
    words = plots.legend(key) if len(done) > 1 else ""
    return f'<h2>Test errors</h2><div class="card">{words}{draw}<p class="note">{note}</p></div>'


def _heat(comparison: Comparison) -> str:
    """A map of two swept keys; nothing when it would be no map."""
    if len(comparison.keys) != 2:
        return ""
    first, second = comparison.keys
    columns, rows = (
        sorted({show(s.values[key]): s.values[key] for s in comparison.settings}.values(), key=order)
        for key in (first, second)
    )
    if not (2 <= len(columns) <= 30 and 2 <= len(rows) <= 30):
        return ""
    names_x, names_y = [show(v) for v in columns], [show(v) for v in rows]
    cells, chosen = {}, None
    for setting in comparison.settings:
        place = names_x.index(show(setting.values[first])), names_y.index(show(setting.values[second]))
        if "errors" in setting.student:
            errors = setting.student["errors"]
            tip = f"{setting.label}: {plus_minus(errors)} test errors, n = {errors.n}"
            if value := setting.student.get("val_accuracy"):
                tip += f"; validation accuracy {plus_minus(value, '.2%')}"
            cells[place] = (errors.mean, f"{errors.mean:,.0f}" if errors.mean >= 100 else f"{errors.mean:.3g}", tip)
        if setting is comparison.best:
            chosen = place
    draw = plots.both(
        lambda width: plots.heat_map(
            cells,
            columns=names_x,
            rows=names_y,
            title=f"test errors by {first} and {second}",
            x_label=first,
            y_label=second,
            width=width,
            chosen=chosen,
        )
    )
    total = comparison.size("test")
    note = f"Mean test errors of {total:,}; the stronger the colour, the more." + (
        " The frame: best by validation." if chosen else ""
    )
    head = f"<h2>{escape(first)} and {escape(second)}</h2>"
    return f'{head}<div class="card">{draw}<p class="note">{note}</p></div>'


# ---------------------------------------------------------------- learning curves


def mean_curve(runs: Iterable[Run], role: str, measure: str) -> list[tuple[int, float, int]]:
    """(epoch, mean over the runs, n) of a column of metrics.jsonl, at most EPOCHS epochs of it, the last among them."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for row in run.history.get(role, ()):
            if row.get(measure) is not None:
                values.setdefault(int(row["epoch"]), []).append(float(row[measure]))
    epochs = sorted(values)
    every = math.ceil(len(epochs) / EPOCHS) or 1
    kept = [epoch for i, epoch in enumerate(epochs) if (len(epochs) - 1 - i) % every == 0]
    return [(epoch, sum(values[epoch]) / len(values[epoch]), len(values[epoch])) for epoch in kept]


def _curves(comparison: Comparison) -> str:
    """Each setting's validation error by epoch; the training error where there is no validation data."""
    measure = "val_accuracy"
    if not any(mean_curve(s.runs, "student", measure) for s in comparison.settings):
        measure = "train_accuracy"
    ranked = sorted((s for s in comparison.settings if s.n), key=_by_validation)
    coloured = ranked if len(ranked) <= plots.LINES else ranked[:1]
    series: list[Series] = []
    key: list[tuple[str, str, str]] = []
    for setting in ranked[len(coloured) :][:FAINT]:
        series.append(_curve(setting.label, setting.runs, "student", measure, "faint", "thin"))
    for setting in sorted(coloured, key=lambda s: comparison.settings.index(s)):
        name, colour = name_of(setting, comparison), f"c{len(key)}"
        series.append(_curve(name, setting.runs, "student", measure, colour, "bare"))
        key.append((name + (", the best by validation" if len(coloured) < len(ranked) else ""), colour, "bare"))
    if len(coloured) < len(ranked):
        others = len(ranked) - len(coloured)
        first = f"the next {FAINT} of " if others > FAINT else ""
        key.append((f"{first}{others} other settings", "faint", "thin"))
    for role, word, colour in (("student_alone", "student alone", "alone"), ("teacher", "teacher", "teacher")):
        distinct = models_of((run for setting in ranked for run in setting.runs), role)
        if len(baselines(comparison, role)) == 1:
            curve = _curve(word, distinct.values(), role, measure, colour, "level")
            if curve.points:
                series.append(curve)
                key.append((word, colour, "level"))
    series = [s for s in series if s.points]
    if not series:
        return ""
    what = "validation" if measure == "val_accuracy" else "training"
    draw = _learning_chart(series, f"{what} error by epoch", f"{what} errors, %")
    note = "Means over seeds; a dashed line is a baseline."
    title = "Learning curves"
    return f'<h2>{title}</h2><div class="card">{plots.legend(key)}{draw}<p class="note">{note}</p></div>'


def _gradients(comparison: Comparison) -> str:
    """How large the two terms' gradients are at each T, where the runs logged it, and what T^2 makes of it."""
    found: dict[str, dict[float, list[float]]] = {}
    for setting in comparison.settings:
        for run in setting.runs:
            rows = run.history.get("student", [])
            T = run.summary.get("T")
            if not rows or T is None or rows[-1].get("soft_gradient_logits") is None:
                continue
            first = rows[0]  # after the last epoch both are near nothing and say little
            for where in ("logits", "parameters"):
                soft, hard = first[f"soft_gradient_{where}"], first[f"hard_gradient_{where}"]
                for name, size in (("soft", soft), ("T² × soft", soft * T**2), ("hard", hard)):
                    found.setdefault(f"{name}/{where}", {}).setdefault(float(T), []).append(size)
    if not found or len(next(iter(found.values()))) < 2:
        return ""
    out = ["<h2>Sizes of the gradients</h2>"]
    for where in ("logits", "parameters"):
        series, key = [], []
        for k, name in enumerate(("soft", "T² × soft", "hard")):
            points = []
            for T, values in sorted(found[f"{name}/{where}"].items()):
                if (s := stat(values)) and s.mean > 0:
                    points.append(Point(T, s.mean, s.std, f"{name}, T = {T:g}: {s.mean:.3g} (n = {s.n})"))
            series.append(Series(name, points, f"c{k}"))
            key.append((f"{name} term", f"c{k}", "line"))
        draw = plots.both(
            lambda width, series=series, where=where: plots.line_chart(  # type: ignore[misc]
                series,
                title=f"gradient sizes on the {where} against T",
                x_label="temperature T (logarithmic)",
                y_label="norm (logarithmic)",
                width=width,
                log_x=True,
                log_y=True,
                x_ticks=sorted(found[f"soft/{where}"]),
            )
        )
        note = "After the first epoch, before alpha and beta; mean ± std over runs."
        if where == "logits":
            note = "Mean over examples of the norm of an example's own gradient. " + note
        out.append(
            f'<h3>On the {where}</h3><div class="card">{plots.legend(key)}{draw}<p class="note">{note}</p></div>'
        )
    return "".join(out)


def _curve(name: str, runs: Iterable[Run], role: str, measure: str, colour: str, style: str) -> Series:
    rate = measure.endswith("accuracy")
    points = [Point(e, 100 * (1 - y) if rate else y) for e, y, _ in mean_curve(runs, role, measure)]
    return Series(name, points, colour, style, marks=False)


def _learning_chart(series: Sequence[Series], title: str, y_label: str) -> str:
    """Curves over epochs; a baseline here is a dashed line, not a level."""
    values = [p.y for s in series for p in s.points]
    log = min(values) > 0 and max(values) / min(values) > 12
    return plots.both(
        lambda width: plots.line_chart(
            series,
            title=title,
            x_label="epoch",
            y_label=y_label + (" (logarithmic)" if log else ""),
            width=width,
            log_y=log,
        )
    )


# ---------------------------------------------------------------- tables


def _table(heads: Sequence[str], rows: Iterable[str], *, tall: bool = False) -> str:
    """A table that a click on a heading sorts."""
    cells = "".join(f'<th scope="col"><button type="button">{escape(head)}</button></th>' for head in heads)
    return _framed(f'<table class="sortable"><thead><tr>{cells}</tr></thead>', rows, tall=tall)


def _plain_table(heads: Sequence[str], rows: Iterable[str]) -> str:
    cells = "".join(f'<th scope="col">{escape(head)}</th>' for head in heads)
    return _framed(f"<table><thead><tr>{cells}</tr></thead>", rows)


def _framed(start: str, rows: Iterable[str], *, tall: bool = False) -> str:
    body = "\n".join(rows)
    return f'<div class="{"scroll tall" if tall else "scroll"}" tabindex="0">{start}<tbody>{body}</tbody></table></div>'


def _line(cells: str, *, best: bool = False) -> str:
    return f'<tr class="best">{cells}</tr>' if best else f"<tr>{cells}</tr>"


def _cell(text: str, value: Any = None) -> str:
    """A cell; value is what it sorts by where the text would mislead."""
    return f"<td>{escape(text)}</td>" if value is None else f'<td data-v="{escape(str(value))}">{escape(text)}</td>'


def _stat_cell(value: Stat | None, form: str = ",.1f") -> str:
    return "<td></td>" if value is None else _cell(plus_minus(value, form), f"{value.mean:.6g}")


_COLUMNS = (
    ("accuracy", "accuracy", ".2%"),
    ("NLL", "nll", ".3f"),
    ("ECE", "ece", ".3f"),
    ("agrees", "agreement", ".1%"),
    ("val NLL", "val_nll", ".3f"),
)


def _settings_table(comparison: Comparison) -> str:
    rows = []
    for setting in comparison.settings:
        gap = setting.gap_closed
        cells = "".join(_cell(show(value)) for value in setting.values.values()) + _cell(counts(setting), setting.n)
        cells += _stat_cell(setting.student.get("val_accuracy"), ".2%") + _stat_cell(setting.student.get("errors"))
        cells += _cell(percent(gap), None if gap is None else f"{gap:.6g}")
        cells += _stat_cell(setting.student_alone.get("errors")) + _stat_cell(setting.teacher.get("errors"))
        cells += "".join(_stat_cell(setting.student.get(m), form) for _, m, form in _COLUMNS)
        rows.append(_line(cells, best=setting is comparison.best))
    heads = [*comparison.keys, "n", "val accuracy", "test errors", "gap closed", "alone", "teacher"]
    heads += [head for head, _, _ in _COLUMNS]
    note = "Mean ± standard deviation over n seeds; marked: the best by validation. Gap closed is of mean errors."
    return _table(heads, rows, tall=len(rows) > 30) + f'<p class="note">{note}</p>'


def _runs_table(comparisons: Sequence[Comparison], root: Path) -> str:
    keys = list(dict.fromkeys(key for comparison in comparisons for key in comparison.keys))
    several = len(comparisons) > 1
    everyone = [run for comparison in comparisons for run in comparison.runs]
    teachers = len({show(run.config.get("teacher_training.seed")) for run in everyone}) > 1
    rows = []
    for comparison in comparisons:
        counted = {id(run) for setting in comparison.settings for run in setting.runs}
        chosen = (
            {id(run) for run in comparison.best.runs} if comparison.best and len(comparison.settings) > 1 else set()
        )
        for run in comparison.runs:
            link = relative(run.path, root)
            cells = f'<td><a href="{_href(link)}/">{escape(link)}</a></td>'
            page = f'<a href="{_href(link)}/{REPORT}">report</a>' if (run.path / REPORT).is_file() else ""
            cells += f"<td>{page}</td>"
            cells += _cell(comparison.dataset) if several else ""
            cells += "".join(_cell(show(value_of(run, key))) for key in keys) + _cell(show(run.seed))
            cells += _cell(show(run.config.get("teacher_training.seed"))) if teachers else ""
            cells += _status(run, counted=id(run) in counted)
            cells += _number(run.validation("val_accuracy"), ".2%") + _number(run.validation("val_nll"), ".4f")
            cells += "".join(_number(run.test(role, "errors"), ",.0f") for role in reversed(ROLES))
            cells += "".join(_number(run.test("student", m), f) for m, f in (("nll", ".4f"), ("ece", ".4f")))
            cells += _number(run.test("student", "agreement"), ".1%")
            rows.append(_line(cells, best=id(run) in chosen))
    heads = ["run", "page", *["dataset"] * several, *keys, "seed", *["teacher seed"] * teachers, "status"]
    heads += ["val accuracy", "val NLL", "test errors", "alone", "teacher", "NLL", "ECE", "agrees"]
    return _table(heads, rows, tall=len(rows) > 30)


def _status(run: Run, *, counted: bool) -> str:
    if run.status == "completed":
        return _cell("completed" if counted else "repeat, not counted")
    why = run.cause or f"no summary; {sum(map(len, run.history.values()))} epochs are recorded"
    return f'<td class="badge" title="{escape(why)}">{escape(run.status)}</td>'


def _number(value: float | None, form: str) -> str:
    return "<td></td>" if value is None else _cell(f"{value:{form}}", f"{value:.6g}")


def _href(path: str) -> str:
    return escape(quote(path))


# ---------------------------------------------------------------- the page of a run


def run_page(run_dir: str | Path, root: Path | None = None) -> str:
    """One run's page, from its summary.json, metrics.jsonl and examples.json, as far as they are there.

    Links are relative to root, the run directory by default. Raises StorageError when there is no readable run.
    """
    path = Path(run_dir)
    root = path if root is None else root
    try:
        run = read_run(path)
        examples = read_json(path / EXAMPLES) if (path / EXAMPLES).is_file() and intact(path / EXAMPLES) else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} cannot be read as a run: {error}", hint="give a run directory of kd-run") from error
    body = [f"<h1>kd-run: {escape(path.resolve().name)}, {escape(run.status)}</h1>"]
    if run.summary:
        body.append(_run_head(run))
    else:
        why = run.cause or "There is no summary yet: the run goes on, or was stopped."
        head = "failed" if run.status == "failed" else "not finished"
        body.append(f'<p class="headline">{head}</p><p>{escape(why)}</p>')
    body += [_auto(run), _omitted(run), _run_curves(run)]
    if examples:
        body += [_temperature(examples), _disagreement(examples), _reliability(examples, run)]
    body.append(_details(run, relative(path, root)))
    return page(f"{path.resolve().name}: {run.status}", body)


def _run_head(run: Run) -> str:
    summary, data = run.summary, run.summary["dataset"]
    first, _, rest = verdict(summary).partition(": ")
    out = [f'<p class="headline">{escape(rest or first)}</p>']
    facts = [first] if rest else []
    facts += [f"{data['name']}: {data['train']:,} training, {data['val']:,} validation, {data['test']:,} test examples"]
    facts += [f"{summary['method']}, seed {summary['seed']}, on {summary['device']} in {summary['precision']}"]
    out.append(f"<p>{escape('; '.join(facts))}.</p>")
    if run.status == "completed":
        out.append(
            '<p class="note">One seed cannot tell a difference from chance: sweep seeds before you believe it.</p>'
        )
    heads, *rows = role_rows(summary)
    if rows:
        out.append(_plain_table(heads, (_line("".join(map(_cell, row))) for row in rows)))
    return "".join(out)


_ROLES = (
    ("teacher", "teacher", "teacher"),
    ("student_alone", "student alone", "alone"),
    ("student", "student", "student"),
)


def _auto(run: Run) -> str:
    """What validation said of the settings that the tool chose from."""
    facts = run.summary.get("auto")
    if not facts:
        return ""
    lines: dict[str, list[Point]] = {}
    chosen = facts["tried"][facts["chosen"]]
    for one in facts["tried"]:
        if one["diverged"] is None and one["val_accuracy"] is not None:
            tip = f"T={one['T']:g}, alpha={one['alpha']:g}: validation accuracy {one['val_accuracy']:.2%}"
            point = Point(float(one["T"]), 100 * (1 - one["val_accuracy"]), None, tip)
            lines.setdefault(f"alpha={one['alpha']:g}", []).append(point)
    series = [Series(name, points, f"c{i % plots.LINES}") for i, (name, points) in enumerate(lines.items())]
    values = sorted({point.x for points in lines.values() for point in points})
    draw = plots.both(
        lambda width: plots.line_chart(
            series,
            title="validation error of what was tried",
            x_label="temperature T",
            y_label="validation errors, %",
            width=width,
            log_x=_is_log(values) if values else False,
            x_ticks=values,
        )
    )
    key = plots.legend([(s.name, s.colour, "line") for s in series])
    words = f"Chosen: T = {chosen['T']:g}, alpha = {chosen['alpha']:g}; {facts['rule']}. One seed each."
    head = " and ".join(facts["keys"])
    return (
        f'<h2>How {escape(head)} was chosen</h2><div class="card">{key}{draw}<p class="note">{escape(words)}</p></div>'
    )


def _omitted(run: Run) -> str:
    """What leaving classes out of the transfer set did, before and after the correction of the biases."""
    facts = run.summary.get("omitted")
    if not facts:
        return ""
    rows = []
    for name, words in (
        ("before", "as trained"),
        ("corrected", "biases shifted, by training inputs alone"),
        ("oracle", "oracle: shift tuned on the test set"),
    ):
        one = facts[name]
        cells = [
            words,
            f"{one['shift']:+.2f}",
            f"{one['errors']:,}",
            f"{one['omitted_errors']:,}",
            f"{one['omitted_total']:,}",
        ]
        rows.append(_line("".join(map(_cell, cells)), best=name == facts["result"]))
    heads = ["", "shift", "test errors", "of them on these classes", "examples of these classes"]
    title = f"Without {', '.join(map(str, facts['classes']))} in the transfer set"
    note = "Marked: this run's result. The oracle has seen the test set and is no result."
    return f'<h2>{escape(title)}</h2>{_plain_table(heads, rows)}<p class="note">{note}</p>'


def _run_curves(run: Run) -> str:
    cards = []
    for name, seen, unseen in (("errors, %", "train_accuracy", "val_accuracy"), ("NLL", "hard_loss", "val_nll")):
        series, key = [], []
        for role, word, colour in _ROLES:
            for measure, kind, style in ((unseen, "validation", "bare"), (seen, "training", "dashed")):
                curve = _curve(f"{word}, {kind}", [run], role, measure, colour, style)
                if curve.points:
                    series.append(curve)
                    key.append((curve.name, colour, style))
        if series:
            draw = _learning_chart(series, f"{name} by epoch", name)
            cards.append(f'<div class="card">{plots.legend(key)}{draw}</div>')
    return f"<h2>Learning curves</h2>{''.join(cards)}" if cards else ""


def _temperature(examples: dict[str, Any]) -> str:
    """A few test examples: the image, and what teacher and student make of it at several temperatures."""
    taught = any(example["teacher"] for example in examples["examples"])
    key = [("teacher", "teacher", "block")] * taught + [("student", "student", "block")]
    title = "What temperature shows" if taught else "What the student sees"
    out = [f"<h2>{title}</h2>"]
    out.append(
        '<p class="note">Probabilities of the classes after dividing the logits by T. The true class is bold; '
        f"T = {examples['T']:g} is this run's. Predictions are made at T = 1.</p>{plots.legend(key)}"
    )
    for example in examples["examples"]:
        panels = []
        for i, t in enumerate(examples["temperatures"]):
            teacher = example["teacher"][i] if example["teacher"] else [None] * len(example["classes"])
            names = enumerate(zip(example["classes"], teacher, example["student"][i], strict=True))
            rows = [(name, p, q, k == example["true"]) for k, (name, p, q) in names]
            own = ' class="own"' if t == examples["T"] else ""
            drawn = plots.distributions(rows, title=f"example {example['index']} at T = {t:g}")
            panels.append(f"<figure{own}><figcaption>T = {t:g}</figcaption>{drawn}</figure>")
        said = [("label", example["label"]), ("teacher", example["teacher_says"]), ("student", example["student_says"])]
        words = "".join(f"<dt>{word}</dt><dd>{escape(name)}</dd>" for word, name in said if name is not None)
        why = f"test example {example['index']}: {escape(example['why'])}"
        image = example["image"] or ""
        picture = (
            f'<img alt="{escape(example["label"])}" src="{escape(image)}">'
            if image.startswith("data:image/png")
            else ""
        )
        out.append(
            f'<div class="card example"><div>{picture}<div><dl>{words}</dl><p class="note">{why}</p></div></div>'
            f'<div class="panels">{"".join(panels)}</div></div>'
        )
    return "".join(out)


def _disagreement(examples: dict[str, Any]) -> str:
    facts = examples["disagreement"]
    if facts is None:
        pairs = examples["mistakes"]
        rows = [_line(_cell(p["label"]) + _cell(p["student"]) + _cell(f"{p['count']:,}")) for p in pairs]
        heads = ["true class", "student says", "examples"]
        return f"<h2>The student's mistakes</h2>{_plain_table(heads, rows)}" if rows else ""
    shares = (
        ("both right", facts["both_right"], "c2"),
        ("only the teacher right", facts["teacher_right"], "teacher"),
        ("only the student right", facts["student_right"], "student"),
        ("both wrong, the same class", facts["both_wrong_alike"], "alone"),
        ("both wrong, different classes", facts["both_wrong_apart"], "c1"),
    )
    key = [(f"{name}: {count:,}", colour, "block") for name, count, colour in shares]
    apart = facts["teacher_right"] + facts["student_right"] + facts["both_wrong_apart"]
    out = ["<h2>Where student and teacher disagree</h2>"]
    share = f"{apart:,} of {facts['total']:,} test examples ({apart / facts['total']:.1%})"
    out.append(f"<p>They put {share} in different classes.</p>")
    bar = plots.both(lambda width: plots.parts(shares, title="who is right", width=width))
    out.append(f'<div class="card">{plots.legend(key)}{bar}</div><div class="pair">')
    if facts["pairs"]:
        rows = []
        for pair in facts["pairs"]:
            numbers = (pair[key] for key in ("count", "teacher_right", "student_right"))
            rows.append(
                _line(_cell(pair["teacher"]) + _cell(pair["student"]) + "".join(_cell(f"{k:,}") for k in numbers))
            )
        heads = ["teacher says", "student says", "count", "teacher right", "student right"]
        out.append(f"<div>{_plain_table(heads, rows)}</div>")
    if facts["matrix"] and apart:
        names = facts["names"]
        cells = {
            (j, i): (float(k), f"{k:,}" if k else "", f"teacher {names[i]}, student {names[j]}: {k:,}")
            for i, row in enumerate(facts["matrix"])
            for j, k in enumerate(row)
            if i != j
        }
        drawn = plots.heat_map(
            cells,
            columns=names,
            rows=names,
            title="disagreements of teacher and student",
            x_label="student says",
            y_label="teacher says",
            width=460,
        )
        out.append(f'<div class="card">{drawn}</div>')
    return "".join(out) + "</div>"


def _reliability(examples: dict[str, Any], run: Run) -> str:
    found = examples["reliability"]
    roles = [(word, colour, found[role]) for role, word, colour in _ROLES if role in found]
    key = []
    for role, word, colour in _ROLES:
        if role in found:
            ece = run.test(role, "ece")
            key.append((word + ("" if ece is None else f", ECE {ece:.3f}"), colour, "block"))
    drawn = plots.reliability_diagram(roles, title="reliability diagram")
    note = "On the dotted line, what is predicted with confidence p is right a share p of the time. Below it the model "
    note += "is too sure. A mark's area is its share of the test examples."
    words = f'<div>{plots.legend(key)}<p class="note">{note}</p></div>'
    return f'<h2>Reliability</h2><div class="card beside"><div>{drawn}</div>{words}</div>'


def _details(run: Run, link: str) -> str:
    names = ["summary.json", "metrics.jsonl", "examples.json", "student.safetensors", "student.json"]
    names += [".hydra/config.yaml", ".hydra/overrides.yaml"]
    start = "" if link == "." else _href(link) + "/"
    there = [name for name in names if (run.path / name).is_file()] + [LOG]  # a sweep writes its logs after the pages
    links = [f'<a href="{start}{name}">{name}</a>' for name in there]
    out = [f"<h2>Files</h2><p>{', '.join(links)}</p>"]
    if command := run.summary.get("command"):
        out.append(f"<p><code>{escape(str(command))}</code></p>")
    if versions := run.summary.get("versions"):
        told = ", ".join(f"{name} {version}" for name, version in versions.items())
        out.append(f'<p class="note">{escape(told)}</p>')
    lines = "\n".join(f"{key}: {show(value)}" for key, value in run.config.items())
    out.append(f"<details><summary>Configuration</summary><pre>{escape(lines)}</pre></details>")
    return "".join(out)


def page(title: str, body: Iterable[str]) -> str:
    """A self-contained page around a body that is HTML already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{plots.CSS}{STYLE}</style></head>\n<body>\n"
        f"{chr(10).join(part for part in body if part)}\n<script>{SCRIPT}</script></body></html>\n"
    )
