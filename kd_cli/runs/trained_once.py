"""Teachers and students alone: each is trained once for its fingerprint, kept in the store, and shared by all jobs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kd_cli.answers.base import Answers
from kd_cli.config.fingerprint import fingerprint
from kd_cli.config.values import RunConfig, TrainSpec
from kd_cli.learn.engine import Interrupted, Outcome
from kd_cli.learn.teachers import combine_logits
from kd_cli.runs.answering import answered, facts_of, is_answers, make_answers
from kd_cli.runs.building import TrainingTask, of_labels, stream_of
from kd_cli.runs.device_data import DeviceData
from kd_cli.runs.group import Member, Stage
from kd_cli.runs.jobs import Job, alive, failing, grouped
from kd_cli.runs.model_notes import loaded_teacher_notes, output_notes
from kd_cli.runs.models import load_module, predict_module, read_checkpoint
from kd_cli.runs.pruned import pruned_spec
from kd_cli.runs.recipe_check import ended_early
from kd_cli.runs.stacks import report_line
from kd_cli.runs.summary import diverged_error
from kd_cli.runs.teaching import teacher_of
from kd_cli.storage.store import Entry

if TYPE_CHECKING:
    from kd_cli.runs.session import Session


@dataclass(frozen=True)
class Wanted:
    """A model that jobs need: what its fingerprint is made of, and how it is trained, or its weights."""

    facts: dict[str, Any]
    spec: TrainSpec
    title: str
    data: DeviceData  # whose training part it learns from
    state: dict[str, Tensor] | None = None  # the user's own weights
    notes: tuple[str, ...] = ()  # what was chosen, left out or filled in when they were read
    answers: Answers | None = None  # a teacher that is no network
    task: TrainingTask | None = None  # of a model that a teacher teaches; the others learn from the labels
    taught: str = ""  # how, see `way_of_teaching`
    number: int | None = None  # of several models of a run

    @functools.cached_property
    def key(self) -> str:
        return fingerprint(self.facts)

    @property
    def is_trained(self) -> bool:
        """Whether it is trained here, and not the user's weights or answers."""
        return self.state is None and self.answers is None


@dataclass(frozen=True)
class Ensemble:
    """The teacher: one entry of the store, or several whose distributions are averaged."""

    members: list[Entry]
    combine: str
    spec: TrainSpec  # of each member

    @property
    def fingerprint(self) -> str:
        return fingerprint_of([entry.fingerprint for entry in self.members], self.combine)

    @functools.cached_property
    def test(self) -> Tensor | None:
        """Logits at T = 1 on the test data, [M,C]; None for a teacher that has not answered for them."""
        outputs = [entry.outputs() for entry in self.members]
        if "test" not in outputs[0]:
            return None
        members = torch.stack([each["test"] for each in outputs])
        return combine_logits(members, combine=self.combine, T=torch.ones(()))


def fingerprint_of(members: Sequence[str], combine: str) -> str:
    """The fingerprint of a teacher with these members."""
    return members[0] if len(members) == 1 else fingerprint([combine, *members])


# ---------------------------------------------------------------- what a job needs


def wanted_teacher(session: Session, job: Job) -> list[Wanted]:
    """The members of the teacher: one network, or several that differ in their seed alone."""
    config = job.config
    if is_answers(config.teacher):
        return [wanted_answers(session, config)]
    if config.checkpoint is not None:
        key = fingerprint([config.checkpoint, config.checkpoint_key, config.teacher.identity("")])
        if key not in session.user_weights:
            session.user_weights[key] = user_weights(session.data, config)
        return [session.user_weights[key]]
    specs = [replace(config.teacher, seed=config.teacher.seed + m) for m in range(config.members)]
    data = session.data.dataset.fingerprint
    return [Wanted({"kind": "teacher", **s.identity(data)}, s, f"teacher {s.title}", session.data) for s in specs]


def wanted_answers(session: Session, config: RunConfig) -> Wanted:
    """A teacher of answers, checked against the data."""
    key = fingerprint([config.checkpoint, config.teacher.model, config.teacher.normalize, config.teacher.seed])
    if key not in session.answers:
        dataset = session.data.dataset
        answers = make_answers(config)
        answers.check(dataset)
        facts = facts_of(answers, config, dataset.fingerprint)
        session.answers[key] = Wanted(facts, config.teacher, f"teacher {answers.title}", session.data, answers=answers)
    return session.answers[key]


def wanted_alone(session: Session, job: Job) -> list[Wanted]:
    """The student alone, on the transfer set; on the training data where the transfer set has no labels at all.

    Where students learn from each other, each of them alone.
    """
    transfer, data, found = session.transfer(job.config), session.data, []
    own = transfer.index is not None and not transfer.whole
    if own:
        data = replace(data, train=transfer.examples)
    for spec in job.config.peers or [job.config.student]:
        facts = {"kind": "alone", **spec.identity(session.data.dataset.fingerprint)}
        if own:
            facts["transfer"] = transfer.facts
        found.append(Wanted(facts, spec, f"student {spec.title} alone", data))
    return found


def user_weights(data: DeviceData, config: RunConfig) -> Wanted:
    """The weights in `teacher.checkpoint` as a teacher."""
    spec = config.teacher
    path = Path(str(config.checkpoint)).expanduser()
    found = read_checkpoint(path, spec, data.dataset, key=config.checkpoint_key)
    identity = spec.identity(data.dataset.fingerprint)
    keys = ("data", "model", "precision", "code", "format", "normalize", "input")
    facts = {
        "kind": "checkpoint",
        "file": found.checksum,
        **{key: identity[key] for key in keys if key in identity},
        **({"checkpoint_key": config.checkpoint_key} if config.checkpoint_key is not None else {}),
    }
    return Wanted(facts, spec, f"teacher {spec.title}", data, found.state, found.notes)


# ---------------------------------------------------------------- from the store, or trained


class Shared:
    """The models of one role that a session's jobs need, each once."""

    def __init__(
        self, session: Session, jobs: Sequence[Job], wanted: Callable[[Session, Job], list[Wanted]], role: str
    ) -> None:
        """`jobs` also names those that have ended: a noted stack is trained with the members that it had."""
        self.session, self.role = session, role
        self.keys: dict[int, list[str]] = {}  # of a job's models, by its id
        self.models: dict[str, Wanted] = {}
        self.users: dict[str, list[Job]] = {}  # the jobs that have not ended, by the models that they need
        self.entries: dict[str, Entry] = {}
        self.trained: set[str] = set()  # in this process
        self.jobs = [job for job in jobs if not job.ended]
        for job in jobs:
            with failing([job]):
                models = wanted(session, job)
                self.keys[id(job)] = [model.key for model in models]
                for model in models:
                    self.models.setdefault(model.key, model)
                    if not job.ended:
                        self.users.setdefault(model.key, []).append(job)

    def obtain(self) -> Iterator[tuple[Job, list[Entry], bool]]:
        """Each job's entries, and whether the store had them; what it lacks is trained. A job's failure is kept."""
        self._look_up(self.users)
        if missing := [key for key in self.users if key not in self.entries]:
            users = [job for key in missing for job in self.users[key]]
            with failing(users), self.session.store.lock(missing, self._stop_waiting):
                self._look_up(missing)  # another process may have trained some of them while we waited
                self._train({key for key in missing if key not in self.entries})
        for job in self.jobs:
            keys = self.keys.get(id(job), [])
            if not job.ended and all(key in self.entries for key in keys):
                yield job, [self.entries[key] for key in keys], self._report(job, keys)

    def _look_up(self, keys: Iterable[str]) -> None:
        found = {key: self.session.store.get(key) for key in keys}
        self.entries |= {key: entry for key, entry in found.items() if entry is not None}

    def _train(self, missing: set[str]) -> None:
        """Train the missing models and put them into the store; the user's own weights are put there as they are."""
        for key in missing:
            self.users[key][0].directory.will_train(key)
        for key in sorted(key for key in missing if self.models[key].state is not None):
            self._keep(key, None)
        for key in sorted(key for key in missing if self.models[key].answers is not None):
            self._keep_answers(key)
        to_train = [model for model in self.models.values() if model.is_trained]
        for models in grouped(to_train, lambda model: (id(model.data.train), model.facts.get("teacher"), model.taught)):
            if any(model.key in missing for model in models):
                self._train_on_same_data(models, missing)

    def _train_on_same_data(self, models: list[Wanted], missing: set[str]) -> None:
        def on_epoch(i: int, row: dict[str, Any]) -> None:
            job = self.users[models[i].key][0]  # the other users get the rows when it is trained
            if not job.ended:
                job.directory.append_metrics(self._rows(job, models[i].key, [row]))

        stage = self._stage(models, missing)
        members = [
            Member(
                key=model.key,
                task=model.task or TrainingTask(model.spec, of_labels(self.session.data.dataset, model.spec)),
                title=model.title,
                name=self.users[model.key][0].path.name if model.key in self.users else model.title,
                result=self.session.store.root / model.key / "entry.json",
                needed=functools.partial(missing.__contains__, model.key),
            )
            for model in models
        ]
        for i, outcome, _ in self.session.trainer.train(stage, members, on_epoch):
            self._keep(models[i].key, outcome)

    def _stage(self, models: list[Wanted], missing: set[str]) -> Stage:
        """What models on the same data, with the same teacher, are trained on."""
        first = models[0]
        user = next(job for model in models if model.key in missing for job in alive(self.users[model.key]))
        own: Any = {"config": user.config, "on_transfer_set": first.data.train is not self.session.data.train}
        if first.task is None:
            return Stage(first.data, self.role, subject=fingerprint(first.facts.get("transfer")), **own)
        subject = fingerprint([first.facts["teacher"], first.facts["transfer"]])
        own |= {"teacher_spec": None if user.taught_by is None else user.taught_by.spec}
        return Stage(first.data, self.role, teacher=teacher_of(self.session, user), subject=subject, **own)

    def _keep(self, key: str, outcome: Outcome | None) -> None:
        """Measure a model and put it into the store; when it diverged, its users fail."""
        model, users, session = self.models[key], self.users[key], self.session
        with failing(users):
            if outcome is not None:
                if outcome.diverged is not None:
                    raise diverged_error(self.role, outcome, users)
                users[0].say(report_line(model.title, model.spec, outcome))
            state = model.state if outcome is None else outcome.state
            assert state is not None
            spec = pruned_spec(model.spec, session.data.dataset)
            module = load_module(spec, state, session.data, role=stream_of(self.role))
            outputs = {"test": predict_module(module, session.data.test)}
            if self.role in ("teacher", "assistant"):  # on all of the training data, whatever the transfer set
                outputs["train"] = predict_module(module, session.data.train)
            report = session.model_report(model.spec, module, outputs["test"], outcome)
            early = [] if outcome is None else ended_early(model.title, model.spec, outcome)
            self.entries[key] = session.store.put(
                key,
                weights=state,
                outputs=outputs,
                report={**report, "notes": [*model.notes, *early, *self._notes(model, module, outputs["test"])]},
                history=outcome.history if outcome else [],
                facts=model.facts,
            )
            self.trained.add(key)

    def _keep_answers(self, key: str) -> None:
        """Put the answers of a teacher that is no network into the store."""
        model, users = self.models[key], self.users[key]
        assert model.answers is not None
        with failing(users):
            outputs, report = answered(model.answers, model.spec, model.data.dataset)
            self.entries[key] = self.session.store.put(
                key, weights={}, outputs=outputs, report=report, history=[], facts=model.facts
            )
            self.trained.add(key)

    def _notes(self, model: Wanted, module: nn.Module, logits: Tensor) -> list[str]:
        """What a model's outputs show that its user should know."""
        notes = output_notes(logits, title=model.title)
        if model.state is None:
            return notes
        data = self.session.data
        return notes + loaded_teacher_notes(
            module,
            data.val if len(data.val) else data.train,
            data_mean=data.dataset.mean,
            data_std=data.dataset.std,
            normalize=model.spec.normalize,
        )

    def _report(self, job: Job, keys: list[str]) -> bool:
        """Log where a job's models come from, and write their rows; whether the store had all of them.

        The job that trains a model notes it beforehand, so that it says the same when it is resumed.
        """
        for key in keys:
            for note in self.entries[key].report.get("notes", ()):  # entries of older versions have none
                self.session.note(job, note)
            if key not in job.directory.trained:
                job.say(f"{self.models[key].title}: from the store, {key}")
            if key not in self.trained or job is not self.users[key][0]:  # else written during training
                job.directory.append_metrics(self._rows(job, key, self.entries[key].history))
        return not job.directory.trained.intersection(keys)

    def _rows(self, job: Job, key: str, history: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
        """A model's rows for metrics.jsonl; those of one of several with its number."""
        keys, number = self.keys[id(job)], self.models[key].number
        if number is None and len(keys) > 1:
            number = keys.index(key)
        return list(history) if number is None else [{**row, "member": number} for row in history]

    def _stop_waiting(self) -> None:
        """Raises Interrupted when asked to stop while another process trains what this one needs."""
        if self.session.trainer.checkpoints.stopping():
            raise Interrupted("stopped while another process trains the same model")
