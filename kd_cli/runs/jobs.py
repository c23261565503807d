"""One run as a job: its configuration, its directory, its result; many jobs share the work that is the same."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from kd_cli.config.values import RunConfig
from kd_cli.errors import ConfigError, Diverged, KdError
from kd_cli.learn.methods import Method
from kd_cli.runs.building import build_method
from kd_cli.storage.run_dir import RunDir, read_identity, read_summary
from kd_cli.storage.store import Entry

if TYPE_CHECKING:
    from kd_cli.runs.trained_once import Ensemble

log = logging.getLogger(__name__)
T = TypeVar("T")
RESULTS = ("completed", "pruned")  # statuses of jobs that have ended and have not failed


class Say(Protocol):
    """Writes a line to a run's log; with `shown=False` to the run's own log only, not to the terminal."""

    def __call__(self, message: str, *, shown: bool = True) -> None: ...


def say_to_log(message: str, *, shown: bool = True) -> None:
    """For a process that runs one job, whose log is the run's."""
    log.info("%s", message)


@dataclass
class Job:
    """One run: its configuration, its directory, and its result or error."""

    config: RunConfig
    path: Path
    command: str
    say: Say = say_to_log
    # Called with the run's directory when its summary is there, also when an earlier process wrote it.
    on_completed: Callable[[Path], None] = lambda path: None
    summary: dict[str, Any] = field(default_factory=dict)
    error: Exception | None = None
    notes: list[str] = field(default_factory=list)  # what the tool left out, changed, filled in or guessed
    # set while the job is worked on
    rundir: RunDir | None = None
    method: Method | None = None
    teacher: Ensemble | None = None
    taught_by: Ensemble | None = None  # what teaches the student: the last of the assistants, else the teacher
    assistants: list[Entry] = field(default_factory=list)  # between teacher and student
    alone: Entry | None = None  # the student without a teacher; of peers, the first
    peers_alone: Sequence[Entry] = ()
    identity: str = ""  # a random number of the run's own, which also names its unfinished training

    @property
    def ended(self) -> bool:
        return self.error is not None or self.summary.get("status") in RESULTS

    @property
    def unfinished(self) -> bool:
        """Whether resuming the job would do something: it has not ended, or an error other than divergence ended it."""
        return not self.ended or (self.error is not None and not isinstance(self.error, Diverged))

    @property
    def needs_teacher(self) -> bool:
        return self.method is not None and self.method.needs_teacher

    @property
    def directory(self) -> RunDir:
        assert self.rundir is not None, f"{self.path} has not been opened"
        return self.rundir

    def open(self) -> None:
        """Build the method and prepare the directory; with `resume`, take the result that is there."""
        self.method = build_method(self.config.method)
        for key, has in (("T", self.method.has_T), ("alpha", self.method.has_alpha)):
            if getattr(self.config, key) == "auto" and not has:
                raise ConfigError(
                    f"{key}=auto, and method={self.config.method_name} has no {key} to choose",
                    hint=f"leave {key} out, or method=soft_targets",
                )
        if self.config.resume and (summary := read_summary(self.path)) is not None:
            if summary["status"] == "completed":
                self.on_completed(self.path)  # the earlier process may have been killed before it did so
            self.summary, self.identity = summary, read_identity(self.path)
            if summary["status"] not in RESULTS:
                raise Diverged(f"{summary['status']}: {summary.get('cause')}")
            return
        self.rundir = RunDir(self.path, again=self.config.resume)
        self.command = self.rundir.begin(self.command, self.config.record)
        self.identity = self.rundir.identity

    def note(self, sentence: str, *, shown: bool = True) -> None:
        """Log a sentence on what the tool did unasked, and keep it for the summary; each sentence once."""
        if sentence not in self.notes:
            self.notes.append(sentence)
            self.say(sentence, shown=shown)


class WarningsAsNotes(logging.Handler):
    """Keeps each warning of this package among the notes of the jobs under way.

    Rooms that know nothing of jobs (storage, learn, data) say with a warning what they left out or did otherwise.
    """

    def __init__(self, jobs: Sequence[Job]) -> None:
        super().__init__(logging.WARNING)
        self.jobs = jobs

    def emit(self, record: logging.LogRecord) -> None:
        sentence = record.getMessage()
        for job in alive(self.jobs):
            if record.levelno == logging.WARNING and sentence not in job.notes:
                job.notes.append(sentence)
                if job.say is not say_to_log:  # else the log that has the warning is the job's own
                    job.say(sentence, shown=False)

    def __enter__(self) -> None:
        logging.getLogger("kd_cli").addHandler(self)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("kd_cli").removeHandler(self)


def alive(jobs: Iterable[Job]) -> list[Job]:
    """The jobs that have neither failed nor finished."""
    return [job for job in jobs if not job.ended]


def grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """The items in groups of equal keys, in the order in which the keys first occur."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


@contextmanager
def failing(jobs: Iterable[Job]) -> Iterator[None]:
    """An exception in the block becomes the error of those of the jobs that have not ended; other jobs go on."""
    try:
        yield
    except Exception as error:
        clear_frames(error)
        for job in alive(jobs):
            job.error = error
            if not isinstance(error, KdError):
                log.debug("%s failed", job.path, exc_info=error)


def clear_frames(error: BaseException | None) -> None:
    """Free the local variables, models and batches among them, in the tracebacks of an error and of its causes."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
