"""The charts of what a run logged by epoch: learning curves and sizes of gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup

from kd_cli.report.compare import Comparison, Setting, baselines, models_of
from kd_cli.report.figures import BASELINES, Figure, Legend, by_validation
from kd_cli.report.peers import agreement_by_epoch
from kd_cli.report.read import Run
from kd_cli.report.svg.lines import SERIES, Point, Series, line_chart
from kd_cli.report.svg.scales import ticks
from kd_cli.report.svg.small import legend
from kd_cli.report.words import name_of
from kd_cli.roles import ROLE_NAMES
from kd_cli.statistics import stat

FAINT = 60  # settings without a colour of their own whose curves are drawn, faintly
EPOCHS = 100  # points of a learning curve
COLOURS = {"teacher": "teacher", "student_alone": "alone", "student": "student"}


def mean_curve(runs: Iterable[Run], role: str, measure: str) -> list[tuple[int, float, int]]:
    """(epoch, mean over the runs, n) of a column of metrics.jsonl, for at most EPOCHS epochs, the last among them."""
    values: dict[int, list[float]] = {}
    for run in runs:
        for row in run.history.get(role, ()):
            if row.get(measure) is not None:
                values.setdefault(int(row["epoch"]), []).append(float(row[measure]))
    epochs = sorted(values)
    every = math.ceil(len(epochs) / EPOCHS) or 1
    kept = [epoch for i, epoch in enumerate(epochs) if (len(epochs) - 1 - i) % every == 0]
    return [(epoch, sum(values[epoch]) / len(values[epoch]), len(values[epoch])) for epoch in kept]


def learning_curves(comparison: Comparison) -> Figure | None:
    """Each setting's validation error by epoch; the training error where there is no validation data."""
    measure = "val_accuracy"
    if not any(mean_curve(s.runs, "student", measure) for s in comparison.settings):
        measure = "train_accuracy"
    ranked = sorted((s for s in comparison.settings if s.n), key=by_validation)
    series, key = _setting_curves(comparison, ranked, measure)
    for role, colour in BASELINES:
        distinct = models_of((run for setting in ranked for run in setting.runs), role)
        if len(baselines(comparison, role)) == 1:
            curve = _curve(ROLE_NAMES[role], distinct.values(), role, measure, colour, "level")
            if curve.points:
                series.append(curve)
                key.append((ROLE_NAMES[role], colour, "level"))
    series = [s for s in series if s.points]
    if not series:
        return None
    what = "validation" if measure == "val_accuracy" else "training"
    chart = _by_epoch(series, f"{what} error by epoch", f"{what} errors, %")
    return Figure("Learning curves", chart, "Means over seeds; a dashed line is a baseline.", legend(key))


def _setting_curves(comparison: Comparison, ranked: Sequence[Setting], measure: str) -> tuple[list[Series], Legend]:
    """A curve for each setting: in a colour of its own where there are few, else the best alone, before the others."""
    coloured = ranked if len(ranked) <= SERIES else ranked[:1]
    series: list[Series] = []
    key: Legend = []
    for setting in ranked[len(coloured) :][:FAINT]:
        series.append(_curve(setting.label, setting.runs, "student", measure, "faint", "thin"))
    for setting in sorted(coloured, key=lambda s: comparison.settings.index(s)):
        name, colour = name_of(setting, comparison), f"c{len(key)}"
        series.append(_curve(name, setting.runs, "student", measure, colour, "bare"))
        key.append((name + (", the best by validation" if len(coloured) < len(ranked) else ""), colour, "bare"))
    if others := len(ranked) - len(coloured):
        first = f"the next {FAINT} of " if others > FAINT else ""
        key.append((f"{first}{others} other settings", "faint", "thin"))
    return series, key


def run_curves(run: Run) -> list[Figure]:
    """A run's errors and likelihood by epoch, of all three roles, and its temperature where it was learned."""
    figures = []
    for name, seen, unseen in (("errors, %", "train_accuracy", "val_accuracy"), ("NLL", "hard_loss", "val_nll")):
        series, key = [], []
        for role, colour in COLOURS.items():
            for measure, kind, style in ((unseen, "validation", "bare"), (seen, "training", "dashed")):
                curve = _curve(f"{ROLE_NAMES[role]}, {kind}", [run], role, measure, colour, style)
                if curve.points:
                    series.append(curve)
                    key.append((curve.name, colour, style))
        if series:
            figures.append(Figure("", _by_epoch(series, f"{name} by epoch", name), legend=legend(key)))
    if agreement := agreement_by_epoch(run):
        chart = _by_epoch(agreement, "Agreement of the peers by epoch", "agreement with the others, %")
        names = legend([(s.name, s.colour, "bare") for s in agreement])
        figures.append(Figure("", chart, "Share of the validation examples, as a mean over the other peers.", names))
    learned = _curve("temperature", [run], "student", "T", COLOURS["student"], "bare")
    if learned.points:
        figures.append(Figure("", _by_epoch([learned], "Temperature by epoch", "T, mean of an epoch's steps")))
    return figures


def _curve(name: str, runs: Iterable[Run], role: str, measure: str, colour: str, style: str) -> Series:
    rate = measure.endswith("accuracy")
    points = [Point(epoch, 100 * (1 - y) if rate else y) for epoch, y, _ in mean_curve(runs, role, measure)]
    return Series(name, points, colour, style, marks=False)


def _by_epoch(series: Sequence[Series], title: str, y_label: str) -> Markup:
    values = [p.y for s in series for p in s.points]
    log = min(values) > 0 and max(values) / min(values) > 12
    y_label += " (logarithmic)" if log else ""
    epochs = [p.x for s in series for p in s.points]
    whole = [mark for mark in ticks(min(epochs), max(epochs), 8) if mark == int(mark)]
    return line_chart(series, title=title, x_label="epoch", y_label=y_label, log_y=log, x_ticks=whole)


# ---------------------------------------------------------------- gradients

TERMS = ("soft", "T² × soft", "hard")


def gradient_figures(comparison: Comparison) -> list[Figure]:
    """Norms of the gradients of the loss's two terms at each T, and T² times the soft one, where runs logged them."""
    found = _gradient_sizes(comparison)
    if not found or len(next(iter(found.values()))) < 2:
        return []
    figures = []
    for where in ("logits", "parameters"):
        series = []
        for k, name in enumerate(TERMS):
            points = []
            for T, values in sorted(found[name, where].items()):
                if (s := stat(values)) and s.mean > 0:
                    points.append(Point(T, s.mean, s.std, f"{name}, T = {T:g}: {s.mean:.3g} (n = {s.n})"))
            series.append(Series(name, points, f"c{k}"))
        chart = line_chart(
            series,
            title=f"gradient sizes on the {where} against T",
            x_label="temperature T (logarithmic)",
            y_label="norm (logarithmic)",
            log_x=True,
            log_y=True,
            x_ticks=sorted(found["soft", where]),
        )
        note = "After the first epoch, before alpha and beta; mean ± std over runs."
        if where == "logits":
            note = "Mean over examples of the norm of an example's own gradient. " + note
        key = [(f"{s.name} term", s.colour, "line") for s in series]
        figures.append(Figure(f"On the {where}", chart, note, legend(key)))
    return figures


def _gradient_sizes(comparison: Comparison) -> dict[tuple[str, str], dict[float, list[float]]]:
    """(term, logits or parameters) -> T -> norms of the runs in their first epoch; later ones are close to 0."""
    found: dict[tuple[str, str], dict[float, list[float]]] = {}
    for run in (run for setting in comparison.settings for run in setting.runs):
        rows = run.history.get("student", [])
        T = run.summary.get("T")
        if not rows or T is None or rows[-1].get("soft_gradient_logits") is None:
            continue
        for where in ("logits", "parameters"):
            soft, hard = rows[0][f"soft_gradient_{where}"], rows[0][f"hard_gradient_{where}"]
            for name, size in zip(TERMS, (soft, soft * T**2, hard), strict=True):
                found.setdefault((name, where), {}).setdefault(float(T), []).append(size)
    return found
