"""Feature methods that are set up for small networks, for their tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from made import CLASSES, SHAPE, images, some_weights
from torch import Tensor, nn

from kd_cli.learn.batches import Batch
from kd_cli.learn.methods import Method, Setting, Terms
from kd_cli.learn.methods.attention import Attention
from kd_cli.learn.methods.crd import CRD
from kd_cli.learn.methods.feature import Feature
from kd_cli.learn.methods.hints import Hints
from kd_cli.learn.methods.pkt import PKT
from kd_cli.learn.methods.relational import Relational
from kd_cli.learn.methods.review import Review
from kd_cli.learn.methods.similarity import Similarity
from kd_cli.learn.outputs import Outputs, sample_outputs
from kd_cli.models.cnn import cnn

METHODS: dict[str, Callable[[], Method]] = {
    "feature": Feature,
    "feature map": lambda: Feature(form="map"),
    "feature cosine": lambda: Feature(distance="cosine"),
    "feature srd": lambda: Feature(distance="srd"),
    "attention": Attention,
    "attention paper": lambda: Attention(norm="paper"),
    "hints": Hints,
    "hints, two stages": lambda: Hints(stages=2),
    "hints, conv_bn_relu": lambda: Hints(regressor="conv_bn_relu"),
    "similarity": Similarity,
    "relational": Relational,
    "pkt": PKT,
    "pkt without diagonal": lambda: PKT(diagonal=False),
    "review": lambda: Review(warmup=0),
    "crd": lambda: CRD(dim=5, K=20),
}


def rows(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def big() -> nn.Module:
    return cnn(input_shape=SHAPE, num_classes=CLASSES, channels=[5, 7], hidden=9)


def ready(method: Method, student: nn.Module, teacher: nn.Module, *, batch: int = 8, examples: int = 30) -> Method:
    """The method after its layers were chosen and its parameters made, in float64 and train mode."""
    two = images(2)
    if method.chooses_layers:
        method.choose_layers(student, teacher, two)
    method.setup(setting(method, student, teacher, batch=batch, examples=examples))
    return method.double().train()


def setting(method: Method, student: nn.Module, teacher: nn.Module, *, batch: int = 8, examples: int = 30) -> Setting:
    return Setting(
        classes=CLASSES,
        examples=examples,
        smallest_batch=batch,
        student=sample_outputs(student, images(2), method.student_features, role="student"),
        teacher=sample_outputs(teacher, images(2), method.teacher_features, role="teacher"),
    )


def called(method: Method, student: Outputs, teacher: Outputs, *, progress: float = 0.0) -> Terms:
    """The terms of one student for the examples 0, 1, ...; their labels are 0, 1, 2, 3, 0, ..."""
    index = torch.arange(student.logits.shape[1])[None]
    return method(student, teacher, Batch(index, index, index % CLASSES, progress), some_weights())


def outputs(method: Method, student: nn.Module, teacher: nn.Module, n: int = 8) -> tuple[Outputs, Outputs]:
    return (
        sample_outputs(student, images(n), method.student_features, role="student"),
        sample_outputs(teacher, images(n), method.teacher_features, role="teacher"),
    )
