"""A Hydra launcher that hands all jobs of a sweep to the task at once, so that they can be trained together.

It works with any task function: one with a method `together` gets the jobs as a list, any other one is called job by
job, as Hydra's basic launcher does. Each job's directory, `.hydra/`, log and callbacks are as with the basic launcher.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra._internal.config_repository import IConfigRepository
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

log = logging.getLogger(__name__)

NAME = "fused"
# Hydra 1.3 instantiates plug-ins of its own top-level package only; the class is registered under such a name.
TARGET = "hydra_plugins.kd_cli.FusedLauncher"


@dataclass
class SweepJob:
    """One job of a sweep on its way through the launcher."""

    config: DictConfig  # with the node `hydra`
    overrides: list[str]
    number: int
    task_config: DictConfig | None = None  # as the task sees it
    choices: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    result: Any = None
    error: Exception | None = None
    records: list[logging.LogRecord] = field(default_factory=list)  # for the job's own log


class FusedLauncher(Launcher):
    """Launches the jobs of a sweep together."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        remember_compositions(hydra_context.config_loader)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose all jobs, run them, and return what Hydra wants to know of each."""
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        sweep_dir = Path(str(self.config.hydra.sweep.dir))
        sweep_dir.mkdir(parents=True, exist_ok=True)
        together = getattr(self.task_function, "together", None)
        jobs = [self._compose(list(o), initial_job_idx + k) for k, o in enumerate(job_overrides)]
        if together is None:
            return [self._run(job, self.task_function, self.hydra_context) for job in jobs]

        if OmegaConf.select(self.config, "dry_run", default=False):
            self.task_function.dry_run(jobs)  # type: ignore[attr-defined]
            if [p.name for p in sweep_dir.iterdir()] == ["multirun.yaml"]:
                shutil.rmtree(sweep_dir)
            return []

        log.info("%d jobs in %s", len(jobs), sweep_dir)
        silent = HydraContext(config_loader=self.hydra_context.config_loader, callbacks=Callbacks())
        for job in jobs:
            self._run(job, _Recording(job), silent)
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        together(jobs)
        returns = [self._end(job) for job in jobs]
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        return returns

    def _compose(self, overrides: list[str], number: int) -> SweepJob:
        config = self.hydra_context.config_loader.load_sweep_config(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = number
            config.hydra.job.num = number
        return SweepJob(config, overrides, number)

    def _run(self, job: SweepJob, task: TaskFunction, context: HydraContext) -> JobReturn:
        log.debug("#%d : %s", job.number, " ".join(filter_overrides(job.overrides)))
        return run_job(
            hydra_context=context,
            task_function=task,
            config=job.config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def _end(self, job: SweepJob) -> JobReturn:
        """The last pass: callbacks, the job's log, and the result, without writing `.hydra/` again."""
        written = job.config.hydra.output_subdir
        with read_write(job.config.hydra):
            job.config.hydra.output_subdir = None
        returned = self._run(job, _Replaying(job), self.hydra_context)
        assert returned.hydra_cfg is not None
        with read_write(returned.hydra_cfg.hydra):
            returned.hydra_cfg.hydra.output_subdir = written
        return returned


class _Recording:
    """The first pass: Hydra makes the job's directory, and we note what the task would have seen."""

    def __init__(self, job: SweepJob) -> None:
        self.job = job

    def __call__(self, config: DictConfig) -> None:
        hydra = HydraConfig.get()
        self.job.task_config = config
        self.job.choices = dict(hydra.runtime.choices)
        self.job.path = Path(hydra.runtime.output_dir)


class _Replaying:
    """The last pass: the job's log gets its lines, and Hydra the result."""

    def __init__(self, job: SweepJob) -> None:
        self.job = job

    def __call__(self, config: DictConfig) -> Any:
        files = [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]
        for record in self.job.records:
            for handler in files:
                handler.handle(record)
        if self.job.error is not None:
            raise self.job.error
        return self.job.result


def remember_compositions(loader: Any) -> None:
    """Compose what a sweep's jobs have in common once, and each job only as far as it differs.

    Hydra composes every job from its files, twice: its sweeper to check it, its launcher to run it. Jobs that differ in
    values alone, and not in options of groups, share one composition here, which is copied and given their values, by
    Hydra's own function. The configurations are equal to Hydra's; a test compares them.
    """
    if hasattr(loader, "_kd_compose"):
        return
    compose = loader._kd_compose = loader.load_sweep_config
    skeletons: dict[tuple[str, ...], DictConfig] = {}
    checked: dict[tuple[str, ...], DictConfig] = {}

    def fresh(master: DictConfig, overrides: list[str]) -> DictConfig:
        parsed = OverridesParser.create().parse_overrides(overrides)
        values = [o for o in parsed if is_value(o, loader.repository)]
        if not values:
            return compose(master, overrides)
        common = tuple(str(o.input_line) for o in parsed if o not in values)
        if common not in skeletons:
            skeletons[common] = compose(master, list(common))
        config = copy.deepcopy(skeletons[common])
        OmegaConf.copy_cache(from_config=master, to_config=config)
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        told = [o for o in parsed if not o.is_hydra_override()]
        config.hydra.overrides.task = [o.input_line for o in told]
        dirname = config.hydra.job.config.override_dirname
        config.hydra.job.override_dirname = get_overrides_dirname(
            overrides=told,
            kv_sep=dirname.kv_sep,
            item_sep=dirname.item_sep,
            exclude_keys=dirname.exclude_keys,
        )
        return config

    def load_sweep_config(master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
        key = tuple(sweep_overrides)
        if key in checked:
            return checked.pop(key)  # the launcher gets what the sweeper has checked
        checked[key] = fresh(master_config, sweep_overrides)
        return checked[key]

    loader.load_sweep_config = load_sweep_config


def is_value(override: Override, repository: IConfigRepository) -> bool:
    """Whether an override sets the value of a key that is there: no option of a group, nothing added or deleted."""
    plain = override.type == OverrideType.CHANGE and override.package is None
    key = override.key_or_group
    return plain and not key.startswith("hydra.") and not repository.group_exists(key)


def register() -> None:
    """Make `hydra/launcher=fused` known to Hydra."""
    plugins = Plugins.instance()
    plugins.register(FusedLauncher)
    plugins.class_name_to_class[TARGET] = FusedLauncher
    ConfigStore.instance().store(group="hydra/launcher", name=NAME, node={"_target_": TARGET}, provider="kd_cli")
