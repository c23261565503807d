"""Stacks of made networks, and the same networks trained one by one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import made
import torch

from kd_cli.learn.augment import Augment
from kd_cli.learn.engine import Outcome
from kd_cli.learn.methods import Method, SoftTargets, Weights
from kd_cli.learn.schedules import Cosine
from kd_cli.learn.stacked.learner import StackedLearner
from kd_cli.learn.teachers import CachedTeacher, LiveTeacher, Teacher

JITTER = Augment(jitter=1, flip=True)
Hyper = Sequence[dict[str, float]]

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.02)
FUSED = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.02, fused=True)

SAME_SEED = (3, 3, 3)
SEEDS = (0, 1, 2)
WEIGHTS = made.some_weights(T=[1, 2, 8], alpha=[1, 0.5, 0], beta=[0.5, 0, 1])
ALIKE: Hyper = [{"lr": 0.02}] * 3
UNLIKE: Hyper = [{"lr": 0.02, "weight_decay": 0.0}, {"lr": 0.02, "weight_decay": 0.1}, {"lr": 0.005, "weight_decay": 0}]


def teacher(live: bool, members: int = 1) -> Teacher:
    modules = [made.model(made.small, seed=8 + m) for m in range(members)]
    if live:
        return LiveTeacher(modules, combine="arithmetic")
    with torch.no_grad():
        logits = torch.stack([3 * module(made.images(75)) for module in modules])
    return CachedTeacher(logits, combine="arithmetic")


def one_of(weights: Weights, s: int) -> Weights:
    return Weights(weights.T[s : s + 1], weights.alpha[s : s + 1], weights.beta[s : s + 1])


def both_ways(
    build: made.Build,
    optimizer: made.Optimizer,
    *,
    seeds: Sequence[int] = SEEDS,
    hyper: Hyper = ALIKE,
    weights: Weights = WEIGHTS,
    methods: Sequence[Method] = (SoftTargets(),) * 3,
    augment: Augment | None = None,
    dtype: torch.dtype = torch.float64,
    epochs: int = 3,
    members: int = 1,
) -> tuple[list[Outcome], list[Outcome]]:
    """The outcomes of a stack, and of its models one by one."""
    plan = made.a_plan(epochs=epochs, schedule=Cosine(warmup=0.2), augment=augment)
    teaching: Any = {"teacher": teacher(augment is not None, members), "plan": plan}
    modules = [made.model(build, seed) for seed in seeds]
    stack = StackedLearner(modules, optimizer, hyper=hyper, seeds=seeds)
    together = made.train(stack, seeds=seeds, weights=weights, method=type(methods[0]).stack(methods), **teaching)
    alone = []
    for s, seed in enumerate(seeds):
        learner = made.solo(build, seed=seed, optimizer=partial(optimizer, **hyper[s]))
        alone += made.train(learner, seeds=[seed], weights=one_of(weights, s), method=methods[s], **teaching)
    return together, alone
