"""Learning-rate schedules, the factor on the learning rate at a share of the training done; and optimisers without
torch's compiler.

`torch.optim` imports the compiler, which takes a second, only to tell it to keep out: when an optimiser is made, and in
each step. Who compiles nothing can do without.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from kd_cli.errors import ConfigError


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """A block in which optimisers are made without the import of torch's compiler."""
    made = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    mark = "__dynamo_disable"  # where torch remembers the function that its compiler keeps out of
    spare = "torch._dynamo" not in sys.modules and not hasattr(made, mark)
    if spare:
        setattr(made, mark, made)
    try:
        yield
    finally:
        if spare:
            delattr(made, mark)


def bare_step(optimizer: torch.optim.Optimizer) -> Callable[[slice], None]:
    """`optimizer.step` for some of its parameter groups, without hooks, profiler marks and the compiler.

    Its parameters are those that it was made with, their gradients stay where they are, and its state is not replaced.
    """
    step = inspect.unwrap(type(optimizer).step)
    fused: dict[int, list[FusedAdam]] = {}  # by the first group's number, from the second step on

    def stepped(some: slice) -> None:
        if kernels := fused.get(some.start):
            for kernel in kernels:
                kernel()
            return
        groups = optimizer.param_groups
        optimizer.param_groups = groups[some]
        try:
            with torch.no_grad():
                step(optimizer)
        finally:
            optimizer.param_groups = groups
        if all(FusedAdam.can(optimizer, group) for group in groups[some]):
            fused[some.start] = [FusedAdam(optimizer, group) for group in groups[some]]

    return stepped


class FusedAdam:
    """A parameter group of Adam or AdamW on a CPU, advanced by the very kernel that `step` ends in.

    What `step` does before, collecting tensors that are always the same ones, takes a tenth of a millisecond in which
    all threads but one wait: 4 % of a step of 2x800 at batch 128.
    """

    @staticmethod
    def can(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
        kind = type(optimizer)
        plain = kind is torch.optim.AdamW or (kind is torch.optim.Adam and not group.get("decoupled_weight_decay"))
        return (
            plain
            and bool(group["fused"])
            and not (group["amsgrad"] or group["capturable"] or group["differentiable"])
            and not any(isinstance(group[key], Tensor) for key in ("lr", "betas", "eps", "weight_decay"))
            and all(p.device.type == "cpu" and p.grad is not None for p in group["params"])
        )

    def __init__(self, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        self.kernel = torch._fused_adamw_ if type(optimizer) is torch.optim.AdamW else torch._fused_adam_
        self.group = group
        states = [optimizer.state[p] for p in group["params"]]
        self.steps = [state["step"] for state in states]
        moments = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq"))
        params = [p.detach() for p in group["params"]]
        self.tensors = (params, [p.grad for p in group["params"]], *moments, [], self.steps)

    def __call__(self) -> None:
        group = self.group
        torch._foreach_add_(self.steps, 1)
        beta1, beta2 = group["betas"]
        self.kernel(
            *self.tensors,
            lr=group["lr"],
            beta1=beta1,
            beta2=beta2,
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=group["maximize"],
        )


def is_recordable(optimizer: torch.optim.Optimizer) -> bool:
    """Whether its steps can be replayed by a GPU: its count of them, if it has one, can lie on the device."""
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim."):
        return False
    if kind is torch.optim.SGD:  # its fused form alone reads the learning rate from the device
        return not any(group["foreach"] or group["fused"] is False for group in optimizer.param_groups)
    return "capturable" in optimizer.defaults


def make_recordable(optimizer: torch.optim.Optimizer) -> None:
    """Keep what changes from step to step on the device, from the first step on; learning rates may be tensors."""
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = True
        if group.get("fused", False) is None and not group.get("foreach"):
            group["fused"] = True  # the others read the learning rate from the device
    for parameter, state in optimizer.state.items():  # of a training that goes on
        if isinstance(state.get("step"), Tensor):
            state["step"] = state["step"].to(parameter.device, torch.float32)
    optimizer._warned_capturable_if_run_uncaptured = True  # the first steps are meant so


def set_rates(optimizer: torch.optim.Optimizer, base_rates: Sequence[float], factor: float | Tensor) -> None:
    """Give each parameter group its learning rate times the factor."""
    for group, rate in zip(optimizer.param_groups, base_rates, strict=True):
        group["lr"] = rate * factor


class Schedule(Protocol):
    """The factor on the optimiser's learning rate."""

    def __call__(self, progress: float) -> float:
        """`progress` in [0, 1): the share of all steps already made."""
        ...


@dataclass(frozen=True)
class _Warmup:
    warmup: float = 0.0  # the share of all steps in which the rate rises linearly from 0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"schedule.warmup is {self.warmup}; it must be at least 0 and below 1")

    def __call__(self, progress: float) -> float:
        if progress < self.warmup:
            return progress / self.warmup
        return self.after((progress - self.warmup) / (1 - self.warmup))

    def after(self, progress: float) -> float:
        raise NotImplementedError


@dataclass(frozen=True)
class Constant(_Warmup):
    """The same rate to the end."""

    def after(self, progress: float) -> float:
        return 1.0


@dataclass(frozen=True)
class Linear(_Warmup):
    """Falls on a straight line to `final` times the rate."""

    final: float = 0.0

    def after(self, progress: float) -> float:
        return 1 - (1 - self.final) * progress


@dataclass(frozen=True)
class Cosine(_Warmup):
    """Falls on half a cosine to `final` times the rate (Loshchilov & Hutter 2017, without restarts)."""

    final: float = 0.0

    def after(self, progress: float) -> float:
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Step(_Warmup):
    """Times `factor` at each of the `milestones` (shares of the training)."""

    milestones: tuple[float, ...] = (0.5, 0.75)
    factor: float = 0.1

    def after(self, progress: float) -> float:
        return self.factor ** sum(progress >= milestone for milestone in self.milestones)
