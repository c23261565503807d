"""A method of the user's own is tried on made outputs before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods import (
    FunctionMethod,
    Hard,
    LabelSmoothing,
    Logits,
    Method,
    PerModelMethod,
    Setting,
    SoftTargets,
    Terms,
    Weights,
)
from kd_cli.learn.methods.probe import try_method
from kd_cli.learn.outputs import Outputs

Forward = Callable[[Tensor, Tensor, Tensor], Any]  # the logits of student and teacher, and the labels


def setting(dtype: torch.dtype = torch.float32) -> Setting:
    student = Outputs(torch.zeros(1, 2, 5, dtype=dtype), {"hidden": torch.zeros(1, 2, 7, dtype=dtype)})
    teacher = Outputs(torch.zeros(1, 2, 5, dtype=dtype), {"body": torch.zeros(1, 2, 3, dtype=dtype)})
    return Setting(classes=5, examples=75, smallest_batch=11, student=student, teacher=teacher)


class Own(Method):
    """A user's method that returns what a function makes of the logits."""

    def __init__(self, terms: Forward) -> None:
        super().__init__()
        self.terms = terms

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        assert teacher is not None
        found: Terms = self.terms(student.logits, teacher.logits, batch.labels)
        return found


def soft(student: Tensor, teacher: Tensor, *, dim: int = -1) -> Tensor:
    return -(teacher.softmax(dim) * student.log_softmax(dim)).sum(-1).mean(-1)


REFUSED: dict[str, tuple[Forward, list[str]]] = {
    "nothing": (lambda z, v, y: None, ["Own returned a NoneType", "'loss'"]),
    "a tensor": (lambda z, v, y: soft(z, v), ["Own returned a Tensor", "a dictionary of terms with a 'loss'"]),
    "no loss": (lambda z, v, y: {"soft": soft(z, v)}, ["Own returned ['soft']", "a 'loss' among them"]),
    "a scalar": (lambda z, v, y: {"loss": soft(z, v).mean()}, ["the term 'loss' for 2 students is of shape []", "[2]"]),
    "no mean": (lambda z, v, y: {"loss": (z - v).square().sum(-1)}, ["the term 'loss'", "of shape [2, 6]"]),
    "a number": (lambda z, v, y: {"loss": soft(z, v), "hint": 0.5}, ["the term 'hint'", "a float"]),
    "a term of another shape": (lambda z, v, y: {"loss": soft(z, v), "hint": z.mean()}, ["the term 'hint'", "[2]"]),
    "softmax over the batch": (
        lambda z, v, y: {"loss": soft(z, v, dim=1)},
        ["the gradient of one example depends on the other examples", "dim=-1", "couples_examples = True"],
    ),
    "softmax over the students": (
        lambda z, v, y: {"loss": soft(z, v, dim=0)},
        ["the loss of one student is", "beside another one", "PerModelMethod"],
    ),
    "the mean student": (
        lambda z, v, y: {"loss": soft(z - z.mean(0, keepdim=True), v)},
        ["the loss of one student is", "beside another one"],
    ),
    "detached": (lambda z, v, y: {"loss": soft(z.detach(), v)}, ["the loss does not depend on the student"]),
    "the teacher alone": (lambda z, v, y: {"loss": soft(v, v).expand(2)}, ["the loss does not depend on the student"]),
    "a loss that is not finite": (
        lambda z, v, y: {"loss": (z - z).sum((1, 2)).log()},
        ["the term 'loss' is [-inf, -inf]", "must be finite"],
    ),
    "a gradient that is not finite": (
        lambda z, v, y: {"loss": (z - z.detach()).square().sum((1, 2)).sqrt()},
        ["the loss of ordinary logits has a gradient that is not finite"],
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_faulty_method_is_refused_and_the_message_names_the_fault(fault: str) -> None:
    forward, words = REFUSED[fault]
    with pytest.raises(ConfigError) as caught:
        try_method(Own(forward), setting(), size=2)
    said = f"{caught.value.message}\n{caught.value.hint or ''}"
    for word in words:
        assert word in said


def test_a_method_that_couples_students_is_refused_for_one() -> None:
    class Peers(SoftTargets):
        couples_models = True

    with pytest.raises(ConfigError, match="Peers couples the students that train together"):
        try_method(Peers(), setting(), size=1)


class OverTheBatch(Own):
    couples_examples = True


def test_what_couples_examples_on_purpose_passes() -> None:
    method = OverTheBatch(lambda z, v, y: {"loss": soft(z, v, dim=1)})
    try_method(method, setting(), size=2)


class OnOneStudent(PerModelMethod):
    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Tensor:
        assert teacher is not None
        soft = F.kl_div(student.logits.log_softmax(1), teacher.logits.softmax(1), reduction="batchmean")
        return weights.alpha * soft + weights.beta * F.cross_entropy(student.logits, batch.labels)


def function(student: Tensor, teacher: Tensor, labels: Tensor, T: Tensor) -> Tensor:
    return F.mse_loss(student / T, teacher / T) + F.cross_entropy(student, labels)


class Projecting(Method):
    """Reads features, through a projection of its own."""

    student_features = ("hidden",)
    teacher_features = ("body",)

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        self.projection = nn.Linear(7, 3)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        assert teacher is not None
        return {"loss": (self.projection(student.features["hidden"]) - teacher.features["body"]).square().mean((1, 2))}


class NeedingMany(Own):
    """The covariance of a batch exists for 9 examples or more."""

    min_batch = 9

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        assert student.logits.shape[1] >= 9
        return super().forward(student, teacher, batch, weights)


GOOD: dict[str, Callable[[], Method]] = {
    "soft targets": SoftTargets,
    "logits": Logits,
    "hard": Hard,
    "smoothed": LabelSmoothing,
    "own": lambda: Own(lambda z, v, y: {"loss": soft(z, v), "soft": soft(z, v)}),
    "of many": lambda: NeedingMany(lambda z, v, y: {"loss": soft(z, v)}),
    "on one student": OnOneStudent,
    "function": lambda: FunctionMethod(function),
    "projection": Projecting,
}


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GOOD)
def test_a_well_written_method_passes(name: str, dtype: torch.dtype, size: int) -> None:
    method = GOOD[name]()
    method.setup(setting(dtype))
    state = torch.get_rng_state()
    try_method(method.to(dtype), setting(dtype), size=size)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in method.parameters())


def test_a_bug_in_a_method_keeps_its_own_error() -> None:
    with pytest.raises(AttributeError, match="no_such_attribute"):
        try_method(Own(lambda z, v, y: z.no_such_attribute), setting(), size=2)
