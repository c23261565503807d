"""Tables as plain text, and the CSV file of a sweep."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_cli.report.answers import answer
from kd_cli.report.chains import assistants, link_name, together
from kd_cli.report.churn import churn
from kd_cli.report.compare import AVERAGED, FIRST, MEASURES, Comparison, Setting, baselines, value_of
from kd_cli.report.differences import from_alone, from_soft_targets, tuned_methods
from kd_cli.report.peers import peers_of
from kd_cli.report.read import Run
from kd_cli.report.words import (
    changed_models,
    counts,
    difference,
    effect,
    from_to,
    name_of,
    next_step,
    not_listed,
    percent,
    plus_minus,
    relative,
    share,
    show,
    sizes,
    tally,
    verdict,
    worst_class,
)
from kd_cli.roles import ROLE_NAMES, ROLES
from kd_cli.statistics import Difference, Stat

VERSUS = ("vs alone", "vs soft targets")  # the columns of differences
WIDTH = 100  # characters of a sweep's table


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of words as a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def wrap(text: str, width: int = 110) -> str:
    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


# ---------------------------------------------------------------- a sweep


def sweep_table(comparisons: Sequence[Comparison]) -> str:
    """The table that a sweep ends with; runs without a result are counted below it."""
    parts = [_comparison_table(comparison) for comparison in shown(comparisons)]
    return "\n\n".join([*parts, *filter(None, [wrap(not_listed(comparisons))])])


def shown(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons that have a setting to show; all of them when none has."""
    return [comparison for comparison in comparisons if comparison.settings] or list(comparisons)


def _comparison_table(comparison: Comparison) -> str:
    head = f"{comparison.dataset}: {sizes(comparison)}{tally(comparison.runs)}; mean ± std over n seeds"
    title, text = answer(comparison)
    star = "* " if comparison.best and len(comparison.settings) > 1 else ""
    sentences = f"{star}{title}\n{wrap(text)}"
    if changed := changed_models(comparison):
        sentences += f"\n{wrap(changed)}"
    if not comparison.settings:
        return f"{head}\n\n{sentences}"
    names = [name_of(setting, comparison) for setting in comparison.settings]
    corner = ""
    if len(comparison.keys) > 1:  # a column for each key is narrower than its name in every row
        values = [[show(value) for value in setting.values.values()] for setting in comparison.settings]
        corner, *names = align([comparison.keys, *values]).splitlines()
    measured = ("accuracy", "agrees", "NLL", "ECE", "gap", "churn")
    rows = [[corner, "val accuracy", "test errors", *VERSUS, *measured, "n"]]
    for name, setting in zip(names, comparison.settings, strict=True):
        mark = " *" if star and setting is comparison.best else ""
        first, *more = _measures(setting.student)
        versus = [_versus(value) for value in (from_alone(setting), from_soft_targets(setting, comparison))]
        last = [percent(setting.gap_closed), share(churn(setting, "student")), counts(setting)]
        rows.append([name + mark, first, more[0], *versus, *more[1:], *last])
    others = together(comparison) + peers_of(comparison)
    for role in ("student_alone", "teacher"):
        others += assistants(comparison) if role == "teacher" else []
        for which, stats in baselines(comparison, role):
            others.append((f"{ROLE_NAMES[role]} ({which})" if which else ROLE_NAMES[role], stats))
    for name, stats in others:
        first, *more = _measures(stats)
        rows.append([name, first, more[0], "", "", *more[1:], "", "", str(stats["errors"].n)])
    _narrow(rows)
    return f"{head}\n\n{align(rows)}\n{_legend(comparison)}\n{_methods(comparison)}{sentences}"


def _methods(comparison: Comparison) -> str:
    """The table of methods, each at its best setting by validation; empty where there is none to make."""
    tuned = tuned_methods(comparison)
    if not tuned:
        return ""
    rows = [["method at its best", "val accuracy", "test errors", "vs soft targets", "vs the best", "n"]]
    for one in tuned:
        setting = one.setting
        versus = [_versus(value) for value in (from_soft_targets(setting, comparison), one.from_best)]
        accuracy, errors = (setting.student.get(key) for key in ("val_accuracy", "errors"))
        name = name_of(setting, comparison) + (" *" if one.is_best else "")
        rows.append([name, plus_minus(accuracy, ".2%"), plus_minus(errors, ",.1f"), *versus, counts(setting)])
    _narrow(rows, "vs the best")
    tried = from_to({one.tried for one in tuned})
    return f"{align(rows)}\nthe highest mean validation accuracy of {tried} settings of each method\n\n"


def _versus(value: Difference | None) -> str:
    """A difference and what it shows, in few characters: -2.0 ± 1.1 helps."""
    return "" if value is None else f"{difference(value)} {effect(value) if value.sign else '?'}"


def _legend(comparison: Comparison) -> str:
    """What the columns of differences show; empty where there are none."""
    found = [from_alone(setting) for setting in comparison.settings]
    found += [from_soft_targets(setting, comparison) for setting in comparison.settings]
    if not any(found):
        return ""
    unclear = {value.n for value in found if value and not value.sign}
    more = f"; ? cannot be told with n = {from_to(unclear)}" if unclear else ""
    return f"vs: difference in errors, paired by seed, ± its 95 % interval{more}\n"


def _narrow(rows: list[list[str]], *more: str) -> None:
    """Delete empty columns and, while the table is too wide, the least important ones; the CSV file has them all."""
    empty = [name for i, name in enumerate(rows[0]) if i and not any(row[i] for row in rows[1:])]
    for name in (*empty, "accuracy", "ECE", "NLL", "agrees", "churn", "gap", "val accuracy", *more):
        if name in rows[0] and (name in empty or align(rows).index("\n") > WIDTH):
            column = rows[0].index(name)
            for row in rows:
                del row[column]


def _measures(stats: Mapping[str, Stat]) -> list[str]:
    forms = (
        ("val_accuracy", ".2%"),
        ("errors", ",.1f"),
        ("accuracy", ".2%"),
        ("agreement", ".1%"),
        ("nll", ".3f"),
        ("ece", ".3f"),
    )
    return [plus_minus(stats.get(measure), form) for measure, form in forms]


def sweep_csv(comparisons: Sequence[Comparison], root: Path) -> str:
    """One row for each run, with all swept keys and all results; `counted` is 1 where a mean contains the run."""
    keys = list(dict.fromkeys(key for comparison in comparisons for key in comparison.keys))
    keys = [*(key for key in FIRST[:4] if key not in keys), *keys]  # these are always of interest
    automatic = any(run.config.get(key) == "auto" for c in comparisons for run in c.runs for key in ("T", "alpha"))
    rows = []
    for comparison in comparisons:
        setting_of = {id(run): setting for setting in comparison.settings for run in setting.runs}
        same = {id(setting): _csv_churn(setting) for setting in comparison.settings}
        for run in comparison.runs:
            setting = setting_of.get(id(run))
            more = _csv_versus(setting, comparison) | same.get(id(setting), _csv_churn(None))
            rows.append(_csv_row(run, comparison, keys, root, automatic=automatic) | more)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _csv_versus(setting: Setting | None, comparison: Comparison) -> dict[str, Any]:
    """The differences of a run's setting, the same in all its runs; empty where no mean contains the run."""
    row: dict[str, Any] = {}
    for name in ("alone", "soft_targets"):
        value = None
        if setting is not None:
            value = from_alone(setting) if name == "alone" else from_soft_targets(setting, comparison)
        facts = (None,) * 4 if value is None else (*value, effect(value))
        row |= zip((f"vs_{name}", f"vs_{name}_ci95", f"vs_{name}_n", f"vs_{name}_shows"), facts, strict=True)
    return row


def _csv_churn(setting: Setting | None) -> dict[str, Any]:
    """The churn of a run's setting, the same in all its runs."""
    roles = {"churn": "student", "churn_alone": "student_alone"}
    return {name: None if setting is None else churn(setting, role) for name, role in roles.items()}


def _csv_row(run: Run, comparison: Comparison, keys: Sequence[str], root: Path, *, automatic: bool) -> dict[str, Any]:
    chosen = comparison.best is not None and any(run is other for other in comparison.best.runs)
    row: dict[str, Any] = {"run": relative(run.path, root), "status": run.status, "dataset": comparison.dataset}
    row |= {key: show(value_of(run, key)) for key in keys}
    if automatic:
        row |= {f"{key}_used": show(run.summary.get(key, "")) for key in ("T", "alpha")}
    row |= {key: show(run.config.get(key)) for key in AVERAGED}
    row |= {"counted": int(id(run) in comparison.counted), "best_by_validation": int(chosen)}
    row |= {measure: run.validation(measure) for measure in ("val_accuracy", "val_nll")}
    for role in reversed(ROLES):
        report = run.summary.get(role) or {}
        row[f"{role}_name"] = report.get("name", run.choices.get(role, ""))
        row |= {f"{role}_{measure}": (report.get("test") or {}).get(measure) for measure in ("total", *MEASURES)}
        facts = ("parameters", "flops", "epochs", "seconds", "fingerprint")
        row |= {f"{role}_{fact}": report.get(fact) for fact in facts}
    return row | {"gap_closed": run.summary.get("gap_closed"), "cause": run.cause}


# ---------------------------------------------------------------- a run


def answers(data: Mapping[str, Any]) -> str:
    """What a model answers, from a summary's `dataset`: 10 classes, 3 independent labels, 1 label."""
    n = data["classes"]
    if not data.get("multilabel"):
        return f"{n} classes"
    return "1 label" if n == 1 else f"{n} independent labels"


def run_table(summary: Mapping[str, Any]) -> str:
    """The table that a run ends with."""
    data = summary["dataset"]
    head = (
        f"{data['name']}: {data['train']:,} training, {data['val']:,} validation, {data['test']:,} test examples, "
        f"{answers(data)}; {summary['device']}, {summary['precision']}, seed {summary['seed']}"
    )
    worst = worst_class(summary)
    said = verdict(summary)
    words = "\n".join(
        filter(None, (wrap(said) if "peers" in summary else said, next_step(summary), worst and wrap(worst)))
    )
    return f"\n{head}\n\n{align(role_rows(summary))}\n\n{words}"


def role_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """A heading and a row for the teacher, the student alone and the student, as far as the run has them.

    Of students that learned from each other, the others follow, each alone and by the method.
    """
    rows = [["", "errors", "accuracy", "NLL", "ECE", "agrees", "parameters", "MFLOPs", "seconds"]]
    generations = summary.get("generations")
    for role in ROLES:
        if (report := summary[role]) is not None:
            by = f" by {summary['method']}" if role == "student" else ""
            rows.append(role_row(f"{ROLE_NAMES[role]}{by} ({report['name']})", report))
        if role == "teacher":
            rows += chain_rows(summary)
    if generations:
        name = f"generations 1 to {generations['members']} together, {generations['combine']} mean"
        rows.append(role_row(name, generations))
    for k, report in enumerate(summary.get("peers", {}).get("peers", ())):
        if k:
            which = f"({report['name']}, seed {report['seed']})"
            if report.get("learned_on"):
                rows.append(role_row(f"teacher, having learned on as peer {k} ({report['name']})", report))
                continue
            rows.append(role_row(f"peer {k} alone {which}", report["alone"]))
            rows.append(role_row(f"peer {k} by {summary['method']} {which}", report))
    if (mean := summary.get("peers", {}).get("together")) is not None:
        rows.append(role_row(f"the {mean['members']} peers together, {mean['combine']} mean", mean))
    return rows


MEASURES_OF_A_ROLE = (("errors", ",d"), ("accuracy", ".2%"), ("nll", ".4f"), ("ece", ".4f"), ("agreement", ".2%"))


def chain_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """A row for each model between teacher and student, in the order in which they teach each other."""
    return [
        role_row(f"{link_name(summary, k)} by {summary['method']} ({report['name']})", report)
        for k, report in enumerate(summary.get("chain", ()))
    ]


def role_row(name: str, report: Mapping[str, Any]) -> list[str]:
    """The row of one model."""
    test = report["test"] or {}  # a teacher that is a file of answers may have none to test data

    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        name,
        *(shown(test.get(key), form) for key, form in MEASURES_OF_A_ROLE),
        shown(report["parameters"], ",d"),
        "" if report["flops"] is None else f"{report['flops'] / 1e6:,.2f}",
        "stored" if report.get("from_store") else f"{report['seconds']:.1f}" if "seconds" in report else "",
    ]
