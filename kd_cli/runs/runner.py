"""Run configurations: the teacher, the student alone, the distilled student, what they are worth.

One run is the case of one job. Many jobs share what is the same: a data set is read once, a teacher and a student alone
are trained once for their fingerprint, and models that differ only in numbers are trained as one stack.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import platform
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from kd_cli.config.run_config import RunConfig, TrainSpec, build, fingerprint
from kd_cli.errors import ConfigError, Diverged, KdError
from kd_cli.learn.augment import Augment
from kd_cli.learn.engine import Interrupted, Outcome
from kd_cli.learn.methods import Method
from kd_cli.learn.teachers import CachedTeacher, LiveTeacher, Teacher, combine_logits
from kd_cli.metrics import agreement, evaluate_logits, matching_shift, oracle_shift
from kd_cli.report.pages import REPORT, write_run_page
from kd_cli.runs.device_data import Bench, device_name, load_bench
from kd_cli.runs.models import check_shape, forward_flops, load_module, predict_module, read_checkpoint
from kd_cli.runs.pictures import pictures
from kd_cli.runs.training import HARD, Care, Lesson, check_recipe, listed, said_of, train_all
from kd_cli.runs.transfer import TransferSet, key_of, transfer_set
from kd_cli.statistics import gap_closed
from kd_cli.storage.files import checksum
from kd_cli.storage.run_dir import STACKS, SUMMARY, RunDir, claim, read_identity, read_summary
from kd_cli.storage.store import Entry, Store
from kd_cli.storage.training_state import StackNotes, forget

log = logging.getLogger(__name__)

Report = dict[str, Any]
T = TypeVar("T")


@dataclass
class Job:
    """One run: its configuration, its directory, and what becomes of it."""

    config: RunConfig
    path: Path
    command: str
    say: Callable[[str], None] = log.info  # a line for the run's log
    summary: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None
    # what it is taught by, once that is known
    rundir: RunDir | None = None
    method: Method | None = None
    teacher: Ensemble | None = None
    alone: Entry | None = None
    identity: str = ""  # of this run, whatever it trains

    @property
    def ended(self) -> bool:
        return self.error is not None or self.summary.get("status") == "completed"

    def open(self) -> None:
        """Prepare the directory; with `resume`, take the result that is there."""
        self.method = build(self.config.method, where="method")
        for key in ("T", "alpha"):
            if getattr(self.config, key) == "auto" and not getattr(
                self.method, f"has_{key}", self.method.needs_teacher
            ):
                raise ConfigError(
                    f"{key}=auto, and method={self.config.method_name} has no {key} to choose",
                    hint=f"leave {key} out, or method=soft_targets",
                )
        if self.config.resume and (summary := read_summary(self.path)) is not None:
            self.summary, self.identity = summary, read_identity(self.path)
            if summary["status"] != "completed":
                raise Diverged(f"{summary['status']}: {summary.get('cause')}")
            if not (self.path / REPORT).exists():  # killed between the two
                write_run_page(self.path)
            return
        self.rundir = RunDir(self.path, again=self.config.resume)
        self.command = self.rundir.begin(self.command, self.config.record)
        self.identity = self.rundir.identity


def run(config: RunConfig, path: Path, *, command: str) -> dict[str, Any]:
    """One run from its configuration to its summary, in the directory `path`.

    Raises KdError for what a person can mend; Diverged after a summary that says so.
    """
    job = Job(config, path, command)
    run_many([job])
    if job.error is not None:
        raise job.error
    return job.summary


def run_many(
    jobs: Sequence[Job],
    *,
    finished: Callable[[Job], None] = lambda job: None,
    fail_fast: bool = False,
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Run jobs together; `finished` is called as each one ends.

    A job that fails keeps its error and fails no other, unless `fail_fast` stops those that have not ended. When
    `stopping` says so, training stops at the end of an epoch, its state is saved, and Interrupted is raised.
    """
    told: set[int] = set()

    def tell() -> None:
        for job in jobs:
            if id(job) not in told and job.ended:
                told.add(id(job))
                finished(job)
        if fail_fast and any(job.error is not None for job in jobs):
            for job in alive(jobs):
                job.error = KdError("not run: another job failed, and fail_fast=true")

    with ExitStack() as claims:
        with failing(jobs):
            for folder in claimed(jobs):
                claims.enter_context(claim(folder))
        for job in alive(jobs):
            with failing([job]):
                job.open()
        tell()
        stacks = StackNotes(claimed(jobs)[0] / STACKS) if jobs else None
        for same_data in grouped(jobs, lambda job: job.config.bench_key()):
            config = same_data[0].config
            store = Store(config.store_dir)
            store.tidy()
            forget(partial_states(config))
            if not alive(same_data):
                continue
            with failing(same_data):
                care = Care(partial_states(config), config.every, stopping, stacks)
                Session(load_bench(config), store, care).run(same_data, tell)
            tell()
        if stacks is not None and not any(unfinished(job) for job in jobs):
            stacks.remove()


def claimed(jobs: Sequence[Job]) -> list[Path]:
    """The folders that belong to this process while it runs the jobs: a run's own, or the sweep's."""
    return [jobs[0].path] if len(jobs) == 1 else sorted({job.path.parent for job in jobs})


def unfinished(job: Job) -> bool:
    """Whether there is something left to do for the job if it is resumed."""
    return not job.ended or (job.error is not None and not isinstance(job.error, Diverged))


def partial_states(config: RunConfig) -> Path:
    """Where the states of trainings that are under way are kept."""
    return config.store_dir / "partial"


def foresee(jobs: Sequence[Job]) -> list[str]:
    """A line for each job: what it would train and what the store has. Reads the data, trains and writes nothing."""
    lines: dict[int, str] = {}
    planned: set[str] = set()
    for same_data in grouped(jobs, lambda job: job.config.bench_key()):
        session = Session(load_bench(same_data[0].config), Store(same_data[0].config.store_dir), Care())
        for job in same_data:
            job.method = build(job.config.method, where="method")
            session.check_shapes(job)
            wanted = session.wanted_alone(job)
            if needs_teacher(job):
                wanted = session.wanted_teacher(job) + wanted
            parts = []
            for one in wanted:
                known = session.store.get(one.key) is not None
                shared = one.key in planned
                planned.add(one.key)
                parts.append(f"{one.title}: {'in the store' if known else 'shared' if shared else 'to train'}")
            config = job.config
            n = len(config.settings())
            students = f"{n} students" if n > 1 else "student"
            parts.append(f"{students} {config.student.name} by {config.method_name}: to train")
            lines[id(job)] = "; ".join(parts)
    return [lines[id(job)] for job in jobs]


def alive(jobs: Iterable[Job]) -> list[Job]:
    """The jobs that have neither failed nor finished."""
    return [job for job in jobs if not job.ended]


def grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """The items with equal keys together, in the order of their first ones."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


@contextmanager
def failing(jobs: Iterable[Job]) -> Iterator[None]:
    """An exception in the block is these jobs' error, and the others go on."""
    try:
        yield
    except Exception as error:
        forget_frames(error)
        for job in alive(jobs):
            job.error = error
            if not isinstance(error, KdError):
                log.debug("%s failed", job.path, exc_info=error)


def forget_frames(error: BaseException | None) -> None:
    """Let go of the local variables in an error's traceback, and in those of its causes: models, batches."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


class Session:
    """Jobs on one data set, device and store."""

    def __init__(self, bench: Bench, store: Store, care: Care) -> None:
        self.bench, self.store = bench, store
        self.labels = bench.dataset.test.labels
        self.transfers: dict[str, TransferSet] = {}
        self.care = care
        self.jobs: Sequence[Job] = ()
        self.fitting: set[tuple[str, str]] = set()  # roles with models that take the data, and recipes that are sound
        self.ensembles: dict[str, tuple[Ensemble, Report]] = {}
        self.flops: dict[str, int] = {}

    def run(self, jobs: Sequence[Job], tell: Callable[[], None]) -> None:
        """Teachers, then students alone, then distilled students, each set of them together."""
        self.jobs = jobs
        for job in alive(jobs):
            with failing([job]):
                self.check_shapes(job)
                transfer = self.transfer(job.config)
                if not transfer.labelled:
                    self.unlabelled(job)
                job.summary = self.first_summary(job)
        tell()
        self.teachers([job for job in alive(jobs) if needs_teacher(job)])
        tell()
        self.students_alone(alive(jobs))
        tell()

        def company(job: Job) -> Hashable:
            teacher = job.summary.get("teacher") or {}
            return teacher.get("fingerprint"), key_of(job.config), job.config.diagnostics

        # Those that an interrupted sweep has finished count where stacks are formed, and are not trained again.
        companies = [
            together
            for same_teacher in grouped((job for job in jobs if job.summary.get("student_alone")), company)
            for together in grouped(same_teacher, lambda job: self.lessons(job)[0].kind())
        ]
        lonely = [group[0] for group in companies if len(group) == 1 and len(group[0].config.settings()) == 1]
        if len(jobs) > 1 and (lonely := alive(lonely)):
            why = "no other job has the same teacher, architecture, optimiser, schedule, epochs and batches"
            log.info("%d × student run one by one: %s (%s)", len(lonely), why, listed(job.path.name for job in lonely))
        for together in companies:
            with failing(together):
                self.distil(together, tell)

    def check_shapes(self, job: Job) -> None:
        """ConfigError when a model does not take the data or its training cannot be built; each is tried once."""
        roles = {"student": job.config.student} | ({"teacher": job.config.teacher} if needs_teacher(job) else {})
        for role, spec in roles.items():
            model = (role, fingerprint(spec.model))
            recipe = (role, fingerprint([spec.optimizer, spec.schedule, spec.augment]))
            if model not in self.fitting:
                check_shape(spec, self.bench.dataset, role=role)
            if recipe not in self.fitting:
                check_recipe(spec, role)
            self.fitting |= {model, recipe}

    def unlabelled(self, job: Job) -> None:
        """Say what hidden labels mean; a method without a teacher has then nothing to learn from."""
        if not needs_teacher(job):
            raise ConfigError(
                f"method={job.config.method_name} learns from labels, and the transfer set has none",
                hint="method=soft_targets or method=logits",
            )
        if job.config.beta > 0:
            job.say(f"the transfer set has no labels: beta = {job.config.beta:g} has no effect")

    def transfer(self, config: RunConfig) -> TransferSet:
        key = key_of(config)
        if key not in self.transfers:
            self.transfers[key] = transfer_set(config, self.bench)
        return self.transfers[key]

    # ------------------------------------------------------------ what is trained once

    def wanted_teacher(self, job: Job) -> list[Wanted]:
        """The members of the teacher: one network, or several that differ in their seed alone."""
        config = job.config
        if config.checkpoint is not None:
            return [self.checkpoint(config)]
        specs = [replace(config.teacher, seed=config.teacher.seed + m) for m in range(config.members)]
        data = self.bench.dataset.fingerprint
        return [Wanted({"kind": "teacher", **s.identity(data)}, s, f"teacher {s.name}", self.bench) for s in specs]

    def wanted_alone(self, job: Job) -> list[Wanted]:
        """The student alone, on the transfer set; on the training data where the transfer set has no labels at all."""
        spec, transfer = job.config.student, self.transfer(job.config)
        facts = {"kind": "alone", **spec.identity(self.bench.dataset.fingerprint)}
        bench = self.bench
        if transfer.index is not None and not transfer.whole:
            facts["transfer"] = transfer.facts
            bench = replace(bench, train=transfer.examples)
        return [Wanted(facts, spec, f"student {spec.name} alone", bench)]

    def teachers(self, jobs: list[Job]) -> None:
        for job, entries, from_store in self.obtain(jobs, self.wanted_teacher, role="teacher"):
            teacher = Ensemble(entries, job.config.combine)
            if teacher.fingerprint not in self.ensembles:
                self.ensembles[teacher.fingerprint] = teacher, self.ensemble_report(teacher)
            job.teacher, report = self.ensembles[teacher.fingerprint]
            job.summary["teacher"] = {**report, "from_store": from_store}

    def checkpoint(self, config: RunConfig) -> Wanted:
        """The user's own weights as a teacher."""
        spec, data = config.teacher, self.bench.dataset.fingerprint
        path = Path(str(config.checkpoint)).expanduser()
        state = read_checkpoint(path, spec, self.bench.dataset)
        facts = {
            "kind": "checkpoint",
            "file": checksum(path),
            "data": data,
            **{key: spec.identity(data)[key] for key in ("model", "precision", "code", "format")},
        }
        return Wanted(facts, spec, f"teacher {spec.name}", self.bench, state)

    def ensemble_report(self, teacher: Ensemble) -> Report:
        """What a summary says of the teacher: its one member's report, or the ensemble's and its members'."""
        reports = [{"fingerprint": entry.fingerprint, **entry.report} for entry in teacher.members]
        if len(reports) == 1:
            return reports[0]
        first = reports[0]
        return {
            "fingerprint": teacher.fingerprint,
            "name": f"{len(reports)} {first['name']}, {teacher.combine} mean",
            "parameters": sum(report["parameters"] for report in reports),
            "flops": sum(report["flops"] for report in reports),
            "epochs": first["epochs"],
            "seconds": round(sum(report["seconds"] for report in reports), 3),
            "val": None,
            "test": vars(evaluate_logits(teacher.test, self.labels)).copy(),
            "members": reports,
        }

    def ended_before(self, role: str) -> list[Job]:
        """Jobs that had their result when this process began, and had part in the training of this role."""
        ended = [job for job in self.jobs if job.rundir is None and job.method is not None and job.summary]
        if role == "teacher":
            return [job for job in ended if needs_teacher(job)]
        return [job for job in ended if not needs_teacher(job) or job.summary.get("teacher")]

    def students_alone(self, jobs: list[Job]) -> None:
        for job, (entry,), from_store in self.obtain(jobs, self.wanted_alone, role="student_alone"):
            job.alone = entry
            report = {"fingerprint": entry.fingerprint, **entry.report, "from_store": from_store}
            job.summary["student_alone"] = self.with_agreement(report, entry.outputs()["test"], job)

    def obtain(
        self, jobs: list[Job], wanted: Callable[[Job], list[Wanted]], *, role: str
    ) -> Iterator[tuple[Job, list[Entry], bool]]:
        """Each job's entries and whether the store had them; what it lacks is trained, together, under its locks.

        Jobs whose entries cannot be made keep the error.
        """
        want: dict[str, Wanted] = {}
        users: dict[str, list[Job]] = {}
        needed: list[tuple[Job, list[str]]] = []
        for job in jobs:
            with failing([job]):
                of_job = wanted(job)
                for one in of_job:
                    want.setdefault(one.key, one)
                    users.setdefault(one.key, []).append(job)
                needed.append((job, [one.key for one in of_job]))
        for job in self.ended_before(role):  # nobody needs theirs, but they were company
            with failing([job]):
                for one in wanted(job):
                    want.setdefault(one.key, one)
        entries = {key: entry for key in users if (entry := self.store.get(key)) is not None}
        made: set[str] = set()
        trained: set[str] = set()
        if missing := [key for key in users if key not in entries]:
            with (
                failing([job for key in missing for job in users[key]]),
                self.store.lock(missing, self.stop_waiting),
                self.care.until_safe() as safe,
            ):
                # another process may have made some of them while we waited
                entries |= {key: entry for key in missing if (entry := self.store.get(key)) is not None}
                new = [key for key in missing if key not in entries]
                for key in new:
                    job_rundir(users[key][0]).will_train(key)
                for key, outcome in self.make(list(want.values()), set(new), users, role=role):
                    with failing(users[key]):
                        entries[key] = self.keep(want[key], outcome, users[key], role)
                        made.add(key)
                        trained.add(key)
                if not any(unfinished(job) and job.error for key in new for job in users[key]):
                    safe()
        for job, keys in needed:
            if job.ended or any(key not in entries for key in keys):
                continue
            fresh = made.union(job_rundir(job).trained).intersection(keys)
            made -= fresh  # to the next job it is as if it had been there
            for key in keys:
                if key not in fresh:
                    job.say(f"{want[key].title}: from the store, {key}")
                if key not in trained or job is not users[key][0]:  # else its rows were written as it was trained
                    job_rundir(job).append_metrics(member_rows(entries[key].history, key, keys))
            yield job, [entries[key] for key in keys], not fresh

    def make(
        self, wanted: Sequence[Wanted], missing: set[str], users: dict[str, list[Job]], *, role: str
    ) -> Iterator[tuple[str, Outcome | None]]:
        """Train what is wanted and missing; for the user's own weights there is no outcome."""
        yield from ((one.key, None) for one in wanted if one.key in missing and one.state is not None)
        for new in grouped((one for one in wanted if one.state is None), lambda one: id(one.bench.train)):
            keys = {one.key: self.member_keys(users[one.key][0], role) for one in new if one.key in missing}

            def told(
                i: int, row: dict[str, Any], new: Sequence[Wanted] = new, keys: dict[str, list[str]] = keys
            ) -> None:
                if new[i].key not in keys:  # it is only company
                    return
                job = users[new[i].key][0]  # the others get the rows when it is trained
                if not job.ended:
                    job_rundir(job).append_metrics(member_rows([row], new[i].key, keys[new[i].key]))

            outcomes = train_all(
                new[0].bench,
                [Lesson(one.spec, HARD) for one in new],
                role=role,
                title=new[0].title,
                notes=self.notes,
                care=self.care,
                subject=fingerprint(new[0].facts.get("transfer")),
                told=told,
                needed=[one.key in missing for one in new],
                names=[users[one.key][0].path.name if one.key in users else one.title for one in new],
                results=[self.store.root / one.key / "entry.json" for one in new],
            )
            yield from ((new[i].key, outcome) for i, outcome in outcomes if new[i].key in missing)

    def member_keys(self, job: Job, role: str) -> list[str]:
        return [one.key for one in (self.wanted_teacher(job) if role == "teacher" else self.wanted_alone(job))]

    def keep(self, one: Wanted, outcome: Outcome | None, users: list[Job], role: str) -> Entry:
        """Measure a trained model and put it into the store. Raises Diverged."""
        if outcome is not None and outcome.diverged is not None:
            raise self.diverged(role, outcome, users)
        if outcome is not None:
            users[0].say(said_of(one.title, one.spec, outcome))
        state = one.state if outcome is None else outcome.state
        assert state is not None
        module = load_module(one.spec, state, self.bench, role="teacher" if role == "teacher" else "student")
        outputs = {"test": predict_module(module, self.bench.test.images)}
        if role == "teacher":  # on all of the training data, whatever the transfer set
            outputs["train"] = predict_module(module, self.bench.train.images)
        report = self.report(one.spec, module, outputs["test"], outcome)
        history = outcome.history if outcome else []
        return self.store.put(one.key, weights=state, outputs=outputs, report=report, history=history, facts=one.facts)

    def stop_waiting(self) -> None:
        """Raises Interrupted when asked to stop while another process trains what this one needs."""
        if self.care.stopping():
            raise Interrupted("stopped while another process trains the same model")

    @property
    def notes(self) -> Path:
        return self.store.root / "stack-sizes.json"

    # ------------------------------------------------------------ distillation

    def lessons(self, job: Job) -> list[Lesson]:
        """What the student of a job is taught: one lesson, or one for each setting when the tool is to choose."""
        config = job.config
        beta = config.beta if self.transfer(config).labelled else 0.0
        return [Lesson(config.student, config.method, T, alpha, beta) for T, alpha in config.settings()]

    def distil(self, jobs: list[Job], tell: Callable[[], None]) -> None:
        """The distilled students of jobs with one teacher and transfer set, together; then each job's results."""
        if not alive(jobs):
            return
        config = jobs[0].config
        transfer = self.transfer(config)
        lessons = [(job, lesson) for job in jobs for lesson in self.lessons(job)]
        title = f"student {config.student.name} by {config.method_name}"

        with self.care.until_safe() as safe:
            self.distil_all(jobs, lessons, transfer, title, tell)
            if not any(unfinished(job) for job in jobs):
                safe()

    def distil_all(
        self,
        jobs: list[Job],
        lessons: list[tuple[Job, Lesson]],
        transfer: TransferSet,
        title: str,
        tell: Callable[[], None],
    ) -> None:
        config = jobs[0].config

        def told(i: int, row: dict[str, Any]) -> None:
            job = lessons[i][0]
            if not job.ended and len(job.config.settings()) == 1:  # else the chosen one's rows follow the choice
                job_rundir(job).append_metrics([row])

        outcomes = train_all(
            replace(self.bench, train=transfer.examples),
            [lesson for _, lesson in lessons],
            role="student",
            title=title,
            teacher=self.teacher(alive(jobs)[0], transfer),
            notes=self.notes,
            diagnostics=config.diagnostics,
            care=self.care,
            subject=fingerprint(
                [jobs[0].summary["teacher"] and jobs[0].summary["teacher"]["fingerprint"], transfer.facts]
            ),
            told=told,
            needed=[not job.ended for job, _ in lessons],
            names=[job.path.name for job, _ in lessons],
            owners=[job.identity for job, _ in lessons],
            results=[job.path.absolute() / SUMMARY for job, _ in lessons],
        )
        waiting: dict[int, dict[int, Outcome]] = {}
        for i, outcome in outcomes:
            job = lessons[i][0]
            own = waiting.setdefault(id(job), {})
            own[i] = outcome
            if len(own) == len(job.config.settings()) and not job.ended:
                del waiting[id(job)]  # a finished student's weights are on the disk
                with failing([job]):
                    self.finish(job, [lessons[k][1] for k in sorted(own)], [own[k] for k in sorted(own)], title)
                tell()

    def teacher(self, job: Job, transfer: TransferSet) -> Teacher | None:
        """The teacher as the student meets it: its stored logits, or live where the student's input is augmented."""
        if job.teacher is None:
            return None
        ensemble, spec = job.teacher, job.config.teacher
        live = Augment(**job.config.student.augment).enabled
        if not live and transfer.index is not None:
            logits = torch.stack([entry.outputs()["train"][transfer.index] for entry in ensemble.members])
        else:
            modules = [load_module(spec, entry.weights(), self.bench, role="teacher") for entry in ensemble.members]
            if live:
                return LiveTeacher(modules, combine=ensemble.combine)
            images = transfer.examples.images
            logits = torch.stack([predict_module(module, images) for module in modules])
        return CachedTeacher(logits.to(self.bench.device), combine=ensemble.combine)

    def finish(self, job: Job, lessons: list[Lesson], outcomes: list[Outcome], title: str) -> None:
        """Choose among the settings where there are several, test the student, write the run's files."""
        spec, rundir, dataset = job.config.student, job_rundir(job), self.bench.dataset
        chosen = choose(outcomes)
        lesson, outcome = lessons[chosen], outcomes[chosen]
        job.summary |= {"T": lesson.T, "alpha": lesson.alpha}
        if len(lessons) > 1:
            job.summary["auto"] = curve(job.config, lessons, outcomes, chosen)
            title = f"{title} at T = {lesson.T:g}, alpha = {lesson.alpha:g}, chosen on validation data"
        if len(lessons) > 1:
            rundir.append_metrics(outcome.history)
        if outcome.diverged is not None:
            raise self.diverged("student", outcome, [job])
        job.say(said_of(title, spec, outcome))
        module = load_module(spec, outcome.state, self.bench, role="student")
        logits = predict_module(module, self.bench.test.images)
        shift = torch.zeros(dataset.classes)
        if self.transfer(job.config).omitted:
            job.summary["omitted"], shift = self.omitted(job, module, logits)
            logits = logits + shift
        teacher = job.teacher
        facts = {
            "kind": "student",
            **spec.identity(dataset.fingerprint),
            "method": job.config.method,
            "weights": [lesson.T, lesson.alpha, lesson.beta],
            "teacher": teacher and teacher.fingerprint,
            "transfer": self.transfer(job.config).facts,
        }
        report = self.report(spec, module, logits, outcome)
        report = {"fingerprint": fingerprint(facts), **report, "from_store": False}
        job.summary["student"] = self.with_agreement(report, logits, job)
        if teacher is not None:
            errors = (job.summary[role]["test"]["errors"] for role in ("teacher", "student_alone", "student"))
            job.summary["gap_closed"] = gap_closed(*errors)
        rundir.write_student(outcome.state, rebuilding(spec, self.bench, shift))
        assert job.alone is not None
        rundir.write_pictures(
            pictures(
                dataset.test.images,
                self.labels,
                teacher.test if teacher else None,
                logits,
                dataset.class_names,
                alone_logits=job.alone.outputs()["test"],
                T=lesson.T,
            )
        )
        rundir.write_summary(job.summary | {"status": "completed"})
        write_run_page(rundir.path)
        job.summary["status"] = "completed"

    def omitted(self, job: Job, module: torch.nn.Module, logits: Tensor) -> tuple[dict[str, Any], Tensor]:
        """What leaving classes out did, and the shift of their logits that puts it right without test data."""
        classes = list(self.transfer(job.config).omitted)
        inside = torch.zeros(self.bench.dataset.classes)
        inside[classes] = 1.0

        def tested(shift: float) -> dict[str, Any]:
            wrong = (logits + shift * inside).argmax(-1) != self.labels
            of_them = inside[self.labels].bool()
            return {
                "shift": shift,
                "errors": int(wrong.sum()),
                "omitted_errors": int(wrong[of_them].sum()),
                "omitted_total": int(of_them.sum()),
            }

        frequency = float(inside[self.bench.dataset.train.labels].mean())
        on_training = predict_module(module, self.bench.train.images)
        shift = matching_shift(on_training, classes, frequency=frequency)
        told: dict[str, Any] = {
            "classes": [self.bench.dataset.class_names[c] for c in classes],
            "before": tested(0.0),
            "corrected": tested(shift),
            "oracle": tested(oracle_shift(logits, self.labels, classes)),
            "result": "corrected" if job.config.transfer.correct_bias else "before",
        }
        job.say(
            "without {}: {} errors, {} after the bias correction ({} with a shift tuned on the test data)".format(
                ", ".join(told["classes"]), *(told[key]["errors"] for key in ("before", "corrected", "oracle"))
            )
        )
        return told, inside * (shift if job.config.transfer.correct_bias else 0.0)

    # ------------------------------------------------------------ what is said of a model

    def report(self, spec: TrainSpec, module: torch.nn.Module, logits: Tensor, outcome: Outcome | None) -> Report:
        """What a summary says of a trained model, its test results included."""
        return {
            "name": spec.name,
            "parameters": sum(p.numel() for p in module.parameters()),
            "flops": self.flops_of(spec, module),
            "epochs": spec.epochs if outcome else None,  # None: weights that the user brought
            "seconds": round(outcome.seconds, 3) if outcome else 0.0,
            "val": validation(outcome) if outcome else None,
            "test": vars(evaluate_logits(logits, self.labels)).copy(),
        }

    def flops_of(self, spec: TrainSpec, module: torch.nn.Module) -> int:
        key = fingerprint(spec.model)
        if key not in self.flops:
            self.flops[key] = forward_flops(module, self.bench.test.images[0])
        return self.flops[key]

    def with_agreement(self, report: Report, logits: Tensor, job: Job) -> Report:
        agree = agreement(logits, job.teacher.test) if job.teacher is not None else None
        return {**report, "test": {**report["test"], "agreement": agree}}

    def diverged(self, role: str, outcome: Outcome, jobs: Iterable[Job]) -> Diverged:
        """The error that says where the loss stopped being a number and what to try; the jobs' summaries say it too."""
        prefix = "teacher_" if role == "teacher" else ""
        error = Diverged(
            f"{role.replace('_', ' ')}: the loss is not a finite number in epoch {outcome.diverged}",
            hint=f"try a smaller {prefix}optimizer.lr, {prefix}schedule.warmup=0.1, or smaller alpha and beta",
        )
        for job in jobs:
            job.summary |= {"status": "diverged", "cause": error.message}
            job_rundir(job).write_summary(job.summary)
        return error

    def first_summary(self, job: Job) -> dict[str, Any]:
        """A summary with all its keys, before there are results."""
        config, dataset = job.config, self.bench.dataset
        return {
            "status": "running",
            "command": job.command,
            "dataset": {
                "name": dataset.name,
                "fingerprint": dataset.fingerprint,
                "train": len(dataset.train),
                "val": len(dataset.val),
                "test": len(dataset.test),
                "classes": dataset.classes,
                "split": dataset.split_rule,
            },
            "teacher": None,
            "student_alone": None,
            "student": None,
            "gap_closed": None,
            "transfer": transfer_told(self.transfer(config), config),
            "T": config.T,
            "alpha": config.alpha,
            "beta": config.beta,
            "method": config.method_name,
            "seed": config.student.seed,
            "device": device_name(self.bench.device),
            "precision": config.precision,
            "versions": versions().copy(),
        }


def member_rows(history: Iterable[dict[str, Any]], key: str, keys: list[str]) -> Iterable[dict[str, Any]]:
    """A model's rows for metrics.jsonl, those of an ensemble's member with its number."""
    return [{**row, "member": keys.index(key)} for row in history] if len(keys) > 1 else list(history)


@dataclass(frozen=True)
class Wanted:
    """A model that runs need: what its fingerprint is made of, how it is trained, or the weights that are there."""

    facts: dict[str, Any]
    spec: TrainSpec
    title: str
    bench: Bench  # whose training part it learns from
    state: dict[str, Tensor] | None = None

    @property
    def key(self) -> str:
        return fingerprint(self.facts)


@dataclass(frozen=True)
class Ensemble:
    """The teacher: one entry of the store, or several whose distributions are averaged."""

    members: list[Entry]
    combine: str

    @property
    def fingerprint(self) -> str:
        if len(self.members) == 1:
            return self.members[0].fingerprint
        return fingerprint([self.combine, *(entry.fingerprint for entry in self.members)])

    @functools.cached_property
    def test(self) -> Tensor:
        """Logits at T = 1 on the test data: [M,C]."""
        members = torch.stack([entry.outputs()["test"] for entry in self.members])
        return combine_logits(members, combine=self.combine, T=torch.ones(()))


def needs_teacher(job: Job) -> bool:
    return job.method is not None and job.method.needs_teacher


def job_rundir(job: Job) -> RunDir:
    assert job.rundir is not None
    return job.rundir


def validation(outcome: Outcome) -> dict[str, Any]:
    """The validation results of the epoch whose weights were kept."""
    row = outcome.history[(outcome.epoch or len(outcome.history)) - 1]
    return {key: row[f"val_{key}"] for key in ("accuracy", "nll")}


def choose(outcomes: Sequence[Outcome]) -> int:
    """The setting with the best validation accuracy, then the best likelihood; 0 if there is one."""
    if len(outcomes) == 1:
        return 0

    def rank(k: int) -> tuple[bool, float, float]:
        last = validation(outcomes[k])
        if outcomes[k].diverged is not None:
            return True, 0.0, 0.0
        return False, -last["accuracy"], last["nll"]

    return min(range(len(outcomes)), key=rank)


def curve(config: RunConfig, lessons: list[Lesson], outcomes: list[Outcome], chosen: int) -> dict[str, Any]:
    """What was tried, what validation said of it, and what was chosen."""
    return {
        "keys": [key for key in ("T", "alpha") if getattr(config, key) == "auto"],
        "rule": "highest validation accuracy, then lowest validation NLL",
        "chosen": chosen,
        "tried": [
            {
                "T": lesson.T,
                "alpha": lesson.alpha,
                **{f"val_{key}": value for key, value in validation(outcome).items()},
                "diverged": outcome.diverged,
            }
            for lesson, outcome in zip(lessons, outcomes, strict=True)
        ],
    }


def rebuilding(spec: TrainSpec, bench: Bench, shift: Tensor) -> dict[str, Any]:
    """What makes a module of the weights: the model, how its input is prepared, what is added to its logits."""
    dataset = bench.dataset
    return {
        "model": spec.model,
        "name": spec.name,
        "input_shape": list(dataset.shape),
        "classes": list(dataset.class_names),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "shift": shift.tolist() if shift.any() else None,
        "precision": spec.precision,
    }


def transfer_told(transfer: TransferSet, config: RunConfig) -> dict[str, Any]:
    """The transfer set in a summary."""
    return {"examples": len(transfer.examples), "labels": transfer.labelled, **config.transfer.examples()}


@functools.cache
def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("kd-cli", "torch", "torchvision", "hydra-core", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
