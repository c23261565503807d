"""How large the gradients of a loss's terms are, measured between epochs; training goes on as if nothing had been."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kd_cli.errors import first_line
from kd_cli.learn.batches import Batch, draw_order
from kd_cli.learn.batchnorm import batch_statistics
from kd_cli.learn.learner import Learner, ask
from kd_cli.learn.methods.base import is_temperature
from kd_cli.learn.objective import Objective
from kd_cli.learn.outputs import Outputs
from kd_cli.learn.randomness import global_stream

if TYPE_CHECKING:
    from kd_cli.learn.engine import Training

log = logging.getLogger(__name__)

DIAGNOSED = 512  # examples on which the terms' gradients are measured
BALANCED = 128  # examples, at most, on which the terms' shares of the gradient are measured

Shares = dict[str, float | None]


def gradient_sizes(
    learner: Learner, training: Training, *, progress: float, epoch: int
) -> list[dict[str, float | None]]:
    """How large the gradient of each term is, before weighting, for each of the S models.

    On the logits: the mean over examples of the norm of an example's own gradient, (p - q) / T for soft targets. On the
    parameters: the norm of the gradient of the mean over examples. In eval mode, on the first 512 examples.
    """
    objective = training.objective
    index = torch.arange(min(DIAGNOSED, len(training.train)), device=training.train.device)[None]
    batch, target = _batch(training, objective, index, progress, epoch)

    def terms(student: Outputs) -> dict[str, Tensor]:
        found = objective(student, target, batch)
        return {name: term for name, term in found.items() if name != "loss" and not is_temperature(name)}

    found = learner.term_gradients(batch, terms)
    columns: dict[str, list[float] | None] = {}
    for name in dict.fromkeys(["soft", "hard", *found]):
        gradient = found.get(name)
        columns[f"{name}_gradient_logits"] = None if gradient is None else gradient.on_logits.tolist()
        columns[f"{name}_gradient_parameters"] = None if gradient is None else gradient.on_parameters.tolist()
    return [
        {key: None if values is None else values[s] for key, values in columns.items()} for s in range(learner.size)
    ]


def loss_balance(learner: Learner, training: Training, *, progress: float, epoch: int) -> Sequence[Shares]:
    """The share of each weighted term in the gradient on the student's parameters, for each of the S models.

    A term's share is the norm of its gradient over the sum of all terms' norms; None where that is 0 or not finite. The
    examples are the first of the first epoch's first batch, at most 128, not augmented. Dropout is not active, and
    BatchNorm, the method's own too, takes the batch's statistics, as in training. The method is a copy: its memories
    stay as they are.
    """
    try:
        method = copy.deepcopy(training.objective.method)
    except Exception as error:  # whatever a user's method holds
        name = training.objective.method.title
        log.warning("the loss balance is not measured: %s cannot be copied (%s)", name, first_line(error))
        return [{} for _ in range(learner.size)]
    objective = replace(training.objective, method=method)
    size = min(training.sizes[0], max(BALANCED, method.min_batch))
    index = draw_order(len(training.train), training.seeds, training.role, 1)[:, :size].to(training.train.device)
    with contextlib.ExitStack() as contexts:
        contexts.enter_context(global_stream(training.seeds[0], training.role, "balance", device=index.device))
        for module in (*(part.module for part in learner.parts), method):
            contexts.enter_context(batch_statistics(module))
        batch, target = _batch(training, objective, index, progress, epoch)
        found = learner.term_gradients(batch, lambda student: objective.weighted_terms(student, target, batch))
    norms = {name: gradient.on_parameters.tolist() for name, gradient in found.items()}
    return [_shares({name: values[s] for name, values in norms.items()}) for s in range(learner.size)]


def _shares(norms: dict[str, float]) -> Shares:
    total = sum(norms.values())
    if not (math.isfinite(total) and total > 0):
        return dict.fromkeys(norms)
    return {name: norm / total for name, norm in norms.items()}


def _batch(
    training: Training, objective: Objective, index: Tensor, progress: float, epoch: int
) -> tuple[Batch, Outputs | None]:
    """The examples of this index [U,B] as a batch, and the teacher's outputs for them."""
    train = training.train
    batch = Batch(index, train.images(index), train.labels[index], progress, epoch)
    return batch, ask(training.teacher, batch, objective.weights.T) if training.teacher is not None else None
