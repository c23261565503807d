"""The task that Hydra runs: one run, or all jobs of a sweep together."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import logging.config
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from kd_cli.config.options import conf_dir, data_node, groups, named_models, no_such_option
from kd_cli.config.read import as_written, option_name, run_config
from kd_cli.config.values import RunConfig
from kd_cli.errors import ConfigError, KdError
from kd_cli.storage.run_dir import configuration_record
from kd_cli.sweeps.instead import run_instead
from kd_cli.sweeps.jobs import SweepJob, SweepTask, current_job, ignore_hydras_report, keep_imports, without_hydra
from kd_cli.sweeps.messages import Printed, failure, record, report_failure
from kd_cli.sweeps.names import register_resolvers
from kd_cli.sweeps.signals import stopping
from kd_cli.sweeps.sweep_folder import FAILED, MULTIRUN, SweepNotes, command, leave_nothing

if TYPE_CHECKING:
    from kd_cli.runs.jobs import Job, Say
    from kd_cli.runs.several import Leader
    from kd_cli.sweeps.pruning import MedianPruning

log = logging.getLogger("kd_cli")


class ReadJob(NamedTuple):
    """What a sweep's job keeps of its configuration."""

    config: RunConfig | None  # None where the configuration was refused
    dataset: str
    fail_fast: bool
    notes: Sequence[str] = ()


class Task(SweepTask):
    """Trains what a composed configuration says. Returns the student's validation error, for sweepers that search."""

    folder: Path | None = None  # of the run that this process began last
    pruning: MedianPruning | None = None  # of the jobs that a search has trained together
    leader: Leader | None = None  # where this is the first of several processes that train together

    def __reduce__(self) -> tuple[Any, ...]:
        return _task_elsewhere, ()

    def __call__(self, cfg: DictConfig) -> float | None:
        """Run one job in its own directory: a single run, or a job of a launcher that starts them one by one."""
        hydra: Any = HydraConfig.get()
        path = Path(hydra.runtime.output_dir)
        with in_folder_of_command(hydra):
            if cfg.instead is not None:
                checked(cfg, hydra)
                run_instead(cfg, path)
                return None
            if hydra.mode != RunMode.MULTIRUN:
                return self._run_alone(cfg, hydra, path)
            return self._run_as_job(cfg, hydra, path)

    def _run_alone(self, cfg: DictConfig, hydra: Any, path: Path) -> float | None:
        try:
            summary = self.run(cfg, path)
        except KdError:
            ignore_hydras_report()
            if SweepNotes.new:
                leave_nothing(path, begun=True)  # unless something has been trained
            raise
        if summary is not None:
            print_run(summary, path)
        return objective(summary or {})

    def _run_as_job(self, cfg: DictConfig, hydra: Any, path: Path) -> float | None:
        failed = Path(str(hydra.sweep.dir)) / FAILED
        if cfg.fail_fast and failed.exists():
            raise KdError("not run: another job failed, and fail_fast=true")
        try:
            return objective(self.run(cfg, path, number=int(hydra.job.num)) or {})
        except Exception as error:  # printed now: Hydra prints the first failure only, at the end
            log.error("%s", failure(path, error), exc_info=None if isinstance(error, KdError) else error)
            ignore_hydras_report()
            if cfg.fail_fast:
                failed.touch()
            raise

    def run(self, cfg: DictConfig, path: Path, *, number: int | None = None) -> dict[str, Any] | None:
        """Run one configuration, a sweep's job if it has a number. Return its summary, None for a dry run."""
        hydra: Any = HydraConfig.get()
        config = checked(cfg, hydra)
        if number is not None and cfg.device == "auto":
            config = spread(config, number)
        job = new_job(config, path)
        for sentence in notes_on_folder(hydra):
            job.note(sentence)
        Task.folder = path
        if cfg.dry_run:
            line = foresee([job])[0]
            print(line if number is None else f"{path.name}: {line}")
            leave_nothing(path)
            return None
        return run_one(job, dataset_name(config, hydra))

    def read(self, job: SweepJob, cfg: DictConfig, hydra: Any, written: dict[str, Any]) -> None:
        """Take a job's configuration as plain values, and whether its failure stops the others."""
        config, fail_fast, name, notes = None, bool(cfg.fail_fast), "", notes_on_folder(hydra)
        try:
            config = checked(cfg, hydra, written)
            name = dataset_name(config, hydra)
        except KdError as error:
            job.error = error
        job.plain = ReadJob(config, name, fail_fast, notes)

    def together(self, jobs: list[SweepJob]) -> None:
        """Run all jobs of a sweep, which `read` has seen: each is given its result or its error."""
        started = time.monotonic()
        printed = Printed()
        running: dict[int, SweepJob] = {}
        for sweep_job in jobs:
            if sweep_job.plain.config is None:
                report_failure(sweep_job)
                sweep_job.end()
            else:
                running[id(sweep_job)] = sweep_job
        fail_fast = any(job.plain.fail_fast for job in jobs)
        if fail_fast and (refused := [job for job in jobs if job.error is not None]):
            stopped = KdError(f"not run: {refused[0].path} failed, and fail_fast=true")
            for sweep_job in running.values():
                sweep_job.error = stopped
            return
        self._train_together(list(running.values()), printed, fail_fast)
        log.info("%d jobs in %.1f s", len(jobs), time.monotonic() - started)

    def _train_together(self, sweep_jobs: Sequence[SweepJob], printed: Printed, fail_fast: bool) -> None:
        todo, owners = [], {}
        if (pruning := Task.pruning) is not None and sweep_jobs:
            numbers = {job.path.name: job.number for job in sweep_jobs if job.path is not None}
            pruning.begin(numbers, [job.plain.config for job in sweep_jobs])
        for sweep_job in sweep_jobs:
            assert sweep_job.path is not None
            job = new_job(sweep_job.plain.config, sweep_job.path, printed.by(sweep_job))
            for sentence in sweep_job.plain.notes:
                job.note(sentence)
            todo.append(job)
            owners[id(job)] = sweep_job

        def opened() -> None:
            for job, sweep_job in zip(todo, sweep_jobs, strict=True):
                for line in announcement([job], [sweep_job.plain.dataset]):
                    sweep_job.records.append(record(logging.INFO, line))
            for line in announcement(todo, [job.plain.dataset for job in sweep_jobs]):
                log.info("%s", line)

        def finished(job: Job) -> None:
            sweep_job = owners[id(job)]
            sweep_job.error, sweep_job.result = job.error, objective(job.summary)
            if job.error is not None:
                report_failure(sweep_job)
            sweep_job.end()

        run_jobs(todo, opened=opened, finished=finished, fail_fast=fail_fast, pruning=pruning)
        for job in todo:  # `finished` is not called for those that fail_fast has stopped
            owners[id(job)].error = job.error

    def dry_run(self, jobs: list[SweepJob]) -> None:
        """Print what the jobs of a sweep would do."""
        todo = []
        for job in jobs:
            config = job.compose()
            with current_job(config):
                hydra = config.hydra
                path = Path(str(hydra.sweep.dir)) / str(hydra.sweep.subdir)
                todo.append(new_job(checked(without_hydra(config), hydra), path))
        for one, line in zip(todo, foresee(todo), strict=True):
            print(f"{one.path.name}: {line}")


def new_job(config: RunConfig, path: Path, say: Say | None = None) -> Job:
    """Return a job of kd_cli.runs, which imports torch: only when a run begins."""
    from kd_cli.runs import jobs

    if Task.leader is not None:
        config = Task.leader.placed(config)
    return jobs.Job(config, path, command(), say or jobs.say_to_log, write_missing_page)


def run_jobs(jobs: Sequence[Job], **keys: Any) -> None:
    """Run jobs together until they end or a signal asks to stop."""
    from kd_cli.runs import run_many

    keep_imports()
    run_many.run_many(jobs, stopping=stopping, leader=Task.leader, **keys)


def foresee(jobs: Sequence[Job]) -> list[str]:
    """Return a line for each job on what it would do."""
    from kd_cli.runs import run_many

    return run_many.dry_run(jobs)


def run_one(job: Job, dataset: str) -> dict[str, Any]:
    """Run a job by itself, on the data set of that name, and return its summary; raises its error."""

    def opened() -> None:
        for line in announcement([job], [dataset]):
            log.info("%s", line)

    run_jobs([job], opened=opened)
    if job.error is not None:
        raise job.error
    return job.summary


def _task_elsewhere() -> Task:
    """Return the task in another process, which has not come through the command line."""
    register_resolvers()
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    return Task()


@contextlib.contextmanager
def in_folder_of_command(hydra: Any) -> Iterator[None]:
    """The block in which relative paths start at the folder where the command was given, in runs as in sweeps.

    With `hydra.job.chdir=true` Hydra has moved to the job's directory, where no `dataset.root=photos` would be found.
    """
    folder = str(hydra.runtime.cwd)
    if not hydra.job.chdir or not os.path.isdir(folder):
        yield
        return
    with contextlib.chdir(folder):
        yield


def notes_on_folder(hydra: Any) -> list[str]:
    """Return a sentence for the run's notes where `hydra.job.chdir` was given in vain."""
    if not hydra.job.chdir:
        return []
    return [f"hydra.job.chdir has no effect: relative paths start in {hydra.runtime.cwd}"]


def checked(cfg: DictConfig, hydra: Any, written: dict[str, Any] | None = None) -> RunConfig:
    """Return the configuration as plain values. ConfigError for what Hydra itself lets pass.

    `written` is `as_written(cfg)` where the caller has it.
    """
    folders = [conf_dir(), *(Path(s.path) for s in hydra.runtime.config_sources if s.provider == "command-line")]
    for override in hydra.overrides.task:
        group, _, name = str(override).partition("=")
        if group in ("training", "teacher_training") and name not in (known := groups(folders).get(group, {})):
            raise no_such_option(group, name, known)  # an optional group: Hydra ignores an option that it cannot find
    if cfg.get("instead") is not None and hydra.mode == RunMode.MULTIRUN:
        raise ConfigError("instead runs a function in place of a training, once, and not in a sweep", hint="without -m")
    written = as_written(cfg) if written is None else written
    noted = configuration_record(written, hydra.runtime.choices)
    data = OmegaConf.select(cfg, "transfer.data")
    if data is not None:
        cfg = copy.deepcopy(cfg)
        values: Any = OmegaConf.to_container(cfg, resolve=True)
        cfg.transfer.data = data_node(values["transfer"]["data"], folders, values["dataset"])
        written = as_written(cfg)
    for key in ("peers", "teacher.chain"):
        if OmegaConf.is_list(names := OmegaConf.select(cfg, key)):
            cfg = copy.deepcopy(cfg)
            given: Any = OmegaConf.to_container(names, resolve=True)
            OmegaConf.update(cfg, key, [list(pair) for pair in named_models(key, given, folders)])
            written = as_written(cfg)
    return dataclasses.replace(run_config(cfg, hydra.runtime.choices, written), record=noted)


def dataset_name(config: RunConfig, hydra: Any) -> str:
    """Return the name of the data set's option."""
    return option_name("dataset", config.dataset, hydra.runtime.choices)


def announcement(jobs: Sequence[Job], datasets: Sequence[str]) -> list[str]:
    """Return the line on what open jobs train on what; no line on a terminal, where a progress bar shows it."""
    jobs = [job for job in jobs if job.method is not None and job.error is None]
    if not jobs or sys.stderr.isatty():
        return []
    from kd_cli.runs.device_data import resolve_device

    def listed(values: Iterable[str]) -> str:
        return ", ".join(dict.fromkeys(values))

    configs = [job.config for job in jobs]
    parts = [listed(datasets)]
    if taught := [job.config for job in jobs if job.needs_teacher]:
        parts.append("teacher " + listed(_announced(c) for c in taught))
    parts.append("student " + listed(f"{c.student.title} ({plural(c.student.epochs)})" for c in configs))
    parts.append(listed(str(resolve_device(c.device)) for c in configs))
    return ["; ".join(parts)]


def _announced(config: RunConfig) -> str:
    """A teacher with how it comes about."""
    answers = str(config.teacher.model["_target_"]).startswith("kd_cli.answers.")
    how = "answers" if answers else "loaded" if config.checkpoint else plural(config.teacher.epochs)
    return f"{config.teacher.title} ({how})"


def plural(epochs: int) -> str:
    """Return "1 epoch", "30 epochs"."""
    return f"{epochs:,} epoch{'s' * (epochs != 1)}"


def resume_run(path: Path) -> None:
    """Go on with a run from its last saved epoch, by the configuration that it recorded itself."""
    if (path.absolute().parent / MULTIRUN).is_file():
        raise ConfigError(
            f"resume is {path}, a job of a sweep, whose jobs are trained together",
            hint=f"kd-run resume={os.path.relpath(path.absolute().parent)} goes on with the sweep",
        )
    if not (path / ".hydra" / "overrides.yaml").is_file():  # the last that Hydra writes before a run begins
        raise ConfigError(
            f"resume is {path}, which holds no run or sweep",
            hint="name a directory with .hydra/ in it, or a sweep's with multirun.yaml",
        )
    try:
        cfg, recorded = (OmegaConf.load(path / ".hydra" / name) for name in ("config.yaml", "hydra.yaml"))
        assert isinstance(cfg, DictConfig)
        cfg.resume = str(path)
        recorded.hydra.runtime.output_dir = str(path.absolute())
        logs = OmegaConf.to_container(recorded.hydra.job_logging, resolve=True)
    except (OSError, ValueError, AssertionError, YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path / '.hydra'} cannot be read: {error}", hint="start the run anew") from error
    config = checked(cfg, recorded.hydra)
    logging.config.dictConfig(logs)  # type: ignore[arg-type]
    Task.folder = path
    print_run(run_one(new_job(config, path), dataset_name(config, recorded.hydra)), path)


def print_run(summary: dict[str, Any], path: Path) -> None:
    """Print the table that a run ends with, and where it is."""
    from kd_cli.report.tables import run_table

    print(run_table(summary))
    print(f"\nwritten to {os.path.relpath(path)}")


def write_missing_page(path: Path) -> None:
    """Write the page of a completed run, unless it is there."""
    from kd_cli.report.pages import REPORT, write_run_page

    if not (path / REPORT).exists():
        write_run_page(path)


def spread(config: RunConfig, number: int) -> RunConfig:
    """Return the configuration with one of the machine's GPUs in turn, for launchers that run several jobs at once."""
    import torch

    count = torch.cuda.device_count()
    return dataclasses.replace(config, device=f"cuda:{number % count}") if count > 1 else config


def objective(summary: dict[str, Any]) -> float | None:
    """Return what a searching sweeper minimises: the student's validation error in the last epoch."""
    val = (summary.get("student") or {}).get("val")
    return None if val is None or val["accuracy"] is None else 1 - val["accuracy"]
