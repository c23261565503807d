"""A run's method tried before anything is trained."""

from __future__ import annotations

import torch

from kd_cli.config.values import RunConfig
from kd_cli.errors import ConfigError
from kd_cli.learn.batches import batch_sizes
from kd_cli.learn.methods import Method, Setting
from kd_cli.learn.methods.probe import try_method
from kd_cli.learn.outputs import Outputs, sample_outputs
from kd_cli.learn.randomness import global_stream
from kd_cli.learn.stacked.learner import why_method_not
from kd_cli.runs.building import build_method, stream_of
from kd_cli.runs.device_data import DeviceData
from kd_cli.runs.models import build_module


def check_method(config: RunConfig, data: DeviceData, *, examples: int) -> None:
    """Set the method up for this student and teacher, and try it on made outputs. Raises ConfigError.

    Networks are built only where the method reads their features. `examples` is the size of the transfer set.
    """
    method = build_method(config.method)
    if method.teacher_features and config.members > 1:
        raise ConfigError(
            f"method={config.method_name} reads the teacher's features, and teacher.members is {config.members}",
            hint="teacher.members=1",
        )
    setting = Setting(
        classes=data.dataset.classes,
        examples=examples,
        smallest_batch=min(batch_sizes(examples, config.student.batch_size)),
        student=made_outputs(config, method, data, "student"),
        teacher=made_outputs(config, method, data, "teacher") if method.needs_teacher else None,
    )
    with global_stream(config.student.seed, "student", "method"):
        method.setup(setting)
    method.to(dtype=data.dtype)
    method.train()
    try_method(method, setting, size=1 if why_method_not(method) else 2)


def made_outputs(config: RunConfig, method: Method, data: DeviceData, role: str) -> Outputs:
    """Outputs of a role's untrained network for two examples, on the CPU; of the right shapes where none is needed."""
    spec, paths = (
        (config.teacher, method.teacher_features) if role == "teacher" else (config.student, method.student_features)
    )
    if not paths:
        return Outputs(torch.zeros(1, 2, data.dataset.classes, dtype=data.dtype))
    module = build_module(spec, data.dataset, role=stream_of(role))
    return sample_outputs(module, data.train.first(2).cpu(), paths, role=role)
