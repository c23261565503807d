"""A run's method tried before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from kd_cli.config.values import RunConfig, TrainSpec
from kd_cli.errors import ConfigError
from kd_cli.learn.batches import batch_sizes
from kd_cli.learn.methods import Method, Setting
from kd_cli.learn.methods.probe import try_method
from kd_cli.learn.outputs import Outputs, sample_outputs
from kd_cli.learn.randomness import global_stream
from kd_cli.learn.stacked.learner import why_method_not
from kd_cli.runs.building import build_method, stream_of
from kd_cli.runs.device_data import DeviceData
from kd_cli.runs.extended import parts_note
from kd_cli.runs.models import build_module


def check_method(config: RunConfig, data: DeviceData, spec: TrainSpec, *, examples: int) -> Sequence[str]:
    """Set the method up for this student and teacher, and try it on made outputs; return its notes.

    Networks are built only where the method reads their features. `spec` is the student that is distilled, `examples`
    the size of the transfer set. Raises ConfigError.
    """
    method = build_method(config.method)
    check_peers(config, method)
    if (method.teacher_features or method.chooses_layers) and config.members > 1:
        raise ConfigError(
            f"method={config.method_name} reads the teacher's features, and teacher.members is {config.members}",
            hint="teacher.members=1",
        )
    if data.dataset.multilabel and config.members > 1 and config.combine != "geometric":
        raise ConfigError(
            "teacher.combine=arithmetic averages probabilities of classes, and the data have independent labels",
            hint="teacher.combine=geometric, the mean of the logits",
        )
    if method.extends_student and (config.student.input or config.teacher.input):
        role = "teacher" if config.teacher.input else "student"
        raise ConfigError(
            f"method={config.method_name} joins parts of both networks, and {role}.input gives them different inputs",
            hint="leave teacher.input and student.input out, or another method",
        )
    if method.replaces_modules:
        check_replacement(config)
    if method.changes_T and config.members > 1 and config.combine != "geometric":
        raise ConfigError(
            f"method={config.method_name} changes T, and the teachers' mean probabilities are taken at the run's T",
            hint="teacher.combine=geometric, whose mean is the same at every T",
        )
    images = data.train.first(2).cpu()
    student = teacher = None
    if method.student_features or method.chooses_layers or method.replaces_modules:
        student = build_module(spec, data.dataset, role=stream_of("student"))
    if method.teacher_features or method.chooses_layers or method.replaces_modules:
        teacher = build_module(config.teacher, data.dataset, role=stream_of("teacher"))
    if method.chooses_layers and student is not None and teacher is not None:
        method.choose_layers(student, teacher, images)
    if method.replaces_modules and student is not None and teacher is not None:
        method.cut(student, teacher, images)
    blank = Outputs(torch.zeros(1, 2, data.dataset.classes, dtype=data.dtype))

    def outputs(module: nn.Module | None, paths: Sequence[str], role: str) -> Outputs:
        return blank if module is None else sample_outputs(module, images, paths, role=role)

    setting = Setting(
        classes=data.dataset.classes,
        examples=examples,
        smallest_batch=min(batch_sizes(examples, config.student.batch_size)),
        student=outputs(student, method.student_features, "student"),
        teacher=outputs(teacher, method.teacher_features, "teacher") if method.needs_teacher else None,
        multilabel=data.dataset.multilabel,
    )
    with global_stream(config.student.seed, "student", "method"):
        method.setup(setting)
    method.to(dtype=data.dtype)
    method.train()
    if "class_weights" in config.student.recipe:
        shape = (2, data.dataset.classes) if data.dataset.multilabel else (data.dataset.classes,)
        method.weigh_classes(torch.linspace(0.5, 2.0, math.prod(shape), dtype=data.dtype).view(shape))
    stacked = 1 if why_method_not(method) else 2
    coupled = max(1, len(config.peers)) + method.teacher_joins
    try_method(method, setting, size=coupled if method.couples_models else stacked)
    if method.couples_models and any(True for _ in method.parameters()):
        raise ConfigError(f"{method.title} couples peers and has parameters of its own, which is not supported")
    return [*method.notes, *([] if student is None else parts_note(student))]


def check_replacement(config: RunConfig) -> None:
    """ConfigError where the teacher's modules cannot take part in the student's network."""
    name = f"method={config.method_name} puts modules of the teacher into the student"
    if config.members > 1:
        raise ConfigError(f"{name}, and teacher.members is {config.members}", hint="teacher.members=1")
    if config.student.input or config.teacher.input or config.student.normalize != config.teacher.normalize:
        raise ConfigError(
            f"{name}, and the two have different inputs: normalisations, sizes or features",
            hint="leave teacher.input, student.input and teacher.normalize out",
        )
    if "checkpointing" in config.student.recipe:
        raise ConfigError(f"{name}, and training.checkpointing is given", hint="leave it out")
    if "freeze" in config.student.recipe:
        raise ConfigError(f"{name} and freezes what follows them, and training.freeze is given", hint="leave it out")


def check_peers(config: RunConfig, method: Method) -> None:
    """ConfigError where peers and the method do not go together."""
    if not config.peers:
        return
    name = config.method_name
    if not method.couples_models:
        raise ConfigError(
            f"peers are given, and method={name} trains each student by itself",
            hint="method=mutual, or leave peers out",
        )
    if "auto" in (config.T, config.alpha):
        raise ConfigError(
            "T=auto and alpha=auto choose among students that are trained by themselves, and peers are given",
            hint="sweep over T: kd-run -m T=1,2,4",
        )
    if method.teacher_joins and config.members > 1:
        raise ConfigError(
            f"method.with_teacher=true makes one teacher a peer, and teacher.members is {config.members}",
            hint="teacher.members=1",
        )
    if method.student_features or method.teacher_features or method.chooses_layers:
        raise ConfigError(f"method={name} couples peers and reads features, which is not supported")
