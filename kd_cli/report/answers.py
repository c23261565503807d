"""What the runs of a comparison show, in sentences."""

from __future__ import annotations

from kd_cli.report.compare import Comparison, Setting
from kd_cli.report.differences import from_alone, from_soft_targets
from kd_cli.report.words import difference, effect, name_of, percent, plus_minus, seeds, tally, what_to_try


def answer(comparison: Comparison) -> tuple[str, str]:
    """What the runs show: a headline with the setting, and sentences on what it is worth on the test set."""
    setting = comparison.best
    head = f"best by validation: {name_of(setting, comparison)}" if setting else ""
    if len(comparison.settings) == 1:
        setting = comparison.settings[0]
        head = name_of(setting, comparison)
    if setting is None:
        if any(s.n for s in comparison.settings):
            why = "There are no validation results to choose by, and the test set is not for choosing."
            return "no setting is chosen", why
        return "nothing to compare yet", f"{tally(comparison.runs)}."
    if not setting.n:
        return head, f"No run has completed: {tally(comparison.runs)}."
    return (
        head,
        f"{_errors(setting, comparison)}{_gap(setting)}{_paired(setting, comparison)}{_certainty(setting, comparison)}",
    )


def _errors(setting: Setting, comparison: Comparison) -> str:
    errors = plus_minus(setting.student["errors"])
    parts = [f"{errors} errors on {comparison.size('test'):,} test examples ({seeds(setting.n)})"]
    if alone := setting.student_alone.get("errors"):
        parts.append(f"the student alone {plus_minus(alone)} (n = {alone.n})")
    if teacher := setting.teacher.get("errors"):
        parts.append(f"the teacher {plus_minus(teacher)} (n = {teacher.n})")
    return ", ".join(parts)


def _gap(setting: Setting) -> str:
    if setting.gap_closed is not None and setting.gap_closed <= 0:
        return f"; on average no better than alone. {what_to_try(setting.runs[0].summary)}."
    if setting.gap_closed is not None:
        return f": {percent(setting.gap_closed)} of the gap to the teacher closed."
    if setting.gap_n:
        return "; the teacher is no better than the student alone, so there is no gap to close."
    return "; without a teacher, there is no gap to speak of."


def _paired(setting: Setting, comparison: Comparison) -> str:
    """The differences to the student alone and to tuned soft targets, where there is more than one seed."""
    found = (("the student alone", from_alone(setting)), ("tuned soft targets", from_soft_targets(setting, comparison)))
    known = [f"{difference(value)} to {name} ({effect(value)})" for name, value in found if value]
    return f" Difference in errors, paired by seed: {', '.join(known)}." if known and setting.n > 1 else ""


def _certainty(setting: Setting, comparison: Comparison) -> str:
    if setting.n == 1:
        return " One seed cannot tell a difference from chance; add seeds, e.g. 'seed=range(5)'."
    if close := comparison.close_to_best:
        names = [name_of(other, comparison) for other in close]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return f" Validation does not tell it from {'; '.join(names[:4])}{more} (within one standard deviation)."
    return ""
