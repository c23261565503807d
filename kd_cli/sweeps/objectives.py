"""What a search minimises, by name: read from the summaries of finished jobs, or measured on their students."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_cli.errors import ConfigError
from kd_cli.nearest import did_you_mean
from kd_cli.storage.run_dir import SUMMARY, verified_summary

OBJECTIVES = {
    "val_error": "share of the validation examples that the student classifies wrongly",
    "val_nll": "the student's mean negative log likelihood on validation data, in nats",
    "parameters": "parameters of the student",
    "flops": "floating-point operations of the student for one example",
    "latency": "milliseconds of the student for one example, with one thread on this machine's CPU",
}
ON_VALIDATION = ("val_error", "val_nll")
DIGITS = {"val_error": ".4f", "val_nll": ".4f", "latency": ".3g"}  # of the others: as they are


def check_objectives(names: Sequence[str], *, validated: bool) -> None:
    """Raise ConfigError for unknown objectives, a repeated one, or one on validation data where there are none."""
    if not names:
        raise ConfigError("hydra.sweeper.objectives is empty", hint="hydra.sweeper.objectives=[val_error]")
    for name in names:
        if name not in OBJECTIVES:
            raise ConfigError(
                f"hydra.sweeper.objectives has {name!r}, which is none",
                hint=did_you_mean(name, list(OBJECTIVES)) or f"there are {', '.join(OBJECTIVES)}",
            )
        if name in ON_VALIDATION and not validated:
            raise ConfigError(
                f"a search by {name} needs validation data, and dataset.val_fraction is 0",
                hint="dataset.val_fraction=0.1",
            )
    if len(set(names)) < len(names):
        raise ConfigError(f"hydra.sweeper.objectives names one twice: {', '.join(names)}")


def measured(folders: Sequence[Path], names: Sequence[str]) -> list[dict[str, float] | None]:
    """The objectives of each job, all to be minimised; None for a job that did not complete."""
    summaries = [completed(folder) for folder in folders]
    times: dict[Path, float] = {}
    if "latency" in names:
        times = latencies([folder for folder, summary in zip(folders, summaries, strict=True) if summary])
    found: list[dict[str, float] | None] = []
    for folder, summary in zip(folders, summaries, strict=True):
        values = summary and {name: times[folder] if name == "latency" else value_of(summary, name) for name in names}
        found.append(values or None)
    return found


def completed(folder: Path) -> dict[str, Any] | None:
    """The summary of a completed job, else None."""
    try:
        summary = verified_summary(folder / SUMMARY)
    except (OSError, ValueError):
        return None
    return summary if summary.get("status") == "completed" else None


def value_of(summary: Mapping[str, Any], name: str) -> float:
    """An objective that a summary has."""
    student = summary["student"]
    if name == "val_error":
        return 1 - float(student["val"]["accuracy"])
    return float(student["val"]["nll"] if name == "val_nll" else student[name])


def latencies(folders: Sequence[Path]) -> dict[Path, float]:
    """The median milliseconds of each job's student for one example, on the CPU with one thread; they take turns."""
    import functools

    import torch

    from kd_cli.export.latency import side_by_side, threads
    from kd_cli.export.load import load_student

    calls: dict[str, Any] = {}
    for folder in folders:
        student = load_student(folder, trust=True)  # the code that this command has just trained
        low = student.range[0] if student.range else 0.0
        kind = torch.uint8 if student.values == "bytes" else student.dtype
        example = torch.full((1, *student.input_shape), low, dtype=kind)
        calls[str(folder)] = functools.partial(student, example)
    if not calls:
        return {}
    with threads(1), torch.no_grad():
        found = side_by_side(calls, batch=1)
    return {Path(name): times["median_ms"] for name, times in found.items()}


def shown(values: Mapping[str, float]) -> str:
    """Objectives in words: val_error 0.0213, parameters 17,610."""
    return ", ".join(
        f"{name} {format(value, DIGITS[name]) if name in DIGITS else f'{value:,.0f}'}" for name, value in values.items()
    )
