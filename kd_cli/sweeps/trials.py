"""The trials of a search: proposed by Optuna, recorded in a file of our own, from which a resumed search goes on."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from kd_cli.errors import ConfigError, StorageError
from kd_cli.storage.files import read_json, write_json
from kd_cli.sweeps.search_space import Choices, Interval, Space

FILE = "search.json"
ENOUGH = 20  # completed trials from which on the importance of keys is given


def optuna() -> ModuleType:
    """The package. Raises ConfigError that names the extra where it is missing or too old."""
    try:
        import optuna as package
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise ConfigError(
            "hydra/sweeper=search needs Optuna, which is not installed", hint="pip install 'kd-cli[search]'"
        ) from error
    if int(package.__version__.partition(".")[0]) < 5:
        raise ConfigError(
            f"hydra/sweeper=search needs Optuna 5, and {package.__version__} is installed",
            hint="pip install 'kd-cli[search]', not beside hydra-optuna-sweeper, which wants an old one",
        )
    package.logging.set_verbosity(package.logging.WARNING)
    module: ModuleType = package
    return module


@dataclass
class Trial:
    """One setting: the value of each searched key, its jobs, and its objectives; None where a job did not complete."""

    number: int
    values: dict[str, Any]  # as Optuna has them
    words: dict[str, str]  # as the command line has them
    jobs: list[str] = field(default_factory=list)  # names of their directories
    objectives: dict[str, float] | None = None
    curves: list[list[float]] = field(default_factory=list)  # the objective of each job after each epoch, with pruning
    pruned: int | None = None  # the epoch after which its trainings were ended


class Trials:
    """The trials of a search, by Optuna's tree-structured Parzen estimator, batch by batch.

    Each batch has a sampler of its own, seeded by the search's seed and the number of trials before it, that sees the
    recorded trials and nothing else: a resumed search proposes what an uninterrupted one would have.
    """

    def __init__(
        self, space: Space, objectives: Sequence[str], seed: int, folder: Path, *, prune: str = "none"
    ) -> None:
        self.package, self.prune = optuna(), prune
        self.space, self.names, self.seed, self.file = space, list(objectives), seed, folder / FILE
        self.all: list[Trial] = []
        kinds = self.package.distributions
        self.distributions: dict[str, Any] = {}
        for key, values in space.searched.items():
            if isinstance(values, Choices):
                self.distributions[key] = kinds.CategoricalDistribution(list(values.words))
            elif values.step is None:
                self.distributions[key] = kinds.FloatDistribution(values.low, values.high, log=values.log)
            else:
                low, high = int(values.low), int(values.high)
                self.distributions[key] = kinds.IntDistribution(low, high, log=values.log, step=values.step)

    def load(self) -> None:
        """Go on from the trials that an earlier process recorded. Raises StorageError for those of another search."""
        if not self.file.is_file():
            return
        try:
            noted = read_json(self.file)
            trials = [Trial(**trial) for trial in noted["trials"]]
            same = noted["search"] == self.facts()
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StorageError(f"{self.file} cannot be read: {error}", hint="start the search anew") from error
        if not same:
            raise StorageError(f"{self.file} is that of a search with other words", hint="start the search anew")
        self.all = trials

    @property
    def done(self) -> list[Trial]:
        """The trials with a result."""
        return [trial for trial in self.all if trial.objectives is not None]

    def is_hopeless(self, curve: Sequence[float], others: Sequence[Sequence[float]], warm_up: int) -> bool:
        """Whether Optuna's median rule ends a trial after the last epoch of its curve, compared with completed ones."""
        pruner = self.package.pruners.MedianPruner(n_warmup_steps=warm_up)
        study = self.package.create_study(direction="minimize", pruner=pruner)
        study.add_trials([self._completed(other) for other in others])
        trial = study.ask()
        for epoch, value in enumerate(curve, 1):
            trial.report(value, epoch)
        return bool(trial.should_prune())

    def _completed(self, curve: Sequence[float]) -> Any:
        state = self.package.trial.TrialState.COMPLETE
        steps = dict(enumerate(curve, 1))
        return self.package.trial.create_trial(state=state, value=curve[-1], intermediate_values=steps)

    def importance(self, name: str) -> dict[str, float]:
        """The share of each searched key in what decides this objective; empty for few trials, or a single key.

        PED-ANOVA (Watanabe et al. 2023), of which the numbers add up to 1.
        """
        done = self.done
        values = {trial.objectives[name] for trial in done if trial.objectives}
        if len(done) < ENOUGH or len(values) < 2 or len(self.distributions) < 2:
            return {}
        study = self.package.create_study(direction="minimize")  # of this objective: Optuna warns of a `target`
        study.add_trials([self._as_optunas(trial, [name]) for trial in done])
        # of a tenth of 20 trials, its default, chance decides
        evaluator = self.package.importance.PedAnovaImportanceEvaluator(target_quantile=0.25, evaluate_on_local=False)
        found: dict[str, float] = self.package.importance.get_param_importances(study, evaluator=evaluator)
        return found

    def propose(self, count: int) -> list[Trial]:
        """The next trials. Real numbers have four significant digits."""
        sampler = self.package.samplers.TPESampler(seed=1000 * self.seed + len(self.all))
        study = self.package.create_study(directions=["minimize"] * len(self.names), sampler=sampler)
        study.add_trials([self._as_optunas(trial, self.names) for trial in self.all])
        found = []
        for k in range(count):
            asked = study.ask(self.distributions).params
            values = {key: self._rounded(key, value) for key, value in asked.items()}
            found.append(Trial(len(self.all) + k, values, {key: str(value) for key, value in values.items()}))
        return found

    def report(self, trials: Sequence[Trial]) -> None:
        """Record a batch of finished trials."""
        self.all += trials
        chosen = [trial.number for trial in self.best()]
        noted = [without_unused(asdict(trial)) for trial in self.all]
        write_json(self.file, {"search": self.facts(), "trials": noted, "chosen": chosen})

    def facts(self) -> dict[str, Any]:
        """What must be equal for recorded trials to be those of this search."""
        kinds = {key: {type(v).__name__: asdict(v)} for key, v in self.space.searched.items()}
        plain = {key: {kind: _lists(values) for kind, values in one.items()} for key, one in kinds.items()}
        facts = {"searched": plain, "seeds": self.space.seeds, "objectives": self.names, "seed": self.seed}
        return facts if self.prune == "none" else {**facts, "prune": self.prune}

    def best(self) -> list[Trial]:
        """The trial with the smallest objective; of several objectives, the trials that no other one dominates."""
        done = self.done
        if len(self.names) == 1 and done:
            return [min(done, key=lambda trial: trial.objectives[self.names[0]])]  # type: ignore[index]
        rows = {trial.number: [trial.objectives[name] for name in self.names] for trial in done if trial.objectives}
        return [trial for trial in done if not any(dominates(row, rows[trial.number]) for row in rows.values())]

    def _rounded(self, key: str, value: Any) -> Any:
        """A real number with few digits, where they lie in its interval."""
        where = self.space.searched[key]
        if not isinstance(value, float) or not isinstance(where, Interval):
            return value
        short = float(f"{value:.4g}")
        return short if where.low <= short <= where.high else value

    def _as_optunas(self, trial: Trial, names: Sequence[str]) -> Any:
        state = self.package.trial.TrialState
        values = None if trial.objectives is None else [trial.objectives[name] for name in names]
        kind, steps = state.FAIL if values is None else state.COMPLETE, {}
        if trial.pruned is not None:  # the sampler ranks pruned trials behind the others, by how far they came
            own = mean_curve([curve[: trial.pruned] for curve in trial.curves if curve])
            kind, steps = state.PRUNED, dict(enumerate(own, 1))
        return self.package.trial.create_trial(
            state=kind,
            params=trial.values,
            distributions=self.distributions,
            values=values,
            intermediate_values=steps,
        )


def without_unused(trial: dict[str, Any]) -> dict[str, Any]:
    """A trial's record without what a search without pruning does not have."""
    return {key: value for key, value in trial.items() if key not in ("curves", "pruned") or value not in ([], None)}


def mean_objectives(found: Sequence[Mapping[str, float] | None]) -> dict[str, float] | None:
    """The means over a trial's jobs; None where one of them did not complete."""
    rows = [values for values in found if values is not None]
    if len(rows) < len(found):
        return None
    return {name: statistics.fmean(values[name] for values in rows) for name in rows[0]}


def mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    """The means of several curves, epoch by epoch, as far as all of them go."""
    return [statistics.fmean(values) for values in zip(*curves, strict=False)]


def dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether `one` is nowhere larger than `other`, and somewhere smaller."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and list(one) != list(other)


def _lists(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
