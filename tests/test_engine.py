"""The epoch loop for one network: random streams, the frozen teacher, the loss's weights, schedules."""

from __future__ import annotations

import math

import made
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_cli import losses
from kd_cli.errors import ConfigError
from kd_cli.learn.augment import Augment
from kd_cli.learn.batches import Batch, Examples
from kd_cli.learn.engine import Observer
from kd_cli.learn.methods import Hard, SoftTargets
from kd_cli.learn.outputs import Outputs
from kd_cli.learn.randomness import generator, global_stream
from kd_cli.learn.schedules import Constant, Cosine, Linear, Step
from kd_cli.learn.teachers import CachedTeacher, LiveTeacher, Teacher

JITTER = Augment(jitter=1, flip=True)


def moody_teacher(seed: int = 9) -> nn.Module:
    """A teacher whose statistics are not the initial ones, left in train mode."""
    module = made.model(made.Moody, seed).train()
    with torch.no_grad(), global_stream(seed, "mood"):
        for _ in range(3):
            module(made.images(32))
    return module


def a_teacher(n: int = 75) -> CachedTeacher:
    return CachedTeacher(torch.randn(n, made.CLASSES, dtype=torch.float64, generator=generator(0, "teacher")))


class Recording(Teacher):
    """A teacher that remembers the batches that it was called with."""

    needs_images = True

    def __init__(self) -> None:
        self.batches: list[Batch] = []

    def __call__(self, batch: Batch, T: Tensor) -> Outputs:
        self.batches.append(Batch(batch.index.clone(), batch.images.clone(), batch.labels, batch.progress, batch.epoch))
        return Outputs(torch.zeros(*batch.index.shape, made.CLASSES, dtype=batch.images.dtype))


# ---------------------------------------------------------------- a plain loop


def plain_loop(module: nn.Module, teacher: Tensor, hard_loss: object, soft_loss: object) -> None:
    """Two epochs of distillation as one writes them by hand."""
    images, labels = made.pictures(75)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    module.train()
    for epoch in (1, 2):
        order = torch.randperm(75, generator=generator(0, "student", "order", epoch))
        with global_stream(0, "student", "global", epoch):
            for index in order.split(16):
                logits = module(images[index])
                loss = 0.7 * 3.0**2 * soft_loss(logits, teacher[index]) + 0.4 * hard_loss(logits, labels[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()


def soft_loss_of_pytorch(student: Tensor, teacher: Tensor) -> Tensor:
    return F.cross_entropy(student / 3.0, (teacher / 3.0).softmax(-1))


def soft_loss_of_ours(student: Tensor, teacher: Tensor) -> Tensor:
    return losses.soft_cross_entropy(student, teacher, T=3.0)


@pytest.mark.parametrize("build", [made.small, made.Own, made.Moody])
@pytest.mark.parametrize(
    ("hard_loss", "soft_loss", "tolerance"),
    [(losses.hard_cross_entropy, soft_loss_of_ours, 0), (F.cross_entropy, soft_loss_of_pytorch, 1e-9)],
    ids=["same losses", "losses of PyTorch"],
)
def test_one_network_trains_as_in_a_plain_loop(
    build: made.Build, hard_loss: object, soft_loss: object, tolerance: float
) -> None:
    teacher = 3 * torch.randn(75, made.CLASSES, dtype=torch.float64, generator=generator(0, "teacher"))
    by_hand = made.model(build)
    plain_loop(by_hand, teacher, hard_loss, soft_loss)
    weights = made.some_weights(T=[3], alpha=[0.7], beta=[0.4])
    outcome = made.train(made.solo(build), teacher=CachedTeacher(teacher), weights=weights)[0]
    assert made.difference(outcome.state, by_hand.state_dict()) <= tolerance
    assert made.difference(outcome.state, made.model(build).state_dict()) > 1e-3


# ---------------------------------------------------------------- random streams


@pytest.mark.parametrize("build", [made.big, made.conv, made.Moody])
def test_same_seed_gives_the_same_history_and_weights_whatever_was_drawn_before(build: made.Build) -> None:
    one = made.train(made.solo(build), teacher=LiveTeacher([moody_teacher()]), plan=made.a_plan(augment=JITTER))[0]
    torch.rand(17)
    made.train(made.solo(build, seed=5), seeds=[5], method=Hard())
    other = made.train(made.solo(build), teacher=LiveTeacher([moody_teacher()]), plan=made.a_plan(augment=JITTER))[0]
    assert made.metrics(one) == made.metrics(other)
    assert made.difference(one.state, other.state) == 0


def test_another_seed_gives_another_history() -> None:
    one, other = (made.train(made.solo(seed=seed), seeds=[seed], method=Hard())[0] for seed in (0, 1))
    assert one.history[-1]["loss"] != other.history[-1]["loss"]


def test_training_and_building_leave_the_global_random_state_alone() -> None:
    before = torch.get_rng_state()
    made.train(made.solo(made.Moody), teacher=LiveTeacher([moody_teacher()]), plan=made.a_plan(augment=JITTER))
    made.train(made.solo(made.big), method=Hard())
    assert torch.equal(before, torch.get_rng_state())


def test_a_longer_training_starts_as_a_shorter_one() -> None:
    short, long = (made.train(made.solo(made.big), method=Hard(), plan=made.a_plan(epochs=n))[0] for n in (1, 3))
    assert made.metrics(short) == made.metrics(long)[:1]


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own() -> None:
    teacher = Recording()
    made.train(made.solo(), teacher=teacher)
    orders = [torch.cat([batch.index[0] for batch in teacher.batches[e : e + 5]]) for e in (0, 5)]
    assert [len(batch.index[0]) for batch in teacher.batches] == [16, 16, 16, 16, 11] * 2
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(75))
    assert not torch.equal(*orders)
    assert not torch.equal(orders[0], torch.arange(75))


# ---------------------------------------------------------------- the teacher


def test_the_live_teacher_is_in_eval_mode_and_stays_bit_identical() -> None:
    module = moody_teacher()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    teacher = LiveTeacher([module])
    made.train(made.solo(), teacher=teacher)
    assert made.difference(before, module.state_dict()) == 0
    assert not any(m.training for m in module.modules())
    assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    images, labels = made.pictures(20)
    batch = Batch(torch.arange(20)[None], images[None], labels[None])
    logits = teacher(batch, torch.ones(1)).logits
    assert torch.equal(logits, teacher(batch, torch.ones(1)).logits)
    assert not logits.requires_grad


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("combine", ["geometric", "arithmetic"])
def test_cached_and_live_teacher_teach_the_same_on_shuffled_batches(members: int, combine: str) -> None:
    modules, images = [moody_teacher(9 + m).eval() for m in range(members)], made.images(75)
    with torch.no_grad():
        cached = CachedTeacher(torch.stack([module(images) for module in modules]), combine=combine)
    live = LiveTeacher(modules, combine=combine)
    outcomes = [made.train(made.solo(), teacher=teacher)[0] for teacher in (cached, live)]
    for one, other in zip(*map(made.metrics, outcomes), strict=True):
        assert one["role"] == other.pop("role")
        assert {key: value for key, value in one.items() if key != "role"} == pytest.approx(other, abs=1e-12)
    assert made.difference(outcomes[0].state, outcomes[1].state) < 1e-12
    assert outcomes[0].history[0]["soft_loss"] > 0


def test_teacher_and_student_see_the_very_same_augmented_images() -> None:
    seen: list[Tensor] = []
    teacher, learner, stored = Recording(), made.solo(), made.images(75)
    learner.module.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].clone()) if m.training else None)
    made.train(learner, teacher=teacher, plan=made.a_plan(augment=JITTER))
    assert len(seen) == len(teacher.batches) == 10
    moved = 0
    for images, batch in zip(seen, teacher.batches, strict=True):
        assert torch.equal(images, batch.images[0])
        moved += sum(not torch.equal(a, b) for a, b in zip(images, stored[batch.index[0]], strict=True))
    assert moved > 100  # of 150


# ---------------------------------------------------------------- the loss's weights


def test_alpha_0_is_the_student_alone_bit_for_bit() -> None:
    weights = made.some_weights(T=[4], alpha=[0], beta=[1])
    distilled = made.train(made.solo(made.big), teacher=a_teacher(), weights=weights)[0]
    alone = made.train(made.solo(made.big), method=Hard(), weights=made.some_weights(beta=[1]))[0]
    assert made.difference(distilled.state, alone.state) == 0
    assert [row["hard_loss"] for row in distilled.history] == [row["hard_loss"] for row in alone.history]


def test_beta_0_uses_no_labels() -> None:
    images, labels = made.pictures(75)
    one, blind = (
        made.train(made.solo(), teacher=a_teacher(), data=Examples(images, shown), weights=made.some_weights(beta=[0]))[
            0
        ]
        for shown in (labels, labels.roll(7))
    )
    assert one.history[-1]["hard_loss"] != blind.history[-1]["hard_loss"]
    assert made.difference(one.state, blind.state) == 0


def test_labels_matter_when_beta_is_not_0() -> None:
    images, labels = made.pictures(75)
    one, other = (
        made.train(made.solo(), teacher=a_teacher(), data=Examples(images, shown))[0]
        for shown in (labels, labels.roll(7))
    )
    assert made.difference(one.state, other.state) > 1e-4


def test_the_reported_loss_is_the_weighted_sum_of_its_terms() -> None:
    weights = made.some_weights(T=[3], alpha=[0.7], beta=[0.2])
    for row in made.train(made.solo(), teacher=a_teacher(), weights=weights, method=SoftTargets())[0].history:
        assert row["loss"] == pytest.approx(0.7 * 9 * row["soft_loss"] + 0.2 * row["hard_loss"], abs=1e-12)


def test_training_learns_what_there_is_to_learn() -> None:
    outcome = made.train(made.solo(), method=Hard(), plan=made.a_plan(epochs=8))[0]
    assert outcome.history[-1]["loss"] < 0.5 * outcome.history[0]["loss"]
    assert outcome.history[-1]["val_accuracy"] > 0.8


# ---------------------------------------------------------------- the loop


def test_a_diverged_training_stops_early_and_keeps_its_history() -> None:
    learner = made.solo(optimizer=lambda p: torch.optim.SGD(p, lr=1e200))
    outcome = made.train(learner, method=Hard(), plan=made.a_plan(epochs=9))[0]
    assert outcome.diverged == len(outcome.history)
    assert outcome.diverged < 4
    assert not math.isfinite(outcome.history[-1]["loss"])


def test_the_bound_on_the_norm_holds_after_every_step() -> None:
    learner = made.solo(made.big, optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    bounds = learner.module.max_norm
    assert bounds.keys() == {"2.weight", "5.weight"}
    norms: list[float] = []

    class Watch(Observer):
        def step(self) -> None:
            norms.extend(float(learner.module.get_parameter(name).detach().norm(dim=1).max()) for name in bounds)

    made.train(learner, method=Hard(), observer=Watch(), plan=made.a_plan(epochs=2))
    assert len(norms) == 20
    assert max(norms) <= 0.6 + 1e-12
    assert max(norms) > 0.59  # it is what held them


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (Constant(), [1, 1, 1]),
        (Linear(), [1, 0.5, 0.1]),
        (Linear(final=0.5), [1, 0.75, 0.55]),
        (Cosine(), [1, 0.5, (1 + math.cos(0.9 * math.pi)) / 2]),
        (Cosine(final=0.2), [1, 0.6, 0.2 + 0.4 * (1 + math.cos(0.9 * math.pi))]),
        (Step(), [1, 0.1, 0.01]),
        (Step(milestones=(0.9,), factor=0.5), [1, 1, 0.5]),
        (Constant(warmup=0.9), [0, 5 / 9, 1]),
        (Linear(warmup=0.5), [0, 1, 0.2]),
    ],
)
def test_schedules_have_their_values(schedule: Constant, values: list[float]) -> None:
    assert [schedule(progress) for progress in (0, 0.5, 0.9)] == pytest.approx(values, abs=1e-12)


def test_a_warm_up_of_the_whole_training_is_refused() -> None:
    with pytest.raises(ConfigError, match="warmup"):
        Constant(warmup=1.0)


def test_the_rate_follows_the_schedule_step_by_step() -> None:
    def sgd(parameters: object) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.4)

    learner = made.solo(optimizer=sgd)
    rates: list[float] = []

    class Watch(Observer):
        def step(self) -> None:
            rates.append(learner.optimizer.param_groups[0]["lr"])

    outcome = made.train(learner, method=Hard(), observer=Watch(), plan=made.a_plan(schedule=Linear()))[0]
    assert rates == pytest.approx([0.4 * (1 - k / 10) for k in range(10)])
    assert [row["lr"] for row in outcome.history] == pytest.approx([0.4 * 0.6, 0.4 * 0.1])
