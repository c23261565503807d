"""The one epoch loop of the project: teachers, students alone, distilled students and stacks pass through it.

Shapes: S models, U distinct batches (models with one seed that lie together see the same), N examples, B examples in a
batch, C classes.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kd_cli.learn.augment import Augment
from kd_cli.learn.cuda_graphs import Recorded, Recorder, why_not_recorded
from kd_cli.learn.learner import Learner
from kd_cli.learn.methods import Method, Terms, Weights, has_closed_form
from kd_cli.learn.optim import Schedule, make_recordable
from kd_cli.learn.randomness import generator
from kd_cli.learn.stacked.dense import Buffers, each, is_dense
from kd_cli.learn.teachers import EVAL_BATCH, Teacher, batches
from kd_cli.losses import examples_last, likeliest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examples:
    """Examples resident on the device: normalised images [N,...] and labels [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


NO_AUGMENTATION = Augment()
WAITING = 1 << 15  # logits of a model, about, that are kept before their losses are summed


@dataclass(frozen=True)
class Plan:
    """How long and how to train; the same for all S models."""

    epochs: int
    batch_size: int
    schedule: Schedule
    augment: Augment = NO_AUGMENTATION
    keep_best: bool = False  # the weights of the epoch with the best validation accuracy instead of the last
    diagnostics: bool = False  # log the sizes of the two terms' gradients
    classes: int | None = None  # of the logits; None is as many as the labels have
    fill: Tensor | float = 0.0  # what moves in at the edge of a shifted image: black, normalised


@dataclass
class Outcome:
    """What became of one of the S models."""

    state: dict[str, Tensor]
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    diverged: int | None = None  # the epoch in which the loss stopped being finite
    epoch: int | None = None  # the epoch that the weights are of


class Observer:
    """Is told how training goes; this one does nothing with it."""

    def start(self, steps: int, models: int) -> None: ...

    def step(self) -> None: ...

    def epoch(self, rows: list[dict[str, Any]]) -> None:
        """One row of metrics for each of the S models."""

    def finish(self) -> None: ...


class Checkpoint(Protocol):
    """Where the state of a training is kept between epochs."""

    def load(self) -> dict[str, Any] | None: ...

    def due(self, epoch: int) -> bool: ...

    def save(self, state: dict[str, Any]) -> None: ...


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop, and has stopped at the end of an epoch."""


def fit(
    learner: Learner,
    train: Examples,
    val: Examples,
    *,
    role: str,
    seeds: list[int],
    plan: Plan,
    method: Method,
    weights: Weights,
    teacher: Teacher | None = None,
    observer: Observer | None = None,
    checkpoint: Checkpoint | None = None,
    stopping: Callable[[], bool] = lambda: False,
    recorder: Recorder | None = None,
) -> list[Outcome]:
    """Train S models side by side and return what became of each.

    `role` names the random streams: two roles share none, two runs with the same role and seed share all, so that the
    student alone and the distilled student start from the same weights and see the same batches. With a `checkpoint`,
    training goes on from the epoch that it holds, to the very result of a training that was never interrupted. When
    `stopping` says so, the state is saved at the end of the epoch and Interrupted is raised. With a `recorder`,
    steps are recorded and replayed, if all that they are made of can be.
    """
    observer = observer or Observer()
    parts = batch_slices(len(train), plan.batch_size)
    steps_per_epoch = len(parts)
    total_steps = plan.epochs * steps_per_epoch
    observer.start(total_steps, learner.size)
    outcomes = [Outcome({}) for _ in seeds]
    done = 0
    if checkpoint is not None and (state := checkpoint.load()) is not None:
        done, outcomes = resume(state, learner)
        for rows in zip(*(outcome.history for outcome in outcomes), strict=True):
            observer.epoch(list(rows))
    steps = Steps(learner, train, method, weights, teacher, plan=plan, done=observer.step)
    recorded = recording(steps, recorder) if recorder is not None else None
    step = done * steps_per_epoch
    for epoch in range(done + 1, plan.epochs + 1):
        if all(outcome.diverged for outcome in outcomes):
            break
        started = time.perf_counter()
        order = draw_order(len(train), seeds, role, epoch).to(train.labels.device)
        draws = draw_augmentation(plan.augment, len(train), seeds, role, epoch, train.images.device)
        factors = [float(plan.schedule((step + k) / total_steps)) for k in range(steps_per_epoch)]
        rates = torch.tensor(factors, device=train.labels.device)
        step += steps_per_epoch
        with learner.train(role, epoch):
            for first in range(0, steps_per_epoch, steps.together):
                some = slice(first, first + steps.together)
                batch_sizes = tuple(part.stop - part.start for part in parts[some])
                part = slice(parts[some][0].start, parts[some][-1].stop)
                now = order[:, part], None if draws is None else draws[:, part], batch_sizes, factors[some]
                if recorded is None:
                    steps(*now)
                else:
                    recorded(*now, rates[some])
        means = steps.teaching.means(len(train))  # the epoch's one wait for the device
        seconds = time.perf_counter() - started
        accuracy, nll = validate(learner, val)
        sizes = gradient_sizes(learner, train, method, weights, teacher) if plan.diagnostics else None
        rows = []
        for s, rate in enumerate(learner.rates(factors[-1])):
            row: dict[str, Any] = {
                "role": role,
                "epoch": epoch,
                **means[s],
                "val_accuracy": accuracy[s],
                "val_nll": nll[s],
                "lr": rate,
                "examples_per_second": len(train) / seconds,
            }
            if sizes is not None:
                row |= sizes[s]
            rows.append(row)
            outcomes[s].history.append(row)
            outcomes[s].seconds += seconds
            if outcomes[s].diverged is None and not math.isfinite(row["loss"]):
                outcomes[s].diverged = epoch
            if plan.keep_best and better(outcomes[s]):
                outcomes[s].epoch, outcomes[s].state = epoch, learner.model_state(s)
        observer.epoch(rows)
        stop = stopping() and epoch < plan.epochs
        if checkpoint is not None and (stop or checkpoint.due(epoch)):
            checkpoint.save(snapshot(epoch, learner, outcomes))
        if stop:
            observer.finish()
            raise Interrupted(f"stopped after epoch {epoch} of {plan.epochs}")
    # the last step can ruin a model whose losses were all finite
    sane = predict(learner, train.images[:EVAL_BATCH]).isfinite().flatten(1).all(1).tolist()
    for s, outcome in enumerate(outcomes):
        if outcome.epoch is None:
            outcome.epoch, outcome.state = len(outcome.history), learner.model_state(s)
            if outcome.diverged is None and not sane[s]:
                outcome.diverged = outcome.epoch
    observer.finish()
    return outcomes


def batch_slices(n: int, size: int) -> list[slice]:
    """An epoch's batches. A last one of a single example joins the one before: BatchNorm has no use for it."""
    edges = [*range(0, n, size), n]
    if size > 1 and n > size and n % size == 1:
        del edges[-2]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def snapshot(epoch: int, learner: Learner, outcomes: list[Outcome]) -> dict[str, Any]:
    """All that training needs to go on after this epoch: tensors and plain values."""
    return {"epoch": epoch, "learner": learner.state(), "outcomes": [vars(outcome).copy() for outcome in outcomes]}


def resume(state: dict[str, Any], learner: Learner) -> tuple[int, list[Outcome]]:
    """Put the learner where the snapshot was taken; the epochs done and what became of the models so far."""
    learner.load_state(state["learner"])
    return state["epoch"], [Outcome(**values) for values in state["outcomes"]]


def better(outcome: Outcome) -> bool:
    """Whether the last epoch is the best so far on the validation part: accuracy, then likelihood."""
    if outcome.diverged is not None:
        return False
    ranks = [(-row["val_accuracy"], row["val_nll"]) for row in outcome.history]
    return all(ranks[-1] < rank for rank in ranks[:-1])


def gradient_sizes(
    learner: Learner, train: Examples, method: Method, weights: Weights, teacher: Teacher | None, *, examples: int = 512
) -> list[dict[str, float | None]]:
    """How large the gradients of the soft and the hard term are, before weighting, for each of the S models.

    On the logits: the mean over examples of the norm of an example's own gradient, (p - q) / T for soft targets. On the
    parameters: the norm of the gradient of the mean over examples. In eval mode, on the first `examples` examples.
    """
    index = torch.arange(min(examples, len(train)), device=train.labels.device)[None]
    images = train.images[index]
    logits = learner.logits(images).clone(memory_format=torch.contiguous_format).requires_grad_()
    soft_targets = ask(teacher, index, images, weights.T, learner.size) if teacher else None
    terms = method(logits, soft_targets, train.labels[index], weights)
    found: dict[str, list[float] | None] = {}
    for name, term in (("soft", terms.soft), ("hard", terms.hard)):
        keys = [f"{name}_gradient_{where}" for where in ("logits", "parameters")]
        if term is None:
            found |= dict.fromkeys(keys)
            continue
        slope = torch.autograd.grad(term.sum(), logits, retain_graph=True)[0]
        on_logits = (slope.norm(dim=-1).mean(-1) * logits.shape[1]).tolist()
        learner.logits(images)  # a backward pass uses up what its forward pass kept
        squares = [g.reshape(learner.size, -1).double().square().sum(-1) for g in learner.gradients(slope)]
        found |= dict(zip(keys, (on_logits, torch.stack(squares).sum(0).sqrt().tolist()), strict=True))
    return [{key: None if values is None else values[s] for key, values in found.items()} for s in range(learner.size)]


def gather(examples: Tensor, index: Tensor, out: Tensor | None = None) -> Tensor:
    """Rows of the examples [N,...] by index [U,B]: [U,B,...]; a plain selection, which is faster than indexing.

    `out` is memory [U B,...] for them.
    """
    return torch.index_select(examples, 0, index.reshape(-1), out=out).view(*index.shape, *examples.shape[1:])


def cut_up(x: Tensor | None, sizes: Sequence[int]) -> Sequence[Any]:
    """The parts of [U,N,...] that lie along the second axis, of these sizes; or as many times None."""
    return [None] * len(sizes) if x is None else x.split(list(sizes), 1)


def ask(teacher: Teacher, index: Tensor, images: Tensor | None, T: Tensor, size: int) -> Tensor:
    """The teacher's logits for the batches [U,B] of S models: [1,B,C] or [S,B,C]."""
    if teacher.has_T and 1 < len(index) < size:
        index, images = each(index, size), None if images is None else each(images, size)
    logits = teacher(index, images, T)
    return logits if len(logits) == 1 else each(logits, size)


def distinct(seeds: list[int]) -> list[int]:
    """The seeds [S] without neighbours that repeat, [U], where each stands for as many models; else all of them."""
    groups = [(seed, len(list(group))) for seed, group in itertools.groupby(seeds)]
    return [seed for seed, _ in groups] if len({n for _, n in groups}) == 1 else seeds


def draw_order(n: int, seeds: list[int], role: str, epoch: int) -> Tensor:
    """The order of the examples in this epoch, one for each distinct seed: [U,N]."""
    drawn = {seed: torch.randperm(n, generator=generator(seed, role, "order", epoch)) for seed in dict.fromkeys(seeds)}
    return torch.stack([drawn[seed] for seed in distinct(seeds)])


def draw_augmentation(
    augmentation: Augment, n: int, seeds: list[int], role: str, epoch: int, device: torch.device
) -> Tensor | None:
    """The augmentation of every example of this epoch, in the order of the batches, for each distinct seed: [U,N,k]."""
    if not augmentation.enabled:
        return None
    drawn = {seed: augmentation.draw(n, generator(seed, role, "augment", epoch)) for seed in dict.fromkeys(seeds)}
    return torch.stack([drawn[seed] for seed in distinct(seeds)]).to(device)


def augment(plan: Plan, images: Tensor, draws: Tensor) -> Tensor:
    """Augment a batch, [U,B,C,H,W], by its draws [U,B,k]."""
    lead = images.shape[:2]
    return plan.augment.apply(images.flatten(0, 1), draws.flatten(0, 1), fill=plan.fill).unflatten(0, lead)


@torch.no_grad()
def predict(learner: Learner, images: Tensor) -> Tensor:
    """Logits at T = 1 of the S models, in eval mode, on the same images [N,...]: [S,N,C]."""
    return torch.cat([learner.logits(batch[None]) for batch in batches(images)], dim=1)


@torch.no_grad()
def validate(learner: Learner, val: Examples) -> tuple[list[float | None], list[float | None]]:
    """Accuracy and negative log likelihood (nats) of each model on the validation part; None when it is empty."""
    if not len(val):
        return [None] * learner.size, [None] * learner.size
    logits_SNC = predict(learner, val.images)
    accuracy = (logits_SNC.argmax(-1) == val.labels).double().mean(-1)
    log_p = logits_SNC.double().log_softmax(-1).gather(-1, val.labels.expand(logits_SNC.shape[:2])[..., None])
    return accuracy.tolist(), (-log_p[..., 0].mean(-1)).tolist()


def steps_together(batch_size: int, classes: int) -> int:
    """How many steps' logits wait for their losses to be summed."""
    return WAITING // (batch_size * classes) + 1


class Steps:
    """Consecutive steps of S models; losses are summed when a block of them is done."""

    def __init__(
        self,
        learner: Learner,
        train: Examples,
        method: Method,
        weights: Weights,
        teacher: Teacher | None,
        *,
        plan: Plan,
        done: Callable[[], None] = lambda: None,
    ) -> None:
        """`done` is told of each step."""
        self.learner, self.train, self.teacher, self.plan, self.done = learner, train, teacher, plan, done
        self.teaching = Teaching(method, weights, learner.size)
        # The steps in a block: it is the number of calls, not their size, that costs beside a small network. Whatever
        # the number of models: a model's sums do not depend on its company.
        classes = plan.classes or int(train.labels.max()) + 1
        self.together = steps_together(plan.batch_size, classes)
        self.plain = is_dense(learner.module)
        self.buffers = Buffers()

    def __call__(
        self, index: Tensor, draws: Tensor | None, sizes: tuple[int, ...], factors: Iterable[float | Tensor]
    ) -> None:
        """See `kd_cli.learn.cuda_graphs.Block`."""
        size, teacher, T = self.learner.size, self.teacher, self.teaching.weights.T
        labels = each(self.train.labels[index], size)
        known = None
        asked = teacher is not None and (teacher.has_T or not teacher.remembers)  # for every batch
        if teacher and not asked:
            known = ask(teacher, index, None, T, size)
        self.teaching.waiting.clear()  # of a recording that failed
        cut = functools.partial(cut_up, sizes=sizes)  # once for all steps: small calls cost most between large products
        targets: Sequence[Tensor | None] = ()
        batches = zip(factors, cut(index), cut(draws), cut(known), cut(labels), strict=True)
        for i, (factor, part, drawn, soft_targets, true) in enumerate(batches):
            images = gather(self.train.images, part, self._place(part.numel()))
            if drawn is not None:
                images = augment(self.plan, images, drawn)
            logits = self.learner.logits(images)
            if teacher and asked:
                soft_targets = ask(teacher, part, images, T, size)
            if not targets:
                targets = cut(None if asked else self.teaching.target(logits, known, labels))
            slope = self.teaching.gradient(logits, soft_targets, true, targets[i])
            self.learner.update(slope, factor)
            if isinstance(factor, float):  # and not while they are recorded
                self.done()
        self.teaching.settle(known, labels)

    def _place(self, n: int) -> Tensor | None:
        """Memory for n images of a step, the same in every step: that of a stack is large enough for the system to take
        it back and give it anew, page by page, which takes longer than to fill it. Not where somebody's own module may
        keep what it was given."""
        images = self.train.images
        return self.buffers("images", images, (n, *images.shape[1:])) if self.plain else None


def recording(steps: Steps, recorder: Recorder) -> Recorded | None:
    """Steps that are recorded and replayed; None, and a word on the reason, where that cannot be."""
    learner = steps.learner
    code = [learner.module, steps.teaching.method, *getattr(steps.teacher, "modules", ())]
    if (reason := why_not_recorded(learner.optimizer, code)) is not None:
        log.info("steps are not recorded as CUDA graphs, and run one by one: %s", reason)
        return None
    make_recordable(learner.optimizer)
    return Recorded(steps, recorder, generators=learner.generators.own, replayed=steps.done)


class Teaching:
    """A method at work: the gradients it gives, and its losses summed over the examples of an epoch.

    The sums stay on the device, so that no step waits for it. Where the method knows its gradient, its losses are
    computed when the steps have settled, for many batches at once.
    """

    def __init__(self, method: Method, weights: Weights, size: int) -> None:
        self.method, self.weights = method, weights
        self.closed = has_closed_form(type(method))
        self.losses = torch.zeros(3, size, dtype=torch.float64, device=weights.T.device)
        self.correct = torch.zeros(size, dtype=torch.int64, device=weights.T.device)
        self.has_soft = False
        self.waiting: list[tuple[Tensor, Tensor | None]] = []
        own = type(method).__module__ == Method.__module__  # somebody else's may count on how logits lie in memory
        self.layout = torch.preserve_format if own else torch.contiguous_format

    @torch.no_grad()
    def target(self, like: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor | None:
        """What the students' logits do not change in the gradients of many batches; None where the method does not
        know it. `like` has the type and the classes of their logits."""
        return self.method.target(like, teacher, labels, self.weights) if self.closed else None  # type: ignore[attr-defined]

    def gradient(self, logits: Tensor, teacher: Tensor | None, labels: Tensor, target: Tensor | None = None) -> Tensor:
        """The gradient of the losses of S models on their logits [S,B,C]; labels are [S,B]."""
        if self.closed:
            logits = logits.contiguous() if self.layout is torch.contiguous_format else logits
            self.waiting.append((logits.clone(), teacher))
            if target is None:
                target = self.target(logits, teacher, labels)
            slope: Tensor = self.method.gradient(logits, target, self.weights)  # type: ignore[attr-defined]
            return slope.detach()  # somebody's own may have built a graph
        # A copy: a method may keep it, and the learner writes over its own.
        leaf = logits.clone(memory_format=self.layout).requires_grad_()
        terms = self.method(leaf, teacher, labels, self.weights)
        self._add(terms, logits, labels)
        return torch.autograd.grad(terms.loss.sum(), leaf)[0]

    @torch.no_grad()
    def settle(self, teacher: Tensor | None, labels: Tensor) -> None:
        """Sum up the losses of the steps since the last time: of all their examples' labels, and the teacher's logits
        unless they came with the steps."""
        if self.waiting:
            logits, came = zip(*self.waiting, strict=True)
            self.waiting = []
            across = examples_last(logits[0])  # stays so: the losses are quicker then
            together = torch.cat([part.mT for part in logits], 2).mT if across else torch.cat(logits, 1)
            if teacher is None and came[0] is not None:
                teacher = torch.cat(came, 1)
            self._add(self.method(together, teacher, labels, self.weights), together, labels)

    @torch.no_grad()
    def _add(self, terms: Terms, logits_SBC: Tensor, labels: Tensor) -> None:
        self.has_soft = terms.soft is not None
        soft = terms.hard if terms.soft is None else terms.soft
        self.losses.add_(torch.stack([terms.loss, soft, terms.hard]), alpha=labels.shape[-1])
        self.correct += (likeliest(logits_SBC) == labels).sum(-1)

    def means(self, n: int) -> list[dict[str, float | None]]:
        """One dictionary for each model: loss, soft_loss, hard_loss, train_accuracy. The next epoch starts from 0."""
        losses, correct = (self.losses / n).tolist(), (self.correct.double() / n).tolist()
        self.losses.zero_()
        self.correct.zero_()
        return [
            {"loss": loss, "soft_loss": soft if self.has_soft else None, "hard_loss": hard, "train_accuracy": accuracy}
            for loss, soft, hard, accuracy in zip(*losses, correct, strict=True)
        ]
