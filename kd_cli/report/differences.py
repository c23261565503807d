"""Differences in test errors between settings, paired by seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from kd_cli.report.compare import FIRST, Comparison, Setting, best
from kd_cli.report.read import Run
from kd_cli.report.words import show
from kd_cli.statistics import Difference, mean_std, paired

SOFT_TARGETS = "soft_targets"
Errors = Mapping[tuple[str, str], float]  # by the student's and the teacher's seed


def from_alone(setting: Setting) -> Difference | None:
    """The student's errors minus those of the student alone; None where no run has both."""
    return _difference(_errors(setting.runs, "student"), _errors(setting.runs, "student_alone"))


def from_soft_targets(setting: Setting, comparison: Comparison) -> Difference | None:
    """The student's errors minus those by tuned soft targets; None for those themselves and where there are none."""
    reference = tuned_soft_targets(setting, comparison)
    if reference is None or reference is setting:
        return None
    return _difference(_errors(setting.runs, "student"), _errors(reference.runs, "student"))


def tuned_soft_targets(setting: Setting, comparison: Comparison) -> Setting | None:
    """The best setting of soft targets by validation, of those with the same models, data and training.

    None in a comparison without another method, where it is the best setting.
    """
    if all(_by_soft_targets(other) for other in comparison.settings if other.n):
        return None
    keys = [key for key in comparison.keys if not (key in FIRST[:3] or key.startswith("method"))]
    like = [s for s in comparison.settings if all(show(s.values[k]) == show(setting.values[k]) for k in keys)]
    return best([other for other in like if _by_soft_targets(other)])


def _by_soft_targets(setting: Setting) -> bool:
    return any(run.choices.get("method") == SOFT_TARGETS for run in setting.runs)


def _errors(runs: Iterable[Run], role: str) -> Errors:
    known = ((run, run.test(role, "errors")) for run in runs)
    seeds = ("seed", "teacher_training.seed")
    return {
        (show(run.config.get(seeds[0])), show(run.config.get(seeds[1]))): errors
        for run, errors in known
        if errors is not None
    }


def _difference(first: Errors, second: Errors) -> Difference | None:
    """The mean over the students' seeds; a seed that has several teachers counts once, with its mean."""
    by_seed: dict[str, list[float]] = {}
    for seeds in first.keys() & second.keys():
        by_seed.setdefault(seeds[0], []).append(first[seeds] - second[seeds])
    return paired([mean_std(found).mean for found in by_seed.values()])
