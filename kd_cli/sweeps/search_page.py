"""search.html: how a search went, and which of the searched keys mattered."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from kd_cli.report.figures import Figure
from kd_cli.report.render import render
from kd_cli.report.svg.lines import Point, Series, line_chart
from kd_cli.report.svg.rows import Row, row_chart
from kd_cli.report.svg.small import legend
from kd_cli.sweeps.objectives import shown
from kd_cli.sweeps.trials import ENOUGH, Trial, Trials, mean_curve

PAGE = "search.html"


def page(trials: Trials) -> str:
    """Each objective by trial with the best so far, and the importance of each key; of two objectives, the chosen."""
    done = [trial for trial in trials.all if trial.objectives is not None]
    figures = [_progress(name, done) for name in trials.names]
    if any(trial.curves for trial in trials.all):
        figures.append(_curves(trials.names[0], trials.all))
    if len(trials.names) > 1:
        figures.insert(0, _chosen(trials))
    for name in trials.names:
        if found := trials.importance(name):
            rows = [Row(key, value) for key, value in sorted(found.items(), key=lambda one: -one[1])]
            chart = row_chart(rows, title=f"importance for {name}", x_label=f"share in what decides {name}")
            note = (
                f"PED-ANOVA of {len(done)} trials: how far a key's values in the best quarter of them are from values "
                f"drawn at random. Given from {ENOUGH} trials on, of which chance decides much."
            )
            figures.append(Figure(f"What decides {name}", chart, note))
    return render("charts", title=f"A search of {len(trials.all)} trials", figures=figures)


def _progress(name: str, done: Sequence[Trial]) -> Figure:
    values = [(trial, trial.objectives[name]) for trial in done if trial.objectives]
    best = list(itertools.accumulate((value for _, value in values), min))
    series = [
        Series("a trial", [Point(t.number + 1, value, title=_title(t)) for t, value in values], "c1", "thin"),
        Series("best so far", [Point(t.number + 1, b) for (t, _), b in zip(values, best, strict=True)], "c0"),
    ]
    chart = line_chart(series, title=f"{name} by trial", x_label="trial", y_label=name)
    return Figure(f"{name} by trial", chart, "", legend([(s.name, s.colour, s.style) for s in series]))


def _curves(name: str, trials: Sequence[Trial]) -> Figure:
    """The means over seeds after each epoch, of pruned trials as far as they came."""
    kinds = {"completed": ("c1", "thin"), "pruned": ("c3", "dashed")}
    series = []
    for trial in trials:
        curve = mean_curve([curve for curve in trial.curves if curve])
        kind = kinds["completed" if trial.pruned is None else "pruned"]
        points = [Point(epoch, value, title=_title(trial)) for epoch, value in enumerate(curve, 1)]
        series.append(Series(f"trial {trial.number + 1}", points, *kind, marks=False))
    chart = line_chart(series, title=f"{name} by epoch", x_label="epoch", y_label=name)
    note = "Each line is a trial, the mean of its seeds. The median rule has ended the pruned ones."
    return Figure(f"{name} by epoch", chart, note, legend([(word, *kind) for word, kind in kinds.items()]))


def _chosen(trials: Trials) -> Figure:
    first, second, *_ = trials.names
    best = sorted(trials.best(), key=lambda trial: (trial.objectives or {})[first])
    points = [Point(t.objectives[first], t.objectives[second], title=_title(t)) for t in best if t.objectives]
    title = f"{second} against {first}"
    chart = line_chart([Series("chosen", points, "c0")], title=title, x_label=first, y_label=second)
    return Figure(title, chart, f"The {len(best)} trials that no other one beats in all objectives.")


def _title(trial: Trial) -> str:
    setting = ", ".join(f"{key}={word}" for key, word in trial.words.items())
    return f"{setting}: {shown(trial.objectives or {})}"
