"""Small made data, networks and trainings for the tests of the engine."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.learn.augment import Augment
from kd_cli.learn.batches import Examples
from kd_cli.learn.cuda_graphs import Recorder
from kd_cli.learn.engine import Checkpoint, Observer, Outcome, Plan, Training, fit
from kd_cli.learn.learner import NO_AUTOCAST, Autocast, Learner, ModuleLearner
from kd_cli.learn.methods import Method, Setting, SoftTargets, Weights
from kd_cli.learn.objective import Objective
from kd_cli.learn.outputs import sample_outputs
from kd_cli.learn.randomness import generator, global_stream
from kd_cli.learn.schedules import Constant, Schedule
from kd_cli.learn.teachers import Teacher
from kd_cli.models.cnn import cnn
from kd_cli.models.mlp import mlp

SHAPE, CLASSES = (1, 6, 6), 4
SIZES: dict[str, Any] = {"input_shape": SHAPE, "num_classes": CLASSES}
Build = Callable[[], nn.Module]
Optimizer = Callable[..., torch.optim.Optimizer]


# ---------------------------------------------------------------- data


def pictures(n: int, part: str = "train", dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Images `[n,1,6,6]` of four classes, each a pattern of its own under noise, and their labels `[n]`."""
    patterns = torch.randn(CLASSES, *SHAPE, generator=generator(0, "patterns"), dtype=torch.float64)
    own = generator(0, part)
    labels = torch.randint(0, CLASSES, (n,), generator=own)
    noise = torch.randn(n, *SHAPE, generator=own, dtype=torch.float64)
    return (patterns[labels] + 1.5 * noise).to(dtype), labels


def images(n: int, part: str = "train", dtype: torch.dtype = torch.float64) -> Tensor:
    return pictures(n, part, dtype)[0]


def examples(n: int, part: str = "train", dtype: torch.dtype = torch.float64) -> Examples:
    return Examples(*pictures(n, part, dtype))


# ---------------------------------------------------------------- networks


def small() -> nn.Module:
    return mlp(hidden=[12, 10], **SIZES)


def big() -> nn.Module:
    return mlp(hidden=[16, 16], dropout=0.5, input_dropout=0.2, max_norm=0.6, **SIZES)


def wide() -> nn.Module:
    """A first layer that one product serves for all models of a seed."""
    return mlp(hidden=[16, 10], **SIZES)


def conv() -> nn.Module:
    return cnn(channels=[3, 4], hidden=8, dropout=0.3, **SIZES)


class Own(nn.Module):
    """A user's network: a forward of its own, with a normalisation that keeps no statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(36, 9), nn.LayerNorm(9), nn.Linear(9, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(images.flatten(1))))
        return self.last(hidden) + hidden[:, :CLASSES]


class Moody(nn.Module):
    """A network that answers differently while it trains: dropout, and statistics that move."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, CLASSES)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


def model(build: Build, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The network with the initial weights of a seed."""
    with global_stream(seed, "student", "init"):
        return build().to(dtype)


# ---------------------------------------------------------------- trainings


def some_weights(
    T: Sequence[float] = (2.0,),
    alpha: Sequence[float] = (1.0,),
    beta: Sequence[float] = (0.5,),
    dtype: torch.dtype = torch.float64,
) -> Weights:
    return Weights(*(torch.tensor(values, dtype=dtype) for values in (T, alpha, beta)))


def a_plan(
    epochs: int = 2, batch_size: int = 16, schedule: Schedule | None = None, augment: Augment | None = None
) -> Plan:
    return Plan(epochs, batch_size, schedule or Constant(), augment or Augment(), fill=-1.0)


def adamw(parameters: Any, lr: float = 0.01, **keys: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=lr, **keys)


def a_setting(method: Method, student: nn.Module, teacher: nn.Module | None = None, *, examples: int = 75) -> Setting:
    """What `setup` is called with before a training on made data."""
    two = images(2).to(next(student.parameters()).dtype)
    return Setting(
        classes=CLASSES,
        examples=examples,
        smallest_batch=11,
        student=sample_outputs(student, two, method.student_features, role="student"),
        teacher=None if teacher is None else sample_outputs(teacher, two, method.teacher_features, role="teacher"),
    )


def learner_of(
    module: nn.Module,
    optimizer: Optimizer = adamw,
    *,
    seed: int = 0,
    method: Method | None = None,
    autocast: Autocast = NO_AUTOCAST,
) -> ModuleLearner:
    """One network with an ordinary optimiser. A method with features or parameters must be the training's own."""
    method = method or SoftTargets()
    parameters = [*module.parameters(), *method.parameters()]
    objective = Objective(method, some_weights())
    return ModuleLearner(module, optimizer(parameters), seed=seed, objective=objective, autocast=autocast)


def solo(
    build: Build = small, *, seed: int = 0, optimizer: Optimizer = adamw, method: Method | None = None
) -> ModuleLearner:
    """A new network that trains alone."""
    return learner_of(model(build, seed), optimizer, seed=seed, method=method)


def train(
    learner: Learner,
    *,
    seeds: Sequence[int] = (0,),
    teacher: Teacher | None = None,
    method: Method | None = None,
    weights: Weights | None = None,
    plan: Plan | None = None,
    data: Examples | None = None,
    val: Examples | None = None,
    observer: Observer | None = None,
    checkpoint: Checkpoint | None = None,
    stopping: Callable[[], bool] = lambda: False,
    recorder: Recorder | None = None,
) -> list[Outcome]:
    """Train, by default on 75 examples: four batches of 16 and one of 11."""
    data = data or examples(75)
    training = Training(
        data,
        val or examples(30, "val", data.first(1).dtype),
        "student",
        list(seeds),
        plan or a_plan(),
        Objective(method or SoftTargets(), weights or some_weights()),
        teacher,
    )
    return fit(learner, training, observer=observer, checkpoint=checkpoint, stopping=stopping, recorder=recorder)


class InMemory:
    """A checkpoint in memory."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.state = state

    def load(self) -> dict[str, Any] | None:
        return self.state

    def due(self, epoch: int) -> bool:
        return False

    def save(self, state: dict[str, Any]) -> None:
        self.state = copy.deepcopy(state)


def metrics(outcome: Outcome) -> list[dict[str, Any]]:
    """An outcome's rows of metrics, without their times."""
    return [{key: value for key, value in row.items() if key != "examples_per_second"} for row in outcome.history]


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference between two states; 0 only when they are the same bit for bit."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)
