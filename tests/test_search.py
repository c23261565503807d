"""Searching with Optuna: the space, the objectives, batches that are trained together, and a search that goes on."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from process import Ran

from kd_cli.errors import ConfigError, StorageError
from kd_cli.sweeps.objectives import check_objectives, measured, shown
from kd_cli.sweeps.search_page import page
from kd_cli.sweeps.search_space import Choices, Interval, Space
from kd_cli.sweeps.trials import FILE, Trial, Trials, dominates, mean_objectives

installed = pytest.mark.usefixtures("_optuna")


def space(*words: str) -> Space:
    return Space.of(OverridesParser.create().parse_overrides(list(words)))


# ---------------------------------------------------------------- the space


def test_the_space_is_read_from_hydras_words() -> None:
    found = space(
        *("T=tag(log,interval(1,20))", "alpha=interval(0,2)", "beta=0.5", "training.epochs=int(interval(5,9))"),
        *("student.hidden=[30,30],[300]", "method.K=range(2,9,3)", "method=choice(dkd,dist)", "seed=range(2)"),
    )
    assert found.searched == {
        "T": Interval(1.0, 20.0, log=True),
        "alpha": Interval(0.0, 2.0),
        "training.epochs": Interval(5, 9, step=1),
        "student.hidden": Choices(("[30,30]", "[300]")),
        "method.K": Interval(2, 8, step=3),
        "method": Choices(("dkd", "dist")),
    }
    assert found.fixed == ["beta=0.5"]
    assert found.jobs({"T": "3.0"}) == [["beta=0.5", "T=3.0", "seed=0"], ["beta=0.5", "T=3.0", "seed=1"]]
    assert space("T=1,2", "alpha=3").jobs({"T": "1"}) == [["alpha=3", "T=1"]]  # the seed is that of the configuration


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["T=2"], "there is nothing to search"),
        (["seed=range(3)"], "there is nothing to search"),
        (["T=interval(5,2)"], "the interval from 5 to 2"),
        (["T=tag(log,interval(0,2))"], "it must go from above 0 up"),
        (["T=1,2", "seed=interval(0,9)"], "seed is an interval"),
        (["T=tag(log,choice(1,2))"], "no logarithmic scale"),
    ],
)
def test_a_space_without_a_meaning_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space(*words)


# ---------------------------------------------------------------- the objectives


@pytest.mark.parametrize(
    ("names", "validated", "message"),
    [
        (["val_eror"], True, "val_error"),
        ([], True, "is empty"),
        (["flops", "flops"], True, "names one twice"),
        (["val_nll"], False, "needs validation data"),
    ],
)
def test_an_objective_that_cannot_be_is_refused(names: list[str], validated: bool, message: str) -> None:
    with pytest.raises(ConfigError) as found:
        check_objectives(names, validated=validated)
    assert message in f"{found.value.message} {found.value.hint}"


def test_objectives_are_means_over_seeds_and_none_where_a_job_has_no_result() -> None:
    one, other = {"val_error": 0.25, "parameters": 17610.0}, {"val_error": 0.75, "parameters": 17610.0}
    assert mean_objectives([one, other]) == {"val_error": 0.5, "parameters": 17610.0}
    assert mean_objectives([one, None]) is None
    assert shown(one) == "val_error 0.2500, parameters 17,610"


def test_one_trial_dominates_another() -> None:
    assert dominates([1, 2], [1, 3])
    assert not dominates([1, 2], [1, 2])
    assert not dominates([1, 2], [2, 1])


# ---------------------------------------------------------------- the trials


def bowl(trial: Trial) -> dict[str, float]:
    """An objective that is smallest at T = 3 and alpha = 1."""
    return {"val_error": (trial.values["T"] / 3 - 1) ** 2 + (trial.values["alpha"] - 1) ** 2}


def searched(folder: Path, count: int, batch: int = 4, names: tuple[str, ...] = ("val_error",)) -> Trials:
    """A search over T and alpha that is continued up to this number of trials."""
    trials = Trials(space("T=tag(log,interval(1,20))", "alpha=interval(0,2)"), names, 0, folder)
    trials.load()
    while len(trials.all) < count:
        proposed = trials.propose(min(batch, count - len(trials.all)))
        for trial in proposed:
            trial.objectives = bowl(trial) | ({"flops": trial.values["T"]} if "flops" in names else {})
        trials.report(proposed)
    return trials


@installed
def test_the_search_finds_the_bottom_better_than_its_random_start(tmp_path: Path) -> None:
    trials = searched(tmp_path, 48)
    (best,) = trials.best()
    assert best.objectives is not None
    start = min(bowl(trial)["val_error"] for trial in trials.all[:10])
    assert bowl(best)["val_error"] < min(0.02, start)
    assert all(1 <= trial.values["T"] <= 20 and float(trial.words["T"]) == trial.values["T"] for trial in trials.all)


@installed
def test_a_search_goes_on_as_if_it_had_not_been_interrupted(tmp_path: Path) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    whole.mkdir()
    again.mkdir()
    expected = searched(whole, 20)
    searched(again, 12)
    found = searched(again, 20)
    assert found.all == expected.all
    assert (again / FILE).read_bytes() == (whole / FILE).read_bytes()
    with pytest.raises(StorageError, match="other words"):
        Trials(space("T=1,2"), ["val_error"], 0, again).load()


@installed
def test_several_objectives_choose_the_trials_that_no_other_dominates(tmp_path: Path) -> None:
    trials = searched(tmp_path, 12, names=("val_error", "flops"))
    best = {trial.number for trial in trials.best()}
    rows = {trial.number: list((trial.objectives or {}).values()) for trial in trials.all}
    for number, row in rows.items():
        beaten = any(all(a <= b for a, b in zip(other, row, strict=True)) and other != row for other in rows.values())
        assert (number in best) is not beaten
    assert json.loads((tmp_path / FILE).read_text())["chosen"] == sorted(best)


@installed
def test_the_key_that_decides_is_the_most_important(tmp_path: Path) -> None:
    trials = Trials(space("T=tag(log,interval(1,20))", "alpha=interval(0,2)"), ["val_error"], 0, tmp_path)
    assert trials.importance("val_error") == {}  # of no trials
    for _ in range(6):
        proposed = trials.propose(5)
        for trial in proposed:
            trial.objectives = {"val_error": (trial.values["T"] - 3) ** 2 + 1e-6 * trial.values["alpha"]}
        trials.report(proposed)
    found = trials.importance("val_error")
    assert found["T"] > 0.7
    assert sum(found.values()) == pytest.approx(1)
    text = page(trials)
    assert "What decides val_error" in text
    assert "importance for val_error" in text


# ---------------------------------------------------------------- the command

SEARCH = [
    *("-m", "hydra/sweeper=search", "hydra.sweeper.trials=4", "hydra.sweeper.batch=2", "hydra.sweep.dir=found"),
    *("teacher=tinymlp", "student=tinymlp", "training.epochs=1", "teacher_training.epochs=1", "device=cpu"),
]
NUMBERS = ["T=tag(log,interval(1,20))", "alpha=interval(0.1,2)", "beta=interval(0,1)", "seed=range(2)"]
NUMBERS += ["optimizer.lr=tag(log,interval(0.001,0.01))"]


@installed
def test_a_search_trains_its_batches_together_and_says_what_it_chose(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run(*SEARCH, *NUMBERS)
    assert ran.code == 0, ran.err
    folder = ran.folder / "found"
    noted = json.loads((folder / FILE).read_text())
    summaries = {path.name: json.loads((path / "summary.json").read_text()) for path in ran.run_dirs}
    assert len(summaries) == 8
    for trial in noted["trials"]:
        runs = [summaries[job] for job in trial["jobs"]]
        assert {run["T"] for run in runs} == {trial["values"]["T"]}
        mean = sum(1 - run["student"]["val"]["accuracy"] for run in runs) / 2
        assert trial["objectives"]["val_error"] == pytest.approx(mean)
        beside = runs[0]["trained_with"]
        assert trial["jobs"][1] in beside["in_one_stack"] + beside["side_by_side"]
    (chosen,) = noted["chosen"]
    errors = [trial["objectives"]["val_error"] for trial in noted["trials"]]
    assert errors[chosen] == min(errors)
    assert f"chosen of 4 trials by val_error, means of 2 seeds: val_error {min(errors):.4f} with T=" in ran.err
    assert "val_error by trial" in (folder / "search.html").read_text()
    rows = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    assert len(rows) == 8
    assert len({row["optimizer.lr"] for row in rows}) == 4

    before = {path: path.stat().st_mtime_ns for path in folder.glob("*/summary.json")}
    noted["trials"], last = noted["trials"][:2], noted["trials"][2:]
    (folder / FILE).write_text(json.dumps(noted))
    for trial in last:
        shutil.rmtree(folder / trial["jobs"][0])
    again = kd_run("resume=found")
    assert again.code == 0, again.err
    assert json.loads((folder / FILE).read_text())["trials"] == [*noted["trials"], *last]
    kept = [path for path in before if path.is_file() and path.stat().st_mtime_ns == before[path]]
    assert len(kept) == 6  # of the 8 jobs, those that were there


@installed
def test_a_search_by_error_and_latency_lists_what_none_dominates(kd_run: Callable[..., Ran]) -> None:
    words = ["student.hidden=[8],[64]", "T=1,4", "hydra.sweeper.objectives=[val_error,latency,parameters]"]
    ran = kd_run(*SEARCH, *words)
    assert ran.code == 0, ran.err
    noted = json.loads((ran.folder / "found" / FILE).read_text())
    sizes = {"[8]": 8 * 65 + 90, "[64]": 64 * 65 + 650}
    for trial in noted["trials"]:
        assert trial["objectives"]["parameters"] == sizes[trial["words"]["student.hidden"]]
        assert trial["objectives"]["latency"] > 0
    assert "trials are better than every other one in one of val_error, latency, parameters" in " ".join(
        ran.err.split()
    )
    assert measured([ran.folder], ["val_error"]) == [None]


@installed
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["T=2"], "there is nothing to search"),
        (["T=1,2", "hydra.sweeper.objectives=[accuracy]"], "hydra.sweeper.objectives has 'accuracy'"),
        (["T=1,2", "hydra.sweeper.trials=0"], "hydra.sweeper.trials is 0"),
        (["T=1,2", "dataset.val_fraction=0"], "needs validation data"),
        (["T=1,2", "hydra.sweeper.trails=3"], "trails"),
        (["T=interval(-3,-1)"], "T is"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_training(
    kd_run: Callable[..., Ran], words: list[str], message: str
) -> None:
    ran = kd_run(*SEARCH, *words)
    assert ran.code != 0
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert "epochs in" not in ran.err + ran.out


@installed
def test_a_dry_run_shows_the_first_batch(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run(*SEARCH, *NUMBERS, "dry_run=true")
    assert ran.code == 0, ran.err
    assert "2 more trials follow, which depend on the results of these" in ran.out
    assert not ran.run_dirs


def test_without_optuna_the_extra_is_named(start: Callable[..., Any], tmp_path: Path) -> None:
    hide = "import sys; sys.modules['optuna'] = None"
    ran = start(*SEARCH, "T=1,2", folder=tmp_path / "work", prelude=hide).wait()
    assert ran.code != 0
    assert "hydra/sweeper=search needs Optuna, which is not installed" in ran.err
    assert "kd-cli[search]" in ran.err
