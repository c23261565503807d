"""How many models side by side take their steps at once: as many as there are threads, where that is faster."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from kd_cli.config.fingerprint import fingerprint
from kd_cli.learn.cohort import Cohort, objectives_of
from kd_cli.learn.engine import Training, fit
from kd_cli.learn.learner import Learner
from kd_cli.learn.methods import FunctionMethod
from kd_cli.runs.building import TrainingTask, make_cohort
from kd_cli.runs.device_data import device_name
from kd_cli.runs.group import Stage
from kd_cli.runs.stack_size import read_notes
from kd_cli.shipped import is_shipped
from kd_cli.storage.files import write_json

log = logging.getLogger(__name__)

GAIN = 0.9  # workers must take less than this share of the time of one model after another
BATCHES = 4  # in each of the two epochs that are timed


def workers_that_pay(stage: Stage, stacks: Sequence[Sequence[TrainingTask]], notes: Path) -> int:
    """How many of these stacks, which are trained side by side, to advance at once; 1 for one after another.

    Small networks do not fill several threads. What is measured is kept in the file `notes` for this machine.
    """
    threads = torch.get_num_threads()
    one_seed = len({task.spec.seed for tasks in stacks for task in tasks}) == 1
    if stage.data.device.type != "cpu" or min(threads, len(stacks)) < 2 or not one_seed:
        return 1
    some = stacks[: 2 * threads]
    machine = [device_name(stage.data.device), torch.__version__, threads]
    key = fingerprint(["workers", [tasks[0].stack_key() for tasks in some], stage.data.dataset.shape, *machine])
    known = read_notes(notes)
    if key not in known:
        seconds = {workers: seconds_of_epoch(stage, some, workers) for workers in (1, threads)}
        known[key] = threads if seconds[threads] < GAIN * seconds[1] else 1
        notes.parent.mkdir(parents=True, exist_ok=True)
        write_json(notes, read_notes(notes) | {key: known[key]})
        log.info(
            "%d models side by side: %d at a time, measured %.3g s one after another, %.3g s %d at a time",
            *(len(stacks), known[key], seconds[1], seconds[threads], threads),
        )
    return known[key]


def seconds_of_epoch(stage: Stage, stacks: Sequence[Sequence[TrainingTask]], workers: int) -> float:
    """Seconds of an epoch of a few batches, on copies that are thrown away; infinite for several workers if these
    would run a user's own code, which need not expect to run beside itself."""
    data, batch = stage.data, stacks[0][0].spec.batch_size
    some = torch.arange(min(BATCHES * batch, len(data.train)))
    part = replace(data, train=data.train.subset(some), val=data.train.subset(some[:0]))
    learner, training = make_cohort(part, stacks, stage.role, teacher=stage.teacher, workers=workers)
    if workers > 1 and not only_shipped(learner, training):
        return float("inf")
    plan = replace(training.plan, epochs=2, keep_best=False, estimate_batchnorm=False)
    outcome, *_ = fit(learner, replace(training, role="timing", plan=plan))
    return min(len(some) / row["examples_per_second"] for row in outcome.history)


def only_shipped(learner: Learner, training: Training) -> bool:
    """Whether all code of the steps is this package's, torch's, torchvision's or timm's."""
    assert isinstance(learner, Cohort)
    modules: list[nn.Module] = [part.module for part in learner.parts]
    modules += [objective.method for objective in objectives_of(training.objective)]
    parts = [part for module in modules for part in module.modules()]
    code = [type(part) for part in [*parts, *(one.optimizer for one in learner.parts)]]
    functions = [part.function for part in parts if isinstance(part, FunctionMethod)]
    return all(is_shipped(one.__module__) for one in [*code, *functions])
