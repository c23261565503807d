"""Optimisers: made without importing torch's compiler, stepped at a rate, prepared for recording as CUDA graphs.

`torch.optim` imports the compiler, which takes a second, only to exclude its own functions from compilation. kd-cli
compiles nothing and skips that import.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor


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


def bare_step(optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    """`optimizer.step` without hooks, profiler marks and the compiler, which take a third of a small network's step."""
    step = inspect.unwrap(type(optimizer).step)

    def stepped() -> None:
        with torch.no_grad():
            step(optimizer)

    return stepped


def quick_step(optimizer: torch.optim.Optimizer) -> Callable[[], Any]:
    """`optimizer.step`, bare for torch's own optimisers: the first step would import the compiler."""
    own = type(optimizer).__module__.startswith("torch.optim.")
    return bare_step(optimizer) if own and not optimizer.defaults.get("differentiable") else optimizer.step


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
