"""The jobs of a sweep without Hydra's `run_job`."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import version
from hydra.core.utils import JobReturn, JobRuntime, JobStatus, configure_log
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from kd_cli.config.read import as_written
from kd_cli.sweeps.hydra_internals.records import save_configuration
from kd_cli.sweeps.jobs import (
    Jobs,
    SweepJob,
    absolute,
    close_logs,
    current_job,
    log_files,
    without_hydra,
    write_records,
)


@dataclass
class JobLog:
    """A job's log file, and the rest of its logging configuration, which is the same for most jobs."""

    file: str
    rest: str


class FastJobs(Jobs):
    """Does what Hydra's `run_job` does before and after it calls the task function, without its five copies."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.logs: dict[int, JobLog] = {}  # by the job's number, for jobs that need nothing else at their end
        self.handlers: dict[str, logging.FileHandler] = {}  # as Hydra made them, by the rest of a job's logging

    def prepare(self, job: SweepJob) -> None:
        config = job.compose()
        with current_job(config):
            job.path = absolute(Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir))
            _set_output_dir(config, job.path)
            job.path.mkdir(parents=True, exist_ok=True)
            written = as_written(config)
            if config.hydra.output_subdir is not None:
                save_configuration(written, job.path / config.hydra.output_subdir)
            job.task_overrides = list(config.hydra.overrides.task)
            if (own := self._log_of(config, written.pop("hydra"))) is not None:
                self.logs[job.number] = own
            hydra = config.hydra
            self.task.read(job, without_hydra(config), hydra, written)

    def _log_of(self, config: DictConfig, written: Mapping[str, Any]) -> JobLog | None:
        """Return the job's log if there is nothing to do at the job's end but to write it.

        `written` is the node `hydra`, interpolations as they are written; only the log's file name may hold one.
        """
        has_callbacks = any(
            getattr(type(callback), name, None) is not getattr(Callback, name)
            for callback in self.context.callbacks.callbacks
            for name in ("on_job_start", "on_job_end")
        )
        if has_callbacks or _changes_folder(config) or config.hydra.job.env_set:
            return None
        try:
            setup = written["job_logging"]
            (name,) = [name for name in setup["root"]["handlers"] if "filename" in setup["handlers"][name]]
            file = str(config.hydra.job_logging.handlers[name].filename)
            del setup["handlers"][name]["filename"]
            rest = json.dumps(setup, sort_keys=True)
        except (KeyError, TypeError, ValueError):  # some other kind of log, or none
            return None
        return None if "${" in rest else JobLog(file, rest)

    def finish(self, job: SweepJob) -> None:
        job.returned = returned = FastReturn(job)
        log = self.logs.pop(job.number, None)
        if log is not None and log.rest in self.handlers:
            copy = _copy_of(self.handlers[log.rest], log.file)
            write_records(job.records, [copy])
            copy.close()
            returned.status = JobStatus.FAILED if job.error is not None else JobStatus.COMPLETED
        else:
            self._finish_as_hydra(job, returned, log)
        job.records.clear()

    def _finish_as_hydra(self, job: SweepJob, returned: FastReturn, log: JobLog | None) -> None:
        from hydra.core.utils import env_override

        assert job.path is not None
        config, before, callbacks = job.compose(), os.getcwd(), self.context.callbacks
        _set_output_dir(config, job.path)
        files: list[logging.FileHandler] = []
        try:
            with current_job(config):
                if _changes_folder(config):
                    os.chdir(job.path)
                    returned.working_dir = str(job.path)
                configure_log(config.hydra.job_logging, config.hydra.verbose)
                with env_override(config.hydra.job.env_set):
                    callbacks.on_job_start(config=config, task_function=self.task)
                    files = log_files()
                    write_records(job.records, files)
                    returned.status = JobStatus.FAILED if job.error is not None else JobStatus.COMPLETED
                if log is not None and [type(file) for file in files] == [logging.FileHandler]:
                    self.handlers[log.rest] = files[0]
                callbacks.on_job_end(config=config, job_return=returned)
        finally:
            os.chdir(before)
            self.log_as_sweep()
            close_logs(files)


class FastReturn(JobReturn):
    """A JobReturn that composes its configurations when they are asked for: a sweeper keeps those of all jobs."""

    def __init__(self, job: SweepJob) -> None:
        self.job = job
        super().__init__()
        self.overrides = job.task_overrides
        self.working_dir = os.getcwd()
        self.task_name = JobRuntime.instance().get("name")

    @property
    def return_value(self) -> Any:
        """The job's result; raises its error, which has been printed."""
        if self.job.error is not None:
            raise self.job.error
        return self.job.result

    @return_value.setter
    def return_value(self, value: Any) -> None: ...

    @property
    def cfg(self) -> DictConfig:
        """The job's configuration as its task function saw it."""
        return without_hydra(self._composed())

    @cfg.setter
    def cfg(self, value: Any) -> None: ...

    @property
    def hydra_cfg(self) -> DictConfig:
        """The job's node `hydra`."""
        return OmegaConf.masked_copy(self._composed(), "hydra")

    @hydra_cfg.setter
    def hydra_cfg(self, value: Any) -> None: ...

    def _composed(self) -> DictConfig:
        config = self.job.compose()
        assert self.job.path is not None
        _set_output_dir(config, self.job.path)
        OmegaConf.set_readonly(config.hydra, True)
        return config


def _set_output_dir(config: DictConfig, path: Path) -> None:
    """Note a job's directory in its configuration, as Hydra does."""
    with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = str(path)


def _changes_folder(config: DictConfig) -> bool:
    """Whether Hydra runs a job in the job's own directory."""
    chdir = config.hydra.job.chdir
    return bool(not version.base_at_least("1.2") if chdir is None else chdir)


def _copy_of(handler: logging.FileHandler, file: str) -> logging.FileHandler:
    """Return a handler like another one, which writes into another file."""
    copy = logging.FileHandler(file, handler.mode, handler.encoding, handler.delay, handler.errors)
    copy.setFormatter(handler.formatter)
    copy.filters = handler.filters
    return copy
