"""Learners side by side on the same batches are the learners trained one by one, to the last bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import made
import pytest
import torch
from stacks import ADAMW, FUSED, JITTER, SGD
from torch import Tensor, nn

from kd_cli.learn.augment import Augment
from kd_cli.learn.cohort import Cohort
from kd_cli.learn.engine import Interrupted, Outcome, Plan, Training, fit
from kd_cli.learn.learner import Learner, ModuleLearner, UniformLearner
from kd_cli.learn.methods import DKD, Hard, Hints, Method, SoftTargets
from kd_cli.learn.objective import Objective, SideBySide
from kd_cli.learn.own_dropout import OwnDropout
from kd_cli.learn.randomness import global_stream
from kd_cli.learn.schedules import Cosine
from kd_cli.learn.stacked.learner import StackedLearner
from kd_cli.learn.teachers import CachedTeacher, LiveTeacher, Teacher

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Student:
    """How one learner of a cohort is made: one network or a stack of them."""

    build: made.Build
    optimizer: made.Optimizer = SGD
    method: type[Method] | partial[Method] = SoftTargets
    T: Sequence[float] = (2.0,)
    stack: bool = False

    def learner(self, teacher: nn.Module, seed: int) -> tuple[UniformLearner, Objective]:
        modules = [made.model(self.build, seed, torch.float32) for _ in self.T]
        n = len(self.T)
        method = self.method()
        with global_stream(seed, "student", "method"):
            method.setup(made.a_setting(method, modules[0], teacher))
        weights = made.some_weights(self.T, [1.0] * n, [0.5] * n, torch.float32)
        objective = Objective(method.to(torch.float32), weights)
        if self.stack:
            return StackedLearner(modules, self.optimizer, hyper=[{}] * n, seeds=[seed] * n), objective
        optimizer = self.optimizer([*modules[0].parameters(), *method.parameters()])
        return ModuleLearner(modules[0], optimizer, seed=seed, objective=objective), objective


HINTS = partial(Hints, "layers.0", "layers.0", regressor="conv_bn_relu")  # with parameters and statistics of its own
STUDENTS = (
    Student(made.Moody),  # BatchNorm, and dropout that draws from torch's global generator
    Student(made.Moody, ADAMW, DKD, T=(4.0,)),
    Student(made.Moody, FUSED, HINTS, T=(1.0,)),
    Student(made.conv, FUSED, Hard),
    Student(made.small, ADAMW, T=(1.0,), stack=True),  # its closed form computes a block's losses at its end
    Student(made.big, FUSED, T=(1.0, 5.0, 9.0), stack=True),
)


class Counting(nn.Module):
    """A network that counts its answers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.answers = made.model(made.Moody, 9, torch.float32).layers, 0

    def forward(self, images: Tensor) -> Tensor:
        self.answers += 1
        return self.layers(images)


def plan_of(**keys: Any) -> Plan:
    plan = made.a_plan(epochs=3, schedule=Cosine(warmup=0.2), augment=JITTER)
    return replace(plan, **{"estimate_batchnorm": True, "keep_best": True, **keys})


def train(
    learner: Learner, objective: Objective, teacher: Teacher, *, seed: int = 5, plan: Plan, **keys: Any
) -> list[Outcome]:
    data = made.examples(75, dtype=torch.float32), made.examples(30, "val", torch.float32)
    return fit(learner, Training(*data, "student", [seed], plan, objective, teacher), **keys)


def cohort_of(
    students: Sequence[Student], network: nn.Module, seed: int = 5, workers: int = 1
) -> tuple[Cohort, Objective]:
    pairs = [student.learner(network, seed) for student in students]
    cohort = Cohort([learner for learner, _ in pairs], CPU, workers=workers)
    return cohort, SideBySide.of([objective for _, objective in pairs])


def live(network: nn.Module, students: Sequence[Student] = STUDENTS) -> LiveTeacher:
    teacher = LiveTeacher([network])
    teacher.read_features(["layers.0"] if any(student.method is HINTS for student in students) else [])
    return teacher


def one_by_one(students: Sequence[Student], network: nn.Module, plan: Plan) -> list[Outcome]:
    return [
        outcome
        for student in students
        for outcome in train(*student.learner(network, 5), live(network, [student]), plan=plan)
    ]


def assert_same_bytes(some: Sequence[Outcome], others: Sequence[Outcome]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert (one.epoch, one.diverged) == (other.epoch, other.diverged)
        assert made.metrics(one) == made.metrics(other)
        assert one.state.keys() == other.state.keys()
        assert all(torch.equal(one.state[name], other.state[name]) for name in one.state)


@pytest.mark.parametrize("diagnostics", [False, True])
@pytest.mark.parametrize("keep_best", [False, True])
def test_students_of_a_cohort_end_with_the_bytes_that_they_end_with_alone(keep_best: bool, diagnostics: bool) -> None:
    plan, network = plan_of(keep_best=keep_best, diagnostics=diagnostics), Counting()
    together = train(*cohort_of(STUDENTS, network), live(network), plan=plan)
    assert_same_bytes(together, one_by_one(STUDENTS, network, plan))
    assert len({outcome.history[-1]["loss"] for outcome in together}) == len(together)  # they are unlike


def test_a_live_teacher_answers_a_batch_once_for_all() -> None:
    plan, network = plan_of(), Counting()
    learner, objective = cohort_of(STUDENTS, network)
    network.answers = 0
    train(learner, objective, live(network), plan=plan)
    assert network.answers == 3 * 5  # epochs, batches


def test_a_live_ensemble_of_arithmetic_means_runs_once_for_temperatures_that_differ() -> None:
    networks = [Counting(), Counting()]
    students = (Student(made.Moody, T=(1.0,)), Student(made.Moody, T=(8.0,)))
    plan = plan_of()
    learner, objective = cohort_of(students, networks[0])
    for network in networks:
        network.answers = 0
    together = train(learner, objective, LiveTeacher(networks, combine="arithmetic"), plan=plan)
    assert [network.answers for network in networks] == [3 * 5, 3 * 5]
    alone = [
        train(*student.learner(networks[0], 5), LiveTeacher(networks, combine="arithmetic"), plan=plan)[0]
        for student in students
    ]
    assert_same_bytes(together, alone)


def test_a_batch_is_fetched_once_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    augmented = []

    def counted(self: Augment, images: Tensor, *args: Any, apply: Any = Augment.apply, **keys: Any) -> Tensor:
        augmented.append(len(images))
        return apply(self, images, *args, **keys)

    monkeypatch.setattr(Augment, "apply", counted)
    network = Counting()
    train(*cohort_of(STUDENTS, network), live(network), plan=plan_of())
    assert augmented == [16, 16, 16, 16, 11] * 3


def test_looked_up_answers_and_a_stack_of_several_seeds() -> None:
    """The learners of a cohort may be stacks whose models have batches of their own, if all have the same."""
    seeds = [3, 3, 4, 4]
    answers = CachedTeacher(torch.randn(75, made.CLASSES, generator=torch.Generator().manual_seed(0)))

    def stack(build: made.Build, optimizer: made.Optimizer) -> tuple[UniformLearner, Objective]:
        modules = [made.model(build, seed, torch.float32) for seed in seeds]
        weights = made.some_weights([1.0, 2, 3, 4], [1.0] * 4, [0.5] * 4, torch.float32)
        learner = StackedLearner(modules, optimizer, hyper=[{}] * 4, seeds=seeds)
        return learner, Objective(SoftTargets(), weights)

    def trained(learner: Learner, objective: Objective) -> list[Outcome]:
        data = made.examples(75, dtype=torch.float32), made.examples(30, "val", torch.float32)
        return fit(learner, Training(*data, "student", seeds, plan_of(augment=Augment()), objective, answers))

    pairs = [stack(made.small, SGD), stack(made.conv, ADAMW)]
    together = trained(Cohort([one for one, _ in pairs], CPU), SideBySide.of([one for _, one in pairs]))
    assert_same_bytes(together, [*trained(*stack(made.small, SGD)), *trained(*stack(made.conv, ADAMW))])


def test_a_student_that_diverges_leaves_the_others_bytes_as_they_are() -> None:
    plan, network = plan_of(), Counting()
    wild = Student(made.conv, partial(torch.optim.SGD, lr=1e30))
    together = train(*cohort_of([STUDENTS[0], wild, STUDENTS[1]], network), live(network), plan=plan)
    assert together[1].diverged == 1
    assert math.isnan(together[1].history[-1]["loss"])
    assert_same_bytes(together[::2], one_by_one(STUDENTS[:2], network, plan))


class Kept:
    """The last saved state."""

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None

    def load(self) -> dict[str, Any] | None:
        return self.state

    def due(self, epoch: int) -> bool:
        return False

    def save(self, state: dict[str, Any]) -> None:
        torch.save(state, "state.pt")
        self.state = torch.load("state.pt", weights_only=True)


@pytest.mark.parametrize("epochs", [1, 2])
def test_an_interrupted_cohort_continues_to_the_same_bytes(
    epochs: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    plan, network, kept = plan_of(), Counting(), Kept()
    whole = train(*cohort_of(STUDENTS, network), live(network), plan=plan)
    asked = iter([False] * (epochs - 1) + [True])
    with pytest.raises(Interrupted):
        train(*cohort_of(STUDENTS, network), live(network), plan=plan, checkpoint=kept, stopping=lambda: next(asked))
    assert kept.state is not None
    assert kept.state["epoch"] == epochs
    resumed = train(*cohort_of(STUDENTS, network), live(network), plan=plan, checkpoint=kept)
    assert_same_bytes(resumed, whole)


def test_a_cohort_leaves_torchs_global_generator_as_it_was() -> None:
    network = Counting()
    learner, objective = cohort_of(STUDENTS, network)
    before = torch.get_rng_state()
    train(learner, objective, live(network), plan=plan_of())
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_of_a_shared_block_are_given_in_step_only() -> None:
    block = made.examples(12).blocks(torch.arange(12)[None], [4, 4, 4])
    one, other = map(iter, block.shared(2))
    first = next(one)
    assert next(other) is first
    next(one)
    next(one)
    with pytest.raises(ValueError, match="batch 1 is asked for while batch 2 is at hand"):
        next(other)


# ---------------------------------------------------------------- several at once


@pytest.mark.parametrize("workers", [2, 5])
def test_students_that_take_their_steps_at_once_end_with_the_same_bytes(workers: int) -> None:
    plan, network = plan_of(), Counting()
    learner, objective = cohort_of(STUDENTS, network, workers=workers)
    network.answers = 0
    together = train(learner, objective, live(network), plan=plan)
    assert network.answers == 3 * 5
    assert learner.draws == [False] * 6
    assert learner.own == [True, True, True, False, False, False]  # nn.Dropout, which the others do not have
    assert_same_bytes(together, one_by_one(STUDENTS, network, plan))


def test_workers_leave_torchs_threads_as_they_were() -> None:
    network = Counting()
    torch.set_num_threads(2)
    learner, objective = cohort_of(STUDENTS[3:], network, workers=2)
    train(learner, objective, live(network, STUDENTS[3:]), plan=plan_of())
    assert torch.get_num_threads() == 2


class Noisy(nn.Module):
    """A network with noise of its own beside dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = made.Moody()

    def forward(self, images: Tensor) -> Tensor:
        logits = self.inner(images)
        return logits + 0.1 * torch.randn_like(logits) if self.training else logits


def test_networks_with_other_random_numbers_than_dropout_take_turns() -> None:
    plan, network = plan_of(), Counting()
    students = [Student(Noisy), Student(made.Moody), Student(Noisy, ADAMW, DKD)]
    learner, objective = cohort_of(students, network, workers=2)
    together = train(learner, objective, live(network, students), plan=plan)
    assert learner.draws == [True, False, True]
    assert_same_bytes(together, one_by_one(students, network, plan))
    assert not any("forward" in vars(part) for one in learner.parts for part in one.module.modules())


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_dropout_from_a_generator_of_its_own_has_the_bytes_of_torchs(p: float, inplace: bool) -> None:
    layer, images = nn.Dropout(p, inplace), torch.randn(9, 3, 5, 5).to(memory_format=torch.channels_last)
    torch.manual_seed(3)
    own = OwnDropout(nn.Sequential(layer))
    own.continue_from(torch.get_rng_state())
    expected = [layer(images.clone()), layer(images.clone())]
    with own.replaced():
        assert all(torch.equal(layer(images.clone()), one) for one in expected)
        assert layer.eval()(images) is images


class Late(nn.Module):
    """A network that draws random numbers from its third step on."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.steps = made.small(), 0

    def forward(self, images: Tensor) -> Tensor:
        self.steps += self.training
        logits = self.inner(images)
        return logits + 0.1 * torch.randn_like(logits) if self.training and self.steps > 2 else logits


def test_a_network_that_draws_in_some_steps_only_is_noticed_and_alone_in_turn_it_is_trained() -> None:
    plan, network = plan_of(), Counting()
    students = [Student(Late), Student(made.conv)]
    learner, objective = cohort_of(students, network, workers=2)
    with pytest.raises(RuntimeError, match="draws random numbers in some steps only"):
        train(learner, objective, live(network, students), plan=plan)
    together = train(*cohort_of(students, network), live(network, students), plan=plan)
    assert_same_bytes(together, one_by_one(students, network, plan))


def test_a_saved_cohort_continues_with_its_number_of_workers() -> None:
    network = Counting()
    learner, _ = cohort_of(STUDENTS, network, workers=2)
    other, _ = cohort_of(STUDENTS, network)
    other.load_state(learner.state())
    assert other.workers == 2


def test_an_error_in_a_worker_is_the_cohorts() -> None:
    class Wrong(SoftTargets):
        calls = 0

        def forward(self, *args: Any) -> Any:
            Wrong.calls += 1
            if Wrong.calls > 3:
                raise ArithmeticError("my own bug")
            return super().forward(*args)

    network = Counting()
    students = [Student(made.conv), Student(made.conv, method=Wrong)]
    learner, objective = cohort_of(students, network, workers=2)
    with pytest.raises(ArithmeticError, match="my own bug"):
        train(learner, objective, live(network, students), plan=plan_of())
