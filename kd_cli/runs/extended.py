"""The model that a run's student is trained and shipped as, where the method adds parts to it."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from kd_cli.config.build import PARTIAL
from kd_cli.config.values import RunConfig, TrainSpec
from kd_cli.learn.methods import Method
from kd_cli.models.extended import ExtendedStudent
from kd_cli.runs.building import stream_of
from kd_cli.runs.device_data import DeviceData
from kd_cli.runs.models import build_module

TARGET = "kd_cli.models.extended.extended_student"


def extended_spec(config: RunConfig, method: Method, data: DeviceData) -> TrainSpec:
    """The student's spec with the parts that the method adds to the model. Raises ConfigError."""
    student = build_module(config.student, data.dataset, role=stream_of("student"))
    teacher = build_module(config.teacher, data.dataset, role=stream_of("teacher"))
    plan = method.extension(student, teacher, data.train.first(2).cpu())
    node = {"_target_": TARGET, "student": {**config.student.model, PARTIAL: True}, **plan}
    return replace(config.student, name=config.student.title, model=node)


def parts_note(module: nn.Module) -> list[str]:
    """A sentence on what is shipped, for an extended student."""
    if not isinstance(module, ExtendedStudent):
        return []

    def weights(part: nn.Module) -> str:
        return f"{sum(p.numel() for p in part.parameters()):,}"

    return [
        f"the shipped student is its network up to the last map ({weights(module.backbone)} parameters), a projector "
        f"({weights(module.projector)}) and the teacher's classifier ({weights(module.classifier)})"
    ]
