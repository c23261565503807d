"""Small made data and models for the tests of the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from kd_cli.learn.optim import Constant, Schedule
from torch import Tensor, nn

from kd_cli.learn.augment import Augment
from kd_cli.learn.cuda_graphs import Recorder
from kd_cli.learn.engine import Examples, Observer, Outcome, Plan, fit
from kd_cli.learn.learner import Learner, SoloLearner
from kd_cli.learn.methods import Method, SoftTargets, Weights
from kd_cli.learn.randomness import generator, global_stream
from kd_cli.learn.teachers import Teacher
from kd_cli.models.cnn import cnn
from kd_cli.models.mlp import mlp

SHAPE, CLASSES = (1, 6, 6), 4
SIZES: dict[str, Any] = {"input_shape": SHAPE, "num_classes": CLASSES}
Build = Callable[[], nn.Module]


def examples(n: int, part: str = "train", dtype: torch.dtype = torch.float64) -> Examples:
    """Images of four classes, each a pattern of its own under noise."""
    patterns = torch.randn(CLASSES, *SHAPE, generator=generator(0, "patterns"), dtype=torch.float64)
    own = generator(0, part)
    labels = torch.randint(0, CLASSES, (n,), generator=own)
    noise = torch.randn(n, *SHAPE, generator=own, dtype=torch.float64)
    return Examples((patterns[labels] + 1.5 * noise).to(dtype), labels)


def small() -> nn.Module:
    return mlp(hidden=[12, 10], **SIZES)


def big() -> nn.Module:
    return mlp(hidden=[16, 16], dropout=0.5, input_dropout=0.2, max_norm=0.6, **SIZES)


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


def made(build: Build, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model with the initial weights of a seed."""
    with global_stream(seed, "student", "init"):
        return build().to(dtype)


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


def solo(build: Build = small, *, seed: int = 0, optimizer: Callable[..., torch.optim.Optimizer] = adamw) -> Learner:
    module = made(build, seed)
    return SoloLearner(module, optimizer(module.parameters()), seed=seed)


def train(
    learner: Learner,
    *,
    seeds: Sequence[int] = (0,),
    teacher: Teacher | None = None,
    method: Method | None = None,
    weights: Weights | None = None,
    plan: Plan | None = None,
    data: Examples | None = None,
    observer: Observer | None = None,
    recorder: Recorder | None = None,
) -> list[Outcome]:
    """Train on 75 examples: four batches of 16 and one of 11."""
    return fit(
        learner,
        data or examples(75),
        examples(30, "val", data.images.dtype if data else torch.float64),
        role="student",
        seeds=list(seeds),
        plan=plan or a_plan(),
        method=method or SoftTargets(),
        weights=weights or some_weights(),
        teacher=teacher,
        observer=observer,
        recorder=recorder,
    )


def told(outcome: Outcome) -> list[dict[str, Any]]:
    """An outcome's history without its times."""
    return [{key: value for key, value in row.items() if key != "examples_per_second"} for row in outcome.history]


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest difference between two states; 0 only when they are the same bit for bit."""
    assert one.keys() == other.keys()
    return max(float((one[name].double() - other[name].double()).abs().max()) for name in one)
