"""What a training needs, built from its configuration: the plan, learner, method, weights and optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kd_cli.config.build import build, locate
from kd_cli.config.fingerprint import fingerprint
from kd_cli.config.values import Node, TrainSpec
from kd_cli.errors import ConfigError
from kd_cli.learn.augment import Augment
from kd_cli.learn.engine import Plan
from kd_cli.learn.learner import Autocast, Learner, SoloLearner
from kd_cli.learn.methods import Method, Weights, stack_methods
from kd_cli.learn.optim import without_compiler
from kd_cli.learn.stacked.dense import is_dense
from kd_cli.learn.stacked.learner import ELEMENTWISE, StackedLearner
from kd_cli.runs.device_data import DeviceData
from kd_cli.runs.models import build_module

PER_MODEL = ("lr", "weight_decay")  # optimiser options that may differ between the models of a stack
HARD: Node = {"_target_": "kd_cli.learn.methods.Hard"}


@dataclass(frozen=True)
class TrainingTask:
    """One model to train: how, and on what loss."""

    spec: TrainSpec
    method: Node
    T: float = 1.0
    alpha: float = 0.0
    beta: float = 1.0

    def stack_key(self) -> str:
        """A fingerprint that two tasks share when they can be trained in one stack: all but each model's numbers."""
        facts = self.spec.identity("")
        optimizer = {key: value for key, value in self.spec.optimizer.items() if key not in PER_MODEL}
        method = {key: value for key, value in self.method.items() if key not in stackable_keys(self.method)}
        return fingerprint({**facts, "seed": None, "optimizer": optimizer, "method": method})

    def hyper(self) -> dict[str, float]:
        """The optimiser options that may differ between the models of a stack, with this task's values."""
        return {key: self.spec.optimizer[key] for key in PER_MODEL if key in self.spec.optimizer}


def stackable_keys(method: Node) -> Sequence[str]:
    """The keys of a method that may differ between the models of a stack, as the method declares them."""
    return getattr(locate(method["_target_"]), "stackable", ())


def stream_of(role: str) -> str:
    """The name of the random streams: the student alone and the distilled student share theirs."""
    return "teacher" if role == "teacher" else "student"


def key_of(section: str, role: str) -> str:
    """The configuration's key for a section of a role's training."""
    return f"teacher_{section}" if role == "teacher" else section


def make_plan(data: DeviceData, spec: TrainSpec, role: str, *, diagnostics: bool = False) -> Plan:
    return Plan(
        epochs=spec.epochs,
        batch_size=spec.batch_size,
        schedule=build(spec.schedule, where=key_of("schedule", role)),
        augment=Augment(**spec.augment),
        classes=data.dataset.classes,
        fill=data.fill,
        keep_best=spec.keep == "best",
        diagnostics=diagnostics,
    )


def make_optimizer(task: TrainingTask, role: str, parameters: Any) -> torch.optim.Optimizer:
    where = key_of("optimizer", role)
    try:
        with without_compiler():
            return build(task.spec.optimizer, parameters, where=where)
    except ValueError as error:  # torch's word on a number out of range
        raise ConfigError(f"{where}: {error}") from error


def check_recipe(spec: TrainSpec, role: str) -> None:
    """Build what a training needs beside the model, so that a mistake is found before anything is trained."""
    build(spec.schedule, where=key_of("schedule", role))
    try:
        Augment(**spec.augment)
    except ConfigError as error:
        raise ConfigError(f"{key_of('training', role)}.{error.message}", hint=error.hint) from error
    make_optimizer(TrainingTask(spec, HARD), role, [nn.Parameter(torch.zeros(1))])


def make_learner(data: DeviceData, tasks: Sequence[TrainingTask], role: str) -> Learner:
    """Several models as a stack, one as an ordinary module unless it has a closed form."""
    modules = [build_module(one.spec, data.dataset, role=stream_of(role), device=data.device) for one in tasks]
    autocast = Autocast(data.device, data.precision)
    closed = is_dense(modules[0]) and locate(tasks[0].spec.optimizer["_target_"]) in ELEMENTWISE
    if len(tasks) == 1 and not closed:
        optimizer = make_optimizer(tasks[0], role, modules[0].parameters())
        return SoloLearner(modules[0], optimizer, seed=tasks[0].spec.seed, autocast=autocast)
    return StackedLearner(
        modules,
        lambda groups: make_optimizer(tasks[0], role, groups),
        hyper=[task.hyper() for task in tasks],
        seeds=[task.spec.seed for task in tasks],
        autocast=autocast,
    )


def make_method(tasks: Sequence[TrainingTask]) -> Method:
    return stack_methods([build(task.method, where="method") for task in tasks])


def make_weights(data: DeviceData, tasks: Sequence[TrainingTask]) -> Weights:
    rows = [(task.T, task.alpha, task.beta) for task in tasks]
    return Weights(*torch.tensor(rows, dtype=data.dtype, device=data.device).T.contiguous())
