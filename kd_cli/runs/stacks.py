"""Train the models of one stage together: as stacks those that differ only in their numbers, and stacks and single
models that see the same batches side by side, as a cohort.

Which models are trained together is chosen once, noted in the plan, and read again on resume: what lacks a result is
then trained as noted, also the members whose results are there.
"""

from __future__ import annotations

import collections
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from kd_cli.config.fingerprint import fingerprint
from kd_cli.config.values import TrainSpec
from kd_cli.data.sentences import listed
from kd_cli.errors import first_line
from kd_cli.learn.engine import Outcome
from kd_cli.runs.checkpoints import Checkpoints
from kd_cli.runs.cohorts import cohort_facts, cohort_key, differing_keys, fitting, why_not_one_stack
from kd_cli.runs.group import Beside, Group, Member, Stage
from kd_cli.runs.progress import OnEpoch, describe
from kd_cli.runs.several import Leader
from kd_cli.runs.stack_size import stack_size
from kd_cli.runs.workers import workers_that_pay

log = logging.getLogger(__name__)

OnFailure = Callable[[int, Exception], None]  # called with the number of a member and what its training raised


class Trained(NamedTuple):
    """A member that has been trained: its number in the stage, its result, and what was trained beside it."""

    number: int
    outcome: Outcome
    beside: Beside


@dataclass(frozen=True)
class Trainer:
    """Trains stages; `stack_sizes` is the file with the fastest sizes of stacks measured on this machine."""

    checkpoints: Checkpoints
    stack_sizes: Path
    leader: Leader | None = None  # of several processes, which train one model at a time

    def train(
        self, stage: Stage, members: Sequence[Member], on_epoch: OnEpoch, on_failure: OnFailure | None = None
    ) -> Iterator[Trained]:
        """Train the members; yield each one that is needed, as those that are trained together end.

        `on_epoch` is called with a needed member's number and metrics after each epoch. `on_failure` is called for
        those whose training raises an exception, and the others are trained; without it, the exception is passed on.
        States are removed when the results that the caller writes between two outcomes are there.
        """
        alike: dict[str, dict[str, Member]] = {}
        peers: dict[str, list[list[str]]] = {}
        for member in members:
            if member.peers:
                peers.setdefault(member.peers, []).append([member.key])
            else:
                alike.setdefault(member.task.stack_key(), {})[member.key] = member
        stacks: list[list[str]] = []
        reasons: dict[str, str] = {}  # why members are not stacked, by their keys
        number = {member.key: i for i, member in enumerate(members)}
        for stack_key, some in alike.items():
            try:
                stacks += self._stacks(stage, fingerprint([stage.role, stage.subject, stack_key]), some, reasons)
            except Exception as error:  # of these models' code
                if on_failure is None:
                    raise
                for key in some:
                    on_failure(number[key], error)
        unsaved: list[Group] = []
        cohorts = self._cohorts(stage, stacks, {member.key: member for member in members}, reasons)
        for cohort in [*cohorts, *peers.values()]:
            for group, outcomes in self._train_cohort(stage, cohort, members, number, on_epoch, on_failure):
                for i, outcome in zip(group.numbers, outcomes, strict=True):
                    if members[i].needed():
                        yield Trained(i, outcome, group.beside(i))
                group.ended = [(outcome.diverged or outcome.left) is not None for outcome in outcomes]
                del outcomes, outcome  # frees the weights before the next models are trained
                unsaved = [one for one in [*unsaved, group] if not one.remove_state()]

    def _stacks(self, stage: Stage, name: str, members: dict[str, Member], reasons: dict[str, str]) -> list[list[str]]:
        """The stacks of equal members: those that the plan has, and new ones for others that lack a result."""
        if self.leader is not None:
            return [[member.key] for member in members.values() if member.needed()]
        stacks = [keys for keys in self.checkpoints.plan.get(name) if all(key in members for key in keys)]
        planned = {key for keys in stacks for key in keys}
        if rest := [member for member in members.values() if member.needed() and member.key not in planned]:
            # Neighbours with equal learning rate and weight decay share one call of the optimiser, those with equal
            # seeds their batches.
            rest.sort(key=lambda member: (sorted(member.task.hyper().items()), member.task.spec.seed))
            tasks = [member.task for member in rest]
            size, reason = stack_size(stage.data, tasks, role=stage.role, teacher=stage.teacher, notes=self.stack_sizes)
            if reason is not None:
                reasons |= {member.key: reason for member in rest}
            new = parts([member.key for member in rest], size)
            self.checkpoints.plan.add(name, new)
            stacks += new
        return stacks

    def _cohorts(
        self, stage: Stage, stacks: list[list[str]], members: dict[str, Member], reasons: dict[str, str]
    ) -> list[list[list[str]]]:
        """The stacks in the groups that are trained side by side: those of the plan, and new ones for the others."""
        if self.leader is not None:
            return [[keys] for keys in stacks]
        alike: dict[str, list[list[str]]] = {}
        for keys in stacks:
            tasks = [members[key].task for key in keys]
            own = keys[0] if tasks[0].spec.recipe.get("patience") else ""  # it ends when it has to, by itself
            alike.setdefault(cohort_key(tasks) + own, []).append(keys)

        def needed(cohort: list[list[str]]) -> bool:
            return any(members[key].needed() for keys in cohort for key in keys)

        cohorts: list[list[list[str]]] = []
        singles: list[Member] = []  # that neither stack nor have others beside them
        for key, group in alike.items():
            name = fingerprint([stage.role, stage.subject, "cohort", key])
            first = {keys[0]: keys for keys in group}
            noted = [[first[k] for k in one] for one in self.checkpoints.plan.get(name) if all(k in first for k in one)]
            placed = {keys[0] for cohort in noted for keys in cohort}
            rest = [keys for keys in group if keys[0] not in placed and needed([keys])]
            new = fitting(stage, [[members[key] for key in keys] for keys in rest])
            for cohort in new:
                if len(cohort) > 1:
                    log_side_by_side(stage, cohort, reasons)
                elif len(cohort[0]) == 1:
                    singles += cohort[0]
            named = [[[member.key for member in stack] for stack in cohort] for cohort in new]
            self.checkpoints.plan.add(name, [[keys[0] for keys in cohort] for cohort in named])
            cohorts += [cohort for cohort in [*noted, *named] if needed(cohort)]
        log_singles(singles, reasons)
        return cohorts

    def _train_cohort(
        self,
        stage: Stage,
        cohort: list[list[str]],
        members: Sequence[Member],
        number: dict[str, int],
        on_epoch: OnEpoch,
        on_failure: OnFailure | None,
    ) -> Iterator[tuple[Group, list[Outcome]]]:
        """Train stacks side by side; what does not fit in the device's memory is halved, what fails is taken apart."""
        queue = collections.deque([cohort])
        while queue:
            stacks = queue.popleft()
            numbers = [[number[key] for key in keys] for keys in stacks]
            group = Group(stage, numbers, members, self.checkpoints, leader=self.leader)
            if not any(members[i].needed() for i in group.numbers):
                continue
            outcomes: list[Outcome] | None = None
            try:
                if len(stacks) > 1 and not group.coupled:
                    tasks = [[members[i].task for i in stack] for stack in numbers]
                    group.workers = workers_that_pay(stage, tasks, self.stack_sizes)
                outcomes = group.train(on_epoch)
            except Exception as error:
                several = not group.coupled and len(group.numbers) > 1
                too_large = isinstance(error, torch.OutOfMemoryError) and several
                if not too_large and (len(stacks) == 1 or group.coupled):
                    if on_failure is None:
                        raise
                    for i in group.numbers:
                        on_failure(i, error)
                    continue
                if not too_large:
                    log.info("%s: %s; they are trained one by one now", group.title, first_line(error))
                    queue.extendleft([keys] for keys in reversed(stacks))
                    continue
            if outcomes is None:  # here the error no longer holds the models
                n = len(group.numbers)
                log.info("%d models do not fit in the memory of %s together; halving", n, stage.data.device)
                torch.cuda.empty_cache()
                queue.extendleft(reversed(self._halved(stage, stacks, members, number)))
                continue
            yield group, outcomes

    def _halved(
        self, stage: Stage, stacks: list[list[str]], members: Sequence[Member], number: dict[str, int]
    ) -> list[list[list[str]]]:
        """Two halves of a cohort, or of its one stack, noted in the plan."""
        task = members[number[stacks[0][0]]].task
        plan = self.checkpoints.plan
        if len(stacks) > 1:
            middle = -(-len(stacks) // 2)
            halves = [stacks[:middle], stacks[middle:]]
            key = cohort_key([members[number[key]].task for key in stacks[0]])
            name = fingerprint([stage.role, stage.subject, "cohort", key])
            plan.split(name, [keys[0] for keys in stacks], [[keys[0] for keys in half] for half in halves])
            return halves
        (keys,) = stacks
        two = parts(keys, -(-len(keys) // 2))
        plan.split(fingerprint([stage.role, stage.subject, task.stack_key()]), keys, two)
        return [[half] for half in two]


def log_side_by_side(stage: Stage, cohort: Sequence[Sequence[Member]], reasons: dict[str, str]) -> None:
    """Say which models are trained side by side, what they share, and why they are not one stack."""
    members = [member for stack in cohort for member in stack]
    shared = "the same batches"
    if stage.teacher is not None and stage.teacher.needs_images:
        shared += ", with one pass of the teacher for all"
    why = why_not_one_stack([stack[0] for stack in cohort], reasons)
    names = listed(dict.fromkeys(member.name for member in members), 3)
    log.info("%d %s side by side on %s: %s (%s)", len(members), stage.kind, shared, why, names)


def log_singles(singles: Sequence[Member], reasons: dict[str, str]) -> None:
    """Say which models are trained by themselves although others are equal but for their numbers, and why."""
    alike: dict[tuple[str, str], list[Member]] = {}
    for member in singles:
        if member.key in reasons:
            alike.setdefault((member.title, reasons[member.key]), []).append(member)
    for (title, reason), members in alike.items():
        facts = [{"seed": member.task.spec.seed, **cohort_facts(member.task)} for member in members]
        differing = differing_keys(facts)
        why = f"{reason}, and they differ in {', '.join(differing)}" if differing else reason
        names = listed(dict.fromkeys(member.name for member in members), 3)
        log.info("%d × %s run one by one: %s (%s)", len(members), title, why, names)


def parts(keys: list[str], size: int) -> list[list[str]]:
    """Parts of at most `size` keys, as equal as can be: one is left over by itself only for a size of 1 or 2."""
    n = -(-len(keys) // size)
    edges = [round(k * len(keys) / n) for k in range(n + 1)]
    return [keys[a:b] for a, b in itertools.pairwise(edges)]


def report_line(title: str, spec: TrainSpec, outcome: Outcome) -> str:
    """A line for the log on a finished training."""
    n = len(outcome.history)
    epochs = f"{n:,} epoch{'s' * (n != 1)}" + (f" of {spec.epochs:,}" if n < spec.epochs else "")
    return f"{title}: {epochs} in {outcome.seconds:.1f} s, {describe(outcome.history[-1:])}"
