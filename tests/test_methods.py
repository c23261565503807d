"""Methods: closed forms against autograd, methods for one model, plain functions, parameters of a method's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import made
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.engine import Interrupted
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
from kd_cli.learn.methods.per_model import is_loss_function
from kd_cli.learn.objective import Objective
from kd_cli.learn.outputs import Outputs
from kd_cli.learn.randomness import generator
from kd_cli.learn.stacked.closed_forms import FORMS, closed_form, has_closed_form
from kd_cli.learn.teachers import CachedTeacher, LiveTeacher

S, B = 3, 7
METHODS: dict[str, Callable[[], Method]] = {
    "soft": SoftTargets,
    "without T^2": lambda: SoftTargets(square_T=False),
    "logits": Logits,
    "uncentred": lambda: Logits(center=False),
    "hard": Hard,
    "smoothed": lambda: LabelSmoothing.stack([LabelSmoothing(smoothing) for smoothing in (0, 0.1, 0.5)]),
}
WEIGHTS = made.some_weights(T=[1, 3, 20], alpha=[1, 0.5, 0], beta=[0.5, 0, 2])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return 3 * torch.randn(*shape, generator=generator(seed, "normal"), dtype=torch.float64)


def some_labels(*shape: int, classes: int) -> Tensor:
    return torch.randint(classes, shape, generator=generator(0, "labels"))


def batch_of(labels: Tensor) -> Batch:
    return Batch(labels, labels, labels)


# ---------------------------------------------------------------- closed forms


def test_every_shipped_method_has_a_closed_form_and_subclasses_have_none() -> None:
    class Changed(SoftTargets):
        pass

    assert set(FORMS) == {SoftTargets, Logits, Hard, LabelSmoothing}
    assert all(has_closed_form(build()) for build in METHODS.values())
    assert not has_closed_form(Changed())
    assert closed_form(Objective(Changed(), WEIGHTS)) is None


@pytest.mark.parametrize("across", [False, True], ids=["classes last", "examples last"])
@pytest.mark.parametrize("own_teacher", [False, True], ids=["one teacher", "a teacher for each"])
@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("name", METHODS)
def test_the_closed_form_is_the_gradient_that_autograd_finds(
    name: str, classes: int, own_teacher: bool, across: bool
) -> None:
    objective = Objective(METHODS[name](), WEIGHTS)
    student = normal(S, classes, B).mT if across else normal(S, B, classes)
    teacher = normal(S if own_teacher else 1, B, classes, seed=1)
    labels = some_labels(S, B, classes=classes)
    leaf = student.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
    objective(Outputs(leaf), Outputs(teacher), batch_of(labels))["loss"].sum().backward()
    form = closed_form(objective)
    assert form is not None
    before = student.clone()
    found = form.gradient(student, form.target(student, teacher, labels))
    assert leaf.grad is not None
    assert leaf.grad.abs().max() > 1e-3
    assert (found - leaf.grad).abs().max() < 1e-12
    assert torch.equal(student, before)


@pytest.mark.parametrize("across", [False, True], ids=["classes last", "examples last"])
@pytest.mark.parametrize("name", METHODS)
def test_targets_of_a_block_are_those_of_its_batches(name: str, across: bool) -> None:
    objective = Objective(METHODS[name](), WEIGHTS)
    form = closed_form(objective)
    assert form is not None
    student = normal(S, 10, 12).mT if across else normal(S, 12, 10)
    teacher, labels = normal(1, 12, 10, seed=1), some_labels(S, 12, classes=10)
    together = form.target(student, teacher, labels).split([8, 4], 1)
    parts = zip(*(x.split([8, 4], 1) for x in (student, teacher, labels)), strict=True)
    for target, (logits, answers, true) in zip(together, parts, strict=True):
        separate = form.gradient(logits, form.target(logits, answers, true))
        assert torch.equal(form.gradient(logits, target), separate)


def test_the_loss_of_one_label_stands_for_all_models_that_share_a_batch() -> None:
    """Batches [U,B] of S models: the objective repeats labels for the models of a group."""
    student, labels = normal(4, B, 10), some_labels(2, B, classes=10)
    weights = made.some_weights(*[[1.0] * 4] * 3)
    shared = Objective(Hard(), weights)(Outputs(student), None, batch_of(labels))["loss"]
    repeated = Objective(Hard(), weights)(Outputs(student), None, batch_of(labels.repeat_interleave(2, 0)))["loss"]
    assert torch.equal(shared, repeated)
    torch.testing.assert_close(shared[3], F.cross_entropy(student[3], labels[1]))


# ---------------------------------------------------------------- methods for one model, and functions


class Distil(PerModelMethod):
    """Soft targets, as published for one student."""

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        assert teacher is not None
        assert student.logits.ndim == teacher.logits.ndim == 2
        assert batch.labels.shape == batch.index.shape == student.logits.shape[:1]
        T = weights.T
        soft = -((teacher.logits / T).softmax(1) * (student.logits / T).log_softmax(1)).sum(1).mean()
        hard = F.cross_entropy(student.logits, batch.labels)
        return {"loss": weights.alpha * T**2 * soft + weights.beta * hard, "soft": soft, "hard": hard}


def distil(student: Tensor, teacher: Tensor, labels: Tensor, T: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    soft = -((teacher / T).softmax(1) * (student / T).log_softmax(1)).sum(1).mean()
    return alpha * T**2 * soft + beta * F.cross_entropy(student, labels)


@pytest.mark.parametrize("teachers", [1, S])
def test_a_method_for_one_model_and_a_function_are_called_for_each_model(teachers: int) -> None:
    student, teacher, labels = normal(S, B, 10), normal(teachers, B, 10, seed=1), some_labels(S, B, classes=10)
    arguments = (Outputs(student), Outputs(teacher), batch_of(labels), WEIGHTS)
    expected = SoftTargets()(*arguments)
    found = Distil()(*arguments)
    assert found.keys() == expected.keys()
    for name, term in expected.items():
        torch.testing.assert_close(found[name], term)
    torch.testing.assert_close(FunctionMethod(distil)(*arguments)["loss"], expected["loss"])


@pytest.mark.parametrize("method", [Distil(), FunctionMethod(distil)], ids=["per model", "function"])
def test_a_method_for_one_model_trains_as_the_shipped_one(method: Method) -> None:
    teacher = CachedTeacher(normal(75, made.CLASSES))
    weights = made.some_weights(T=[3], alpha=[0.7], beta=[0.4])
    own, shipped = (
        made.train(made.solo(method=one), teacher=teacher, method=one, weights=weights)[0]
        for one in (method, SoftTargets())
    )
    assert made.difference(own.state, shipped.state) < 1e-9


def test_a_function_gets_what_it_has_parameters_for_and_its_own_keys() -> None:
    def squared(student: Tensor, teacher: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        soft = scale * (student - teacher).square().sum(1).mean()
        return {"loss": soft, "soft": soft}

    def labelled(student: Tensor, labels: Tensor, T: Tensor) -> Tensor:
        return F.cross_entropy(student / T, labels)

    method, other = FunctionMethod(squared, scale=2.0), FunctionMethod(labelled)
    assert (method.needs_teacher, method.needs_labels, method.has_T, method.has_alpha) == (True, False, False, False)
    assert (other.needs_teacher, other.needs_labels, other.has_T, other.has_alpha) == (False, True, True, False)
    student, teacher, labels = normal(S, B, 10), normal(1, B, 10, seed=1), some_labels(S, B, classes=10)
    found = method(Outputs(student), Outputs(teacher), batch_of(labels), WEIGHTS)
    torch.testing.assert_close(found["soft"], 2 * (student - teacher).square().sum(-1).mean(-1))
    loss = other(Outputs(student), None, batch_of(labels), WEIGHTS)["loss"]
    torch.testing.assert_close(loss[1], F.cross_entropy(student[1] / 3, labels[1]))


def test_a_function_is_a_loss_when_it_takes_a_student_first() -> None:
    assert is_loss_function(distil)
    for other in (lambda student: student, lambda teacher, student: student, Distil, "distil", F.mse_loss):
        assert not is_loss_function(other)


def test_a_method_for_one_model_without_a_loss_is_refused() -> None:
    class Terms(PerModelMethod):
        def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Any:
            return {"soft": student.logits.sum()}

    labels = some_labels(S, B, classes=10)
    with pytest.raises(ConfigError, match=r"Terms: the loss returned .*soft.* and no 'loss' among them"):
        Terms()(Outputs(normal(S, B, 10)), None, batch_of(labels), WEIGHTS)


# ---------------------------------------------------------------- what a method asks of the training


class Picky(Hard):
    min_classes = 3
    min_batch = 12


@pytest.mark.parametrize(
    ("classes", "smallest", "message"),
    [
        (2, 12, "Picky needs 3 classes or more, and the data have 2"),
        (3, 11, "Picky needs batches of 12 examples or more, and the smallest has 11"),
    ],
)
def test_data_that_a_method_cannot_learn_from_are_refused(classes: int, smallest: int, message: str) -> None:
    def setting(classes: int, smallest: int) -> Setting:
        return Setting(classes, 75, smallest, Outputs(torch.zeros(1, 2, classes)), None)

    Picky().setup(setting(3, 12))
    with pytest.raises(ConfigError) as caught:
        Picky().setup(setting(classes, smallest))
    assert caught.value.message == message


class Progress(Hard):
    """Remembers where in the training it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[float, int, bool]] = []

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        self.calls.append((batch.progress, batch.epoch, self.training))
        return super().forward(student, teacher, batch, weights)


def test_a_method_knows_where_in_the_training_it_is() -> None:
    method = Progress()
    made.train(made.solo(method=method), method=method)
    assert [progress for progress, _, _ in method.calls] == pytest.approx([k / 10 for k in range(10)])
    assert [epoch for _, epoch, _ in method.calls] == [1] * 5 + [2] * 5
    assert all(training for *_, training in method.calls)
    assert not method.training


def test_every_term_of_a_method_is_a_column_of_the_metrics() -> None:
    class Terms(Hard):
        def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Any:
            terms = super().forward(student, teacher, batch, weights)
            return {**terms, "size": student.logits.square().mean((1, 2))}

    method = Terms()
    row = made.train(made.solo(method=method), method=method)[0].history[0]
    assert row["soft_loss"] is None
    assert row["loss"] == pytest.approx(0.5 * row["hard_loss"])
    assert row["size_loss"] > 0


# ---------------------------------------------------------------- parameters of a method's own


class Hint(Method):
    """The student's hidden layer, projected, learns the teacher's."""

    student_features = ("first",)
    teacher_features = ("layers.3",)

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        assert setting.teacher is not None
        widths = [setting.student.features["first"].shape[-1], setting.teacher.features["layers.3"].shape[-1]]
        self.projection = nn.Linear(*widths)
        self.drop = nn.Dropout(0.2)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        assert teacher is not None
        projected = self.projection(self.drop(student.features["first"]))
        hint = (projected - teacher.features["layers.3"]).square().mean((1, 2))
        hard = torch.stack([F.cross_entropy(*pair) for pair in zip(student.logits, batch.labels, strict=True)])
        return {"loss": weights.alpha * hint + weights.beta * hard, "hint": hint, "hard": hard}


def hint_training() -> tuple[Hint, dict[str, Any]]:
    """A method with a projection, set up, and the arguments of its training."""
    teacher, method = made.model(made.Moody, 9), Hint()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        method.setup(made.a_setting(method, made.model(made.Own), teacher))
    method.double()
    live = LiveTeacher([teacher])
    live.read_features(method.teacher_features)
    return method, {"teacher": live, "method": method, "plan": made.a_plan(epochs=4)}


def test_a_methods_parameters_are_trained_and_are_no_part_of_the_student() -> None:
    method, keys = hint_training()
    before = {name: t.clone() for name, t in method.state_dict().items()}
    outcome = made.train(made.solo(made.Own, method=method), **keys)[0]
    assert set(before) == {"projection.weight", "projection.bias"}
    assert all(not torch.equal(t, method.state_dict()[name]) for name, t in before.items())
    assert outcome.history[-1]["hint_loss"] < outcome.history[0]["hint_loss"]
    assert outcome.state.keys() == made.Own().state_dict().keys()


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_training_with_a_methods_parameters_resumes_bit_for_bit(stop_after: int) -> None:
    method, keys = hint_training()
    whole = made.train(made.solo(made.Own, method=method), **keys)[0]

    interrupted, keys = hint_training()
    checkpoint, epochs = made.InMemory(), itertools.count(1)
    with pytest.raises(Interrupted):
        made.train(
            made.solo(made.Own, method=interrupted),
            **keys,
            checkpoint=checkpoint,
            stopping=lambda: next(epochs) == stop_after,
        )
    resumed, keys = hint_training()
    outcome = made.train(made.solo(made.Own, method=resumed), **keys, checkpoint=checkpoint)[0]
    assert made.difference(outcome.state, whole.state) == 0
    assert made.metrics(outcome) == made.metrics(whole)
    assert made.difference(dict(resumed.state_dict()), dict(method.state_dict())) == 0
    assert made.difference(dict(resumed.state_dict()), dict(interrupted.state_dict())) > 1e-3


def test_methods_that_differ_in_a_stackable_key_are_one_method() -> None:
    smoothings: Sequence[float] = (0, 0.1, 0.5)
    stacked = LabelSmoothing.stack([LabelSmoothing(smoothing) for smoothing in smoothings])
    student, labels = normal(S, B, 10), some_labels(S, B, classes=10)
    found = stacked(Outputs(student), None, batch_of(labels), WEIGHTS)["loss"]
    expected = [
        WEIGHTS.beta[s] * F.cross_entropy(student[s], labels[s], label_smoothing=smoothing)
        for s, smoothing in enumerate(smoothings)
    ]
    torch.testing.assert_close(found, torch.stack(expected))
