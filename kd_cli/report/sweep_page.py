"""The page of a sweep, or of any runs that are compared: the answer first, then charts and tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kd_cli.report.answers import answer
from kd_cli.report.compare import Comparison, Setting
from kd_cli.report.cost import latency_figure
from kd_cli.report.curves import gradient_figures, learning_curves
from kd_cli.report.figures import error_figure, heat_figure
from kd_cli.report.grids import methods_grid, runs_grid, settings_grid
from kd_cli.report.render import render
from kd_cli.report.tables import shown
from kd_cli.report.words import not_listed, percent, plus_minus, run_notes, tally, warnings
from kd_cli.statistics import Stat


class Tile(NamedTuple):
    """A result in large letters."""

    name: str
    value: str
    more: str
    colour: str


def sweep_page(comparisons: Sequence[Comparison], root: Path, *, name: str = "sweep", notes: Sequence[str] = ()) -> str:
    """One page for all comparisons; links are relative to root, the folder that the page is written to."""
    runs = [run for comparison in comparisons for run in comparison.runs]
    listed = shown(comparisons)
    return render(
        "sweep",
        title=f"{root.resolve().name}: {tally(runs)}",
        heading=f"kd-report: {root.resolve().name or root}, {tally(runs)}",
        sections=[_section(comparison, several=len(listed) > 1) for comparison in listed],
        runs=runs_grid(listed, root),
        not_listed=not_listed(comparisons),
        csv=f"{name}.csv",
        notes=notes,
    )


def _section(comparison: Comparison, *, several: bool) -> dict[str, Any]:
    """The values that the template shows of a comparison."""
    headline, text = answer(comparison)
    setting = comparison.best or (comparison.settings[0] if len(comparison.settings) == 1 else None)
    figures = [error_figure(comparison), heat_figure(comparison)] if any(s.n for s in comparison.settings) else []
    return {
        "dataset": comparison.dataset if several else "",
        "headline": headline,
        "text": text.replace(" ± ", "\u00a0±\u00a0"),
        "tiles": _tiles(setting, comparison) if setting is not None and setting.n else [],
        "warnings": warnings(comparison),
        "notes": run_notes(comparison.runs),
        "figures": [figure for figure in (*figures, latency_figure(comparison), learning_curves(comparison)) if figure],
        "gradients": gradient_figures(comparison),
        "methods": methods_grid(comparison),
        "settings": settings_grid(comparison) if len(comparison.settings) > 1 else None,
    }


def _tiles(setting: Setting, comparison: Comparison) -> list[Tile]:
    """The errors of the three roles, and what distillation was worth."""
    total = comparison.size("test") or 0

    def errors(word: str, role: str, stats: dict[str, Stat]) -> list[Tile]:
        value = stats.get("errors")
        if value is None:
            return []
        more = f"errors of {total:,}, {value.mean / total:.2%}, n = {value.n}" if total else f"n = {value.n}"
        return [Tile(word, plus_minus(value), more, role)]

    tiles = errors("Student", "student", setting.student)
    tiles += errors("Student alone", "alone", setting.student_alone)
    tiles += errors("Teacher", "teacher", setting.teacher)
    if setting.gap_closed is not None:
        tiles.append(Tile("Gap closed", percent(setting.gap_closed), f"of mean errors, n = {setting.gap_n}", "c2"))
    elif setting.saved:
        tiles.append(Tile("Errors saved", plus_minus(setting.saved), f"against alone, n = {setting.saved.n}", "c2"))
    return tiles
