"""What summary.json says: of the run, of its models, of what made it fail."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kd_cli.config.values import RunConfig
from kd_cli.data.sentences import listed
from kd_cli.data.source import Dataset
from kd_cli.errors import Diverged
from kd_cli.label_metrics import evaluate_labels, label_agreement
from kd_cli.learn.engine import Outcome
from kd_cli.metrics import agreement, evaluate_logits
from kd_cli.runs.device_data import DeviceData, device_name
from kd_cli.runs.jobs import Job, alive
from kd_cli.runs.transfer import TransferSet

if TYPE_CHECKING:
    from kd_cli.runs.trained_once import Ensemble

Report = dict[str, Any]


def first_summary(job: Job, data: DeviceData, transfer: TransferSet) -> dict[str, Any]:
    """A summary with all its keys, before there are results."""
    config, dataset = job.config, data.dataset
    return {
        "status": "running",
        "command": job.command,
        "dataset": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "train": len(dataset.train),
            "val": len(dataset.val),
            "test": len(dataset.test),
            "classes": dataset.classes,
            "multilabel": dataset.multilabel,
            "class_names": list(dataset.class_names),
            "test_by_class": dataset.class_counts()["test"],
            "split": dataset.split_rule,
        },
        "notes": job.notes,
        "teacher": None,
        **({"chain": []} if config.chain else {}),  # the models between teacher and student
        "student_alone": None,
        "student": None,
        "gap_closed": None,
        "trained_with": None,
        "latency": None,  # of teacher and student, for one example
        "transfer": transfer_summary(transfer, config),
        "T": config.T,
        "alpha": config.alpha,
        "beta": config.beta,
        "method": config.method_name,
        **({"unused": unused} if (unused := unused_keys(job)) else {}),  # keys that the method does not have
        "seed": config.student.seed,
        "device": device_name(data.device),
        "precision": config.precision,
        "versions": versions().copy(),
        **({"code": code} if (code := config.own_code()) else {}),  # the user's own files, by module
    }


def unused_keys(job: Job) -> list[str]:
    """Those of T and alpha that the job's method does not depend on."""
    assert job.method is not None
    return [key for key, has in (("T", job.method.has_T), ("alpha", job.method.has_alpha)) if not has]


def transfer_summary(transfer: TransferSet, config: RunConfig) -> dict[str, Any]:
    return {"examples": len(transfer.examples), "labels": transfer.labelled, **config.transfer.examples()}


def results_on_test(logits: Tensor, dataset: Dataset) -> dict[str, Any]:
    """The results of logits [M,C] on the test data; `recall`, or `labels`, is in the order of the classes."""
    if dataset.multilabel:
        found = evaluate_labels(logits, dataset.test.labels)
        each = zip(dataset.class_names, found.labels, strict=True)
        return {**vars(found), "labels": [{"name": name, **vars(label)} for name, label in each]}
    result = evaluate_logits(logits, dataset.test.labels)
    worst = {
        "name": dataset.class_names[result.worst_class],
        "recall": result.recall[result.worst_class],
        "examples": int((dataset.test.labels == result.worst_class).sum()),
    }
    return {**vars(result), "worst_class": worst}


def missed_classes(results: dict[str, Any], dataset: Dataset) -> str | None:
    """A sentence on classes of which no test example is classified correctly although most examples are; else None."""
    if dataset.multilabel:
        return None  # a label that is hardly ever present is rightly not predicted
    missed = [name for name, recall in zip(dataset.class_names, results["recall"], strict=True) if recall == 0]
    if not missed or results["accuracy"] < 0.5:
        return None
    return (
        f"the student classifies no test example of {listed(dict.fromkeys(missed), 3)} correctly: its accuracy is "
        f"{results['accuracy']:.2%}, and {results['balanced_accuracy']:.2%} averaged over the classes"
    )


def ensemble_report(teacher: Ensemble, dataset: Dataset) -> Report:
    """What a summary says of the teacher: its one member's report, or the ensemble's and its members'."""
    reports = [{"fingerprint": entry.fingerprint, **entry.report} for entry in teacher.members]
    if len(reports) == 1:
        return reports[0]
    first = reports[0]
    return {
        "fingerprint": teacher.fingerprint,
        "name": f"{len(reports)} {first['name']}, {teacher.combine} mean",
        "parameters": sum(report["parameters"] for report in reports),
        "flops": sum(report["flops"] for report in reports),
        "epochs": first["epochs"],
        "seconds": round(sum(report["seconds"] for report in reports), 3),
        "val": None,
        "test": None if teacher.test is None else results_on_test(teacher.test, dataset),
        "members": reports,
    }


def with_agreement(report: Report, logits: Tensor, teacher: Ensemble | None) -> Report:
    """A report with the share of the test examples that the model and the teacher put in the same class."""
    same = label_agreement if "labels" in report["test"] else agreement
    agree = same(logits, teacher.test) if teacher is not None and teacher.test is not None else None
    return {**report, "test": {**report["test"], "agreement": agree}}


def validation(outcome: Outcome) -> dict[str, Any]:
    """The validation results of the epoch whose weights were kept."""
    row = outcome.history[(outcome.epoch or len(outcome.history)) - 1]
    return {key: row[f"val_{key}"] for key in ("accuracy", "nll")}


def diverged_error(role: str, outcome: Outcome, jobs: Iterable[Job]) -> Diverged:
    """The error that says when the loss stopped being a number and what to try; written to the jobs' summaries too."""
    prefix = "teacher_" if role == "teacher" else ""
    error = Diverged(
        f"{role.replace('_', ' ')}: the loss is not a finite number in epoch {outcome.diverged}",
        hint=f"try a smaller {prefix}optimizer.lr, {prefix}schedule.warmup=0.1, or smaller alpha and beta",
    )
    for job in alive(jobs):
        job.summary |= {"status": "diverged", "cause": error.message}
        job.directory.write_summary(job.summary)
    return error


@functools.cache
def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("kd-cli", "torch", "torchvision", "timm", "hydra-core", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
