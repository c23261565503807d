"""The one epoch loop of the project: teachers, students alone, distilled students and stacks are trained by it.

Shapes: S models, U distinct batches (neighbouring models with the same seed share one), N examples, B examples in a
batch, C classes.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kd_cli.learn.augment import Augment
from kd_cli.learn.batches import (
    EVAL_BATCH,
    NO_AUGMENTATION,
    Augmented,
    Block,
    Examples,
    batch_sizes,
    draw_augmentation,
    draw_balanced,
    draw_order,
    shares_of_steps,
)
from kd_cli.learn.batchnorm import estimate_statistics, tracked_norms, training_batches
from kd_cli.learn.cuda_graphs import PlainSteps, RecordedSteps, Recorder, recorded_steps
from kd_cli.learn.gradients import gradient_sizes, loss_balance
from kd_cli.learn.learner import Learner
from kd_cli.learn.objective import Objective
from kd_cli.learn.schedules import Schedule
from kd_cli.learn.teachers import Teacher
from kd_cli.losses import binary_cross_entropy, correct

BLOCK_LOGITS = 1 << 15  # logits of one model, about, in the batches of one block

Row = dict[str, Any]  # a line of metrics.jsonl


@dataclass(frozen=True)
class Plan:
    """How long and how to train; the same for all S models."""

    epochs: int
    batch_size: int
    schedule: Schedule
    augment: Augment = NO_AUGMENTATION
    estimate_batchnorm: bool = False  # BatchNorm's statistics are estimated anew before each evaluation
    keep_best: bool = False  # keep the weights of the epoch with the best validation accuracy instead of the last
    diagnostics: bool = False  # log the sizes of each term's gradients
    accumulate: int = 1  # batches whose gradients make one step
    patience: int = 0  # epochs without a better validation accuracy after which training ends; 0 for all epochs
    balanced: bool = False  # examples are drawn with replacement so that each class is as likely
    loss_balance: bool = False  # measure each term's share of the gradient at start, middle and end
    fill: Tensor | float = 0.0  # what moves in at the edge of a shifted image: black, normalised


@dataclass(frozen=True)
class Training:
    """What S models are trained on: data, plan, objective and teacher.

    `seeds` are those of the batches, as `distinct` reads them. `role` names the random streams: two roles share none,
    two trainings with the same role and seed share all, so that the student alone and the distilled student start from
    the same weights and see the same batches.
    """

    train: Examples
    val: Examples
    role: str
    seeds: Sequence[int]
    plan: Plan
    objective: Objective
    teacher: Teacher | None = None

    @property
    def sizes(self) -> list[int]:
        """The lengths of an epoch's batches."""
        return batch_sizes(len(self.train), self.plan.batch_size)

    def order(self, epoch: int) -> Tensor:
        """The examples of an epoch in the order of its batches, for each distinct seed: [U,N]."""
        if self.plan.balanced:
            return draw_balanced(self.train.labels, self.seeds, self.role, epoch)
        return draw_order(len(self.train), self.seeds, self.role, epoch)

    @property
    def steps(self) -> int:
        """The steps of the optimiser in an epoch."""
        return -(-len(self.sizes) // self.plan.accumulate)

    def progress_at(self, epoch: int) -> float:
        """The share of all steps made before the last one of this epoch; 0 before the first epoch."""
        return max(0, epoch * self.steps - 1) / (self.plan.epochs * self.steps)

    @functools.cached_property
    def steps_of_block(self) -> int:
        """How many batches are handed to the learner at once."""
        labels = self.train.labels
        classes = labels.shape[1] if labels.dim() == 2 else int(labels.max()) + 1
        return BLOCK_LOGITS // (self.plan.batch_size * classes) + 1


@dataclass
class Outcome:
    """The result of training one of the S models."""

    state: dict[str, Tensor]
    history: list[Row] = field(default_factory=list)
    seconds: float = 0.0
    diverged: int | None = None  # the epoch in which the loss stopped being finite
    epoch: int | None = None  # the epoch that the weights are of
    balance: list[Row] = field(default_factory=list)  # each term's share of the gradient, as `loss_balance` returns it
    left: int | None = None  # the epoch after which it left the training, by a decision of others


class Observer:
    """Receives the progress of a training; this base class ignores it."""

    def start(self, steps: int, models: int) -> None:
        """Training begins: the number of steps in all epochs, and of models."""

    def step(self) -> None:
        """One step was made."""

    def epoch(self, rows: list[Row]) -> None:
        """An epoch has ended: one row of metrics for each of the S models."""

    def finish(self) -> None:
        """Training has ended, or was interrupted."""


class Checkpoint(Protocol):
    """Where the state of a training is kept between epochs."""

    def load(self) -> dict[str, Any] | None: ...

    def due(self, epoch: int) -> bool: ...

    def save(self, state: dict[str, Any]) -> None: ...


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, and has stopped at the end of an epoch."""


class Left(Exception):
    """Some models leave the training, which `epoch` epochs and `outcomes` of all S models describe so far."""

    def __init__(self, epoch: int, outcomes: list[Outcome]) -> None:
        super().__init__(f"models leave after epoch {epoch}")
        self.epoch, self.outcomes = epoch, outcomes


def fit(
    learner: Learner,
    training: Training,
    *,
    observer: Observer | None = None,
    checkpoint: Checkpoint | None = None,
    stopping: Callable[[], bool] = lambda: False,
    recorder: Recorder | None = None,
    leaving: Callable[[list[Outcome]], bool] = lambda outcomes: False,
) -> list[Outcome]:
    """Train S models side by side and return the outcome of each.

    With a `checkpoint`, training continues from the epoch that it holds, to the same result as a training that was
    never interrupted. When `stopping()` is true at the end of an epoch, the state is saved and Interrupted is raised.
    With a `recorder`, steps are recorded and replayed where all of their parts allow it. When `leaving(outcomes)` is
    true before an epoch, Left is raised, and the caller goes on with the models that stay.
    """
    observer = observer or Observer()
    plan = training.plan
    observer.start(plan.epochs * len(training.sizes), learner.size)
    done, outcomes = 0, [Outcome({}) for _ in range(learner.size)]
    if checkpoint is not None and (state := checkpoint.load()) is not None:
        done, outcomes = resume(state, learner)
        for earlier in zip(*(outcome.history for outcome in outcomes), strict=True):
            observer.epoch(list(earlier))
    steps = recorded_steps(learner, training.teacher, training.objective, recorder)
    if done == 0 and not any(outcome.balance for outcome in outcomes):
        add_balance(learner, training, outcomes, epoch=0)
    for epoch in range(done + 1, plan.epochs + 1):
        if all(outcome.diverged for outcome in outcomes) or ended_early(outcomes, plan):
            break
        if leaving(outcomes):
            observer.finish()
            raise Left(epoch - 1, outcomes)
        started = time.perf_counter()
        train_epoch(learner, training, epoch, steps, observer)
        n = len(training.train)
        means = [row for part in learner.parts for row in part.sums.means(n)]  # the epoch's one wait for the device
        networks = [part.module for part in learner.parts if tracked_norms(part.module)]
        if plan.estimate_batchnorm and networks:
            images = training_batches(
                training.train, plan.batch_size, seed=training.seeds[0], role=training.role, epoch=epoch
            )
            estimate_statistics(networks, images)
        seconds = time.perf_counter() - started
        rows = epoch_rows(learner, training, epoch, means, seconds)
        for s, (outcome, row) in enumerate(zip(outcomes, rows, strict=True)):
            add_epoch(outcome, row, seconds)
            if plan.keep_best and is_best(outcome):
                outcome.epoch, outcome.state = epoch, learner.model_state(s)
        add_balance(learner, training, outcomes, epoch=epoch)
        observer.epoch(rows)
        stop = stopping() and epoch < plan.epochs
        if checkpoint is not None and (stop or checkpoint.due(epoch)):
            checkpoint.save(snapshot(epoch, learner, outcomes))
        if stop:
            observer.finish()
            raise Interrupted(f"stopped after epoch {epoch} of {plan.epochs}")
    if ended_early(outcomes, plan) and len(outcomes[0].history) < plan.epochs:
        add_balance(learner, training, outcomes, epoch=plan.epochs)
    take_last_weights(learner, training.train, outcomes)
    observer.finish()
    return outcomes


def train_epoch(
    learner: Learner, training: Training, epoch: int, steps: PlainSteps | RecordedSteps, observer: Observer
) -> None:
    """Make the steps of one epoch, block after block."""
    plan, train, sizes = training.plan, training.train, training.sizes
    order = training.order(epoch).to(train.device)
    train.expect(*learner.asked_for(order, sizes))
    steps_of = shares_of_steps(sizes, plan.accumulate) if plan.accumulate > 1 else []
    draws = draw_augmentation(plan.augment, len(train), training.seeds, training.role, epoch)
    draws = None if draws is None else draws.to(train.device)
    before, total = (epoch - 1) * training.steps, plan.epochs * training.steps
    start = 0
    with learner.training(training.role, epoch):
        for first in range(0, len(sizes), training.steps_of_block):
            some = tuple(sizes[first : first + training.steps_of_block])
            part = slice(start, start := start + sum(some))
            augmented = None if draws is None else Augmented(plan.augment, draws[:, part], plan.fill)
            progress = tuple((before + (first + k) // plan.accumulate) / total for k in range(len(some)))
            of_steps = tuple(steps_of[first : first + len(some)])
            block = Block(train, order[:, part], some, augmented, progress, epoch, of_steps)
            steps(block, [float(plan.schedule(share)) for share in progress], observer.step)


def epoch_rows(
    learner: Learner, training: Training, epoch: int, means: Sequence[dict[str, float | None]], seconds: float
) -> list[Row]:
    """The metrics of an epoch, one row for each model."""
    found = validate(learner, training.val, coupled=training.objective.method.couples_models)
    last = training.progress_at(epoch)
    sizes: list[dict[str, float | None]] = [{}] * learner.size
    if training.plan.diagnostics:
        sizes = [
            row
            for part, objective in learner.with_objectives(training.objective)
            for row in gradient_sizes(part, replace(training, objective=objective), progress=last, epoch=epoch)
        ]
    rates = learner.rates(float(training.plan.schedule(last)))
    return [
        {
            "role": training.role,
            "epoch": epoch,
            **means[s],
            **found[s],
            "lr": rates[s],
            "examples_per_second": len(training.train) / seconds,
            **sizes[s],
        }
        for s in range(learner.size)
    ]


def add_epoch(outcome: Outcome, row: Row, seconds: float) -> None:
    """Add an epoch's metrics to a model's outcome, and notice when the loss has stopped being finite."""
    outcome.history.append(row)
    outcome.seconds += seconds
    if outcome.diverged is None and not math.isfinite(row["loss"]):
        outcome.diverged = row["epoch"]


def add_balance(learner: Learner, training: Training, outcomes: Sequence[Outcome], *, epoch: int) -> None:
    """Measure the terms' shares of the gradient before the first epoch, after half of them and after the last."""
    epochs = training.plan.epochs
    when = {epochs // 2: "middle", 0: "start", epochs: "end"}.get(epoch)
    if when is None or not training.plan.loss_balance:
        return
    progress, left = training.progress_at(epoch), iter(outcomes)
    for part, objective in learner.with_objectives(training.objective):
        own = list(itertools.islice(left, part.size))
        if objective.method.needs_teacher or objective.method.has_alpha:
            found = loss_balance(part, replace(training, objective=objective), progress=progress, epoch=max(1, epoch))
            for outcome, shares in zip(own, found, strict=True):
                outcome.balance.append({"when": when, "epoch": epoch, "shares": shares})


def take_last_weights(learner: Learner, train: Examples, outcomes: Sequence[Outcome]) -> None:
    """Give each outcome without weights those of the last epoch. The last step can ruin a model whose losses were all
    finite: its logits are looked at."""
    finite = learner.logits(train.first(EVAL_BATCH)).isfinite().flatten(1).all(1).tolist()
    for s, outcome in enumerate(outcomes):
        if outcome.epoch is None:
            outcome.epoch, outcome.state = len(outcome.history), learner.model_state(s)
            if outcome.diverged is None and not finite[s]:
                outcome.diverged = outcome.epoch


def snapshot(epoch: int, learner: Learner, outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """All that training needs to continue after this epoch: tensors and plain values."""
    return {"epoch": epoch, "learner": learner.state(), "outcomes": [vars(outcome).copy() for outcome in outcomes]}


def resume(state: dict[str, Any], learner: Learner) -> tuple[int, list[Outcome]]:
    """Restore the learner from a snapshot; return the number of epochs done and the outcomes so far."""
    learner.load_state(state["learner"])
    return state["epoch"], [Outcome(**values) for values in state["outcomes"]]


def ended_early(outcomes: Sequence[Outcome], plan: Plan) -> bool:
    """Whether one model has been trained for `patience` epochs without a better result on the validation part."""
    if not plan.patience or len(outcomes) > 1 or not outcomes[0].history:
        return False
    ranks = [(-row["val_accuracy"], row["val_nll"]) for row in outcomes[0].history]
    return len(ranks) - 1 - ranks.index(min(ranks)) >= plan.patience


def is_best(outcome: Outcome) -> bool:
    """Whether the last epoch is the best so far on the validation part: by accuracy, then by likelihood."""
    if outcome.diverged is not None:
        return False
    ranks = [(-row["val_accuracy"], row["val_nll"]) for row in outcome.history]
    return all(ranks[-1] < rank for rank in ranks[:-1])


@torch.no_grad()
def validate(learner: Learner, val: Examples, *, coupled: bool = False) -> list[dict[str, float | None]]:
    """`val_accuracy` and `val_nll` (nats) of each model on the validation part; None when it is empty.

    Of models that learn from each other also `val_agreement`: the share of the examples that another model puts in the
    same class, as a mean over the others.
    """
    columns: dict[str, list[Tensor]] = {"val_accuracy": [], "val_nll": []}
    if not len(val):
        return [dict.fromkeys(columns) for _ in range(learner.size)]
    logits = learner.predict(val)
    # One part at a time: a sum over more numbers may be divided among threads in another way.
    for logits_SNC in logits.split([part.size for part in learner.parts]):
        labels = val.labels.expand(*logits_SNC.shape[:2], *val.labels.shape[1:])
        columns["val_accuracy"].append(correct(logits_SNC, labels).double().mean(-1))
        if val.labels.dim() == 2:
            columns["val_nll"].append(binary_cross_entropy(logits_SNC.double(), val.labels))
        else:
            log_p = logits_SNC.double().log_softmax(-1).gather(-1, labels[..., None])
            columns["val_nll"].append(-log_p[..., 0].mean(-1))
    if coupled and val.labels.dim() == 1:
        said = logits.argmax(-1)
        same = torch.stack([(said == one).double().mean(-1) for one in said])  # [S,S], 1 on the diagonal
        columns["val_agreement"] = [(same.sum(1) - 1) / (len(same) - 1)]
    values = {name: torch.cat(some).tolist() for name, some in columns.items()}
    return [{name: column[s] for name, column in values.items()} for s in range(learner.size)]
