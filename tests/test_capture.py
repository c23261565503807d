from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from made import CLASSES, a_plan, difference, learner_of, metrics, model, small, some_weights, train
from tape import Tape
from torch import Tensor, nn

from kd_cli.learn import engine
from kd_cli.learn.augment import Augment
from kd_cli.learn.cuda_graphs import CudaGraphs
from kd_cli.learn.engine import Observer, Outcome
from kd_cli.learn.learner import Learner
from kd_cli.learn.methods import Hard, LabelSmoothing, Logits, Method, SoftTargets
from kd_cli.learn.schedules import Cosine
from kd_cli.learn.stacked.learner import StackedLearner
from kd_cli.learn.teachers import CachedTeacher, LiveTeacher

AUGMENTS = {"plain": Augment(), "moved": Augment(jitter=1, flip=True, rotate=10, scale=0.1)}
METHODS: dict[str, Callable[[], Method]] = {
    "soft": SoftTargets,
    "logits": Logits,
    "hard": Hard,
    "smoothed": LabelSmoothing,
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
}


@pytest.fixture(autouse=True)
def tapes(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    monkeypatch.setattr(Tape, "made", [])
    return Tape.made


def convolutional() -> nn.Module:
    from kd_cli.models.layers import Dropout

    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), Dropout(0.5), nn.Linear(48, CLASSES)
    )


def one_by_one(build: Callable[[], nn.Module], optimizer: Callable[..., torch.optim.Optimizer]) -> Learner:
    return learner_of(model(build), optimizer)


def stacked(build: Callable[[], nn.Module], optimizer: Callable[..., torch.optim.Optimizer], size: int) -> Learner:
    modules = [model(build, seed) for seed in range(size)]
    return StackedLearner(modules, optimizer, hyper=[{}] * size, seeds=range(size))


LEARNERS: dict[str, Callable[..., Learner]] = {
    "solo": lambda optimizer: one_by_one(small, optimizer),
    "batchnorm": lambda optimizer: one_by_one(convolutional, optimizer),
    "stack of 1": lambda optimizer: stacked(small, optimizer, 1),
    "stack of 3": lambda optimizer: stacked(small, optimizer, 3),
}


def trained(
    learner: str,
    optimizer: str = "adamw",
    method: str = "soft",
    augment: str = "plain",
    *,
    recorder: Tape | None,
    observer: Observer | None = None,
) -> list[Outcome]:
    own = LEARNERS[learner](OPTIMIZERS[optimizer])
    logits = torch.randn(75, CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    teacher = LiveTeacher([model(small, 9)]) if AUGMENTS[augment].enabled else CachedTeacher(logits)
    return train(
        own,
        seeds=range(own.size),
        method=METHODS[method](),
        teacher=teacher if METHODS[method]().needs_teacher else None,
        weights=some_weights([3.0] * own.size, [1.0] * own.size, [0.5] * own.size),
        plan=a_plan(epochs=6, schedule=Cosine(), augment=AUGMENTS[augment]),
        observer=observer,
        recorder=recorder,
    )


def numbers(row: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, int | float)}


def assert_alike(one: list[Outcome], other: list[Outcome]) -> None:
    """Up to the learning rate, which is rounded to float32 where steps are recorded."""
    for a, b in zip(one, other, strict=True):
        assert difference(a.state, b.state) < 1e-6
        for row, its in zip(metrics(a), metrics(b), strict=True):
            assert numbers(row) == pytest.approx(numbers(its), rel=1e-6)


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("learner", LEARNERS)
def test_recorded_or_not_the_training_is_the_same(learner: str, optimizer: str, method: str, augment: str) -> None:
    """The tape keeps every rule of a CUDA graph, but runs here."""
    plain = trained(learner, optimizer, method, augment, recorder=None)
    assert_alike(plain, trained(learner, optimizer, method, augment, recorder=Tape()))
    assert [tape.replays for tape in Tape.made] == [4]  # the first two of six epochs are done as they are


def test_blocks_of_other_sizes_have_recordings_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "BLOCK_LOGITS", 2 * 16 * CLASSES - 1)  # five batches: two, two and the short one
    plain = trained("stack of 3", recorder=None)
    assert_alike(plain, trained("stack of 3", recorder=Tape()))
    assert [tape.replays for tape in Tape.made] == [10, 4]  # of 12 blocks of two and 6 of one


def test_progress_counts_every_step_recorded_or_not() -> None:
    class Counting(Observer):
        steps = 0

        def step(self) -> None:
            self.steps += 1

    counting = Counting()
    trained("stack of 1", recorder=Tape(), observer=counting)
    assert counting.steps == 6 * 5


class Counts(nn.Linear):
    """A user's layer that does something else in every step, in Python."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) / self.calls


class Waits(nn.Linear):
    recordable = True

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1.0 if x.sum().item() > 0 else 0.5)


def with_layer(kind: type[nn.Linear]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Flatten(), kind(36, CLASSES))


def test_what_may_change_in_python_is_not_recorded_and_the_log_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    outcomes = [
        train(one_by_one(with_layer(Counts), OPTIMIZERS["adamw"]), method=Hard(), recorder=g) for g in (None, Tape())
    ]
    assert difference(outcomes[0][0].state, outcomes[1][0].state) == 0
    assert not Tape.made
    assert "run one by one: Counts does not say recordable = True" in caplog.text

    train(one_by_one(small, torch.optim.Adagrad), method=Hard(), recorder=Tape())
    assert not Tape.made
    assert "run one by one: the optimiser Adagrad counts its steps outside the device" in caplog.text


def test_a_step_that_cannot_be_recorded_runs_as_it_is_and_the_log_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plan = a_plan(epochs=6)
    outcomes = [
        train(one_by_one(with_layer(Waits), OPTIMIZERS["adamw"]), method=Hard(), plan=plan, recorder=g)
        for g in (None, Tape())
    ]
    assert difference(outcomes[0][0].state, outcomes[1][0].state) == 0
    assert metrics(outcomes[0][0]) == metrics(outcomes[1][0])
    assert caplog.text.count("steps cannot be recorded as CUDA graphs, and run one by one: a recorded step waits") == 1


class WaitsLate(StackedLearner):
    """Waits for a number in each update, after the step's logits were kept."""

    def _update(self, slope: Tensor, rate: float | Tensor) -> None:
        super()._update(slope, float(rate))


def test_a_recording_that_fails_late_leaves_no_trace_in_the_metrics() -> None:
    outcomes = []
    for recorder in (None, Tape()):
        learner = WaitsLate([model(small)], OPTIMIZERS["adamw"], hyper=[{}], seeds=[0])
        outcomes += train(learner, method=Hard(), plan=a_plan(epochs=6), recorder=recorder)
    assert not Tape.made
    assert metrics(outcomes[0]) == metrics(outcomes[1])


@pytest.mark.parametrize("keys", [{"foreach": True}, {"fused": False}])
def test_sgd_that_reads_its_rate_from_python_is_not_recorded(
    keys: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    learner = one_by_one(small, lambda parameters: torch.optim.SGD(parameters, lr=0.01, **keys))
    train(learner, method=Hard(), plan=a_plan(epochs=4), recorder=Tape())
    assert not Tape.made
    assert "run one by one: the optimiser SGD" in caplog.text


def test_a_network_with_a_hook_is_not_recorded(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    learner = one_by_one(small, OPTIMIZERS["adamw"])
    next(iter(learner.module.children())).register_forward_hook(lambda *_: None)
    train(learner, method=Hard(), plan=a_plan(epochs=4), recorder=Tape())
    assert not Tape.made
    assert "forward_hooks of its own" in caplog.text


def test_diagnostics_and_recordings_go_together() -> None:
    plan = replace(a_plan(epochs=5), diagnostics=True)
    own = [LEARNERS["stack of 3"](OPTIMIZERS["adamw"]) for _ in range(2)]
    keys: dict[str, Any] = {"seeds": range(3), "method": Hard(), "weights": some_weights(*[[1.0] * 3] * 3)}
    assert_alike(*(train(one, plan=plan, recorder=r, **keys) for one, r in zip(own, (None, Tape()), strict=True)))
    assert [tape.replays for tape in Tape.made] == [3]


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_recorded_training_resumes_from_its_state(learner: str) -> None:
    """The state has plain numbers where the recording has tensors, so a training that resumes need not record."""
    own = LEARNERS[learner](OPTIMIZERS["adamw"])
    keys: dict[str, Any] = {
        "seeds": range(own.size),
        "method": Hard(),
        "weights": some_weights(*[[1.0] * own.size] * 3),
    }
    train(own, plan=a_plan(epochs=4), recorder=Tape(), **keys)
    assert Tape.made[0].replays
    state = copy.deepcopy(own.state())
    assert all(type(group["lr"]) is float for group in state["optimizer"]["param_groups"])
    other = LEARNERS[learner](OPTIMIZERS["adamw"])
    other.load_state(state)
    go_on = [train(one, plan=a_plan(epochs=1), **keys) for one in (own, other)]
    for one, its in zip(*go_on, strict=True):
        assert difference(one.state, its.state) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("student", ["student.hidden=[32]", "student=cnn", "student=torchvision student.name=resnet18"])
def test_a_gpu_reports_the_same_recorded_or_not(student: str, tmp_path: Path) -> None:
    def rows(recorded: bool) -> list[dict[str, Any]]:
        folder = tmp_path / str(recorded)
        keys = f"{student} device=cuda cuda_graphs={str(recorded).lower()} training.epochs=4 training.jitter=1".split()
        keys += ["training.batch_size=8", "diagnostics=true"]  # several equal blocks in an epoch
        command = [sys.executable, "-m", "kd_cli", *keys, "teacher_training.epochs=4", f"hydra.run.dir={folder}"]
        done = subprocess.run(command, env=os.environ | {"KD_STORE": f"{folder}.store"}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "one by one" not in done.stdout + done.stderr
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [{**numbers(json.loads(line)), "examples_per_second": 0} for line in lines]

    for one, other in zip(rows(True), rows(False), strict=True):
        assert one == pytest.approx(other, rel=1e-2, abs=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_cuda_graph_is_done_at_each_replay_and_draws_on() -> None:
    own, alike = (torch.Generator("cuda").manual_seed(5) for _ in range(2))
    drawn = torch.zeros(3, device="cuda")

    def draw() -> None:
        drawn.normal_(generator=own)

    recorder = CudaGraphs(torch.device("cuda"))
    recorder.run(draw)
    replay = recorder.record(draw, [own])
    own.manual_seed(7)
    alike.manual_seed(7)
    for _ in range(3):
        replay()
        assert torch.equal(drawn, torch.zeros_like(drawn).normal_(generator=alike))
