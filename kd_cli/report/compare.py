"""Comparing runs: data sets, swept keys, settings with their means, and the best of them.

Runs are compared on one data set at a time. Keys of the configuration that differ between runs are swept; seeds are
averaged over; a setting is one combination of values of the other swept keys. The best setting is chosen by validation
results alone.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kd_cli.numeric import is_number
from kd_cli.report.hidden import MARKS, hidden_differences
from kd_cli.report.read import Run
from kd_cli.report.words import label, show
from kd_cli.roles import ROLES
from kd_cli.statistics import Stat, gap_closed, mean_std, stat

AVERAGED = ("seed", "teacher_training.seed")
# Keys about where and how a run is executed, which make no setting of their own.
NO_SETTING = (
    *("device", "cuda_graphs", "data_dir", "store_dir", "experiment", "diagnostics", "latency"),
    *("resume", "dry_run", "fail_fast", "instead"),
)
FIRST = ("T", "alpha", "beta", "method", "student", "teacher")  # the order in which keys are shown; the rest follow
MEASURES = ("errors", "accuracy", "nll", "ece", "agreement")


@dataclass(frozen=True)
class Setting:
    """The runs that differ in their seeds alone.

    `gap_closed` is computed from the mean errors of the `gap_n` runs that have all three roles. It is not the mean of
    the runs' own shares: a share divides by a difference that can be close to 0 in one run, which would then decide
    the mean. `saved` is the mean over runs of the errors of the student alone minus those of the student.
    """

    values: dict[str, Any]
    runs: tuple[Run, ...]  # the completed ones, without repeats
    student: dict[str, Stat]  # by measure; val_accuracy and val_nll among them
    student_alone: dict[str, Stat]
    teacher: dict[str, Stat]
    saved: Stat | None
    gap_closed: float | None
    gap_n: int
    diverged: int
    pruned: tuple[int, ...]  # of each run that a search ended early: after how many epochs
    failed: int
    unfinished: int
    repeats: int
    changed: int  # models of repeats that are not those of the runs counted: code, data or versions have changed

    @property
    def n(self) -> int:
        return len(self.runs)

    @property
    def label(self) -> str:
        return label(self.values)


@dataclass(frozen=True)
class Comparison:
    """The runs on one data set, the keys swept among them, a Setting for each value, and the best by validation.

    Runs without a result belong to a setting only where another run of it has one; the others are `unlisted`.
    """

    dataset: str
    runs: tuple[Run, ...]
    keys: tuple[str, ...]
    settings: tuple[Setting, ...]
    best: Setting | None
    unlisted: tuple[Run, ...] = ()

    @functools.cached_property
    def listed(self) -> list[Run]:
        """The runs that belong to a setting."""
        left_out = {id(run) for run in self.unlisted}
        return [run for run in self.runs if id(run) not in left_out]

    @functools.cached_property
    def counted(self) -> set[int]:
        """The id() of every run that a mean contains."""
        return {id(run) for setting in self.settings for run in setting.runs}

    @functools.cached_property
    def naming_keys(self) -> list[str]:
        """The keys that distinguish the settings."""
        return distinguishing(self.keys, [setting.values for setting in self.settings])

    def size(self, split: str) -> int | None:
        """Number of examples in train, val or test; None while no run has ended."""
        return next((run.summary["dataset"][split] for run in self.runs if run.summary), None)

    @property
    def close_to_best(self) -> list[Setting]:
        """Settings whose mean validation accuracy is within one standard deviation of the best's."""
        if self.best is None or (top := self.best.student["val_accuracy"]).std is None:
            return []
        stats = ((s, s.student.get("val_accuracy")) for s in self.settings if s is not self.best)
        return [s for s, other in stats if other is not None and top.mean - other.mean <= top.std]


def compare(runs: Sequence[Run], *, unfinished: bool = False) -> list[Comparison]:
    """Group the runs by data set and, in each, by setting.

    With `unfinished`, runs without a result make settings of their own, too.
    """
    comparisons = []
    for dataset, group in _by_data(runs).items():
        unlisted = [] if unfinished else _without_result(group)
        left_out = {id(run) for run in unlisted}
        listed = [run for run in group if id(run) not in left_out]
        keys = swept_keys(listed)
        found = settings(listed, keys)
        comparisons.append(Comparison(dataset, tuple(group), tuple(keys), tuple(found), best(found), tuple(unlisted)))
    return comparisons


def _without_result(runs: Sequence[Run]) -> list[Run]:
    """The runs that neither completed nor diverged, unless another run with the same setting did."""

    def setting(run: Run) -> str:
        config = {k: v for k, v in sorted(run.config.items()) if k not in (*AVERAGED, *NO_SETTING)}
        return json.dumps(config, default=str)

    if all(run.ended for run in runs):
        return []
    known = {setting(run) for run in runs if run.ended}
    return [run for run in runs if not run.ended and setting(run) not in known]


def swept_keys(runs: Sequence[Run]) -> list[str]:
    """The keys in which the runs' settings differ.

    Keys under a group (`student.hidden`) are represented by the group's option (`student`) where they follow from it.
    Seeds, the data set, and where a run was executed are left out.
    """
    skip = (*AVERAGED, *NO_SETTING)
    names = {key for run in runs for key in run.config if key not in skip and not key.startswith("dataset.")}
    differ = {key for key in names if _varies(runs, key)}
    for group in sorted({name for run in runs for name in run.choices} - {"dataset", "experiment"}):
        inside = {key for key in differ if key.startswith(f"{group}.")}
        by_option: dict[str | None, list[Run]] = {}
        for run in runs:
            by_option.setdefault(run.choices.get(group), []).append(run)
        if inside and len(by_option) > 1:
            varied = {key for key in inside if any(_varies(some, key) for some in by_option.values())}
            differ = (differ - inside) | varied | {group}
    differ |= hidden_differences(runs)
    return sorted(differ, key=lambda key: (FIRST.index(key) if key in FIRST else len(FIRST), key))


def value_of(run: Run, key: str) -> Any:
    """A run's value of a swept key: from its configuration, the option of a group, or what the key does not show."""
    if key in MARKS:
        return MARKS[key](run)
    return run.config[key] if key in run.config else run.choices.get(key)


def settings(runs: Sequence[Run], keys: Sequence[str]) -> list[Setting]:
    """One Setting for each combination of the keys' values, in the order of the values."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps([value_of(run, key) for key in keys], default=str), []).append(run)
    made = [_setting({key: value_of(group[0], key) for key in keys}, group) for group in groups.values()]
    return sorted(made, key=lambda setting: [order(value) for value in setting.values.values()])


def order(value: Any) -> tuple[int, float, str]:
    """A sorting key for values of any kind: numbers first, by size."""
    if is_number(value):
        return 0, float(value), ""
    return 1, 0.0, show(value)


def best(settings: Sequence[Setting]) -> Setting | None:
    """The setting with the highest mean validation accuracy; of equal ones that with the lowest validation NLL.

    Test results play no part. Settings with a diverged or pruned run are chosen only if every setting has one: a mean
    over the runs that survived flatters them. None when no setting has validation results.
    """
    candidates = [setting for setting in settings if "val_accuracy" in setting.student]
    candidates = [setting for setting in candidates if not setting.diverged and not setting.pruned] or candidates

    def rank(setting: Setting) -> tuple[float, float]:
        nll = setting.student.get("val_nll")
        return -round(setting.student["val_accuracy"].mean, 12), nll.mean if nll else float("inf")

    return min(candidates, key=rank, default=None)


def distinguishing(keys: Sequence[str], values: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys needed to distinguish the values.

    Constant keys are dropped, then, from the last on, keys implied by the rest. T, alpha and beta are kept wherever
    they differ.
    """

    def combinations(some: Sequence[str]) -> int:
        return len({tuple(show(value[key]) for key in some) for value in values})

    kept = [key for key in keys if combinations([key]) > 1]
    for key in reversed([key for key in kept if key not in FIRST[:3]]):
        fewer = [other for other in kept if other != key]
        if combinations(fewer) == combinations(kept):
            kept = fewer
    return kept


def _setting(values: dict[str, Any], group: Sequence[Run]) -> Setting:
    completed = [run for run in group if run.status == "completed"]
    # The same configuration and seeds run twice is no new evidence: the later one counts.
    latest = {tuple(show(run.config.get(key)) for key in AVERAGED): run for run in completed}
    runs = tuple(latest.values())
    student = {
        **{measure: stat(run.test("student", measure) for run in runs) for measure in MEASURES},
        **{measure: stat(run.validation(measure) for run in runs) for measure in ("val_accuracy", "val_nll")},
    }
    triples = [tuple(run.test(role, "errors") for role in ROLES) for run in runs]
    whole = [[float(x) for x in triple if x is not None] for triple in triples if None not in triple]
    saved = [alone - errors for _, alone, errors in triples if alone is not None and errors is not None]
    return Setting(
        values=values,
        runs=runs,
        student={measure: value for measure, value in student.items() if value is not None},
        student_alone=_results(models_of(runs, "student_alone"), "student_alone"),
        teacher=_results(models_of(runs, "teacher"), "teacher"),
        saved=stat(saved),
        gap_closed=gap_closed(*(mean_std(errors).mean for errors in zip(*whole, strict=True))) if whole else None,
        gap_n=len(whole),
        diverged=sum(run.status == "diverged" for run in group),
        pruned=tuple(int(run.summary["pruned_after"]) for run in group if run.status == "pruned"),
        failed=sum(run.status == "failed" for run in group),
        unfinished=sum(run.status not in ("completed", "diverged", "pruned", "failed") for run in group),
        repeats=len(completed) - len(runs),
        changed=len({run.fingerprint for run in completed} - {run.fingerprint for run in runs}),
    )


def families(settings: Iterable[Setting], role: str) -> list[tuple[list[Setting], dict[str, Stat]]]:
    """The distinct teachers, or students alone: the settings that share models, and the results of those models.

    A setting with fewer seeds than others belongs to those with which it shares a model.
    """
    found: list[tuple[list[Setting], dict[str, Run]]] = []
    for setting in settings:
        members, models = [setting], models_of(setting.runs, role)
        if not models:
            continue
        for other in [other for other in found if other[1].keys() & models.keys()]:
            found.remove(other)
            members, models = [*other[0], *members], {**other[1], **models}
        found.append((members, models))
    return [(members, _results(models, role)) for members, models in found]


def models_of(runs: Iterable[Run], role: str) -> dict[str, Run]:
    """The distinct models of a role by fingerprint, each with a run that has its results."""
    return {run.summary[role]["fingerprint"]: run for run in runs if run.summary.get(role)}


def _results(models: Mapping[str, Run], role: str) -> dict[str, Stat]:
    return {m: s for m in MEASURES if (s := stat(run.test(role, m) for run in models.values()))}


def baselines(comparison: Comparison, role: str) -> list[tuple[str, dict[str, Stat]]]:
    """The distinct teachers, or students alone: the keys that distinguish it from the others, and its results."""
    names, found = [], families(comparison.settings, role)
    for group, stats in found:
        same = {k: v for k, v in group[0].values.items() if all(show(s.values[k]) == show(v) for s in group)}
        relevant = {k: v for k, v in same.items() if _matters(role, k)} or same
        names.append((label(relevant) if len(found) > 1 else "", stats))
    return names


def _matters(role: str, key: str) -> bool:
    """Whether a key can make a difference to a teacher or a student alone."""
    if role == "teacher":
        return key.startswith("teacher") or key == "precision"
    return not key.startswith(("teacher", "method")) and key not in ("T", "alpha", "beta")


def _varies(runs: Iterable[Run], key: str) -> bool:
    return len({json.dumps(run.config.get(key, "(not set)"), default=str) for run in runs}) > 1


def _by_data(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each data set, under a name of its own. Equal data is one set whatever its path."""
    described = {
        id(run): json.dumps({k: v for k, v in run.config.items() if k.startswith("dataset.")}, default=str)
        for run in runs
    }
    known = {described[id(run)]: run.summary["dataset"]["fingerprint"] for run in runs if run.summary}
    groups: dict[str, list[Run]] = {}
    for run in runs:
        description = described[id(run)]
        mark = run.summary["dataset"]["fingerprint"] if run.summary else known.get(description, description)
        groups.setdefault(mark, []).append(run)
    names = [group[0].choices.get("dataset", "data") for group in groups.values()]
    named: dict[str, list[Run]] = {}
    for (mark, group), name in zip(groups.items(), names, strict=True):
        if names.count(name) > 1:
            rivals = [other[0] for other, same in zip(groups.values(), names, strict=True) if same == name]
            differ = [key for key in group[0].config if key.startswith("dataset.") and _varies(rivals, key)]
            name += f" ({', '.join(f'{key[8:]}={show(group[0].config[key])}' for key in differ) or mark[:6]})"
        named[name if name not in named else f"{name} {mark[:6]}"] = group
    return named
