"""Which trials of a search are hopeless by their validation curves, so that their trainings end early."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from kd_cli.config.values import RunConfig
from kd_cli.errors import ConfigError
from kd_cli.report.read import read_run
from kd_cli.report.words import from_to
from kd_cli.sweeps.objectives import ON_VALIDATION
from kd_cli.sweeps.trials import Trial, Trials, mean_curve

WAYS = ("none", "median")
WARM_UP = 3  # nothing is pruned in the first third of the epochs, whose order of trials says little of the last one's


def check_pruning(way: object, trials: Trials, *, together: bool) -> None:
    """Raise ConfigError for a value of hydra.sweeper.prune that is none, or that the search excludes.

    `together` says that the launcher trains the jobs in this process.
    """
    if way not in WAYS:
        raise ConfigError(f"hydra.sweeper.prune is {way!r}; it must be none or median")
    if way == "none":
        return
    if not together:
        raise ConfigError(
            "hydra.sweeper.prune=median ends trainings of this process, and another launcher than fused is chosen",
            hint="hydra/launcher=fused, or hydra.sweeper.prune=none",
        )
    if len(trials.names) > 1 or trials.names[0] not in ON_VALIDATION:
        raise ConfigError(
            f"hydra.sweeper.prune=median compares validation curves, and the search is by {', '.join(trials.names)}",
            hint="hydra.sweeper.objectives=[val_error] or [val_nll], or hydra.sweeper.prune=none",
        )
    if "training.epochs" in trials.space.searched:
        raise ConfigError(
            "hydra.sweeper.prune=median compares trials after the same epoch of trainings of one length, and "
            "training.epochs is searched",
            hint="a fixed training.epochs, or hydra.sweeper.prune=none",
        )


def value_in(row: Mapping[str, Any], name: str) -> float:
    """An objective after one epoch, from its row of metrics; NaN where it is none."""
    value = row.get("val_accuracy" if name == "val_error" else name)
    if value is None:
        return math.nan
    return 1 - float(value) if name == "val_error" else float(value)


def curves(folders: Sequence[Path], name: str) -> tuple[list[list[float]], int | None]:
    """The objective of each job's student after each epoch, and the last epoch of a pruned one; None without one."""
    found, pruned = [], []
    for run in map(read_run, folders):
        found.append([value_in(row, name) for row in run.history.get("student", [])])
        if run.status == "pruned":
            pruned.append(int(run.summary["pruned_after"]))
    return found, max(pruned, default=None)


def pruned_lines(trials: Sequence[Trial]) -> list[str]:
    """A line on the trials that were pruned and the epochs that this saved; none where there are none."""
    ended = [trial for trial in trials if trial.pruned is not None]
    if not ended:
        return []
    trained = [len(curve) for trial in trials for curve in trial.curves]
    saved = 1 - sum(trained) / (max(trained) * len(trained))
    after = from_to({trial.pruned for trial in ended if trial.pruned is not None})
    epochs = sum(trained)
    return [
        f"{len(ended)} of {len(trials)} trials were pruned after epoch {after} and are not chosen; their students and "
        f"the others were trained for {epochs:,} epochs together, {saved:.0%} fewer than without pruning"
    ]


class MedianPruning:
    """Optuna's median rule for the trials of one batch, whose jobs may be trained together or one after another.

    After an epoch, a trial is hopeless whose best objective so far is above the median of the completed trials'
    after that epoch: the mean over those of its seeds that are trained together, of all trials over the same seeds.
    Trials of earlier batches alone are compared with, so that what is pruned does not depend on which jobs of a batch
    are trained first. The other jobs of a hopeless trial end as well.
    """

    def __init__(self, trials: Trials, batch: Sequence[Trial], first_job: int) -> None:
        """`first_job` is the number of the batch's first job; each trial has as many jobs as there are seeds."""
        self.trials, self.name = trials, trials.names[0]
        self.batch, self.first_job = list(batch), first_job
        self.places: dict[str, tuple[int, int]] = {}  # of the jobs by name: their trial, and which of its seeds
        self.causes: dict[int, str] = {}  # of the trials that are hopeless
        self.epochs = 0

    def begin(self, numbers: Mapping[str, int], configs: Sequence[RunConfig]) -> None:
        """Take the numbers of the jobs by name. Raises ConfigError for jobs that do not have one student each."""
        seeds = len(self.trials.space.seeds) or 1
        self.places = {name: divmod(number - self.first_job, seeds) for name, number in numbers.items()}
        self.epochs = configs[0].student.epochs
        if any(config.peers or len(config.settings()) > 1 for config in configs):
            raise ConfigError(
                "hydra.sweeper.prune=median looks at one student of each job, and peers, T=auto and alpha=auto train "
                "several",
                hint="hydra.sweeper.prune=none",
            )

    def hopeless(self, curves: Mapping[str, Sequence[Mapping[str, Any]]]) -> Set[str]:
        """The names of those of the jobs whose trials are hopeless, by the rows of their epochs so far."""
        of_trials: dict[int, dict[int, list[float]]] = {}
        for name, rows in curves.items():
            trial, seed = self.places[name]
            of_trials.setdefault(trial, {})[seed] = [value_in(row, self.name) for row in rows]
        for trial, own in of_trials.items():
            if trial not in self.causes and (cause := self._cause(own)) is not None:
                self.causes[trial] = f"trial {self.batch[trial].number + 1} is {cause}"
        return {name for name in curves if self.places[name][0] in self.causes}

    def note(self, name: str) -> None:
        self.causes.setdefault(self.places[name][0], "pruned by an earlier process")

    def cause(self, name: str) -> str:
        return self.causes[self.places[name][0]]

    def _cause(self, own: Mapping[int, Sequence[float]]) -> str | None:
        """Why a trial is hopeless, by the curves of some of its seeds; None where it is not."""
        curve = mean_curve(list(own.values()))
        epoch, warm_up = len(curve), max(1, -(-self.epochs // WARM_UP))
        if not warm_up <= epoch < self.epochs or any(map(math.isnan, curve)):
            return None  # a loss that is not finite ends a run by itself
        others = [mean_curve([trial.curves[seed] for seed in own]) for trial in self.trials.done]
        if not self.trials.is_hopeless(curve, others, warm_up):
            return None
        median = statistics.median(other[epoch - 1] for other in others)
        return (
            f"pruned after epoch {epoch} of {self.epochs}: its best {self.name} is {min(curve):.4f}, above the "
            f"{median:.4f} of the median of {len(others)} completed trials"
        )
