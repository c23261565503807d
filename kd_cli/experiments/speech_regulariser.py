"""Soft targets as a regulariser (Hinton 2015, section 4's models, table 5): 3 % of the frames of speech."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_cli.errors import DataError
from kd_cli.experiments.recorded import completed, configuration, logits_on_test, stored
from kd_cli.experiments.speech import Recordings
from kd_cli.export.load import load_student
from kd_cli.report.figures import Figure
from kd_cli.report.read import Run
from kd_cli.report.render import render
from kd_cli.report.svg.lines import Point, Series, line_chart
from kd_cli.report.svg.small import legend
from kd_cli.runs.device_data import load_device_data
from kd_cli.statistics import stat
from kd_cli.storage.files import write_json, write_text
from kd_cli.storage.store import Store

NAME = "speech_regulariser"
# What is compared: its name, its role, and `training.keep` of its runs.
ROWS = (
    ("baseline, all frames", "teacher", "last"),
    ("labels, last epoch", "student_alone", "last"),
    ("labels, best epoch by validation", "student_alone", "best"),
    ("soft targets, last epoch", "student", "last"),
)
CURVES = {"student_alone": ("labels", "alone"), "student": ("soft targets", "c0")}


def speech_regulariser(folder: Path) -> list[Path]:
    """Compare a network trained on all frames with those of a small share, by labels and by its soft targets.

    The folder is that of a sweep over `training.keep=last,best` and seeds. Frame accuracy on what each network was
    trained on, in the epoch whose weights it has, and on the test part, and the error of the whole recording, in
    percent and seed by seed. Writes speech_regulariser.json and speech_regulariser.html. Raises DataError.
    """
    runs = completed(folder)
    kept = {keep: [run for run in runs if run.config["training.keep"] == keep] for keep in ("last", "best")}
    if not kept["last"] or not kept["best"]:
        raise DataError(f"{folder} needs completed runs with training.keep=last and with training.keep=best")
    config = configuration(runs[0])
    dataset = load_device_data(config).dataset
    recordings, labels, store = Recordings.of(dataset), dataset.test.labels, Store(config.store_dir)

    def results(run: Run, role: str) -> dict[str, float]:
        if role == "student":
            with torch.no_grad():
                logits: Tensor = load_student(run.path)(dataset.test.images[:])
        else:
            logits = logits_on_test(stored(store, run.summary[role]["fingerprint"], run))
        return {
            "train": 100 * trained_accuracy(run, role),
            "test": 100 * float((logits.argmax(1) == labels).double().mean()),
            "recording_errors": recordings.errors(logits),
        }

    table = [{"name": name, "results": [results(run, role) for run in kept[keep]]} for name, role, keep in ROWS]
    trained = kept["last"][0].summary["transfer"]["examples"]
    facts = {"frames": len(dataset.train.labels), "trained": trained, "split": config.dataset["split"]}
    write_json(folder / f"{NAME}.json", {**facts, "rows": table})
    write_text(folder / f"{NAME}.html", page(kept["last"], facts))
    return [folder / f"{NAME}.html", folder / f"{NAME}.json"]


def trained_accuracy(run: Run, role: str) -> float:
    """The accuracy on its training frames while a model took the steps of the epoch whose weights it has."""
    rows = run.history[role]
    section = "teacher_training" if role == "teacher" else "training"
    last: dict[str, Any] = rows[-1]
    if run.config[f"{section}.keep"] == "best":
        last = min(rows, key=lambda row: (-row["val_accuracy"], row["val_nll"]))
    return float(last["train_accuracy"])


def page(runs: Sequence[Run], facts: dict[str, Any]) -> str:
    """A page with the validation curves of labels and of soft targets."""
    chart = line_chart(
        curves(runs), title="validation frames right by epoch", x_label="epoch", y_label="validation frames right, %"
    )
    note = (
        f"Mean ± std of {len(runs)} seeds, networks of {facts['trained']:,} of {facts['frames']:,} training frames; "
        "the baseline, which has all frames, is the level."
    )
    kinds = [*((name, colour, "line") for name, colour in CURVES.values()), ("all frames", "teacher", "level")]
    figure = Figure("Validation frames by epoch", chart, note, legend(kinds))
    return render("charts", title="Soft targets as a regulariser, on frames of speech", figures=[figure])


def curves(runs: Sequence[Run]) -> list[Series]:
    """Validation accuracy by epoch, in percent, of labels and soft targets, and the level of the baseline."""
    series = []
    for role, (name, colour) in CURVES.items():
        points = []
        for rows in zip(*(run.history[role] for run in runs), strict=True):
            found = stat(100 * row["val_accuracy"] for row in rows)
            assert found is not None
            if rows[0]["epoch"] % 5 == 0 or rows[0]["epoch"] == 1:
                points.append(Point(rows[0]["epoch"], found.mean, found.std))
        series.append(Series(name, points, colour))
    level = stat(100 * max(row["val_accuracy"] for row in run.history["teacher"]) for run in runs)
    assert level is not None
    series.append(Series("all frames", [Point(p.x, level.mean, level.std) for p in points], "teacher", "level"))
    return series
