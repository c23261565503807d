"""Trials of a search that end early: models that leave a training, the median rule, and what a search says of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import made
import pytest
import torch
from made import InMemory, difference, images, metrics
from process import Ran
from stacks import ADAMW, SGD, UNLIKE, WEIGHTS, Hyper
from test_search import installed, space

from kd_cli.config.values import TrainSpec
from kd_cli.data.digits import digits
from kd_cli.data.normalisation import Normalisation
from kd_cli.data.prepare import prepare
from kd_cli.errors import ConfigError
from kd_cli.learn.engine import Interrupted, Observer, Outcome, Row, fit
from kd_cli.learn.methods import Hard
from kd_cli.learn.stacked.learner import StackedLearner
from kd_cli.models.building import dtype_of
from kd_cli.runs.building import TrainingTask, make_cohort
from kd_cli.runs.device_data import DeviceData, examples_of
from kd_cli.runs.trial_pruning import Staying, fit_pruned
from kd_cli.sweeps.pruning import MedianPruning, check_pruning, pruned_lines
from kd_cli.sweeps.trials import FILE, Trial, Trials, mean_curve

# ---------------------------------------------------------------- models that leave


@pytest.mark.parametrize("optimizer", [ADAMW, SGD])
@pytest.mark.parametrize("hyper", [UNLIKE, [{"lr": 0.02}] * 3])
def test_a_stack_of_some_of_its_models_continues_as_they_would(optimizer: Any, hyper: Hyper) -> None:
    some = hyper if optimizer is ADAMW else [{"lr": one["lr"]} for one in hyper]
    whole = StackedLearner([made.model(made.small, s) for s in range(3)], optimizer, hyper=some, seeds=range(3))
    made.train(whole, seeds=range(3), weights=WEIGHTS, method=Hard(), plan=made.a_plan(epochs=1))
    part = whole.only([0, 2])
    assert torch.equal(part.logits(images(9)), whole.logits(images(9))[[0, 2]])
    assert part.rates(1.0) == [whole.rates(1.0)[0], whole.rates(1.0)[2]]
    made.train(whole, seeds=range(3), weights=WEIGHTS, method=Hard())
    made.train(part, seeds=[0, 2], weights=made.some_weights([1, 8], [1, 0], [0.5, 1]), method=Hard())
    for k, s in enumerate((0, 2)):
        assert difference(part.model_state(k), whole.model_state(s)) < 1e-12


class Leaving:
    """Named models leave after an epoch of theirs."""

    def __init__(self, **after: int) -> None:
        self.after = after

    def hopeless(self, curves: Mapping[str, Sequence[Row]]) -> Set[str]:
        return {name for name, rows in curves.items() if len(rows) >= self.after.get(name, 99)}

    def note(self, name: str) -> None:
        self.after[name] = 0

    def cause(self, name: str) -> str:
        return f"{name} left"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DeviceData:
    dataset = prepare(digits(data_dir=tmp_path_factory.mktemp("none")), val_fraction=0.2)
    normalise, cpu = Normalisation(dataset.mean, dataset.std, dtype_of("float64")), torch.device("cpu")
    train, val, test = (examples_of(p.images, p.labels, normalise) for p in (dataset.train, dataset.val, dataset.test))
    return DeviceData(dataset, cpu, "float64", train, val, test, torch.zeros(1, dtype=torch.float64))


def task(seed: int = 0, hidden: Sequence[int] = (12,), lr: float = 0.01, epochs: int = 3) -> TrainingTask:
    model = {"_target_": "kd_cli.models.mlp.mlp", "hidden": list(hidden), "dropout": 0.1}
    optimizer = {"_target_": "torch.optim.AdamW", "lr": lr}
    schedule = {"_target_": "kd_cli.learn.schedules.Cosine", "warmup": 0.1}
    spec = TrainSpec("mlp", model, epochs, 128, {"jitter": 0}, optimizer, schedule, seed, "float64")
    return TrainingTask(spec, {"_target_": "kd_cli.learn.methods.Hard"})


STACK = [[task(0), task(1), task(0, lr=0.03), task(1, lr=0.03)]]
COHORT = [[task(0), task(0, lr=0.03)], [task(0, hidden=[8, 8])], [task(0, hidden=[9])]]
SEVERAL_SEEDS = [[task(0), task(1), task(2)], [task(s, hidden=[9]) for s in range(3)]]


def trained(
    data: DeviceData, stacks: list[list[TrainingTask]], rule: Leaving | None, **keys: Any
) -> tuple[list[Outcome], list[list[Row]]]:
    """The outcomes of a group whose models are called a, b, ..., and the rows that an observer was shown of each."""
    learner, training = make_cohort(data, stacks, "student_alone")
    tasks = [one for stack in stacks for one in stack]
    names = [chr(ord("a") + i) for i in range(len(tasks))]
    if rule is None:
        return fit(learner, training, **keys), []
    shown: list[list[Row]] = [[] for _ in tasks]

    class Shown(Observer):
        def __init__(self, members: Sequence[int], seen: int) -> None:
            self.members, self.seen = members, seen

        def epoch(self, rows: list[Row]) -> None:
            for i, row in zip(self.members, rows, strict=True):
                if row["epoch"] > self.seen:
                    shown[i].append(row)

    numbers = iter(range(len(tasks)))
    start = Staying(learner, training, [[next(numbers) for _ in stack] for stack in stacks])
    keys = {"checkpoint": None, **keys}
    return fit_pruned(start, tasks, names, rule, data=data, role="student_alone", observer=Shown, **keys), shown


@pytest.mark.parametrize(
    ("stacks", "after", "left"),
    [
        (STACK, {"b": 1, "c": 2}, [None, 1, 2, None]),
        (STACK, dict.fromkeys("abcd", 1), [1, 1, 1, 1]),
        (COHORT, {"a": 1, "c": 1, "d": 2}, [1, None, 1, 2]),
        (COHORT, {"b": 0}, [None, 0, None, None]),
        (SEVERAL_SEEDS, {"a": 1, "d": 1, "e": 1, "f": 2}, [2, None, None, 2, 2, 2]),  # stacks share their batches
    ],
)
def test_those_that_stay_are_trained_as_if_nobody_had_left(
    data: DeviceData, stacks: list[list[TrainingTask]], after: dict[str, int], left: list[int | None]
) -> None:
    found, shown = trained(data, stacks, Leaving(**after))
    expected, _ = trained(data, stacks, None)
    assert [one.left for one in found] == left
    for one, other, rows in zip(found, expected, shown, strict=True):
        n = 3 if one.left is None else one.left
        assert [row["epoch"] for row in one.history] == [row["epoch"] for row in rows] == list(range(1, n + 1))
        for row, whole in zip(metrics(one), metrics(other), strict=False):
            assert row["val_nll"] == pytest.approx(whole["val_nll"], abs=1e-9)
        if one.left is None:
            assert difference(one.state, other.state) < 1e-9
        else:
            assert one.state == {}


def test_a_training_that_models_have_left_is_resumed(data: DeviceData) -> None:
    rule, checkpoint = Leaving(a=1, c=1), InMemory()
    expected, shown = trained(data, COHORT, rule)
    calls = iter([False, True])
    with pytest.raises(Interrupted):
        trained(data, COHORT, rule, checkpoint=checkpoint, stopping=lambda: next(calls))
    assert checkpoint.state is not None
    assert checkpoint.state["epoch"] == 2
    found, again = trained(data, COHORT, rule, checkpoint=checkpoint)
    assert [one.left for one in found] == [1, None, 1, None]
    assert [len(rows) for rows in again] == [len(rows) for rows in shown] == [1, 3, 1, 3]
    for one, other in zip(found, expected, strict=True):
        assert metrics(one) == metrics(other)
        assert one.state.keys() == other.state.keys()
        assert all(torch.equal(one.state[name], other.state[name]) for name in one.state)


# ---------------------------------------------------------------- the median rule


def searched(folder: Path, *curves: Sequence[Sequence[float]], seeds: str = "seed=range(2)") -> MedianPruning:
    """The rule for two trials after completed ones with these curves, one for each seed, of six epochs."""
    trials = Trials(space("T=interval(1,9)", seeds), ["val_error"], 0, folder, prune="median")
    for number, some in enumerate(curves):
        ends = {"val_error": sum(curve[-1] for curve in some) / len(some)}
        trials.all.append(Trial(number, {"T": 2.0}, {"T": "2.0"}, [], ends, [list(curve) for curve in some]))
    rule = MedianPruning(trials, [Trial(5, {}, {}), Trial(6, {}, {})], 10)
    rule.epochs, rule.places = 6, {"p0": (0, 0), "p1": (0, 1), "q0": (1, 0), "q1": (1, 1)}
    return rule


def rows(*errors: float) -> list[Row]:
    return [{"val_accuracy": 1 - error, "epoch": epoch} for epoch, error in enumerate(errors, 1)]


FALLING = (0.5, 0.4, 0.3, 0.2, 0.1, 0.1)
FIVE = [[FALLING, [value + 0.2 for value in FALLING]]] * 5


@installed
def test_a_trial_is_hopeless_whose_best_value_is_above_the_median(tmp_path: Path) -> None:
    rule = searched(tmp_path, *FIVE)
    both = {"p0": rows(0.5, 0.45), "p1": rows(0.7, 0.6), "q0": rows(0.9, 0.39), "q1": rows(0.9, 0.61)}
    assert rule.hopeless(both) == {"p0", "p1"}  # means 0.525 and 0.5; the median after the second epoch is 0.5
    assert rule.cause("p1") == (
        "trial 6 is pruned after epoch 2 of 6: its best val_error is 0.5250, above the 0.5000 of the median of 5 "
        "completed trials"
    )
    assert rule.hopeless({"p0": [], "q0": rows(0.9)}) == {"p0"}  # its other jobs end too
    assert searched(tmp_path, *FIVE[:4]).hopeless(both) == set()  # fewer than five completed trials
    assert searched(tmp_path, *FIVE).hopeless({"p0": rows(0.9), "p1": rows(0.9)}) == set()  # in the first third
    assert searched(tmp_path, *FIVE).hopeless({"p0": rows(*[0.9] * 6)}) == set()  # it has been trained already
    assert searched(tmp_path, *FIVE).hopeless({"p0": rows(math.nan, math.nan)}) == set()  # it diverges


@installed
def test_a_trial_of_which_one_seed_is_trained_is_compared_with_that_seed(tmp_path: Path) -> None:
    rule = searched(tmp_path, *FIVE)
    assert rule.hopeless({"p1": rows(0.7, 0.59), "q0": rows(0.5, 0.41)}) == {"q0"}  # 0.6 and 0.4 are the medians
    rule.note("p0")
    assert rule.hopeless({"p1": rows(0.1, 0.1)}) == {"p1"}  # an earlier process has ended its trial


@installed
@pytest.mark.parametrize(
    ("words", "objectives", "prune", "together", "message"),
    [
        (["T=1,2"], ["val_error"], "mean", True, "must be none or median"),
        (["T=1,2"], ["val_error", "flops"], "median", True, "val_error, flops"),
        (["T=1,2"], ["parameters"], "median", True, "parameters"),
        (["training.epochs=int(interval(2,5))"], ["val_nll"], "median", True, "training.epochs is searched"),
        (["T=1,2"], ["val_error"], "median", False, "another launcher"),
    ],
)
def test_pruning_without_curves_to_compare_is_refused(
    tmp_path: Path, words: list[str], objectives: list[str], prune: str, together: bool, message: str
) -> None:
    trials = Trials(space(*words), objectives, 0, tmp_path)
    with pytest.raises(ConfigError, match=message):
        check_pruning(prune, trials, together=together)


def test_the_epochs_that_pruning_saved_are_counted() -> None:
    whole = Trial(0, {}, {}, [], {"val_error": 0.1}, [[0.1] * 10] * 2)
    pruned = Trial(1, {}, {}, [], None, [[0.9] * 4, []], 4)
    (line,) = pruned_lines([whole, pruned])
    assert line.startswith("1 of 2 trials were pruned after epoch 4 and are not chosen")
    assert "for 24 epochs together, 40% fewer" in line
    assert pruned_lines([whole]) == []
    assert mean_curve([[1.0, 3.0], [2.0]]) == [1.5]


# ---------------------------------------------------------------- the command

SEARCH = [
    *("-m", "hydra/sweeper=search", "hydra.sweeper.trials=9", "hydra.sweeper.batch=5", "hydra.sweeper.prune=median"),
    *("teacher=tinymlp", "student=tinymlp", "training.epochs=3", "teacher_training.epochs=1", "device=cpu"),
    *("T=interval(1,9)", "optimizer.lr=tag(log,interval(0.00001,0.02))", "hydra.sweep.dir=found"),
]


@installed
@pytest.mark.slow
def test_a_search_prunes_trials_and_never_chooses_them(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run(*SEARCH)
    assert ran.code == 0, ran.err
    folder = ran.folder / "found"
    noted = json.loads((folder / FILE).read_text())
    pruned = [trial for trial in noted["trials"] if trial.get("pruned")]
    assert pruned
    assert noted["search"]["prune"] == "median"
    assert not {trial["number"] for trial in pruned} & set(noted["chosen"])
    for trial in pruned:
        assert trial["objectives"] is None
        assert [len(curve) for curve in trial["curves"]] == [trial["pruned"]]
        for job in trial["jobs"]:
            summary = json.loads((folder / job / "summary.json").read_text())
            assert (summary["status"], summary["pruned_after"], summary["student"]) == ("pruned", trial["pruned"], None)
            assert not (folder / job / "student.safetensors").exists()
            assert len((folder / job / "metrics.jsonl").read_text().splitlines()) >= trial["pruned"]
    assert f"{len(pruned)} of 9 trials were pruned after epoch" in " ".join(ran.err.split())
    assert f"0 (1 pruned after epoch {pruned[0]['pruned']})" in ran.out
    assert "pruned after epoch" in (folder / "sweep.csv").read_text()
    assert "val_error by epoch" in (folder / "search.html").read_text()
    before = (folder / FILE).read_bytes()
    again = kd_run("resume=found")
    assert again.code == 0, again.err
    assert (folder / FILE).read_bytes() == before
