"""Train the models of one stage: those that differ only in their numbers as stacks, the others one by one.

Which models form a stack is chosen once, noted in the plan, and read again on resume: a stack that lacks a result is
then trained as noted, also the members whose results are there.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kd_cli.config.fingerprint import code_version, fingerprint
from kd_cli.config.values import TrainSpec
from kd_cli.data.sentences import listed
from kd_cli.errors import ConfigError
from kd_cli.learn.engine import Outcome, fit
from kd_cli.learn.teachers import Teacher
from kd_cli.runs.building import TrainingTask, make_training
from kd_cli.runs.checkpoints import Checkpoints, SavedTraining
from kd_cli.runs.device_data import DeviceData
from kd_cli.runs.progress import OnEpoch, Progress, describe
from kd_cli.runs.stack_size import stack_size

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Member:
    """One training of a stage."""

    key: str  # the same in the process that resumes the stage; no other member of the stage has it
    task: TrainingTask
    name: str  # of the job, for the log
    result: Path  # the file that exists once the result is safe
    needed: bool = True  # whether the result is missing; one that is not needed is trained only to complete a stack


@dataclass(frozen=True)
class Stage:
    """What the trainings of one stage have in common."""

    data: DeviceData
    role: str  # of the rows in metrics.jsonl
    title: str  # for the log and the progress bar
    teacher: Teacher | None = None
    subject: str = ""  # fingerprint of the teacher and the transfer set
    diagnostics: bool = False


@dataclass(frozen=True)
class Trainer:
    """Trains stages; `stack_sizes` is the file with the fastest sizes of stacks measured on this machine."""

    checkpoints: Checkpoints
    stack_sizes: Path

    def train(self, stage: Stage, members: Sequence[Member], on_epoch: OnEpoch) -> Iterator[tuple[int, Outcome]]:
        """Train the members; yield number and outcome of each one that is needed, as each stack ends.

        `on_epoch` is called with a needed member's number and metrics after each epoch. States are removed when the
        results that the caller writes between two outcomes are there.
        """
        groups: dict[str, list[int]] = {}
        for i, member in enumerate(members):
            groups.setdefault(member.task.stack_key(), []).append(i)
        unsaved: list[Stack] = []
        for stack_key, group in groups.items():
            if any(members[i].needed for i in group):
                name = fingerprint([stage.role, stage.subject, stack_key])
                stacks = self._stacks(stage, name, {members[i].key: members[i] for i in group})
                for stack, outcomes in self._train_stacks(stage, name, stacks, members, on_epoch):
                    for i, outcome in zip(stack.numbers, outcomes, strict=True):
                        if members[i].needed:
                            yield i, outcome
                    stack.diverged = [outcome.diverged is not None for outcome in outcomes]
                    del outcomes, outcome  # frees the weights before the next stack is trained
                    unsaved = [one for one in [*unsaved, stack] if not one.remove_state()]

    def _stacks(self, stage: Stage, name: str, members: dict[str, Member]) -> list[list[str]]:
        """The stacks of equal members that lack a result: those that the plan has, and new ones for the others."""
        needed = [member for member in members.values() if member.needed]
        stacks = [
            keys
            for keys in self.checkpoints.plan.get(name)
            if all(key in members for key in keys) and any(members[key].needed for key in keys)
        ]
        planned = {key for keys in stacks for key in keys}
        if rest := [member for member in needed if member.key not in planned]:
            # Neighbours with equal learning rate and weight decay share one call of the optimiser, those with equal
            # seeds their batches.
            rest.sort(key=lambda member: (sorted(member.task.hyper().items()), member.task.spec.seed))
            tasks = [member.task for member in rest]
            size, reason = stack_size(stage.data, tasks, role=stage.role, teacher=stage.teacher, notes=self.stack_sizes)
            if reason is not None:
                names = listed(dict.fromkeys(member.name for member in rest), 3)
                log.info("%d × %s run one by one: %s (%s)", len(rest), stage.title, reason, names)
            new = parts([member.key for member in rest], size)
            if len(members) > 1:
                self.checkpoints.plan.add(name, new)
            stacks += new
        return stacks

    def _train_stacks(
        self, stage: Stage, name: str, stacks: list[list[str]], members: Sequence[Member], on_epoch: OnEpoch
    ) -> Iterator[tuple[Stack, list[Outcome]]]:
        """Train stacks one after the other; one that does not fit in the device's memory is halved."""
        number = {member.key: i for i, member in enumerate(members)}
        queue = collections.deque(stacks)
        while queue:
            keys = queue.popleft()
            numbers = [number[key] for key in keys]
            stack = Stack(stage, numbers, [members[i] for i in numbers], self.checkpoints)
            outcomes: list[Outcome] | None = None
            try:
                outcomes = stack.train(on_epoch)
            except torch.OutOfMemoryError:
                if len(keys) == 1:
                    raise
            if outcomes is None:  # here the error no longer holds the models
                log.info("%d models do not fit in the memory of %s together; halving", len(keys), stage.data.device)
                torch.cuda.empty_cache()
                halves = parts(keys, -(-len(keys) // 2))
                self.checkpoints.plan.split(name, keys, halves)
                queue.extendleft(reversed(halves))
                continue
            yield stack, outcomes


@dataclass
class Stack:
    """Members that are trained together; `numbers` are their numbers in the stage."""

    stage: Stage
    numbers: list[int]
    members: list[Member]
    checkpoints: Checkpoints
    diverged: list[bool] = field(default_factory=list)  # of the members, once they are trained

    @property
    def title(self) -> str:
        n = len(self.members)
        return f"{n} × {self.stage.title}" if n > 1 else self.stage.title

    @functools.cached_property
    def state(self) -> SavedTraining | None:
        """The saved state of this training; its name is a fingerprint of all that its course depends on."""
        stage, tasks = self.stage, [member.task for member in self.members]
        facts = [
            [task.spec.identity(""), task.method, code_version(task.method), task.T, task.alpha, task.beta]
            for task in tasks
        ]
        data = [stage.data.dataset.fingerprint, len(stage.data.train), stage.diagnostics]
        name = fingerprint([stage.role, stage.subject, facts, [member.key for member in self.members], data])
        results = [member.result for member in self.members]
        return self.checkpoints.of(name, title=self.title, device=stage.data.device, results=results)

    def remove_state(self) -> bool:
        """Remove the saved state once every member has its result or diverged; whether that is so."""
        pairs = zip(self.members, self.diverged, strict=True)
        safe = all(diverged or member.result.exists() for member, diverged in pairs)
        if safe and self.state is not None:
            self.state.remove()
        return safe

    def train(self, on_epoch: OnEpoch) -> list[Outcome]:
        """Train the members, from their saved state if there is one; call `on_epoch` for those that are needed."""
        stage, tasks = self.stage, [member.task for member in self.members]
        spec = tasks[0].spec

        def on_row(s: int, row: dict[str, Any]) -> None:
            if self.members[s].needed:
                on_epoch(self.numbers[s], row)

        with batchnorm_explained(spec):
            learner, training = make_training(
                stage.data, tasks, stage.role, teacher=stage.teacher, diagnostics=stage.diagnostics
            )
            outcomes = fit(
                learner,
                training,
                observer=Progress(self.title, spec.epochs, role=stage.role, on_epoch=on_row),
                checkpoint=self.state,
                stopping=self.checkpoints.stopping,
                recorder=stage.data.recorder,
            )
        for outcome in outcomes:
            outcome.history = [{**row, "role": stage.role} for row in outcome.history]
        return outcomes


@contextlib.contextmanager
def batchnorm_explained(spec: TrainSpec) -> Iterator[None]:
    """Turn torch's error on BatchNorm and a batch of one example into a ConfigError."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ConfigError(
            f"{spec.title} has BatchNorm, which cannot learn from a batch of one example",
            hint="a batch size of 2 or more, and two training examples or more",
        ) from error


def parts(keys: list[str], size: int) -> list[list[str]]:
    """Parts of at most `size` keys, as equal as can be: one is left over by itself only for a size of 1 or 2."""
    n = -(-len(keys) // size)
    edges = [round(k * len(keys) / n) for k in range(n + 1)]
    return [keys[a:b] for a, b in itertools.pairwise(edges)]


def report_line(title: str, spec: TrainSpec, outcome: Outcome) -> str:
    """A line for the log on a finished training."""
    epochs = f"{spec.epochs:,} epoch{'s' * (spec.epochs != 1)}"
    return f"{title}: {epochs} in {outcome.seconds:.1f} s, {describe(outcome.history[-1:])}"
