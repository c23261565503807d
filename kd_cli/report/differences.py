"""Differences in test errors between settings, paired by seed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from kd_cli.report.compare import FIRST, Comparison, Setting, best
from kd_cli.report.read import Run
from kd_cli.report.words import show
from kd_cli.statistics import Difference, mean_std, paired

SOFT_TARGETS = ("soft_targets", "binary")  # of classes, and of independent labels
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
    like = [other for other in comparison.settings if _conditions(other) == _conditions(setting)]
    return best([other for other in like if _by_soft_targets(other)])


@dataclass(frozen=True)
class Tuned:
    """A method's best setting by validation, of `tried` settings, for one choice of models, data and training.

    `from_best` is its errors minus those of the method whose tuned setting validates best; `is_best` says that it is
    that one.
    """

    method: str
    setting: Setting
    tried: int
    is_best: bool
    from_best: Difference | None


def tuned_methods(comparison: Comparison) -> list[Tuned]:
    """Each method at its best setting by validation, in the order of the settings.

    Empty where there is one method, or none that was tried in several settings: then the settings say it all.
    """
    if "method" not in comparison.keys:
        return []
    tried: dict[tuple[str, ...], dict[str, list[Setting]]] = {}
    for setting in (setting for setting in comparison.settings if "val_accuracy" in setting.student):
        by_method = tried.setdefault(_conditions(setting), {})
        by_method.setdefault(show(setting.values["method"]), []).append(setting)
    if not any(len(by_method) > 1 and max(map(len, by_method.values())) > 1 for by_method in tried.values()):
        return []
    found = []
    for by_method in tried.values():
        chosen = {method: best(settings) for method, settings in by_method.items()}
        top = best([setting for setting in chosen.values() if setting is not None])
        for method, one in chosen.items():
            if one is not None and top is not None:
                errors = _errors(one.runs, "student"), _errors(top.runs, "student")
                versus = None if one is top else _difference(*errors)
                found.append(Tuned(method, one, len(by_method[method]), one is top, versus))
    return found


def _conditions(setting: Setting) -> tuple[str, ...]:
    """The values of a setting that say on what a method was tried: all but the method, its keys, T, alpha and beta."""
    return tuple(
        show(value) for key, value in setting.values.items() if key not in FIRST[:3] and not key.startswith("method")
    )


def _by_soft_targets(setting: Setting) -> bool:
    return any(run.choices.get("method") in SOFT_TARGETS for run in setting.runs)


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
