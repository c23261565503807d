"""The teacher as the student in training meets it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kd_cli.data.keep import OF_MEMORY
from kd_cli.data.room import available_memory
from kd_cli.learn.augment import Augment
from kd_cli.learn.stored_examples import StoredExamples
from kd_cli.learn.teachers import CachedTeacher, LiveTeacher, MappedTeacher, Teacher
from kd_cli.runs.device_data import DeviceData
from kd_cli.runs.models import load_module, predict_module

if TYPE_CHECKING:
    from kd_cli.runs.jobs import Job
    from kd_cli.runs.session import Session


STORED = "by its stored logits"


def needs_live_teacher(job: Job) -> bool:
    """Whether a teacher of the job's student must see the student's own images, or run for its features."""
    assert job.method is not None
    reads_features = job.method.chooses_layers or bool(job.method.teacher_features)
    return reads_features or job.method.replaces_modules or Augment(**job.config.student.augment).enabled


def way_of_teaching(job: Job) -> str:
    """How the job's student meets its teacher; students that are trained together share it."""
    assert job.method is not None
    if job.method.replaces_modules:
        return "by its modules"  # whose hooks would keep features of the mixed networks for others
    return "live" if needs_live_teacher(job) else STORED


def taught_by(summary: Mapping[str, Any]) -> str | None:
    """The fingerprint of the model that teaches a run's student: its last assistant, else its teacher; from a summary.

    None in a run without a teacher, and while the models before the student are not known.
    """
    models = [summary.get("teacher"), *summary.get("chain", ())]
    return models[-1] and str(models[-1]["fingerprint"])


def teacher_of(session: Session, job: Job) -> Teacher | None:
    """What teaches the job's next model: its stored logits, or live where the images are augmented."""
    if job.taught_by is None:
        return None
    ensemble, data, transfer = job.taught_by, session.data, session.transfer(job.config)
    live = needs_live_teacher(job)
    if not live and transfer.index is not None:
        members = [entry.outputs()["train"] for entry in ensemble.members]  # mapped from the store's files
        if stay_mapped(members, data):
            return MappedTeacher(members, transfer.index, combine=ensemble.combine, device=data.device)
        logits = torch.stack([member[transfer.index] for member in members])
    else:
        modules = [load_module(ensemble.spec, entry.weights(), data, role="teacher") for entry in ensemble.members]
        if live:
            return LiveTeacher(modules, combine=ensemble.combine)
        logits = torch.stack([predict_module(module, transfer.examples) for module in modules])
    return CachedTeacher(logits.to(data.device), combine=ensemble.combine)


def stay_mapped(members: Sequence[Tensor], data: DeviceData) -> bool:
    """Whether a teacher's logits are read from their files batch by batch: where the data are, or where they are large.

    Large is what `dataset.keep=auto` calls large: more than a quarter of the memory that is available.
    """
    memory = available_memory()
    size = sum(member.numel() * member.element_size() for member in members)
    return isinstance(data.train, StoredExamples) or (memory is not None and size * OF_MEMORY > memory)
