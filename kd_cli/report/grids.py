"""The tables of pages, as rows of cells: the settings of a comparison, and all runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_cli.report.churn import churn
from kd_cli.report.compare import Comparison, value_of
from kd_cli.report.differences import from_alone, from_soft_targets, tuned_methods
from kd_cli.report.read import Run
from kd_cli.report.words import counts, difference, effect, percent, plus_minus, relative, show
from kd_cli.roles import ROLES
from kd_cli.statistics import Difference, Stat
from kd_cli.storage.run_dir import REPORT

TALL = 30  # rows of a table that gets a scroll bar of its own


@dataclass(frozen=True)
class Cell:
    """Text; the value it is sorted by where that is not its text; a link; what hovering shows, marked by colour."""

    text: str = ""
    sort: str | None = None
    link: str = ""
    badge: str = ""


@dataclass(frozen=True)
class Line:
    """A row; the best one is marked."""

    cells: Sequence[Cell]
    best: bool = False


@dataclass(frozen=True)
class Grid:
    """A table; a sortable one is sorted by a click on a heading."""

    heads: Sequence[str]
    lines: Sequence[Line]
    sortable: bool = False

    @property
    def tall(self) -> bool:
        return self.sortable and len(self.lines) > TALL


def plain(heads: Sequence[str], rows: Sequence[Sequence[str]], *, best: int | None = None) -> Grid:
    """A table of texts, with the row number `best` marked."""
    return Grid(heads, [Line([Cell(text) for text in row], best=i == best) for i, row in enumerate(rows)])


_COLUMNS = (
    ("accuracy", "accuracy", ".2%"),
    ("NLL", "nll", ".3f"),
    ("ECE", "ece", ".3f"),
    ("agrees", "agreement", ".1%"),
    ("val NLL", "val_nll", ".3f"),
)


def settings_grid(comparison: Comparison) -> Grid:
    """A row for each setting: its values, its means, its baselines."""
    lines = []
    settings = comparison.settings
    versus = {
        "against alone": [from_alone(setting) for setting in settings],
        "against tuned soft targets": [from_soft_targets(setting, comparison) for setting in settings],
    }
    versus = {name: found for name, found in versus.items() if any(found)}
    for i, setting in enumerate(settings):
        gap = setting.gap_closed
        cells = [*(Cell(show(value)) for value in setting.values.values()), Cell(counts(setting), str(setting.n))]
        cells += [_mean(setting.student.get("val_accuracy"), ".2%"), _mean(setting.student.get("errors"))]
        cells += [_versus(found[i]) for found in versus.values()]
        cells += [Cell(percent(gap), None if gap is None else f"{gap:.6g}")]
        cells += [_mean(setting.student_alone.get("errors")), _mean(setting.teacher.get("errors"))]
        cells += [_mean(setting.student.get(measure), form) for _, measure, form in _COLUMNS]
        cells += [_number(churn(setting, role), ".1%") for role in ("student", "student_alone")]
        lines.append(Line(cells, best=setting is comparison.best))
    heads = [*comparison.keys, "n", "val accuracy", "test errors", *versus, "gap closed", "alone", "teacher"]
    return Grid([*heads, *(head for head, _, _ in _COLUMNS), "churn", "churn alone"], lines, sortable=True)


def methods_grid(comparison: Comparison) -> Grid | None:
    """A row for each method at its best setting by validation; None where there is none to choose."""
    lines = []
    for one in tuned_methods(comparison):
        setting = one.setting
        versus = (from_alone(setting), from_soft_targets(setting, comparison), one.from_best)
        cells = [*(Cell(show(value)) for value in setting.values.values()), Cell(f"1 of {one.tried}", str(one.tried))]
        cells += [Cell(counts(setting), str(setting.n)), _mean(setting.student.get("val_accuracy"), ".2%")]
        cells += [_mean(setting.student.get("errors")), *map(_versus, versus)]
        lines.append(Line(cells, best=one.is_best))
    heads = [*comparison.keys, "settings", "n", "val accuracy", "test errors", "against alone"]
    heads += ["against tuned soft targets", "against the best"]
    return Grid(heads, lines, sortable=True) if lines else None


def runs_grid(comparisons: Sequence[Comparison], root: Path) -> Grid:
    """A row for each listed run; links are relative to root."""
    keys = list(dict.fromkeys(key for comparison in comparisons for key in comparison.keys))
    several = len(comparisons) > 1
    everyone = [run for comparison in comparisons for run in comparison.listed]
    teachers = len({show(run.config.get("teacher_training.seed")) for run in everyone}) > 1
    lines = []
    for comparison in comparisons:
        best = comparison.best.runs if comparison.best and len(comparison.settings) > 1 else ()
        chosen = {id(run) for run in best}
        for run in comparison.listed:
            link = relative(run.path, root)
            cells = [Cell(link, link=f"{link}/")]
            cells.append(Cell("report", link=f"{link}/{REPORT}") if (run.path / REPORT).is_file() else Cell())
            cells += [Cell(comparison.dataset)] * several
            cells += [*(Cell(show(value_of(run, key))) for key in keys), Cell(show(run.seed))]
            cells += [Cell(show(run.config.get("teacher_training.seed")))] * teachers
            cells += [_status(run, counted=id(run) in comparison.counted), *_results(run)]
            lines.append(Line(cells, best=id(run) in chosen))
    heads = ["run", "page", *["dataset"] * several, *keys, "seed", *["teacher seed"] * teachers, "status"]
    heads += ["val accuracy", "val NLL", "test errors", "alone", "teacher", "NLL", "ECE", "agrees"]
    return Grid(heads, lines, sortable=True)


def _results(run: Run) -> list[Cell]:
    return [
        _number(run.validation("val_accuracy"), ".2%"),
        _number(run.validation("val_nll"), ".4f"),
        *(_number(run.test(role, "errors"), ",.0f") for role in reversed(ROLES)),
        *(_number(run.test("student", measure), ".4f") for measure in ("nll", "ece")),
        _number(run.test("student", "agreement"), ".1%"),
    ]


def _status(run: Run, *, counted: bool) -> Cell:
    if run.status == "completed":
        return Cell("completed" if counted else "repeat, not counted")
    why = run.cause or f"no summary; {sum(map(len, run.history.values()))} epochs are recorded"
    return Cell(run.status, badge=why)


def _versus(value: Difference | None) -> Cell:
    return Cell() if value is None else Cell(f"{difference(value)}, {effect(value)}", f"{value.mean:.6g}")


def _mean(value: Stat | None, form: str = ",.1f") -> Cell:
    return Cell() if value is None else Cell(plus_minus(value, form), f"{value.mean:.6g}")


def _number(value: float | None, form: str) -> Cell:
    return Cell() if value is None else Cell(f"{value:{form}}", f"{value:.6g}")
