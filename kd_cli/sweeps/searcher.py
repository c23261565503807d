"""A Hydra sweeper that searches: Optuna proposes settings, batch by batch, and the launcher trains a batch together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from kd_cli.errors import ConfigError, KdError
from kd_cli.numeric import is_whole
from kd_cli.storage.files import write_text
from kd_cli.sweeps.hydra_internals.registration import register_plugin, store_node
from kd_cli.sweeps.launcher import FusedLauncher
from kd_cli.sweeps.objectives import check_objectives, measured, shown
from kd_cli.sweeps.pruning import MedianPruning, check_pruning, curves, pruned_lines
from kd_cli.sweeps.search_page import PAGE, page
from kd_cli.sweeps.search_space import Space
from kd_cli.sweeps.task import Task
from kd_cli.sweeps.trials import Trial, Trials, mean_objectives

log = logging.getLogger(__name__)

NAME = "search"
LISTED = 5  # trials that the last line names


class SearchSweeper(Sweeper):
    """Searches for the values that minimise `objectives`, in `trials` trials of which `batch` are trained together."""

    def __init__(
        self,
        trials: int,
        batch: int,
        objectives: Sequence[str],
        seed: int,
        params: dict[str, str] | None,
        prune: str = "none",
    ) -> None:
        self.trials, self.batch, self.seed, self.prune = trials, batch, seed, prune
        self.objectives, self.params = objectives, params or {}

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`."""
        self.hydra_context, self.config = hydra_context, config  # which the base class reads, too
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Train the trials; the best are logged and stand in search.json in the sweep's folder."""
        assert self.hydra_context is not None
        assert self.config is not None
        self._check(self.config)
        words = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        space = Space.of(parser.parse_overrides(words))
        folder = Path(str(self.config.hydra.sweep.dir))
        trials = Trials(space, self.objectives, self.seed, folder, prune=self.prune)
        check_pruning(self.prune, trials, together=isinstance(self.launcher, FusedLauncher))
        if OmegaConf.select(self.config, "dry_run", default=False):
            self._dry_run(trials, space)
            return []
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        trials.load()
        returns: list[Sequence[JobReturn]] = []
        while len(trials.all) < self.trials:
            returns.append(self._train_batch(trials, space, folder))
        for line in result(trials, self.trials):
            log.info("%s", line)
        write_text(folder / PAGE, page(trials))
        return returns

    def _check(self, config: DictConfig) -> None:
        """ConfigError for keys of the sweeper that have no meaning; Hydra would wrap an error of the constructor."""
        for key, value, least in (("trials", self.trials, 1), ("batch", self.batch, 1), ("seed", self.seed, 0)):
            if not is_whole(value) or value < least:
                raise ConfigError(f"hydra.sweeper.{key} is {value!r}; it must be a whole number, {least} or more")
        fraction = OmegaConf.select(config, "dataset.val_fraction", default=None)
        check_objectives(self.objectives, validated=fraction != 0)

    def _train_batch(self, trials: Trials, space: Space, folder: Path) -> Sequence[JobReturn]:
        """Propose, train and record the next trials. Raises KdError when none of them has a result."""
        batch = trials.propose(min(self.batch, self.trials - len(trials.all)))
        jobs = [job for trial in batch for job in space.jobs(trial.words)]
        each = len(jobs) // len(batch)
        if not trials.all:
            self.validate_batch_is_legal(jobs)
        assert self.launcher is not None
        if self.prune != "none":
            Task.pruning = MedianPruning(trials, batch, each * len(trials.all))
        returns = self.launcher.launch(jobs, initial_job_idx=each * len(trials.all))
        Task.pruning = None
        paths = [folder_of(returned) for returned in returns]
        found = measured(paths, self.objectives)
        for k, trial in enumerate(batch):
            own = slice(each * k, each * (k + 1))
            trial.jobs = [path.name for path in paths[own]]
            trial.objectives = mean_objectives(found[own])
            if self.prune != "none":
                trial.curves, trial.pruned = curves(paths[own], trials.names[0])
        trials.report(batch)
        if all(trial.objectives is None and trial.pruned is None for trial in batch):
            raise KdError(f"none of the {len(batch)} trials of a batch has a result", hint="the jobs' errors are above")
        first, last = batch[0].number + 1, batch[-1].number + 1
        pruned = sum(trial.pruned is not None for trial in batch)
        ended = f" ({pruned} pruned)" if pruned else ""
        best = said(trials.best()[0])
        log.info("trials %d to %d of %d%s; best so far: %s", first, last, self.trials, ended, best)
        return returns

    def _dry_run(self, trials: Trials, space: Space) -> None:
        """Show the first batch; what follows depends on its results."""
        assert self.launcher is not None
        batch = trials.propose(min(self.batch, self.trials))
        self.launcher.launch([job for trial in batch for job in space.jobs(trial.words)], initial_job_idx=0)
        if self.trials > len(batch):
            print(f"{self.trials - len(batch)} more trials follow, which depend on the results of these")


def folder_of(returned: JobReturn) -> Path:
    """The directory of a finished job."""
    hydra: Any = returned.hydra_cfg
    return Path(str(hydra.hydra.runtime.output_dir))


def said(trial: Trial) -> str:
    """A trial in words: its objectives, its setting, its jobs."""
    setting = ", ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in trial.values.items()
    )
    objectives = shown(trial.objectives) if trial.objectives else "no result"
    return f"{objectives} with {setting} (trial {trial.number + 1}: {', '.join(trial.jobs[:1])})"


def result(trials: Trials, total: int) -> list[str]:
    """Lines on what the search chose."""
    best, names = trials.best(), ", ".join(trials.names)
    n = len(trials.space.seeds) or 1
    by = names + (f", means of {n} seeds" if n > 1 else "")
    failed = sum(trial.objectives is None and trial.pruned is None for trial in trials.all)
    lines = [f"{failed} of {total} trials have no result and are not chosen"] if failed else []
    lines += pruned_lines(trials.all)
    if len(trials.names) == 1:
        if found := trials.importance(trials.names[0]):
            ordered = sorted(found.items(), key=lambda one: -one[1])
            lines.append("importance: " + ", ".join(f"{key} {share:.2f}" for key, share in ordered))
        return [*lines, f"chosen of {total} trials by {by}: {said(best[0])}"]
    first = trials.names[0]
    best.sort(key=lambda trial: (trial.objectives or {})[first])
    lines.append(f"{len(best)} of {total} trials are better than every other one in one of {by}, by {first}:")
    lines += [f"  {said(trial)}" for trial in best[:LISTED]]
    return lines + ([f"  and {len(best) - LISTED} more in search.json"] if len(best) > LISTED else [])


def register() -> None:
    """Make `hydra/sweeper=search` known to Hydra."""
    node = {
        "_target_": register_plugin(SearchSweeper),
        "trials": 40,
        "batch": 8,
        "objectives": ["val_error"],
        "seed": 0,
        "params": None,
        "prune": "none",
    }
    store_node(NAME, node, group="hydra/sweeper")
