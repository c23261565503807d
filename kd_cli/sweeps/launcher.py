"""A Hydra launcher that hands all jobs of a sweep to the task at once, so that they can be trained together.

It works with any task function: a SweepTask gets the jobs as a list, any other one is called job by job, as Hydra's
basic launcher does. Each job's directory, `.hydra/`, log and callbacks are as with the basic launcher.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from pathlib import Path

from hydra.core.utils import JobReturn, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from kd_cli.sweeps.hydra_internals.checks import usable
from kd_cli.sweeps.hydra_internals.compositions import sweep_config_loader
from kd_cli.sweeps.hydra_internals.registration import register_plugin, store_node
from kd_cli.sweeps.jobs import HydraJobs, Jobs, SweepJob, SweepTask, resolved

log = logging.getLogger(__name__)

NAME = "fused"


class FusedLauncher(Launcher):
    """Launches the jobs of a sweep together."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `launch`."""
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        self.load_config = sweep_config_loader(hydra_context.config_loader)
        # Resolved once: after every job the terminal gets the sweep's logging again.
        self.logging = resolved(config.hydra.hydra_logging)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose all jobs, run them, and return a JobReturn for each; nothing for a dry run."""
        setup_globals()
        self.log_as_sweep()
        sweep_dir = Path(str(self.config.hydra.sweep.dir))
        sweep_dir.mkdir(parents=True, exist_ok=True)
        numbered = [(list(overrides), initial_job_idx + k) for k, overrides in enumerate(job_overrides)]
        if not isinstance(self.task_function, SweepTask):
            returns = [self._run(*job) for job in numbered]
            self.log_as_sweep()
            return returns
        jobs = [SweepJob(*job, functools.partial(self._compose, *job)) for job in numbered]
        if OmegaConf.select(self.config, "dry_run", default=False):
            self.task_function.dry_run(jobs)
            return []
        return self._run_together(jobs, self.task_function)

    def log_as_sweep(self) -> None:
        """Set up logging as the sweep's configuration says."""
        configure_log(self.logging, self.config.hydra.verbose)

    def _run_together(self, jobs: list[SweepJob], task: SweepTask) -> list[JobReturn]:
        log.info("%d jobs in %s", len(jobs), self.config.hydra.sweep.dir)
        steps = self._steps(task)
        for job in jobs:
            job.on_end = steps.finish
            steps.prepare(job)
        task.together(jobs)
        for job in jobs:
            job.end()
        return [job.returned for job in jobs if job.returned is not None]

    def _steps(self, task: SweepTask) -> Jobs:
        if not usable("jobs"):
            return HydraJobs(self.hydra_context, task, self.log_as_sweep)
        from kd_cli.sweeps.hydra_internals.fast_jobs import FastJobs  # may not import with another Hydra

        return FastJobs(self.hydra_context, task, self.log_as_sweep)

    def _compose(self, overrides: list[str], number: int) -> DictConfig:
        config = self.load_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
        return config

    def _run(self, overrides: list[str], number: int) -> JobReturn:
        """Run a job of a task that takes one at a time."""
        log.info("#%d : %s", number, " ".join(filter_overrides(overrides)))
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=self._compose(overrides, number),
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


def register() -> None:
    """Make `hydra/launcher=fused` known to Hydra."""
    store_node(NAME, {"_target_": register_plugin(FusedLauncher)}, group="hydra/launcher")
