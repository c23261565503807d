"""How many models to train at once: as many as are fastest on this machine, as measured."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.config.fingerprint import fingerprint
from kd_cli.learn.engine import BLOCK_LOGITS, fit
from kd_cli.learn.stacked.learner import why_method_not, why_not
from kd_cli.learn.teachers import Teacher
from kd_cli.runs.building import TrainingTask, build_method, make_optimizer, make_training, stream_of, why_recipe_not
from kd_cli.runs.device_data import DeviceData, device_name
from kd_cli.runs.models import build_module
from kd_cli.storage.files import read_json, write_json

log = logging.getLogger(__name__)

SIZES = (4, 16, 64, 256)  # the sizes of stacks that are measured
ENOUGH = 64  # the smallest size after which no larger one is measured when it gains nothing
TOLERANCE = 1.1  # a size is as fast as the fastest within this factor: repeated measurements differ by as much


def stack_size(
    data: DeviceData, tasks: Sequence[TrainingTask], *, role: str, teacher: Teacher | None, notes: Path
) -> tuple[int, str | None]:
    """How many of these models to train at once, and why only one where they do not stack.

    What is measured is kept in the file `notes` for this machine.
    """
    if len(tasks) == 1:
        return 1, None
    module = build_module(tasks[0].spec, data.dataset, role=stream_of(role), device=data.device)
    optimizer = make_optimizer(tasks[0], role, module.parameters())
    reason = why_recipe_not(tasks[0].spec) or why_not(module, optimizer, data.train.first(1)[0])
    reason = reason or why_method_not(build_method(tasks[0].method))
    if reason is not None:
        return 1, reason
    memory = memory_of_one(data, tasks[0], module)
    most = min(len(tasks), int(free_memory(data.device) // memory))
    if most < 2:
        return 1, "two do not fit in memory"
    one_seed = len({task.spec.seed for task in tasks}) == 1
    machine = [device_name(data.device), torch.__version__, torch.get_num_threads()]
    key = fingerprint([tasks[0].stack_key(), data.dataset.shape, data.dataset.classes, most, one_seed, *machine])
    known = read_notes(notes)
    if key in known:
        return known[key], None
    best, seconds = smallest_fast_size(most, lambda size: seconds_of_step(data, tasks[:size], role, teacher) / size)
    notes.parent.mkdir(parents=True, exist_ok=True)
    write_json(notes, read_notes(notes) | {key: best})
    log.info(
        "%d × %s: %d at once, about %.3g MB each, measured %s",
        *(len(tasks), tasks[0].spec.title, best, memory / 2**20),
        ", ".join(f"{1e3 * s:.3g} ms a step and model in stacks of {size}" for size, s in seconds.items()),
    )
    return best, None


def smallest_fast_size(most: int, seconds_of: Callable[[int], float]) -> tuple[int, dict[int, float]]:
    """The smallest size up to `most` that is about as fast as the fastest, and what was measured.

    `seconds_of(size)` is the time of a step divided by the number of models. A larger stack takes more memory.
    """
    seconds: dict[int, float] = {}
    for size in [1, *(size for size in SIZES if size < most), most]:
        fastest = min(seconds.values(), default=math.inf)
        seconds[size] = seconds_of(size)
        if size >= ENOUGH and seconds[size] > fastest / TOLERANCE:
            break  # larger ones gain nothing either, and would take their memory
    limit = TOLERANCE * min(seconds.values())
    return min(size for size, time in seconds.items() if time <= limit), seconds


def read_notes(notes: Path) -> dict[str, int]:
    """The sizes in the file; none when it is missing or damaged."""
    try:
        found = read_json(notes)
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, int) and value > 0}


def memory_of_one(data: DeviceData, task: TrainingTask, module: nn.Module) -> int:
    """Bytes that a model of a stack takes while it trains, estimated from above."""
    return memory_of_weights(data, module) + memory_of_step(data, task, module)


def memory_of_weights(data: DeviceData, module: nn.Module) -> int:
    """Bytes that a model takes between two steps: its weights, their gradients, two of the optimiser, a temporary."""
    return 5 * data.dtype.itemsize * sum(p.numel() for p in module.parameters())


def memory_of_step(data: DeviceData, task: TrainingTask, module: nn.Module) -> int:
    """Bytes that a model takes during a step beside its weights, estimated from above."""
    outputs = 0

    def count(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal outputs
        outputs += output.numel() if isinstance(output, Tensor) else 0

    hooks = [m.register_forward_hook(count) for m in module.modules()]
    with torch.no_grad():
        module.eval()(data.train.first(1))
    for hook in hooks:
        hook.remove()
    batch, classes = min(task.spec.batch_size, len(data.train)), data.dataset.classes
    step = batch * (3 * outputs + 2 * math.prod(data.train.shape))
    steps = BLOCK_LOGITS // (batch * classes) + 1
    block = min(steps, -(-len(data.train) // batch)) * batch * classes
    losses = 10 * block  # of the logits that wait for their losses, their targets, and what a method makes of both
    return int(data.dtype.itemsize * (step + losses))


def free_memory(device: torch.device) -> float:
    """Bytes that a stack may take: most of what is free on a GPU, half of what is free on the machine."""
    if device.type == "cuda":
        return 0.8 * torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
        return 0.5 * 1024 * int(text.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return 2.0 * 1024**3


def seconds_of_step(data: DeviceData, tasks: Sequence[TrainingTask], role: str, teacher: Teacher | None) -> float:
    """Seconds of one training step of these models, on copies that are thrown away; the best of several epochs."""
    spec = tasks[0].spec
    batch = min(spec.batch_size, len(data.train))
    some = torch.arange(min(3 * batch, len(data.train)))
    part = replace(data, train=data.train.subset(some), val=data.train.subset(some[:0]))
    learner, training = make_training(part, tasks, role, teacher=teacher)
    plan = replace(training.plan, epochs=5, batch_size=batch, keep_best=False, loss_balance=False)
    outcome, *_ = fit(learner, replace(training, role="timing", plan=plan), recorder=data.recorder)
    return batch / max(row["examples_per_second"] for row in outcome.history)
