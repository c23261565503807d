"""Trainings that end early because a search has found them hopeless: the models that stay are trained on together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Protocol

from kd_cli.learn.batches import distinct
from kd_cli.learn.cohort import Cohort
from kd_cli.learn.engine import Checkpoint, Left, Observer, Outcome, Row, Training, fit
from kd_cli.learn.learner import Learner, UniformLearner
from kd_cli.learn.objective import Objective, SideBySide
from kd_cli.learn.stacked.learner import StackedLearner
from kd_cli.runs.building import TrainingTask, make_training
from kd_cli.runs.device_data import DeviceData

Stacks = list[list[int]]  # the members of each stack that are still trained, by their numbers in the group


class TrialPruning(Protocol):
    """Decides which jobs' students are not worth training on, from nothing but validation curves."""

    def hopeless(self, curves: Mapping[str, Sequence[Row]]) -> Set[str]:
        """The names of the jobs that are hopeless, of those that are trained together, by their epochs so far."""
        ...

    def note(self, name: str) -> None:
        """Called for a job that an earlier process has found hopeless."""
        ...

    def cause(self, name: str) -> str:
        """A sentence on why a job was found hopeless."""
        ...


@dataclass(frozen=True)
class Staying:
    """Models that are trained together, and the members of a group that they are."""

    learner: Learner
    training: Training
    stacks: Stacks

    @property
    def members(self) -> list[int]:
        return [i for stack in self.stacks for i in stack]

    def without(self, leaving: Set[int], seeds: Sequence[int]) -> Stacks:
        """The stacks without those of these members that can leave; `seeds` are those of all the group's members.

        Stacks side by side share their batches, one for each of their seeds: where they would no longer have the same
        seeds, a stack leaves as a whole or not at all.
        """
        parts = [[i for i in stack if i not in leaving] for stack in self.stacks]
        batches = {tuple(distinct([seeds[i] for i in part])) for part in parts if part}
        if len(batches) > 1:
            parts = [part and stack for part, stack in zip(parts, self.stacks, strict=True)]
        return parts

    def only(self, stacks: Stacks, tasks: Sequence[TrainingTask], data: DeviceData, role: str) -> Staying:
        """The models of these members alone, with their weights and their optimisers' states; at the end of an epoch.

        `stacks` has the stacks of this one in their order, each with some of its members or none.
        """
        learners: list[UniformLearner] = []
        objectives: list[Objective] = []
        pairs = self.learner.with_objectives(self.training.objective)
        for part, (_, objective), before, after in zip(self.learner.parts, pairs, self.stacks, stacks, strict=True):
            if not after:
                continue
            if len(after) < len(before):
                assert isinstance(part, StackedLearner), "a single model stays or leaves as a whole"
                own = [tasks[i] for i in after]
                objective = make_training(data, own, role, teacher=self.training.teacher)[1].objective
                part = part.only([before.index(i) for i in after])
            learners.append(part)
            objectives.append(objective)
        kept = [stack for stack in stacks if stack]
        seeds = [tasks[i].spec.seed for i in kept[0]]
        if len(learners) == 1:
            return Staying(learners[0], replace(self.training, objective=objectives[0], seeds=seeds), kept)
        assert isinstance(self.learner, Cohort)
        cohort = Cohort(learners, self.learner.device, workers=self.learner.workers)
        return Staying(cohort, replace(self.training, objective=SideBySide.of(objectives), seeds=seeds), kept)


class Continued:
    """A checkpoint of a training that some members have left, which `facts` say; it goes on from `state`."""

    def __init__(self, saved: Checkpoint | None, state: dict[str, Any] | None, facts: dict[str, Any]) -> None:
        self.saved, self.state, self.facts = saved, state, facts

    def load(self) -> dict[str, Any] | None:
        return self.state

    def due(self, epoch: int) -> bool:
        return self.saved is not None and self.saved.due(epoch)

    def save(self, state: dict[str, Any]) -> None:
        if self.saved is not None:
            self.saved.save({**state, **self.facts})


def fit_pruned(
    start: Staying,
    tasks: Sequence[TrainingTask],
    names: Sequence[str],
    pruning: TrialPruning,
    *,
    data: DeviceData,
    role: str,
    observer: Callable[[Sequence[int], int], Observer],
    checkpoint: Checkpoint | None,
    **keys: Any,
) -> list[Outcome]:
    """`fit` for members with these tasks and names, of which the hopeless leave; the outcome of each.

    `observer(members, seen)` makes the observer of some members' training, whose first `seen` epochs it has been shown.
    """
    staying, seen = start, 0
    left: dict[int, Outcome] = {}
    seeds = [task.spec.seed for task in tasks]
    state = checkpoint.load() if checkpoint is not None else None
    if state is not None and "stacks" in state:
        left = {int(i): Outcome(**values) for i, values in state.pop("left").items()}
        for i, outcome in left.items():
            show(observer([i], 0), outcome)
        staying = narrowed(staying, state.pop("stacks"), tasks, data, role)

    def stacks_after(outcomes: Sequence[Outcome]) -> Stacks:
        curves = {names[i]: one.history for i, one in zip(staying.members, outcomes, strict=True)}
        found = pruning.hopeless(curves)
        return staying.without({i for i in staying.members if names[i] in found}, seeds)

    def leaving(outcomes: list[Outcome]) -> bool:
        return sum(map(len, stacks_after(outcomes))) < len(staying.members)

    while True:
        facts = (
            {"left": {str(i): vars(one).copy() for i, one in left.items()}, "stacks": staying.stacks} if left else {}
        )
        own = Continued(checkpoint, state, facts)
        try:
            outcomes = fit(
                *(staying.learner, staying.training),
                observer=observer(staying.members, seen),
                checkpoint=own,
                leaving=leaving,
                **keys,
            )
            found = left | dict(zip(staying.members, outcomes, strict=True))
            return [found[i] for i in range(len(tasks))]
        except Left as event:
            stacks, seen = stacks_after(event.outcomes), event.epoch
            here = dict(zip(staying.members, event.outcomes, strict=True))
            stay = {i for stack in stacks for i in stack}
            left |= {i: replace(one, left=seen, state={}) for i, one in here.items() if i not in stay}
            if not stay:
                return [left[i] for i in range(len(tasks))]
            staying = staying.only(stacks, tasks, data, role)
            rest = [vars(here[i]).copy() for i in staying.members]
            state = {"epoch": seen, "learner": staying.learner.state(), "outcomes": rest}


def narrowed(staying: Staying, stacks: Stacks, tasks: Sequence[TrainingTask], data: DeviceData, role: str) -> Staying:
    """The members of these stacks alone; empty stacks may be missing."""
    kept = {i for stack in stacks for i in stack}
    return staying.only([[i for i in stack if i in kept] for stack in staying.stacks], tasks, data, role)


def show(observer: Observer, outcome: Outcome) -> None:
    """Show an observer of one model the epochs of an earlier process."""
    observer.start(0, 1)
    for row in outcome.history:
        observer.epoch([row])
    observer.finish()
