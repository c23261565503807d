"""Teachers trained with and without label smoothing, and the students that they teach (Müller et al. 2019)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_cli.errors import DataError
from kd_cli.experiments.projection import penultimate, projection_figure
from kd_cli.experiments.recorded import completed, configuration, stored
from kd_cli.metrics import clusters
from kd_cli.report.figures import Figure
from kd_cli.report.read import Run
from kd_cli.report.render import render
from kd_cli.report.svg.lines import Point, Series, line_chart
from kd_cli.report.svg.small import legend
from kd_cli.runs.device_data import DeviceData, load_device_data
from kd_cli.runs.models import load_module
from kd_cli.statistics import Stat, paired, stat
from kd_cli.storage.files import write_json, write_text
from kd_cli.storage.store import Store

SMOOTHING = "teacher_training.label_smoothing"
Teachers = dict[float, dict[Any, dict[str, float]]]  # by smoothing and seed: errors, nll, ece, within, between, ratio


def smoothed_teachers(folder: Path) -> list[Path]:
    """Compare teachers by how much their labels were smoothed: calibration, clusters, and what their students learn.

    The folder is that of a sweep over `teacher_training.label_smoothing`, T and seeds, each seed with a teacher of its
    own. Clusters are those of the test data's classes in the input of the teacher's classifier: the mean distance of an
    example to its class's mean over that of two classes' means; three classes are drawn as Müller et al. do. Each
    teacher's T is chosen by validation accuracy. Writes smoothed.json and smoothed.html into the folder. Raises
    DataError when the sweep has one smoothing only.
    """
    runs = completed(folder)
    by_smoothing: dict[float, list[Run]] = {}
    for run in runs:
        by_smoothing.setdefault(float(run.config[SMOOTHING]), []).append(run)
    if len(by_smoothing) < 2:
        raise DataError(f"{folder} has no runs with different {SMOOTHING}", hint=f"{SMOOTHING}=0,0.1")
    by_smoothing = dict(sorted(by_smoothing.items()))
    data = load_device_data(configuration(runs[0]))
    teachers = {smoothing: teachers_of(some, data) for smoothing, some in by_smoothing.items()}
    students = {smoothing: students_of(some) for smoothing, some in by_smoothing.items()}
    chosen = {smoothing: chosen_T(some) for smoothing, some in by_smoothing.items()}
    first, *others = by_smoothing
    alone = [run.test("student_alone", "errors") for run in of_each_seed(runs)]
    table = {
        "teachers": [{"smoothing": s, "by_seed": list(found.values())} for s, found in teachers.items()],
        "students": [
            {"smoothing": s, "T": T, "chosen": chosen[s] == T, "errors": list(found.values())}
            for s, by_T in students.items()
            for T, found in by_T.items()
        ],
        "alone": alone,
        "to_unsmoothed": [
            {"smoothing": s, "errors": difference(students[s][chosen[s]], students[first][chosen[first]])}
            for s in others
        ],
    }
    write_json(folder / "smoothed.json", table)
    planes = [projection_figure(s, of_each_seed(some)[0], data) for s, some in by_smoothing.items()]
    write_text(folder / "smoothed.html", _page(teachers, students, alone, planes))
    return [folder / "smoothed.html", folder / "smoothed.json"]


def of_each_seed(runs: Iterable[Run]) -> list[Run]:
    """One run of each seed, in the order of the seeds."""
    return sorted({run.seed: run for run in runs}.values(), key=lambda run: run.seed)


def teachers_of(runs: Sequence[Run], data: DeviceData) -> dict[Any, dict[str, float]]:
    """The test results and the clusters of the teachers of some runs, one for each seed."""
    found = {}
    for run in of_each_seed(runs):
        config = configuration(run)
        entry = stored(Store(config.store_dir), run.summary["teacher"]["fingerprint"], run)
        module = load_module(config.teacher, entry.weights(), data, role="teacher")
        seen = clusters(penultimate(module, data.test), data.test.labels)
        measures = {name: float(run.summary["teacher"]["test"][name]) for name in ("errors", "nll", "ece")}
        found[run.seed] = {**measures, "within": seen.within, "between": seen.between, "ratio": seen.ratio}
    return found


def students_of(runs: Iterable[Run]) -> dict[float, dict[Any, float]]:
    """The students' errors by T and seed."""
    found: dict[float, dict[Any, float]] = {}
    for run in sorted(runs, key=lambda run: (float(run.config["T"]), run.seed)):
        errors = run.test("student", "errors")
        assert errors is not None
        found.setdefault(float(run.config["T"]), {})[run.seed] = errors
    return found


def chosen_T(runs: Sequence[Run]) -> float:
    """The temperature with the best mean validation accuracy; the lowest of equal ones."""
    means: dict[float, float] = {}
    for T in sorted({float(run.config["T"]) for run in runs}):
        value = stat(run.validation("val_accuracy") for run in runs if float(run.config["T"]) == T)
        means[T] = value.mean if value else 0.0
    return max(means, key=lambda T: means[T])


def difference(errors: Mapping[Any, float], others: Mapping[Any, float]) -> dict[str, Any] | None:
    """The mean difference of students with the same seeds, and half of its 95 % interval."""
    found = paired([errors[seed] - others[seed] for seed in errors if seed in others])
    return None if found is None else found._asdict()


def _page(
    teachers: Teachers,
    students: Mapping[float, dict[float, dict[Any, float]]],
    alone: list[Any],
    planes: Sequence[Figure],
) -> str:
    temperatures = sorted({T for by_T in students.values() for T in by_T})
    names = {smoothing: f"taught by a teacher with smoothing {smoothing:g}" for smoothing in students}
    series = [
        Series(
            names[smoothing],
            [_point(T, stat(found.values())) for T, found in by_T.items()],
            f"c{k}",
        )
        for k, (smoothing, by_T) in enumerate(students.items())
    ]
    level = stat(alone)
    if level is not None:
        series.append(Series("student alone", [_point(T, level) for T in temperatures], "alone", "level"))
    n = max(len(found) for by_T in students.values() for found in by_T.values())
    taught = line_chart(
        series,
        title="students' test errors against T",
        x_label="temperature T (logarithmic)",
        y_label="test errors",
        log_x=True,
        x_ticks=temperatures,
    )
    said = legend([(one.name, one.colour, one.style) for one in series])
    figures = [Figure("What the students learn", taught, f"Mean ± std over seeds, n = {n}.", said)]
    measures = {
        "ratio": ("Clusters of the classes", "distance to the class's mean, over that between classes' means"),
        "ece": ("Calibration of the teachers", "expected calibration error"),
        "errors": ("Errors of the teachers", "test errors"),
    }
    for measure, (title, words) in measures.items():
        points = [_point(s, stat(one[measure] for one in found.values())) for s, found in teachers.items()]
        chart = line_chart(
            [Series("teachers", points, "teacher")],
            title=f"{words} against label smoothing",
            x_label="label smoothing of the teacher",
            y_label=words.partition(",")[0],
            x_ticks=sorted(teachers),
        )
        figures.append(Figure(title, chart, f"{words[0].upper()}{words[1:]}. Mean ± std over seeds, n = {n}."))
    figures += planes
    return render("charts", title="Teachers with and without label smoothing", figures=figures)


def _point(x: float, value: Stat | None) -> Point:
    assert value is not None
    return Point(x, value.mean, value.std)
