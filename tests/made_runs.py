"""Run directories of made-up numbers, as kd-run leaves them, and the comparison of those under a path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kd_cli.report.compare import compare
from kd_cli.report.read import collect
from kd_cli.roles import ROLES
from kd_cli.statistics import gap_closed
from kd_cli.storage.run_dir import configuration_record

TEST = 200  # examples in a made-up test set


def made_run(
    path: Path,
    *,
    teacher: int | None = 10,
    alone: int = 50,
    student: int | None = 30,
    val: float | None = 0.9,
    val_nll: float = 0.5,
    status: str = "completed",
    data: str = "data-1",
    choices: dict[str, str] | None = None,
    epochs: int = 3,
    **config: Any,
) -> Path:
    """Write a run directory as kd-run leaves it; a status of unfinished has no summary."""
    options = {
        "method": "soft_targets",
        "student": "tinymlp",
        "teacher": "bigmlp",
        "dataset": "digits",
        **(choices or {}),
    }
    settings = {"T": 2.0, "alpha": 1.0, "beta": 0.5, "seed": 0, "training.epochs": epochs, "teacher_training.seed": 0}
    settings |= {"dataset.val_fraction": 0.2, "device": "auto", "precision": "float32", **config}
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        group, _, name = key.rpartition(".")
        (nested.setdefault(group, {}) if group else nested)[name] = value
    (path / ".hydra").mkdir(parents=True)
    (path / ".hydra/config.yaml").write_text(json.dumps(nested))  # JSON is YAML
    lines = "".join(f"      {group}: {name}\n" for group, name in {**options, "experiment": "null"}.items())
    (path / ".hydra/hydra.yaml").write_text(f"hydra:\n  runtime:\n    cwd: /x\n    choices:\n{lines}  verbose: false\n")
    noted = {
        "command": "kd-run T=2",
        "identity": "0",
        "trained": [],
        **configuration_record(nested, {**options, "experiment": None}),
    }
    (path / "run.json").write_text(json.dumps(noted))
    rows = [
        {"role": role, "epoch": e, "train_accuracy": 0.5, "hard_loss": 1.0 / e, "val_accuracy": val, "val_nll": val_nll}
        for role in ROLES
        for e in range(1, epochs + 1)
    ]
    rows = [row if val is not None else {**row, "val_accuracy": None, "val_nll": None} for row in rows]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if status == "unfinished":
        return path

    def report(name: str, errors: int | None, mark: str) -> dict[str, Any] | None:
        if errors is None:
            return None
        test = {"errors": errors, "total": TEST, "accuracy": 1 - errors / TEST, "nll": 0.3, "ece": 0.05}
        facts = {"parameters": 100, "flops": 200, "epochs": epochs, "seconds": 0.1, "from_store": False}
        return {"fingerprint": mark, "name": name, **facts, "test": test | {"agreement": 0.8}}

    seed, taught = settings["seed"], teacher is not None
    mark = json.dumps([settings, options])
    summary = {
        "status": status,
        "command": "kd-run T=2",
        "dataset": {
            "name": options["dataset"],
            "fingerprint": data,
            "train": 100,
            "val": 50,
            "test": TEST,
            "classes": 10,
        },
        "teacher": report(options["teacher"], teacher, f"teacher {settings['teacher_training.seed']}"),
        "student_alone": report(options["student"], alone, f"alone {seed} {options['student']} {epochs}"),
        "student": report(options["student"], student if status == "completed" else None, mark),
        "gap_closed": gap_closed(teacher, alone, student) if taught and student is not None else None,
        **{key: settings[key] for key in ("T", "alpha", "beta", "seed", "precision")},
        "method": options["method"],
        "device": "cpu",
        "versions": {"python": "3.11"},
        **({"cause": "student: the loss is not a finite number in epoch 1"} if status == "diverged" else {}),
    }
    (path / "summary.json").write_text(json.dumps(summary))
    return path


def as_before(path: Path) -> Path:
    """Take the configuration out of a run.json, as earlier versions left it; returns the path."""
    noted = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({key: noted[key] for key in ("command", "identity", "trained")}))
    return path


def only(path: Path, **options: Any) -> Any:
    """The only comparison of the runs under a path."""
    (comparison,) = compare(collect([path])[0], **options)
    return comparison
