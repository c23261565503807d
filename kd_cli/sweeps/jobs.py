"""The jobs of a sweep that are trained together, and how Hydra is informed of each: directory, log, callbacks, result.

`HydraJobs` uses Hydra's public `run_job` alone; `hydra_internals.FastJobs` leaves the same files in less time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, run_job
from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from kd_cli.config.read import as_written


@dataclass
class SweepJob:
    """One job of a sweep, from its overrides to its result or error."""

    overrides: list[str]
    number: int
    compose: Callable[[], DictConfig]  # the configuration with its node `hydra`; keeping a thousand fills the memory
    task_overrides: Sequence[str] = ()  # the overrides as Hydra records them
    path: Path | None = None
    plain: Any = None  # what SweepTask.read made of the configuration
    result: Any = None
    error: Exception | None = None
    records: list[logging.LogRecord] = field(default_factory=list)  # for the job's own log
    returned: JobReturn | None = None
    on_end: Callable[[SweepJob], None] = lambda job: None

    def end(self) -> None:
        """Report `result` or `error` to Hydra, once: write the job's log, call its callbacks."""
        if self.returned is None:
            self.on_end(self)


class SweepTask(ABC):
    """A Hydra task function that can also run all jobs of a sweep at once."""

    @abstractmethod
    def __call__(self, cfg: DictConfig) -> Any:
        """Run one job, as any Hydra task function does."""

    @abstractmethod
    def together(self, jobs: list[SweepJob]) -> None:
        """Run the jobs, which `read` has seen; each is given its `result` or `error`."""

    @abstractmethod
    def read(self, job: SweepJob, cfg: DictConfig, hydra: Any, written: dict[str, Any]) -> None:
        """Take what is needed from a job's configuration, which is not kept; `cfg` may be changed.

        `written` has the same values as plain dictionaries and lists, interpolations as they are written.
        """

    @abstractmethod
    def dry_run(self, jobs: list[SweepJob]) -> None:
        """Print what the jobs would do; they have no directories."""


class Jobs(ABC):
    """Carries out for each job what Hydra does around a task function: before it, `prepare`; after it, `finish`."""

    def __init__(self, context: HydraContext, task: SweepTask, log_as_sweep: Callable[[], None]) -> None:
        self.context, self.task, self.log_as_sweep = context, task, log_as_sweep

    @abstractmethod
    def prepare(self, job: SweepJob) -> None:
        """Make the job's directory and its `.hydra/`, which stays as it is where it is already there; call `read`."""

    @abstractmethod
    def finish(self, job: SweepJob) -> None:
        """Write the job's log, call the callbacks and set `job.returned`."""


class HydraJobs(Jobs):
    """Calls Hydra's `run_job` twice for each job.

    The first call, without callbacks, makes the directory and reads the configuration. The second, after the training,
    replays the log and returns the result or raises the error, with the callbacks.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.resumed: set[int] = set()  # numbers of jobs that an earlier process has begun

    def prepare(self, job: SweepJob) -> None:
        if self._is_recorded(job):
            self.resumed.add(job.number)
        failed: list[Exception] = []

        def read(cfg: DictConfig) -> None:
            hydra: Any = HydraConfig.get()
            job.path = Path(hydra.runtime.output_dir)
            try:
                self.task.read(job, cfg, hydra, as_written(cfg))
            except Exception as error:
                failed.append(error)

        silent: Any = NoCallbacks()
        self._run(job, read, dataclasses.replace(self.context, callbacks=silent), configure_logging=False)
        if failed:
            raise failed[0]

    def finish(self, job: SweepJob) -> None:
        files: list[logging.FileHandler] = []

        def replay(cfg: DictConfig) -> Any:
            files.extend(log_files())
            write_records(job.records, files)
            if job.error is not None:
                ignore_hydras_report()
                raise job.error
            return job.result

        try:
            returned = self._run(job, replay, self.context)
        finally:
            self.log_as_sweep()
            close_logs(files)
        job.returned = returned if job.error is None else FailedJob(returned, job.error)
        job.records.clear()

    def _run(self, job: SweepJob, task: Callable[[DictConfig], Any], context: HydraContext, **keys: Any) -> JobReturn:
        config = job.compose()
        subdir = config.hydra.output_subdir
        if job.number in self.resumed:
            config.hydra.output_subdir = None  # Hydra would overwrite the record of how the job began
        returned = run_job(
            task_function=task,
            config=config,
            hydra_context=context,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
            **keys,
        )
        if returned.hydra_cfg is not None:
            with read_write(returned.hydra_cfg.hydra):
                returned.hydra_cfg.hydra.output_subdir = subdir
        return returned

    def _is_recorded(self, job: SweepJob) -> bool:
        config = job.compose()
        with current_job(config):
            folder = Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)
            return config.hydra.output_subdir is not None and is_recorded(folder / config.hydra.output_subdir)


class NoCallbacks:
    """Stands in for Hydra's callbacks where a job has not begun yet."""

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None: ...

    def on_job_end(self, config: DictConfig, **kwargs: Any) -> None: ...


class FailedJob(JobReturn):
    """A failed job's JobReturn that raises its error without printing the overrides: the error has been printed."""

    def __init__(self, returned: JobReturn, error: Exception) -> None:
        vars(self).update(vars(returned))
        self.error = error

    @property
    def return_value(self) -> Any:
        raise self.error

    @return_value.setter
    def return_value(self, value: Any) -> None: ...


@contextlib.contextmanager
def current_job(config: DictConfig) -> Iterator[None]:
    """The block in which `${hydra:...}` and HydraConfig refer to this configuration."""
    OmegaConf.set_readonly(config.hydra, True)
    before = HydraConfig.instance().cfg
    HydraConfig.instance().cfg = config  # type: ignore[assignment]  # set_config would copy it
    try:
        yield
    finally:
        HydraConfig.instance().cfg = before


def without_hydra(config: DictConfig) -> DictConfig:
    """Remove the node `hydra` from a composed configuration and return it, as a task function sees it."""
    with read_write(config), open_dict(config):
        del config["hydra"]
    return config


def is_recorded(folder: Path) -> bool:
    """Whether a job's `.hydra` holds the last of the files that Hydra writes there: the job is resumed."""
    last = folder / "overrides.yaml"
    return last.is_file() and last.stat().st_size > 0


def log_files() -> list[logging.FileHandler]:
    """Return the files that the root logger writes."""
    return [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.FileHandler)]


def keep_imports() -> None:
    """Take what is imported out of the collector's sight, once: a look through torch takes a tenth of a second.

    Only once, because what is garbage by then is never freed.
    """
    if not gc.get_freeze_count():
        gc.freeze()


def ignore_hydras_report() -> None:
    """Keep a job's failure out of its log where Hydra would add it: Hydra 1.4 writes a traceback for every error."""
    for file in log_files():
        file.addFilter(lambda record: record.name != "hydra.core.utils")


def close_logs(files: Sequence[logging.FileHandler]) -> None:
    """Detach log files from the root logger, where a sweep without logging of its own leaves them, and close them."""
    for file in files:
        logging.getLogger().removeHandler(file)
        file.close()


def write_records(records: Sequence[logging.LogRecord], files: Sequence[logging.FileHandler]) -> None:
    """Write log records into each of the files."""
    for record in records:
        for file in files:
            file.handle(record)


def resolved(node: DictConfig) -> DictConfig:
    """Return a copy of a node with its interpolations resolved."""
    return DictConfig(OmegaConf.to_container(node, resolve=True))


def absolute(path: Path) -> Path:
    """Return the path from the root, without looking at the file system."""
    return Path(os.path.abspath(path))
