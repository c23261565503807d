"""Run jobs together: what they share is read and trained once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from kd_cli.config.values import RunConfig
from kd_cli.data.sentences import listed
from kd_cli.data.source import Dataset
from kd_cli.data.stored import StoredImages
from kd_cli.errors import KdError
from kd_cli.runs.building import build_method
from kd_cli.runs.chains import wanted_assistants
from kd_cli.runs.checkpoints import Checkpoints
from kd_cli.runs.device_data import load_device_data
from kd_cli.runs.jobs import Job, WarningsAsNotes, alive, failing, grouped
from kd_cli.runs.peers import without_unused_peers
from kd_cli.runs.session import Session
from kd_cli.runs.several import Leader
from kd_cli.runs.threads import choose_threads
from kd_cli.runs.trained_once import wanted_alone, wanted_teacher
from kd_cli.runs.trial_pruning import TrialPruning
from kd_cli.storage.run_dir import STACKS, claim
from kd_cli.storage.stack_plan import StackPlan
from kd_cli.storage.store import Store
from kd_cli.storage.training_state import forget

log = logging.getLogger(__name__)


def run_many(
    jobs: Sequence[Job],
    *,
    opened: Callable[[], None] = lambda: None,
    finished: Callable[[Job], None] = lambda job: None,
    fail_fast: bool = False,
    stopping: Callable[[], bool] = lambda: False,
    leader: Leader | None = None,
    pruning: TrialPruning | None = None,
) -> None:
    """Run jobs together; `opened` is called when their methods are known, `finished` once for each job when it ends.

    A job that fails keeps its error and fails no other, unless `fail_fast` stops those that have not ended. When
    `stopping()` is true, training stops at the end of the epoch, its state is saved, and Interrupted is raised.
    With a `leader`, other processes take part in each training. `pruning` ends the trainings of hopeless students.
    """
    reported: set[int] = set()

    def report_ended() -> None:
        for job in jobs:
            if id(job) not in reported and job.ended:
                reported.add(id(job))
                finished(job)
        if fail_fast and any(job.error is not None for job in jobs):
            for job in alive(jobs):
                job.error = KdError("not run: another job failed, and fail_fast=true")

    with ExitStack() as claims:
        with failing(jobs):
            for folder in claimed_folders(jobs):
                claims.enter_context(claim(folder))
        for job in alive(jobs):
            with failing([job]):
                job.open()
        without_unused_peers(jobs)
        opened()
        report_ended()
        plan = StackPlan(claimed_folders(jobs)[0] / STACKS) if jobs else StackPlan(None)
        for same_data in grouped(jobs, lambda job: job.config.data_key()):
            config = same_data[0].config
            store = Store(config.store_dir)
            store.tidy()
            forget(partial_states(config))
            if not alive(same_data):
                continue
            with failing(same_data), WarningsAsNotes(same_data):
                checkpoints = Checkpoints(partial_states(config), config.every, stopping, plan)
                data = load_device_data(config)
                session = Session(data, store, checkpoints, leader, pruning)
                if leader is None and data.device.type == "cpu" and (sentence := choose_threads()) is not None:
                    for job in alive(same_data):
                        session.note(job, sentence)
                session.run(same_data, report_ended)
            report_ended()
        if not any(job.unfinished for job in jobs):
            plan.remove()


def claimed_folders(jobs: Sequence[Job]) -> list[Path]:
    """The folders that no other process may work in meanwhile: a run's own, or the sweep's."""
    return [jobs[0].path] if len(jobs) == 1 else sorted({job.path.parent for job in jobs})


def partial_states(config: RunConfig) -> Path:
    """The folder of the states of unfinished trainings."""
    return config.store_dir / "partial"


def dry_run(jobs: Sequence[Job]) -> list[str]:
    """A line for each job: what it would train and what the store has; what is found of the data goes to the log.

    Reads the data, trains and writes nothing.
    """
    lines: dict[int, str] = {}
    planned: set[str] = set()
    for same_data in grouped(jobs, lambda job: job.config.data_key()):
        session = Session(load_device_data(same_data[0].config), Store(same_data[0].config.store_dir), Checkpoints())
        for line in (described(session.data.dataset), *session.data.dataset.notes):
            log.info("%s", line)
        for job in same_data:
            job.method = build_method(job.config.method)
        without_unused_peers(same_data)
        for job in same_data:
            session.check_models(job)
            wanted = wanted_alone(session, job)
            if job.needs_teacher:
                wanted = wanted_teacher(session, job) + wanted_assistants(session, job) + wanted
            parts = []
            for one in wanted:
                known = session.store.get(one.key) is not None
                new = "to train" if one.is_trained else "to test, with the weights of teacher.checkpoint"
                new = new if one.answers is None else one.answers.pending
                state = "in the store" if known else "shared" if one.key in planned else new
                planned.add(one.key)
                parts.append(f"{one.title}: {state}")
            n = len(job.config.peers) or len(job.config.settings())
            students = f"{n} {'peers' if job.config.peers else 'students'}" if n > 1 else "student"
            parts.append(f"{students} {job.config.student.title} by {job.config.method_name}: to train")
            lines[id(job)] = "; ".join(parts)
    return [lines[id(job)] for job in jobs]


def described(dataset: Dataset) -> str:
    """A line on a data set: its parts, its examples' shape and type, its classes, its memory."""
    parts = {"training": dataset.train, "validation": dataset.val, "test": dataset.test}
    counts = ", ".join(f"{len(split):,} {name}" for name, split in parts.items())
    memory = sum(split.images.numel() * split.images.element_size() for split in parts.values())
    shape = "x".join(map(str, dataset.shape)) + (" features" if len(dataset.shape) == 1 else "")
    images = dataset.train.images
    kept = f" {images.kept}" if isinstance(images, StoredImages) else ""
    kind = str(images.dtype).removeprefix("torch.")
    classes = f"{dataset.classes} {'labels' if dataset.multilabel else 'classes'} ({listed(dataset.class_names, 5)})"
    per_class = dataset.class_counts()["train"]
    least = f"{min(per_class):,} to {max(per_class):,} training examples each"
    return f"{dataset.name}: {counts} examples of {shape} {kind}, {memory / 1e6:,.1f} MB{kept}; {classes}, {least}"
