"""Pruned students beside students that have the smaller size from the start, by seed, with what all of them cost."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kd_cli.errors import DataError
from kd_cli.experiments.quantised import shown
from kd_cli.experiments.recorded import completed, configuration
from kd_cli.export.latency import side_by_side, threads
from kd_cli.export.load import load_student
from kd_cli.report.read import Run
from kd_cli.runs.device_data import load_device_data
from kd_cli.statistics import mean_std, paired
from kd_cli.storage.files import write_json, write_text

log = logging.getLogger(__name__)

Row = dict[str, Any]
ROLES = ("student", "student_alone")
SIZE = ("before", "parameters")  # of a student: parameters that training began with, and that it ended with


def pruned(folder: Path) -> list[Path]:
    """Compare the students of a sweep over sizes, `student.prune` and seeds; those of equal size are paired by seed.

    Latencies are PyTorch's for one example on one thread, measured side by side. Writes pruned.md and pruned.json.
    Raises DataError without a pruned student and an unpruned one of its size.
    """
    runs = completed(folder)
    rows = [row_of(run) for run in runs]
    first = {tuple(row[key] for key in SIZE): run for row, run in reversed(list(zip(rows, runs, strict=True)))}
    latency = latencies(first)
    for row in rows:
        row["median_ms"] = latency[tuple(row[key] for key in SIZE)]
    pairs = matched(rows)
    if not pairs:
        raise DataError(
            f"{folder} has no pruned student and a student that has its size from the start, with the same seed",
            hint="kd-run experiment=pruned_digits",
        )
    text = table(rows, runs[0].summary, pairs)
    write_json(folder / "pruned.json", rows)
    write_text(folder / "pruned.md", text)
    for line in text.splitlines():
        log.info("%s", line)
    return [folder / "pruned.md", folder / "pruned.json"]


def row_of(run: Run) -> Row:
    """A run's sizes and errors."""
    student = run.summary["student"]
    found = student.get("pruned", {})
    return {
        "seed": run.seed,
        "kind": found.get("kind"),
        "before": found.get("parameters_before", student["parameters"]),
        "parameters": student["parameters"],
        "flops": student["flops"],
        **{role: run.summary[role]["test"]["errors"] for role in ROLES},
    }


def latencies(first: Mapping[tuple[int, ...], Run]) -> dict[tuple[int, ...], float]:
    """The median latency in milliseconds of one student of each size."""
    images = load_device_data(configuration(next(iter(first.values())))).dataset.test.images[:1].contiguous()
    students = {str(size): load_student(run.path) for size, run in first.items()}
    calls = {size: lambda model=model: model.unchecked(images) for size, model in students.items()}
    with threads(1), torch.inference_mode():
        found = side_by_side(calls, batch=1)
    return {size: found[str(size)]["median_ms"] for size in first}


def matched(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Pairs of a pruned student and one that was never pruned, of the same seed, parameters and FLOPs."""
    whole = {(row["seed"], row["parameters"], row["flops"]): row for row in rows if row["kind"] is None}
    keys = [(row, (row["seed"], row["parameters"], row["flops"])) for row in rows if row["kind"] == "structured"]
    return [(row, whole[key]) for row, key in keys if key in whole]


def table(rows: Sequence[Row], summary: Mapping[str, Any], pairs: Sequence[tuple[Row, Row]]) -> str:
    """Means over seeds as Markdown, and the differences of the pairs."""
    total, teacher = summary["teacher"]["test"]["total"], summary["teacher"]["test"]["errors"]
    lines = [
        f"| parameters | MFLOPs | ms | n | errors alone, of {total:,} | errors, taught by a teacher with {teacher:,} |",
        "|---|---|---|---|---|---|",
    ]
    for key in sorted({(row["before"], row["parameters"], row["kind"] or "") for row in rows}, reverse=True):
        own = [row for row in rows if (row["before"], row["parameters"], row["kind"] or "") == key]
        before, after, kind = key
        name = f"{before:,}" if not kind else f"{before:,}, pruned to {after:,}"
        if kind == "magnitude":
            name = f"{before:,}, of which some weights are 0"
        errors = {role: shown(mean_std([row[role] for row in own])) for role in ROLES}
        lines.append(
            f"| {name} | {own[0]['flops'] / 1e6:.4f} | {own[0]['median_ms']:.3f} | {len(own)} | "
            f"{errors['student_alone']} | {errors['student']} |"
        )
    lines += ["", *sentences(pairs), ""]
    return "\n".join(lines)


def sentences(pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    """What pruning was worth against the same size from the start, for each size."""
    found = []
    for size in sorted({(row["before"], row["parameters"]) for row, _ in pairs}, reverse=True):
        own = [(row, other) for row, other in pairs if (row["before"], row["parameters"]) == size]
        for role, name in (("student", "taught by the teacher"), ("student_alone", "alone")):
            difference = paired([row[role] - other[role] for row, other in own])
            assert difference is not None
            half = "no interval" if difference.half is None else f"± {difference.half:.1f}, 95 % interval"
            found.append(
                f"Pruned from {size[0]:,} to {size[1]:,} parameters, {name}: {difference.mean:+.1f} errors against a "
                f"student of that size from the start ({half}; paired by seed, n = {difference.n})."
            )
    return found
