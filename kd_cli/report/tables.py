"""Tables as plain text, and the CSV file of a sweep."""

from __future__ import annotations

import csv
import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_cli.report.compare import AVERAGED, FIRST, MEASURES, Comparison, baselines, value_of
from kd_cli.report.read import Run
from kd_cli.report.words import (
    answer,
    changed_models,
    counts,
    name_of,
    not_listed,
    percent,
    plus_minus,
    relative,
    show,
    sizes,
    tally,
    verdict,
    worst_class,
)
from kd_cli.roles import ROLE_NAMES, ROLES
from kd_cli.statistics import Stat

WIDTH = 120  # characters of a sweep's table


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
    rows = [[corner, "val accuracy", "test errors", "accuracy", "agrees", "NLL", "ECE", "gap", "n"]]
    for name, setting in zip(names, comparison.settings, strict=True):
        mark = " *" if star and setting is comparison.best else ""
        rows.append([name + mark, *_measures(setting.student), percent(setting.gap_closed), counts(setting)])
    for role in ("student_alone", "teacher"):
        for which, stats in baselines(comparison, role):
            name = f"{ROLE_NAMES[role]} ({which})" if which else ROLE_NAMES[role]
            rows.append([name, *_measures(stats), "", str(stats["errors"].n)])
    _narrow(rows)
    return f"{head}\n\n{align(rows)}\n\n{sentences}"


def _narrow(rows: list[list[str]]) -> None:
    """Delete empty columns and, while the table is too wide, the least important ones; the CSV file has them all."""
    empty = [name for i, name in enumerate(rows[0]) if i and not any(row[i] for row in rows[1:])]
    for name in (*empty, "accuracy", "ECE", "NLL", "agrees"):
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
    rows = [
        _csv_row(run, comparison, keys, root, automatic=automatic)
        for comparison in comparisons
        for run in comparison.runs
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


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
        row |= {f"{role}_{measure}": report.get("test", {}).get(measure) for measure in ("total", *MEASURES)}
        facts = ("parameters", "flops", "epochs", "seconds", "fingerprint")
        row |= {f"{role}_{fact}": report.get(fact) for fact in facts}
    return row | {"gap_closed": run.summary.get("gap_closed"), "cause": run.cause}


# ---------------------------------------------------------------- a run


def run_table(summary: Mapping[str, Any]) -> str:
    """The table that a run ends with."""
    data = summary["dataset"]
    head = (
        f"{data['name']}: {data['train']:,} training, {data['val']:,} validation, {data['test']:,} test examples, "
        f"{data['classes']} classes; {summary['device']}, {summary['precision']}, seed {summary['seed']}"
    )
    worst = worst_class(summary)
    return f"\n{head}\n\n{align(role_rows(summary))}\n\n{verdict(summary)}" + (f"\n{wrap(worst)}" if worst else "")


def role_rows(summary: Mapping[str, Any]) -> list[list[str]]:
    """A heading and a row for the teacher, the student alone and the student, as far as the run has them."""
    rows = [["", "errors", "accuracy", "NLL", "ECE", "agrees", "parameters", "MFLOPs", "seconds"]]
    for role in ROLES:
        report = summary[role]
        if report is None:
            continue
        test, agree = report["test"], report["test"].get("agreement")
        by = f" by {summary['method']}" if role == "student" else ""
        rows.append(
            [
                f"{ROLE_NAMES[role]}{by} ({report['name']})",
                f"{test['errors']:,}",
                f"{test['accuracy']:.2%}",
                "" if test["nll"] is None else f"{test['nll']:.4f}",
                "" if test["ece"] is None else f"{test['ece']:.4f}",
                "" if agree is None else f"{agree:.2%}",
                f"{report['parameters']:,}",
                f"{report['flops'] / 1e6:,.2f}",
                "stored" if report["from_store"] else f"{report['seconds']:.1f}",
            ]
        )
    return rows
