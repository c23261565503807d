"""The epoch loop for one model: random streams, the frozen teacher, the loss's weights, schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import made
import pytest
import torch
from conftest import TINY
from process import Ran
from torch import Tensor, nn

from kd_cli.errors import ConfigError
from kd_cli.learn.augment import Augment
from kd_cli.learn.engine import Examples, Observer
from kd_cli.learn.learner import SoloLearner
from kd_cli.learn.methods import Hard, SoftTargets
from kd_cli.learn.optim import Constant, Cosine, Linear, Step
from kd_cli.learn.randomness import global_stream
from kd_cli.learn.teachers import CachedTeacher, LiveTeacher

JITTER = Augment(jitter=1, flip=True)


def moody_teacher(seed: int = 9) -> nn.Module:
    """A teacher whose statistics are not those it was born with, left in train mode."""
    module = made.made(made.Moody, seed).train()
    with torch.no_grad(), global_stream(seed, "mood"):
        for _ in range(3):
            module(made.examples(32).images)
    return module


class Recording:
    """A teacher that remembers what it was asked."""

    def __init__(self) -> None:
        self.has_T = self.remembers = False
        self.asked: list[tuple[Tensor, Tensor]] = []

    def __call__(self, index: Tensor, images: Tensor, T: Tensor) -> Tensor:
        self.asked.append((index.clone(), images.clone()))
        return torch.zeros(*index.shape, made.CLASSES, dtype=images.dtype)


# ---------------------------------------------------------------- random streams


@pytest.mark.parametrize("build", [made.big, made.conv, made.Moody])
def test_same_seed_gives_the_same_history_and_weights_whatever_was_drawn_before(build: made.Build) -> None:
    one = made.train(made.solo(build), teacher=LiveTeacher([moody_teacher()]), plan=made.a_plan(augment=JITTER))[0]
    torch.rand(17)
    made.train(made.solo(build, seed=5), seeds=[5], method=Hard())
    other = made.train(made.solo(build), teacher=LiveTeacher([moody_teacher()]), plan=made.a_plan(augment=JITTER))[0]
    assert made.told(one) == made.told(other)
    assert made.apart(one.state, other.state) == 0


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
    assert made.told(short) == made.told(long)[:1]


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own() -> None:
    teacher = Recording()
    made.train(made.solo(), teacher=teacher)
    orders = [torch.cat([index[0] for index, _ in teacher.asked[e : e + 5]]) for e in (0, 5)]
    assert [len(index[0]) for index, _ in teacher.asked] == [16, 16, 16, 16, 11] * 2
    for order in orders:
        assert torch.equal(order.sort().values, torch.arange(75))
    assert not torch.equal(*orders)
    assert not torch.equal(orders[0], torch.arange(75))


def test_equal_runs_of_the_command_write_equal_metrics(tiny: Callable[..., Ran], tmp_path: Path) -> None:
    extra = ["training.jitter=1", "training.epochs=2", "teacher=bigmlp", "teacher.hidden=[12]"]
    one, other = (tiny(f"store_dir={tmp_path / name}", *extra, folder=tmp_path / name) for name in "ab")

    def rows(ran: Ran) -> list[dict]:
        return [{key: value for key, value in row.items() if key != "examples_per_second"} for row in ran.metrics]

    assert len(rows(one)) == 5
    assert rows(one) == rows(other)
    for role in ("teacher", "student_alone", "student"):
        assert not other.summary[role]["from_store"]
        assert one.summary[role]["test"] == other.summary[role]["test"]


@pytest.mark.parametrize("augment", [[], ["training.jitter=1"]], ids=["cached", "live"])
def test_student_alone_and_distilled_student_share_weights_and_batches(
    tiny: Callable[..., Ran], augment: list[str]
) -> None:
    ran = tiny("alpha=0", "beta=1", "training.epochs=2", "student.dropout=0.3", *augment)
    alone, distilled = (
        [(row["hard_loss"], row["loss"], row["train_accuracy"], row["val_nll"]) for row in ran.metrics if is_of(row)]
        for is_of in (lambda row: row["role"] == "student_alone", lambda row: row["role"] == "student")
    )
    assert len(alone) == 2
    assert alone == distilled
    assert ran.summary["student_alone"]["test"] == ran.summary["student"]["test"]


# ---------------------------------------------------------------- the teacher


def test_the_live_teacher_is_in_eval_mode_and_stays_bit_identical() -> None:
    module = moody_teacher()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    teacher = LiveTeacher([module])
    made.train(made.solo(), teacher=teacher)
    assert made.apart(before, module.state_dict()) == 0
    assert not any(m.training for m in module.modules())
    assert all(p.grad is None and not p.requires_grad for p in module.parameters())
    asked = torch.arange(20)[None], made.examples(20).images[None], torch.ones(1)
    logits = teacher(*asked)
    assert torch.equal(logits, teacher(*asked))
    assert not logits.requires_grad


@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("combine", ["geometric", "arithmetic"])
def test_cached_and_live_teacher_teach_the_same_on_shuffled_batches(members: int, combine: str) -> None:
    modules, data = [moody_teacher(9 + m).eval() for m in range(members)], made.examples(75)
    with torch.no_grad():
        cached = CachedTeacher(torch.stack([module(data.images) for module in modules]), combine=combine)
    live = LiveTeacher(modules, combine=combine)
    outcomes = [made.train(made.solo(), teacher=teacher)[0] for teacher in (cached, live)]
    for one, other in zip(*map(made.told, outcomes), strict=True):
        assert one["role"] == other.pop("role")
        assert {key: value for key, value in one.items() if key != "role"} == pytest.approx(other, abs=1e-12)
    assert made.apart(outcomes[0].state, outcomes[1].state) < 1e-12
    assert outcomes[0].history[0]["soft_loss"] > 0


def test_teacher_and_student_see_the_very_same_augmented_images() -> None:
    seen: list[Tensor] = []
    teacher, learner, data = Recording(), made.solo(), made.examples(75)
    assert isinstance(learner, SoloLearner)
    learner.module.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].clone()) if m.training else None)
    made.train(learner, teacher=teacher, data=data, plan=made.a_plan(augment=JITTER))
    assert len(seen) == len(teacher.asked) == 10
    moved = 0
    for mine, (index, images) in zip(seen, teacher.asked, strict=True):
        assert torch.equal(mine, images[0])
        moved += sum(not torch.equal(a, b) for a, b in zip(images[0], data.images[index[0]], strict=True))
    assert moved > 100  # of 150


OWN_TEACHER = """
import torch
from pathlib import Path

class Net(torch.nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.layer = torch.nn.Linear(64, num_classes)

    def forward(self, images):
        if images.device.type != "meta":
            with Path("calls.txt").open("a") as file:
                print(len(images), self.training, torch.is_grad_enabled(), file=file)
        return self.layer(images.flatten(1))
"""


def test_the_teacher_runs_live_when_the_students_images_are_augmented_and_only_then(
    kd_run: Callable[..., Ran], tmp_path: Path
) -> None:
    (tmp_path / "own_teacher.py").write_text(OWN_TEACHER)
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "own.yaml").write_text("_target_: own_teacher.Net\n")
    calls = tmp_path / "calls.txt"
    argv = [
        "--config-dir",
        "conf",
        *TINY[1:2],
        *TINY[3:],
        "teacher=own",
        "training.batch_size=100",
        "teacher_training.batch_size=128",
    ]

    def called(*more: str) -> list[str]:
        calls.unlink(missing_ok=True)
        ran = kd_run(*argv, *more)
        assert ran.code == 0, ran.err
        assert "seed=1" not in more or ran.summary["teacher"]["from_store"]
        return calls.read_text().splitlines() if calls.exists() else []

    assert called().count("128 True True") == 7  # the teacher's own training
    assert not called("seed=1")
    live = called("seed=1", "training.jitter=1")
    assert live.count("100 False False") == 10
    assert not any(" True " in f" {line} " for line in live)


# ---------------------------------------------------------------- the loss's weights


def test_alpha_0_is_the_student_alone_bit_for_bit() -> None:
    logits = 3 * torch.randn(75, made.CLASSES, dtype=torch.float64)
    distilled = made.train(
        made.solo(made.big), teacher=CachedTeacher(logits), weights=made.some_weights(T=[4], alpha=[0], beta=[1])
    )[0]
    alone = made.train(made.solo(made.big), method=Hard(), weights=made.some_weights(beta=[1]))[0]
    assert made.apart(distilled.state, alone.state) == 0
    assert [row["hard_loss"] for row in distilled.history] == [row["hard_loss"] for row in alone.history]


def test_beta_0_uses_no_labels() -> None:
    data = made.examples(75)
    other = Examples(data.images, data.labels.roll(7))
    teacher = CachedTeacher(torch.randn(75, made.CLASSES, dtype=torch.float64))
    one, blind = (
        made.train(made.solo(), teacher=teacher, data=d, weights=made.some_weights(beta=[0]))[0] for d in (data, other)
    )
    assert one.history[-1]["hard_loss"] != blind.history[-1]["hard_loss"]
    assert made.apart(one.state, blind.state) == 0


def test_labels_matter_when_beta_is_not_0() -> None:
    data = made.examples(75)
    teacher = CachedTeacher(torch.randn(75, made.CLASSES, dtype=torch.float64))
    one, other = (
        made.train(made.solo(), teacher=teacher, data=d)[0] for d in (data, Examples(data.images, data.labels.roll(7)))
    )
    assert made.apart(one.state, other.state) > 1e-4


def test_the_reported_loss_is_the_weighted_sum_of_its_terms() -> None:
    teacher = CachedTeacher(torch.randn(75, made.CLASSES, dtype=torch.float64))
    weights = made.some_weights(T=[3], alpha=[0.7], beta=[0.2])
    for row in made.train(made.solo(), teacher=teacher, weights=weights, method=SoftTargets())[0].history:
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
    assert isinstance(learner, SoloLearner)
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
    assert isinstance(learner, SoloLearner)
    rates: list[float] = []

    class Watch(Observer):
        def step(self) -> None:
            rates.append(learner.optimizer.param_groups[0]["lr"])

    outcome = made.train(learner, method=Hard(), observer=Watch(), plan=made.a_plan(schedule=Linear()))[0]
    assert rates == pytest.approx([0.4 * (1 - k / 10) for k in range(10)])
    assert [row["lr"] for row in outcome.history] == pytest.approx([0.4 * 0.6, 0.4 * 0.1])
