"""int8 in training against int8 after training: students of the same size, by the errors of the files that ship."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from kd_cli.data.source import Dataset
from kd_cli.errors import DataError
from kd_cli.experiments.recorded import completed, configuration
from kd_cli.export.forms import check_packages, run_onnx
from kd_cli.export.load import load_student
from kd_cli.export.parity import compare, logits_of
from kd_cli.export.ship import int8_form
from kd_cli.report.read import Run
from kd_cli.runs.device_data import load_device_data
from kd_cli.statistics import Stat, mean_std, paired
from kd_cli.storage.files import write_json, write_text

log = logging.getLogger(__name__)

IN_FLOATS, IN_TRAINING = None, "int8"  # values of student.quantise
# What is compared: its name, the value of student.quantise, and whose errors.
ROWS = (
    ("teacher, floats", IN_FLOATS, "teacher"),
    ("student alone, floats", IN_FLOATS, "student_alone"),
    ("student, floats", IN_FLOATS, "student"),
    ("student, int8 after training", IN_FLOATS, "file"),
    ("student alone, int8 in training", IN_TRAINING, "student_alone"),
    ("student, int8 in training", IN_TRAINING, "student"),
    ("student, int8 in training, its file", IN_TRAINING, "file"),
)


def quantised(folder: Path) -> list[Path]:
    """Compare the students of a sweep over `student.quantise=null,int8` and seeds, as PyTorch and as int8 files.

    The float students are quantised after training, by ONNX Runtime, as `kd-export --int8` does; the others as they
    were trained. Writes quantised.md and quantised.json. Raises DataError without pairs of runs of a seed, ExportError
    without the packages for ONNX.
    """
    check_packages()
    found: dict[Any, dict[Any, Run]] = {}
    for run in completed(folder):
        found.setdefault(run.seed, {})[run.config.get("student.quantise")] = run
    pairs = {seed: runs for seed, runs in found.items() if runs.keys() == {IN_FLOATS, IN_TRAINING}}
    if not pairs:
        raise DataError(
            f"{folder} has no seed with a student in floats and one in int8",
            hint="kd-run -m student.quantise=null,int8 'seed=range(3)'",
        )
    data = load_device_data(configuration(next(iter(pairs.values()))[IN_FLOATS])).dataset
    rows = [
        {"seed": seed, "quantise": kind, **costs_of(run, data)}
        for seed, runs in sorted(pairs.items())
        for kind, run in runs.items()
    ]
    text = table(rows, total=len(data.test))
    write_json(folder / "quantised.json", rows)
    write_text(folder / "quantised.md", text)
    for line in text.splitlines():
        log.info("%s", line)
    return [folder / "quantised.md", folder / "quantised.json"]


def costs_of(run: Run, data: Dataset) -> dict[str, Any]:
    """The errors of a run's models, and of its student's int8 file with its bytes."""
    student = load_student(run.path)
    content, how = int8_form(student, {}, data.train.images)
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        path = Path(scratch) / "student.int8.onnx"
        path.write_bytes(content)
        own = logits_of(student, data.test.images)
        parity = compare(logits_of(run_onnx(path), data.test.images), own, data.test)
    errors = {role: run.summary[role]["test"]["errors"] for role in ("teacher", "student_alone", "student")}
    return {
        "errors": errors | {"file": parity.errors},
        "nll": parity.nll,
        "agreement": parity.agreement,
        "bytes": len(content),
        "quantisation": how,
    }


def table(rows: Sequence[Mapping[str, Any]], *, total: int) -> str:
    """Means over seeds as Markdown, and the paired difference of the two int8 files."""
    kinds = {kind: [row for row in rows if row["quantise"] == kind] for kind in (IN_FLOATS, IN_TRAINING)}
    n = len(kinds[IN_FLOATS])
    lines = [f"| | errors of {total:,}, n = {n} | bytes of the file |", "|---|---|---|"]
    for name, kind, whose in ROWS:
        size = f"{mean_std([row['bytes'] for row in kinds[kind]]).mean:,.0f}" if whose == "file" else ""
        lines.append(f"| {name} | {shown(mean_std([row['errors'][whose] for row in kinds[kind]]))} | {size} |")
    files = {kind: [row["errors"]["file"] for row in own] for kind, own in kinds.items()}
    differences = [b - a for a, b in zip(files[IN_FLOATS], files[IN_TRAINING], strict=True)]
    found = paired(differences)
    assert found is not None
    half = "no interval" if found.half is None else f"± {found.half:.1f}, 95 % interval"
    agree = {kind: mean_std([row["agreement"] for row in own]).mean for kind, own in kinds.items()}
    return "\n".join(
        [
            *lines,
            "",
            f"Of the two int8 files, the one that was trained in int8 has {found.mean:+.1f} errors ({half}; paired by "
            f"seed, n = {n}). It agrees with its PyTorch student on {agree[IN_TRAINING]:.2%} of the test examples, the "
            f"one that was quantised after training with its own on {agree[IN_FLOATS]:.2%}.",
            "",
        ]
    )


def shown(stat: Stat) -> str:
    return f"{stat.mean:.1f}" + ("" if stat.std is None else f" ± {stat.std:.1f}")
