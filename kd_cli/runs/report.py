"""Run directories to tables a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of words as a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def run_table(summary: dict[str, Any]) -> str:
    """The table that a run ends with."""
    data = summary["dataset"]
    head = (
        f"{data['name']}: {data['train']:,} training, {data['val']:,} validation, {data['test']:,} test examples, "
        f"{data['classes']} classes; {summary['device']}, {summary['precision']}, seed {summary['seed']}"
    )
    rows = [["", "errors", "accuracy", "NLL", "ECE", "agrees", "parameters", "MFLOPs", "seconds"]]
    by = f" by {summary['method']}"
    for role, name in (("teacher", "teacher"), ("student_alone", "student alone"), ("student", "student" + by)):
        report = summary[role]
        if report is None:
            continue
        test = report["test"]
        agree = test.get("agreement")
        rows.append(
            [
                f"{name} ({report['name']})",
                f"{test['errors']:,}",
                f"{test['accuracy']:.2%}",
                f"{test['nll']:.4f}",
                f"{test['ece']:.4f}",
                "" if agree is None else f"{agree:.2%}",
                f"{report['parameters']:,}",
                f"{report['flops'] / 1e6:,.2f}",
                "stored" if report["from_store"] else f"{report['seconds']:.1f}",
            ]
        )
    return f"\n{head}\n\n{align(rows)}\n\n{verdict(summary)}"


def verdict(summary: dict[str, Any]) -> str:
    """In a sentence, what distillation was worth in this run."""
    if summary["teacher"] is None:
        return f"{summary['method']} has no teacher; T = {summary['T']:g} is not used"
    weights = f"T = {summary['T']:g}, alpha = {summary['alpha']:g}, beta = {summary['beta']:g}"
    alone, student = (summary[role]["test"]["errors"] for role in ("student_alone", "student"))
    if summary["gap_closed"] is None:
        return f"{weights}: {alone} errors alone, {student} distilled; the teacher is no better than the student alone"
    return f"{weights}: {alone} errors alone, {student} distilled, {summary['gap_closed']:.0%} of the gap to the teacher closed"
