"""Numbers, values and results in words, for tables and pages alike."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_cli.statistics import Difference, Stat

if TYPE_CHECKING:
    from kd_cli.report.compare import Comparison, Setting
    from kd_cli.report.read import Run

BELOW = 0.2  # how far below the accuracy a class's recall must be to be named


def show(value: Any) -> str:
    """A configuration value as it is typed on the command line."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False) if isinstance(value, list) else str(value)


def label(values: Mapping[str, Any]) -> str:
    """A setting in words: T=2, beta=0.5."""
    return ", ".join(f"{key}={show(value)}" for key, value in values.items())


def formatted(value: float, form: str) -> str:
    """The number in this format, without the sign of a zero: 0, never -0."""
    text = f"{value:{form}}"
    return text.removeprefix("-") if text.startswith("-") and not any(c in "123456789" for c in text) else text


def plus_minus(value: Stat | None, form: str = ",.1f") -> str:
    """Mean ± std; the mean alone when there is one value, and nothing when there is none."""
    if value is None:
        return ""
    if value.std is None:
        return formatted(value.mean, ",.0f" if form == ",.1f" and value.mean == int(value.mean) else form)
    return f"{formatted(value.mean, form).removesuffix('%')} ± {value.std:{form}}"


def percent(value: float | None) -> str:
    return "" if value is None else formatted(value, ".0%")


def share(value: float | None) -> str:
    return "" if value is None else formatted(value, ".1%")


def effect(value: Difference) -> str:
    """What the student's errors less another's show: helps, harms, or cannot be told with n = 3."""
    return {-1: "helps", 0: f"cannot be told with n = {value.n}", 1: "harms"}[value.sign]


def difference(value: Difference | None) -> str:
    """A difference in errors with its 95 % interval, -2.0 ± 1.1; the mean alone where there is no interval."""
    if value is None:
        return ""
    text = formatted(value.mean, "+,.1f")
    text = "0.0" if text == "+0.0" else text
    return text if value.half is None else f"{text} ± {value.half:,.1f}"


def seeds(n: int) -> str:
    return "one seed" if n == 1 else f"mean ± std, n = {n} seeds"


def from_to(values: set[int]) -> str:
    """2, or 2 to 5."""
    low, high = min(values), max(values)
    return str(low) if low == high else f"{low} to {high}"


def tally(runs: Sequence[Run]) -> str:
    """How many runs there are, by status."""
    numbers = Counter(run.status for run in runs)
    return f"{len(runs):,} {'run' if len(runs) == 1 else 'runs'}: {by_status(numbers)}"


def by_status(numbers: Mapping[str, int]) -> str:
    return ", ".join(f"{n:,} {status}" for status, n in numbers.items())


def not_listed(comparisons: Sequence[Comparison]) -> str:
    """A sentence on the runs that no table lists because they have no result; empty when there are none."""
    runs = [run for comparison in comparisons for run in comparison.unlisted]
    if not runs:
        return ""
    number = "1 run without a result is" if len(runs) == 1 else f"{len(runs):,} runs without a result are"
    return f"{number} not listed ({by_status(Counter(run.status for run in runs))}); kd-report --unfinished lists them"


def one_setting(comparison: Comparison) -> str:
    """What all runs of a comparison without swept keys have in common."""
    run = comparison.runs[0]
    parts = {key: run.config.get(key) for key in ("T", "alpha", "beta")}
    return f"{run.choices.get('method', '')} with {label(parts)}".removeprefix(" with ")


def name_of(setting: Setting, comparison: Comparison) -> str:
    """A setting by the values that distinguish it from the others; the tables have the rest."""
    return label({key: setting.values[key] for key in comparison.naming_keys}) or one_setting(comparison)


def warnings(comparison: Comparison) -> list[str]:
    """Sentences on the runs that no mean contains."""
    out = []
    if lost := [s for s in comparison.settings if s.diverged]:
        total = sum(s.diverged for s in lost)
        names = "; ".join(name_of(s, comparison) for s in lost[:6]) + (" and others" if len(lost) > 6 else "")
        out.append(f"{total} {'run diverged and is' if total == 1 else 'runs diverged and are'} in no mean: {names}.")
    if repeats := sum(s.repeats for s in comparison.settings):
        have = "run repeats" if repeats == 1 else "runs repeat"
        out.append(f"{repeats} {have} another one, seeds included; the latest of each is counted.")
    if changed := changed_models(comparison):
        out.append(changed)
    return out


def changed_models(comparison: Comparison) -> str:
    """A sentence on runs of equal settings and seeds whose models differ all the same; empty when there are none."""
    if not (changed := sum(s.changed for s in comparison.settings)):
        return ""
    runs = "1 of these runs has" if changed == 1 else f"{changed} of these runs have"
    return (
        f"{runs} the settings and seeds of a later one and another model: code, teacher or versions changed in between."
    )


def run_notes(runs: Sequence[Run]) -> list[str]:
    """What the runs noted on what was left out, changed, filled in or guessed; with the number of runs unless all."""
    ended = [run for run in runs if run.summary]
    counts = Counter(note for run in ended for note in dict.fromkeys(run.summary.get("notes", ())))
    return [note if n == len(ended) else f"{note} ({n} of {len(ended):,} runs)" for note, n in counts.items()]


def trained_together(summary: Mapping[str, Any]) -> str:
    """What else was trained together with a run's student, and how equal that leaves it; nothing where nothing was."""
    facts = summary.get("trained_with")  # absent from the summaries of earlier versions
    if not facts:
        return ""
    counts = {"in one stack with": len(facts["in_one_stack"]), "side by side with": len(facts["side_by_side"])}
    ways = [f"{way} {n} other{'s' * (n > 1)}" for way, n in counts.items() if n]
    equal = (
        "equal to a run alone up to rounding" if facts["equal_to_alone"] == "rounding" else "the bytes of a run alone"
    )
    return f"trained {' and '.join(ways)}: {equal}"


def sizes(comparison: Comparison) -> str:
    """How many examples chose and tested: 200 validation, 597 test examples; nothing while no run has ended."""
    known = [(comparison.size(split), word) for split, word in (("val", "validation"), ("test", "test"))]
    listed = ", ".join(f"{size:,} {word}" for size, word in known if size)
    return f"{listed} examples; " if listed else ""


def counts(setting: Setting) -> str:
    """n, and the runs that no mean contains: 3 (1 diverged), 0 (3 pruned after epoch 10)."""
    lost = [f"{k} {word}" for word in ("diverged", "failed", "unfinished") if (k := getattr(setting, word))]
    if setting.pruned:
        lost.append(f"{len(setting.pruned)} pruned after epoch {from_to(set(setting.pruned))}")
    return f"{setting.n} ({', '.join(lost)})" if lost else str(setting.n)


def verdict(summary: Mapping[str, Any]) -> str:
    """In a sentence, what distillation was worth in one run."""
    if summary["status"] == "diverged":
        return f"diverged: {summary.get('cause', 'a loss is not a finite number')}"
    if summary["status"] == "pruned":
        return f"pruned: {summary['cause']}"
    if "peers" in summary:
        return peers_verdict(summary)
    if summary["teacher"] is None:
        return f"{summary['method']} has no teacher; T = {show(summary['T'])} is not used"
    weights = ", ".join(f"{key} = {show(summary[key])}" for key in ("T", "alpha", "beta"))
    if "generations" in summary:
        weights += f", generation {summary['generations']['members']}"
    elif summary.get("chain"):
        weights += f", by way of {', '.join(link['name'] for link in summary['chain'])}"
    if "auto" in summary:
        weights += f" ({' and '.join(summary['auto']['keys'])} chosen on validation data)"
    if summary["student"] is None or summary["student_alone"] is None:
        return f"{weights}: there is no result to compare"
    alone, student = (summary[role]["test"]["errors"] for role in ("student_alone", "student"))
    if summary["teacher"]["test"] is None:
        return f"{weights}: {alone} errors alone, {student} distilled; the teacher's own are not known"
    if summary["gap_closed"] is None:
        return f"{weights}: {alone} errors alone, {student} distilled; the teacher is no better than the student alone"
    gap = alone - summary["teacher"]["test"]["errors"]
    errors = f"{weights}: {alone} errors alone, {student} distilled"
    if student > alone:  # a share would say little: 14 errors more are -1400 % of a gap of one
        return f"{errors}: {student - alone} more than alone, where the teacher makes {gap} fewer"
    return f"{errors}, {percent(summary['gap_closed'])} of the gap to the teacher closed"


def peers_verdict(summary: Mapping[str, Any]) -> str:
    """In a sentence, what it was worth to students that they learned from each other."""
    facts = summary["peers"]
    weights = ", ".join(f"{key} = {show(summary[key])}" for key in ("T", "alpha", "beta"))
    best = ""
    if facts["best"] is not None:
        best = (
            f"; the best by validation is peer {facts['best']}, with {facts['peers'][facts['best']]['test']['errors']}"
        )
    n = sum(not one.get("learned_on") for one in facts["peers"])
    if n < len(facts["peers"]):
        before, after = summary["teacher"]["test"]["errors"], facts["peers"][-1]["test"]["errors"]
        best += f"; the teacher, which learned on with them, makes {after}, and made {before} before"
    if "together" in facts:
        best += f"; the mean of all peers' answers makes {facts['together']['test']['errors']}"
    if shares := [one["gap_closed"] for one in facts["peers"] if one.get("gap_closed") is not None]:
        best += f"; of the gap to the teacher they close {', '.join(map(percent, shares))}"
    return (
        f"{weights}: {facts['mean_errors_alone']:.1f} errors alone, {facts['mean_errors']:.1f} by learning from each "
        f"other, as means of {n} peer{'s' * (n > 1)}; two agree on {facts['agreement']:.1%} of the test "
        f"examples{best}"
    )


def next_step(summary: Mapping[str, Any]) -> str:
    """What to try after a run whose student made more errors than alone; empty after other runs."""
    reports = [summary[role] for role in ("student_alone", "student")]
    if summary["teacher"] is None or None in reports:
        return ""
    alone, student = (report["test"]["errors"] for report in reports)
    if student <= alone:
        return ""
    return f"advice: distillation made this student worse. {what_to_try(summary)}{_validation(*reports)}"


def what_to_try(summary: Mapping[str, Any]) -> str:
    """What may help a student that got worse, of the keys that its method has."""
    unused = summary.get("unused", ())
    words = ["T=auto"] if "auto" not in summary and "T" not in unused else []
    words += ["more epochs", *(["a smaller alpha"] if "alpha" not in unused else [])]
    return f"Try {' or '.join(filter(None, [', '.join(words[:-1]), words[-1]]))}, and choose by the validation accuracy"


def _validation(alone: Mapping[str, Any], student: Mapping[str, Any]) -> str:
    """The validation accuracies of both students, where there is validation data."""
    before, after = ((report.get("val") or {}).get("accuracy") for report in (alone, student))
    return "" if before is None or after is None else f": {before:.1%} alone, {after:.1%} distilled"


def worst_class(summary: Mapping[str, Any]) -> str:
    """A sentence on the class of lowest recall, where that is clearly below the student's accuracy; else empty."""
    report = summary["student"] or summary["student_alone"] or summary["teacher"]
    worst = report["test"].get("worst_class") if report and report["test"] else None
    if not worst or not worst["examples"] or worst["recall"] is None:
        return ""
    accuracy, n = report["test"]["accuracy"], worst["examples"]
    # three standard deviations of a share, with one example of each kind added so that none is certain
    chance = 3 * math.sqrt((accuracy * n + 1) * ((1 - accuracy) * n + 1)) / (n + 2) / math.sqrt(n)
    if worst["recall"] > accuracy - max(BELOW, chance):
        return ""
    return (
        f"worst class of {report['name']}: {worst['name']}, of whose {n:,} test examples {worst['recall']:.1%} are "
        f"classified correctly; the mean over the classes is {report['test']['balanced_accuracy']:.2%}"
    )


def relative(path: Path, root: Path) -> str:
    """The path as seen from root, with forward slashes; absolute where there is no way (another drive)."""
    try:
        return Path(os.path.relpath(path.resolve(), root.resolve())).as_posix()
    except ValueError:
        return path.resolve().as_posix()
