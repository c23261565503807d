"""A Hydra launcher that hands all jobs of a sweep to the task at once, so that they can be trained together.

It works with any task function: one with a method `together` gets the jobs as a list, any other one is called job by
job, as Hydra's basic launcher does. Each job's directory, `.hydra/`, log and callbacks are as with the basic launcher.
"""

from __future__ import annotations

import functools
import gc
import json
import logging
import os
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl, get_overrides_dirname
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.plugins import Plugins
from hydra.core.utils import (
    JobReturn,
    JobRuntime,
    JobStatus,
    configure_log,
    env_override,
    filter_overrides,
    run_job,
    setup_globals,
)
from hydra.experimental.callback import Callback
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf._utils import OmegaConfDumper, get_omega_conf_dumper

log = logging.getLogger(__name__)

NAME = "fused"
# Hydra 1.3 instantiates plug-ins of its own top-level package only; the class is registered under such a name.
TARGET = "hydra_plugins.kd_cli.FusedLauncher"
SKELETONS = 64  # compositions that are remembered


@dataclass
class SweepJob:
    """One job of a sweep on its way through the launcher."""

    overrides: list[str]
    number: int
    compose: Callable[[], DictConfig]  # the configuration with its node `hydra`; a thousand kept would fill the memory
    told: Sequence[str] = ()  # the overrides as Hydra records them
    ended: Callable[[SweepJob], None] = lambda job: None
    path: Path | None = None
    read: Any = None  # what the task made of the configuration
    result: Any = None
    error: Exception | None = None
    records: list[logging.LogRecord] = field(default_factory=list)  # for the job's own log
    log: OwnLog | None = None
    returned: JobReturn | None = None

    @property
    def config(self) -> DictConfig:
        """The configuration, composed anew at each call."""
        return self.compose()

    def end(self) -> None:
        """Tell the launcher that `result` or `error` is there: the job's log is written and its callbacks called."""
        if self.returned is None:
            self.ended(self)


@dataclass
class OwnLog:
    """Where a job's records go, and what Hydra's set-up of logging says beside it, the same for most jobs."""

    file: str
    shape: str


class FusedLauncher(Launcher):
    """Launches the jobs of a sweep together."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.hydra_context, self.task_function, self.config = hydra_context, task_function, config
        self.composed = remember_compositions(hydra_context.config_loader)
        # Resolved once: after every job the terminal gets the sweep's words again.
        self.logging = DictConfig(OmegaConf.to_container(config.hydra.hydra_logging, resolve=True))
        self.handlers: dict[str, logging.FileHandler] = {}  # as Hydra made them, by the shape of a job's logging

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Compose all jobs, run them, and return what Hydra wants to know of each."""
        setup_globals()
        self._log_as_sweep()
        sweep_dir = Path(str(self.config.hydra.sweep.dir))
        sweep_dir.mkdir(parents=True, exist_ok=True)
        numbered = [(list(overrides), initial_job_idx + k) for k, overrides in enumerate(job_overrides)]
        together = getattr(self.task_function, "together", None)
        if together is None:
            returns = [self._run(*job) for job in numbered]
            self._log_as_sweep()
            return returns

        if OmegaConf.select(self.config, "dry_run", default=False):
            jobs = [SweepJob(*job, functools.partial(self._compose, *job)) for job in numbered]
            self.task_function.dry_run(jobs)  # type: ignore[attr-defined]
            return []

        log.info("%d jobs in %s", len(numbered), sweep_dir)
        gc.freeze()  # what is imported stays; the collector need not look through torch again and again
        jobs = [self._prepare(*job) for job in numbered]
        together(jobs)
        for job in jobs:
            job.end()
        return [job.returned for job in jobs if job.returned is not None]

    def _log_as_sweep(self) -> None:
        configure_log(self.logging, self.config.hydra.verbose)

    def _compose(self, overrides: list[str], number: int) -> DictConfig:
        config = self.composed(self.config, overrides)
        with open_dict(config):
            config.hydra.job.id = number
            config.hydra.job.num = number
        return config

    def _run(self, overrides: list[str], number: int) -> JobReturn:
        """A job of a task that takes one at a time."""
        log.info("#%d : %s", number, " ".join(filter_overrides(overrides)))
        return run_job(
            hydra_context=self.hydra_context,
            task_function=self.task_function,
            config=self._compose(overrides, number),
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    # `_prepare` and `_end` do what Hydra's `run_job` does before and after it calls the task. `run_job` itself copies
    # the configuration five times, which is most of what a small job would cost.

    def _prepare(self, overrides: list[str], number: int) -> SweepJob:
        """The job's directory and its `.hydra/`, which stays as it is where it is already there."""
        config = self._compose(overrides, number)
        with known_to_hydra(config):
            path = Path(str(config.hydra.sweep.dir)) / str(config.hydra.sweep.subdir)
            place(config, path)
            path.mkdir(parents=True, exist_ok=True)
            if config.hydra.output_subdir is not None:
                save_configuration(config, path / config.hydra.output_subdir)
            told = list(config.hydra.overrides.task)
            again = functools.partial(self._composed_at, overrides, number, path.absolute())
            job = SweepJob(overrides, number, again, told, self._end, path.absolute(), log=self._own_log(config))
            if hasattr(self.task_function, "read"):
                self.task_function.read(job, config)
        return job

    def _composed_at(self, overrides: list[str], number: int, path: Path) -> DictConfig:
        config = self._compose(overrides, number)
        place(config, path)
        OmegaConf.set_readonly(config.hydra, True)
        return config

    def _own_log(self, config: DictConfig) -> OwnLog | None:
        """Where the job's log is, if there is nothing to do at the job's end but to write it."""
        told = any(
            getattr(type(callback), name, None) is not getattr(Callback, name)
            for callback in self.hydra_context.callbacks.callbacks
            for name in ("on_job_start", "on_job_end")
        )
        if told or changes_folder(config) or config.hydra.job.env_set:
            return None
        setup: Any = OmegaConf.to_container(config.hydra.job_logging, resolve=True)
        try:
            handlers = (setup["handlers"][name] for name in setup["root"]["handlers"])
            (file,) = [handler for handler in handlers if "filename" in handler]
            return OwnLog(file.pop("filename"), json.dumps(setup, sort_keys=True))
        except (KeyError, TypeError, ValueError):  # some other kind of log, or none
            return None

    def _end(self, job: SweepJob) -> None:
        """The job's log and callbacks, and what Hydra wants to know of it."""
        assert job.path is not None
        job.returned = returned = LazyReturn(job.compose)
        returned.overrides = job.told
        returned.working_dir = os.getcwd()
        returned.task_name = JobRuntime.instance().get("name")
        failed = job.error is not None
        returned.return_value = job.error if failed else job.result
        status = JobStatus.FAILED if failed else JobStatus.COMPLETED
        if job.log is not None and job.log.shape in self.handlers:
            copy = copy_of(self.handlers[job.log.shape], job.log.file)
            write_records(job.records, [copy])
            copy.close()
            returned.status = status
        else:
            self._end_as_hydra(job, returned, status)
        job.records.clear()

    def _end_as_hydra(self, job: SweepJob, returned: JobReturn, status: JobStatus) -> None:
        config, before = job.config, os.getcwd()
        files: list[logging.FileHandler] = []
        try:
            with known_to_hydra(config):
                if changes_folder(config):
                    assert job.path is not None
                    os.chdir(job.path)
                    returned.working_dir = str(job.path)
                configure_log(config.hydra.job_logging, config.hydra.verbose)
                with env_override(config.hydra.job.env_set):
                    callbacks = self.hydra_context.callbacks
                    callbacks.on_job_start(config=config, task_function=self.task_function)
                    files = [h for h in logging.getLogger().handlers if isinstance(h, logging.FileHandler)]
                    write_records(job.records, files)
                    returned.status = status
                if job.log is not None and [type(file) for file in files] == [logging.FileHandler]:
                    self.handlers[job.log.shape] = files[0]
                callbacks.on_job_end(config=config, job_return=returned)
        finally:
            os.chdir(before)
            self._log_as_sweep()
            for file in files:  # they are still there where a sweep sets up no logging of its own
                logging.getLogger().removeHandler(file)
                file.close()


class LazyReturn(JobReturn):
    """A JobReturn that composes its configurations when it is asked for them: a sweeper keeps those of all jobs."""

    def __init__(self, compose: Callable[[], DictConfig]) -> None:
        self.compose = compose
        super().__init__()

    @property
    def cfg(self) -> DictConfig:
        return without_hydra(self.compose())

    @cfg.setter
    def cfg(self, value: Any) -> None: ...

    @property
    def hydra_cfg(self) -> DictConfig:
        return OmegaConf.masked_copy(self.compose(), "hydra")

    @hydra_cfg.setter
    def hydra_cfg(self, value: Any) -> None: ...


def place(config: DictConfig, path: Path) -> None:
    """Note a job's directory in its configuration, as Hydra does."""
    with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = os.path.abspath(path)


def without_hydra(config: DictConfig) -> DictConfig:
    """A composed configuration as a task sees it; the one given is changed."""
    with read_write(config), open_dict(config):
        del config["hydra"]
    return config


class known_to_hydra:
    """The block in which `${hydra:...}` and HydraConfig mean this job."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config

    def __enter__(self) -> None:
        OmegaConf.set_readonly(self.config.hydra, True)
        self.before = HydraConfig.instance().cfg
        HydraConfig.instance().cfg = self.config  # type: ignore[assignment]

    def __exit__(self, *error: object) -> None:
        HydraConfig.instance().cfg = self.before


def save_configuration(config: DictConfig, folder: Path) -> None:
    """Write config.yaml, hydra.yaml and overrides.yaml as Hydra does, unless they are there."""
    last = folder / "overrides.yaml"
    if last.is_file() and last.stat().st_size:  # a job that is resumed: its record is of how it began
        return
    folder.mkdir(parents=True, exist_ok=True)
    values = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    assert isinstance(values, dict)
    hydra = values.pop("hydra")
    text = "".join(to_yaml_again(pickle.dumps({key: value})) for key, value in values.items())
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    parts = (to_yaml_again(pickle.dumps({"hydra": {key: value}})) for key, value in hydra.items())
    text = "hydra:\n" + "".join(part.removeprefix("hydra:\n") for part in parts)
    (folder / "hydra.yaml").write_text(text, encoding="utf-8")
    last.write_text(to_yaml(hydra["overrides"]["task"]), encoding="utf-8")


def to_yaml(value: Any) -> str:
    """The text that OmegaConf.to_yaml would give, by libyaml where PyYAML has it: five times as fast."""
    return yaml.dump(value, default_flow_style=False, allow_unicode=True, sort_keys=False, Dumper=_dumper())


@functools.lru_cache(1024)
def to_yaml_again(pickled: bytes) -> str:
    """The text of a part of a configuration: most are the same in all jobs of a sweep."""
    return to_yaml(pickle.loads(pickled))


@functools.cache
def _dumper() -> Any:
    plain = get_omega_conf_dumper()
    if not hasattr(yaml, "CDumper"):
        return plain
    fast = type("FastDumper", (yaml.CDumper,), {})
    fast.add_representer(str, OmegaConfDumper.str_representer)  # type: ignore[attr-defined]
    return fast


def write_records(records: Sequence[logging.LogRecord], files: Sequence[logging.FileHandler]) -> None:
    for record in records:
        for file in files:
            file.handle(record)


def copy_of(handler: logging.FileHandler, file: str) -> logging.FileHandler:
    """A handler like another one, which writes into another file."""
    copy = logging.FileHandler(file, handler.mode, handler.encoding, handler.delay, handler.errors)
    copy.setFormatter(handler.formatter)
    copy.filters = handler.filters
    return copy


def changes_folder(config: DictConfig) -> bool:
    """Whether a job is run in its own directory."""
    chdir = config.hydra.job.chdir
    return bool(not version.base_at_least("1.2") if chdir is None else chdir)


def remember_compositions(loader: Any) -> Callable[[DictConfig, list[str]], DictConfig]:
    """Compose what a sweep's jobs have in common once, and each job only as far as it differs.

    Hydra composes every job from its files, twice: its sweeper to check it, its launcher to run it. Jobs that differ in
    values alone, and not in options of groups, share one composition here, which is copied and given their values, by
    Hydra's own function. The configurations are equal to Hydra's; a test compares them. What a sweeper gets, to check
    it, is good until it asks for the next: copying is most of what a composition costs. What is returned composes a
    configuration of one's own.
    """
    if hasattr(loader, "_kd_composed"):
        return loader._kd_composed
    compose = loader.load_sweep_config
    skeletons: dict[tuple[str, ...], bytes] = {}
    scratch: dict[tuple[Any, ...], DictConfig] = {}  # the last one given to a sweeper
    parse = functools.lru_cache(10_000)(OverridesParser.create().parse_override)
    is_group = functools.cache(loader.repository.group_exists)

    def composed(master_config: DictConfig, sweep_overrides: list[str], *, shared: bool = False) -> DictConfig:
        parsed = [parse(str(override)) for override in sweep_overrides]
        common, values = split(parsed, is_group)
        if not values:
            return compose(master_config, sweep_overrides)
        key = tuple(str(o.input_line) for o in common)
        if key not in skeletons:
            if len(skeletons) >= SKELETONS:
                skeletons.clear()
            skeletons[key] = pickle.dumps(compose(master_config, list(key)))
        keys = (key, *(o.key_or_group for o in values))
        config: DictConfig = (shared and scratch.get(keys)) or pickle.loads(skeletons[key])
        if shared:
            scratch.clear()
            scratch[keys] = config
        OmegaConf.copy_cache(from_config=master_config, to_config=config)
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

    loader._kd_composed = composed
    loader.load_sweep_config = functools.partial(composed, shared=True)
    return composed


def split(overrides: Sequence[Override], is_group: Callable[[str], bool]) -> tuple[list[Override], list[Override]]:
    """What shapes a composition, and the values that can be set in it afterwards.

    A value stays with the former when a key is added or deleted after it, lest their order change.
    """
    structural = [k for k, o in enumerate(overrides) if o.type != OverrideType.CHANGE]
    last = max(structural, default=-1)
    values = [
        k
        for k, o in enumerate(overrides)
        if k > last and o.package is None and not o.is_hydra_override() and not is_group(o.key_or_group)
    ]
    return [o for k, o in enumerate(overrides) if k not in values], [overrides[k] for k in values]


def register() -> None:
    """Make `hydra/launcher=fused` known to Hydra."""
    plugins = Plugins.instance()
    plugins.register(FusedLauncher)
    plugins.class_name_to_class[TARGET] = FusedLauncher
    ConfigStore.instance().store(group="hydra/launcher", name=NAME, node={"_target_": TARGET}, provider="kd_cli")
