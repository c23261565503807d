"""Models that are trained together: one stack, or stacks and single models side by side."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_cli.config.fingerprint import code_version, fingerprint
from kd_cli.config.values import RunConfig, TrainSpec
from kd_cli.errors import ConfigError
from kd_cli.learn.engine import Outcome, Training, fit
from kd_cli.learn.learner import Learner
from kd_cli.learn.teachers import Teacher
from kd_cli.runs.building import TrainingTask, make_cohort, make_peers
from kd_cli.runs.checkpoints import Checkpoints, SavedTraining
from kd_cli.runs.device_data import DeviceData
from kd_cli.runs.progress import OnEpoch, Progress
from kd_cli.runs.several import Leader, Taught, Work
from kd_cli.runs.trial_pruning import Staying, TrialPruning, fit_pruned

KINDS = {"teacher": "teachers", "student_alone": "students alone", "student": "students"}
KINDS |= {"assistant": "assistants"}


@dataclass(frozen=True)
class Member:
    """One training of a stage."""

    key: str  # the same in the process that resumes the stage; no other member of the stage has it
    task: TrainingTask
    title: str  # for the log and the progress bar
    name: str  # of the job, for the log
    result: Path  # the file that exists once the result is safe
    needed: Callable[[], bool] = lambda: True  # whether the result is missing; else it is trained to complete a stack
    peers: str = ""  # names those that learn from each other, of which this is one


@dataclass(frozen=True)
class Stage:
    """What the trainings of one stage have in common."""

    data: DeviceData
    role: str  # of the rows in metrics.jsonl
    teacher: Teacher | None = None
    subject: str = ""  # fingerprint of the teacher and the transfer set
    diagnostics: bool = False
    config: RunConfig | None = None  # of one of its jobs, for the other processes of several
    teacher_spec: TrainSpec | None = None  # of the members of a teacher that is a network
    on_transfer_set: bool = False  # whether `data` has the transfer set for its training part
    pruning: TrialPruning | None = None  # decides which members are not worth training on

    @property
    def kind(self) -> str:
        """The models of this stage in messages."""
        return KINDS[self.role]


@dataclass(frozen=True)
class Beside:
    """The names of the jobs whose models were trained together with one: in its stack, and beside it."""

    stack: Sequence[str] = ()
    cohort: Sequence[str] = ()
    workers: int = 1  # how many took their steps at once, each with one thread


@dataclass
class Group:
    """Stacks that are trained side by side; `stacks` are the numbers of their members in the stage."""

    stage: Stage
    stacks: list[list[int]]
    members: Sequence[Member]  # of the stage
    checkpoints: Checkpoints
    workers: int = 1  # stacks that take their steps at once, each with one thread
    leader: Leader | None = None  # of several processes that train the one model together
    ended: list[bool] = field(default_factory=list)  # which members diverged or left, once they are trained

    @property
    def numbers(self) -> list[int]:
        return [i for stack in self.stacks for i in stack]

    @property
    def own(self) -> list[Member]:
        """The members that are trained together."""
        return [self.members[i] for i in self.numbers]

    @property
    def coupled(self) -> bool:
        """Whether the members learn from each other, so that none can be trained without the others."""
        return bool(self.own[0].peers)

    @property
    def title(self) -> str:
        titles = {member.title for member in self.own}
        n = len(self.numbers)
        if len(titles) > 1:
            return f"{n} {self.stage.kind} side by side"
        (title,) = titles
        return f"{n} × {title}" if n > 1 else title

    def beside(self, i: int) -> Beside:
        """What was trained together with member `i`."""
        name = self.members[i].name

        def others(numbers: Sequence[int]) -> list[str]:
            return [other for k in numbers if (other := self.members[k].name) != name]

        (stack,) = (stack for stack in self.stacks if i in stack)
        beside = others([k for other in self.stacks if other is not stack for k in other])
        return Beside(others(stack), beside, self.workers)

    @functools.cached_property
    def state(self) -> SavedTraining | None:
        """The saved state of this training; its name is a fingerprint of all that its course depends on."""
        stage, members = self.stage, self.own
        facts = [
            [task.spec.identity(""), task.method, code_version(task.method), task.T, task.alpha, task.beta]
            for task in (member.task for member in members)
        ]
        data = [stage.data.dataset.fingerprint, len(stage.data.train), stage.diagnostics]
        sizes = [len(stack) for stack in self.stacks] if len(self.stacks) > 1 else []
        name = fingerprint([stage.role, stage.subject, facts, [member.key for member in members], data, *sizes])
        results = [member.result for member in members]
        return self.checkpoints.of(name, title=self.title, device=stage.data.device, results=results)

    def remove_state(self) -> bool:
        """Remove the saved state once every member has its result, diverged or left; whether that is so."""
        safe = all(ended or member.result.exists() for member, ended in zip(self.own, self.ended, strict=True))
        if safe and self.state is not None:
            self.state.remove()
        return safe

    def train(self, on_epoch: OnEpoch) -> list[Outcome]:
        """Train the members, from their saved state if there is one; call `on_epoch` for those that are needed."""
        stage, numbers = self.stage, self.numbers
        specs = [member.task.spec for member in self.own]

        def on_row(s: int, row: dict[str, Any]) -> None:
            if self.members[numbers[s]].needed():
                on_epoch(numbers[s], row)

        def observer(some: Sequence[int], seen: int) -> Progress:
            def on_new_row(s: int, row: dict[str, Any]) -> None:
                if row["epoch"] > seen:
                    on_row(some[s], row)

            return Progress(self.title, specs[0].epochs, role=stage.role, on_epoch=on_new_row)

        every = range(len(numbers))
        keys: Any = {"checkpoint": self.state, "stopping": self.checkpoints.stopping}
        with batchnorm_explained(specs[0]):
            if self.leader is not None:
                outcomes = self.leader.train(
                    self.work(), stage.data, stage.teacher, observer=observer(every, 0), **keys
                )
            elif stage.pruning is not None and not self.coupled:
                outcomes = self.train_pruned(stage.pruning, observer, recorder=stage.data.recorder, **keys)
            else:
                learner_and_training = self.learner_and_training()
                outcomes = fit(*learner_and_training, observer=observer(every, 0), recorder=stage.data.recorder, **keys)
        for outcome in outcomes:
            outcome.history = [{**row, "role": stage.role} for row in outcome.history]
        return outcomes

    def train_pruned(
        self, pruning: TrialPruning, observer: Callable[[Sequence[int], int], Progress], **keys: Any
    ) -> list[Outcome]:
        """Train the members, of which the hopeless leave."""
        ends = list(itertools.accumulate(map(len, self.stacks), initial=0))
        stacks = [list(range(a, b)) for a, b in itertools.pairwise(ends)]
        return fit_pruned(
            Staying(*self.learner_and_training(), stacks),
            [member.task for member in self.own],
            [member.name for member in self.own],
            pruning,
            data=self.stage.data,
            role=self.stage.role,
            observer=observer,
            **keys,
        )

    def work(self) -> Work:
        """What the other processes need to take part in the training of the one model."""
        stage, (member,) = self.stage, self.own
        assert stage.config is not None
        taught = Taught.of(stage.teacher, stage.teacher_spec)
        return Work(stage.config, stage.on_transfer_set, member.task, stage.role, taught, stage.diagnostics)

    def learner_and_training(self) -> tuple[Learner, Training]:
        """The members as a learner, and what they are trained on."""
        stage = self.stage
        stacks = [[self.members[i].task for i in stack] for stack in self.stacks]
        keys: Any = {"teacher": stage.teacher, "diagnostics": stage.diagnostics}
        if self.coupled:
            return make_peers(stage.data, stacks, stage.role, **keys)
        return make_cohort(stage.data, stacks, stage.role, workers=self.workers, **keys)


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
