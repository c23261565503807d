"""Sweeps: fused as one by one, compositions, names, dry runs, failures, resuming, T=auto, other launchers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from conftest import TINY
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from process import Ran
from safetensors.torch import load_file

from kd_cli.commands.kd_run import prepare
from kd_cli.config.options import conf_dir
from kd_cli.config.read import as_written
from kd_cli.runs.stack_size import smallest_fast_size
from kd_cli.runs.stacks import parts
from kd_cli.sweeps.hydra_internals.checks import RELIES_ON, SWITCH, missing, usable
from kd_cli.sweeps.hydra_internals.compositions import sweep_config_loader
from kd_cli.sweeps.hydra_internals.records import save_configuration, to_yaml
from kd_cli.sweeps.jobs import without_hydra
from kd_cli.sweeps.names import LONGEST, job_dir
from kd_cli.sweeps.task import checked, spread

Run = Callable[..., Ran]
OwnCode = Callable[..., list[str]]
# Launchers, and whether the fused one uses its shortcuts past Hydra's public functions.
LAUNCHERS = ["fused", pytest.param("fused without shortcuts", marks=pytest.mark.slow), "basic"]
OUT = "hydra.sweep.dir=out"
# Numbers and words of a run's record that are its own: times, and where it comes from.
OWN = {"trained_with", "seconds", "examples_per_second", "command", "from_store", "fingerprint", "epoch_seconds"}
OWN |= {"latency"}


def sweep(kd_run: Run, *argv: str, code: int = 0, **options: Any) -> Ran:
    """A sweep of the smallest runs, in the folder `out`."""
    ran = kd_run("-m", *TINY, *argv, *([] if any(a.startswith("hydra.sweep.dir") for a in argv) else [OUT]), **options)
    assert ran.code == code, ran.err
    return ran


@pytest.fixture
def launcher(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name, *without = request.param.split(" ", 1)
    monkeypatch.setenv(SWITCH, "0" if without else "1")
    return name


def summary(path: Path) -> dict[str, Any]:
    return json.loads((path / "summary.json").read_text())


def jobs(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/.hydra"))


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def close(one: Any, other: Any, tolerance: float, at: str = "") -> None:
    """Equal, and numbers to the tolerance, but for what is a run's own."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), at
        for key in one.keys() - OWN:
            close(one[key], other[key], tolerance, f"{at}.{key}")
    elif isinstance(one, list):
        assert len(one) == len(other), at
        for k, (a, b) in enumerate(zip(one, other, strict=True)):
            close(a, b, tolerance, f"{at}[{k}]")
    elif isinstance(one, float) and isinstance(other, float):
        assert one == pytest.approx(other, rel=tolerance, abs=tolerance), at
    else:
        assert one == other, at


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def said(path: Path) -> list[str]:
    """The lines of a job's log without dates and seconds."""
    lines = (path / "run.log").read_text().splitlines()
    assert all(re.match(r"\[\d{4}-\d\d-\d\d [\d:,]+\]\[kd_cli\S*\]\[(INFO|WARNING)\] ", line) for line in lines)
    return [re.sub(r"^(\[[^]]*\]){3}|\d+\.\d s", "", line) for line in lines]


# ---------------------------------------------------------------- fused as one by one


@pytest.mark.parametrize(
    ("precision", "tolerance", "switch"), [("float64", 1e-9, "1"), ("float64", 1e-9, "0"), ("float32", 1e-4, "1")]
)
def test_a_fused_sweep_leaves_what_one_by_one_leaves(
    kd_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, tolerance: float, switch: str
) -> None:
    folders = []
    monkeypatch.setenv(SWITCH, switch)
    for launcher in ("fused", "basic"):
        monkeypatch.setenv("KD_STORE", str(tmp_path / f"store-{launcher}"))
        argv = ("T=1,4", "seed=0,1", "training.epochs=2", "student.dropout=0.2", f"precision={precision}")
        ran = sweep(kd_run, *argv, f"hydra/launcher={launcher}", f"hydra.sweep.dir={launcher}")
        folders.append(tmp_path / launcher)
        assert ("MB each, measured" in ran.err) == (launcher == "fused")
    fused, basic = folders
    assert files(fused) == files(basic)
    for one, other in zip(jobs(fused), jobs(basic), strict=True):
        for name in ("config.yaml", "overrides.yaml"):
            assert (one / ".hydra" / name).read_text() == (other / ".hydra" / name).read_text()
        hydra = [yaml.safe_load((path / ".hydra" / "hydra.yaml").read_text())["hydra"] for path in (one, other)]
        for node in hydra:  # which launcher it was, and where
            del node["launcher"], node["runtime"]["output_dir"], node["runtime"]["choices"]["hydra/launcher"]
            node["overrides"]["hydra"] = node["sweep"]["dir"] = None
        assert hydra[0] == hydra[1]
        close(rows(one), rows(other), tolerance)
        close(summary(one), summary(other), tolerance)
        weights = [load_file(path / "student.safetensors") for path in (one, other)]
        for key, value in weights[0].items():
            assert (value - weights[1][key]).abs().max() < tolerance
        assert said(one) == said(other)


HEARING = """
import logging
from hydra.experimental.callback import Callback

class Hearing(Callback):
    def on_job_end(self, config, job_return, **kwargs):
        logging.getLogger("kd_cli").info("heard of T = %s: %s", config.T, job_return.status.name)
"""
NORMALISED = """
from torch import nn

def net(input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, num_classes))
"""


@pytest.mark.parametrize("launcher", LAUNCHERS, indirect=True)
def test_ones_own_callback_hears_of_each_job(kd_run: Run, own_code: OwnCode, tmp_path: Path, launcher: str) -> None:
    own_code({"hearing.py": HEARING})
    own = "+hydra.callbacks.own._target_=hearing.Hearing"
    sweep(kd_run, "T=1,2", own, f"hydra/launcher={launcher}")
    for job, T in zip(jobs(tmp_path / "out"), (1, 2), strict=True):
        assert said(job)[-1] == f" heard of T = {T}: COMPLETED"


def test_what_is_not_trained_together_runs_one_by_one_and_a_line_says_why(kd_run: Run, own_code: OwnCode) -> None:
    here = own_code({"own.py": NORMALISED, "model/own": "_target_: own.net\n"})
    argv = [word for word in TINY if word != "student.hidden=[8]"]
    ran = kd_run("-m", *here, *argv, "student=own", "seed=0,1", "hydra.sweep.dir=batchnorm")
    assert ran.code == 0, ran.err
    why = "BatchNorm1d keeps running statistics, which do not stack, and they differ in seed"
    assert f"2 × student own by soft_targets run one by one: {why}" in ran.err
    optimizer = [
        "optimizer=sgd",
        "~optimizer.momentum",
        "~optimizer.nesterov",
        "optimizer._target_=torch.optim.Adadelta",
        "seed=0,1",
        "hydra.sweep.dir=optimizer",
    ]
    assert "the optimiser Adadelta has no stacked form" in sweep(kd_run, *optimizer).err


@pytest.mark.parametrize(
    ("swept", "key"),
    [
        ("method=soft_targets,hard", "teacher"),  # hard labels need no teacher
        ("method=soft_targets,feature student=cnn teacher=cnn", "method"),  # which reads a live teacher's features
        ("schedule=constant,cosine", "schedule"),
        ("training.batch_size=64,128", "training.batch_size"),
        ("training.epochs=1,2", "training.epochs"),
        ("transfer.fraction=0.5,1", "transfer"),
        ("teacher_training.seed=0,1", "teacher"),
    ],
)
def test_the_keys_that_keep_students_from_being_stacked_are_named(kd_run: Run, swept: str, key: str) -> None:
    argv = [word for word in TINY if ".hidden" not in word]
    ran = kd_run("-m", *argv, *swept.split(), OUT)
    assert ran.code == 0, ran.err
    (named,) = re.findall(r"2 × student run one by one: those that differ in (.*) are not trained together", ran.err)
    assert named == key


# ---------------------------------------------------------------- compositions


@pytest.fixture
def loader(hydra_restore_singletons: None) -> Iterator[tuple[Any, DictConfig]]:
    GlobalHydra.instance().clear()
    prepare([])
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        found = GlobalHydra.instance().config_loader()
        yield found, found.load_configuration("config", ["hydra.launcher={}"], RunMode.MULTIRUN)


COMBINATIONS = [
    [],
    ["T=3"],
    ["T=3.5", "alpha=0", "beta=1e-3", "seed=17"],
    ["T=auto", "alpha=auto"],
    ["student=tinymlp", "T=3"],
    ["T=3", "student=tinymlp", "student.hidden=[4,5]", "teacher=cnn", "teacher.channels=[1]"],
    ["student.hidden=[]", "student.max_norm=null", "student.dropout=0.5"],
    ["method=soft_targets", "method.square_T=false", "seed=1"],
    ["optimizer=sgd", "optimizer.lr=1", "teacher_optimizer.weight_decay=0.1"],
    ["schedule=step", "schedule.milestones=[0.1,0.9]", "training.epochs=3", "training.flip=true"],
    ["dataset=mnist", "training.epochs=2", "teacher_training.seed=4"],
    ["device='cuda:1'", 'data_dir="a folder/with, comma=and=equals"', "store_dir='${oc.env:HOME}/x'"],
    ["data_dir='tr\u00fcb: #no'", "store_dir='~/x'", "precision=float64"],
    ["data_dir='1.50'", "store_dir='null'", "resume='yes'"],
    ["+student.extra=1", "student.extra=2"],
    ["student.dropout=0.5", "++student.dropout=0.6", "student.dropout=0.7"],
    ["T=2", "~student.hidden", "seed=3"],
    ["student.hidden=[1]", "~student.hidden", "T=9"],
    ["hydra.job.name=other", "T=2", "hydra.sweep.subdir=${hydra.job.num}", "seed=1"],
    ["hydra/job_logging=none", "T=2"],
    ["transfer.omit=[3,'seven']", "transfer.fraction=0.5"],
    ["training.epochs=${teacher_training.epochs}", "T=${beta}", "beta=2"],
    ["T=1", "T=2"],
]


needs_shortcuts = pytest.mark.skipif(not usable("compositions") or not usable("jobs"), reason="not with this Hydra")


@needs_shortcuts
@pytest.mark.parametrize("overrides", COMBINATIONS, ids=" ".join)
def test_a_remembered_composition_is_hydras_own(loader: tuple[Any, DictConfig], overrides: list[str]) -> None:
    found, master = loader
    expected = found.load_sweep_config(master, overrides)
    own = sweep_config_loader(found)
    found.load_sweep_config(master, ["T=77", *overrides[:1]])  # something has been remembered
    for compose in (found.load_sweep_config, own, found.load_sweep_config, own):
        config = compose(master, overrides)
        assert OmegaConf.to_yaml(config) == OmegaConf.to_yaml(expected)
        types = [
            {key: type(node._get_node(key)) for node in tree(some) for key in keys_of(node)}
            for some in (config, expected)
        ]
        assert types[0] == types[1]


def tree(node: Any) -> Iterator[Any]:
    yield node
    for key in keys_of(node):
        child = node._get_node(key)
        if OmegaConf.is_config(child):
            yield from tree(child)


def keys_of(node: Any) -> list[Any]:
    if node._is_none() or node._is_interpolation() or node._is_missing():
        return []
    return list(node.keys()) if OmegaConf.is_dict(node) else list(range(len(node)))


@pytest.mark.parametrize("overrides", [["training.epochs=many"], ["T=1", "studnt=x"], ["seed=1", "beta.x=1"]])
def test_a_remembered_composition_refuses_what_hydra_refuses(
    loader: tuple[Any, DictConfig], overrides: list[str]
) -> None:
    found, master = loader
    with pytest.raises(Exception, match=r"override") as expected:
        found.load_sweep_config(master, overrides)
    sweep_config_loader(found)
    with pytest.raises(type(expected.value)) as refused:
        found.load_sweep_config(master, overrides)
    assert str(refused.value) == str(expected.value)


@pytest.mark.parametrize("shortcut", RELIES_ON)
def test_a_shortcut_is_used_where_all_that_it_relies_on_is_there(
    shortcut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert missing(shortcut) is None or not hydra.__version__.startswith("1.3")
    assert usable(shortcut) == (missing(shortcut) is None)
    monkeypatch.setenv(SWITCH, "0")
    assert not usable(shortcut)


@pytest.mark.parametrize("shortcut", RELIES_ON)
def test_a_shortcut_is_not_used_where_hydra_has_other_names_or_signatures(
    shortcut: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (module, name, parameters), *others = RELIES_ON[shortcut]
    assert parameters is not None
    for changed in ((module, name + "_gone", parameters), (module, name, (*parameters, "more"))):
        missing.cache_clear()
        monkeypatch.setitem(RELIES_ON, shortcut, (*others, changed))
        assert not usable(shortcut)
        assert str(missing(shortcut)).startswith(f"{module}.{name}") or not hydra.__version__.startswith("1.3")
    missing.cache_clear()


@needs_shortcuts
@pytest.mark.parametrize("overrides", COMBINATIONS, ids=" ".join)
def test_the_record_of_a_job_is_written_as_omegaconf_writes_it(
    loader: tuple[Any, DictConfig], overrides: list[str], tmp_path: Path
) -> None:
    found, master = loader
    config = found.load_sweep_config(master, overrides)
    save_configuration(as_written(config), tmp_path)
    values = OmegaConf.masked_copy(config, [key for key in config if key != "hydra"])
    assert (tmp_path / "config.yaml").read_text() == OmegaConf.to_yaml(values)
    assert (tmp_path / "hydra.yaml").read_text() == OmegaConf.to_yaml(OmegaConf.masked_copy(config, "hydra"))
    assert (tmp_path / "overrides.yaml").read_text() == OmegaConf.to_yaml(config.hydra.overrides.task)


@needs_shortcuts
def test_long_words_and_odd_ones_survive_the_fast_writer() -> None:
    odd = {
        "long": "word " * 60,
        "lines": "a\nb\n",
        "like": ["1", "1e3", "no", "~", "", " x", "'", '"', "a: b", "#", "\U0001f30a"],
    }
    assert yaml.safe_load(to_yaml(odd)) == odd


# ---------------------------------------------------------------- names


def test_a_jobs_directory_is_short_and_says_what_is_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KD_SWEPT", "T,student.hidden")
    name = job_dir(3, ["teacher=bigmlp", "T=2", "student.hidden=[8,8]", "resume=x/y"])
    assert re.fullmatch(r"003_T=2_hidden=-8-8_[0-9a-f]{8}", name)
    assert name == job_dir(3, ["teacher=bigmlp", "T=2", "student.hidden=[8,8]"])  # found again when resumed
    long = job_dir(1234, [f"student.hidden=[{'8,' * 400}]", "data_dir=/a/b/../c", "T='a/b'"])
    assert len(long) < LONGEST + 20
    assert "/" not in long
    assert long != job_dir(1234, [f"student.hidden=[{'8,' * 401}]", "data_dir=/a/b/../c", "T='a/b'"])


def test_a_value_swept_twice_runs_in_two_directories(kd_run: Run, tmp_path: Path) -> None:
    sweep(kd_run, "T=1,1", "data_dir=a/b", code=0)
    assert len(jobs(tmp_path / "out")) == 2


# ---------------------------------------------------------------- dry runs


def test_a_value_that_refers_to_another_is_resolved_in_each_job(kd_run: Run) -> None:
    ran = sweep(kd_run, "alpha=0.25,0.75", "beta=${alpha}")
    assert [(run["alpha"], run["beta"]) for run in map(summary, ran.run_dirs)] == [(0.25, 0.25), (0.75, 0.75)]
    for path in ran.run_dirs:
        assert json.loads((path / "run.json").read_text())["config"]["beta"] == "${alpha}"


def test_a_log_format_of_the_users_is_resolved_in_each_job(kd_run: Run) -> None:
    ran = sweep(kd_run, "T=1,2", "hydra.job_logging.formatters.dated.format='job ${hydra.job.num}: %(message)s'")
    for number, path in enumerate(ran.run_dirs):
        lines = (path / "run.log").read_text().splitlines()
        assert lines
        assert all(line.startswith(f"job {number}: ") for line in lines)


@pytest.mark.parametrize("launcher", LAUNCHERS, indirect=True)
def test_a_dry_run_of_a_sweep_tells_and_leaves_nothing(kd_run: Run, tmp_path: Path, launcher: str) -> None:
    argv = ("-m", *TINY, "T=1,2", "dry_run=true", f"hydra/launcher={launcher}")
    ran = kd_run(*argv)
    assert ran.code == 0, ran.err
    told = [line for line in ran.out.splitlines() if line]
    assert len(told) == 2
    assert "teacher tinymlp: to train; student tinymlp alone: to train" in told[0]
    assert told[1].startswith("001_T=2_")
    assert list(tmp_path.iterdir()) == []
    assert not Path(os.environ["KD_STORE"]).exists()
    sweep(kd_run, "T=1")
    ran = kd_run(*argv)
    assert ran.out.count("teacher tinymlp: in the store; student tinymlp alone: in the store") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("launcher", LAUNCHERS, indirect=True)
def test_a_dry_run_removes_no_run(kd_run: Run, tmp_path: Path, launcher: str) -> None:
    sweep(kd_run, "T=1,2")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in files(tmp_path / "out") if ".hydra" not in name}
    kd_run("-m", *TINY, "T=1,2", "resume=out", "dry_run=true", f"hydra/launcher={launcher}")
    (job, *_) = jobs(tmp_path / "out")
    kd_run(*TINY, f"hydra.run.dir={job}", "dry_run=true")
    after = {name: (tmp_path / "out" / name).read_bytes() for name in before}
    for name in before:
        if not name.endswith(("multirun.yaml", "run.log")):
            assert after[name] == before[name]


# ---------------------------------------------------------------- failures


@pytest.mark.parametrize("launcher", LAUNCHERS, indirect=True)
def test_a_failed_job_fails_nothing_else_and_is_counted(kd_run: Run, tmp_path: Path, launcher: str) -> None:
    ran = sweep(kd_run, "T=-1,1", "optimizer.lr=0.01,1e30", f"hydra/launcher={launcher}", code=1)
    by_name = {job.name: job for job in jobs(tmp_path / "out")}
    status = {name[:3]: json.loads((job / "summary.json").read_text())["status"]
              for name, job in by_name.items() if (job / "summary.json").exists()}  # fmt: skip
    assert status == {"002": "completed", "003": "diverged"}
    for number, cause in (("000", "T is -1"), ("001", "T is -1"), ("003", "is not a finite number in epoch 1")):
        (name,) = (name for name in by_name if name.startswith(number))
        assert re.search(rf"failed: out/{re.escape(name)}: .*{cause}", ran.err)
        assert cause in (by_name[name] / "run.log").read_text()
    assert "4 runs: 2 failed, 1 completed, 1 diverged" in ran.out
    assert "3 of 4 jobs did not complete" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("launcher", LAUNCHERS, indirect=True)
def test_fail_fast_ends_a_sweep_at_its_first_failure(kd_run: Run, tmp_path: Path, launcher: str) -> None:
    ran = sweep(kd_run, "optimizer.lr=1e30,0.01", "fail_fast=true", f"hydra/launcher={launcher}", code=1)
    assert not list((tmp_path / "out").glob("001*/summary.json"))
    assert "is not a finite number" in ran.err
    sweep(kd_run, "T=-1,1", "fail_fast=true", f"hydra/launcher={launcher}", "hydra.sweep.dir=second", code=1)
    assert not list((tmp_path / "second").glob("001*/summary.json"))


FAILING = """
import resource
import kd_cli.runs.run_many as runner
from kd_cli.runs.distil import Distillation
def failing(self, *args, **keys):
    import numpy as np
    ballast = np.ones(12_000_000)  # 96 MB
    try:
        raise ValueError("first")
    except ValueError as cause:
        held = lambda: ballast
        raise RuntimeError("my bug") from cause
Distillation.finish = failing
def end(*args, main=runner.run_many, **keys):
    main(*args, **keys)
    print("peak MB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
runner.run_many = end
"""


def test_failed_jobs_give_their_memory_back(kd_run: Run) -> None:
    peaks = []
    for n in (1, 8):
        ran = sweep(kd_run, f"seed=range({n})", f"hydra.sweep.dir=out{n}", code=1, prelude=FAILING)
        assert ran.err.count("my bug") >= n
        peaks.append(int(re.search(r"peak MB (\d+)", ran.out)[1]))  # type: ignore[index]
    assert peaks[1] - peaks[0] < 96


# ---------------------------------------------------------------- resuming

KILLED = """
from kd_cli.runs.distil import Distillation
def killed(self, *args, finish=Distillation.finish, done=[], **keys):
    import os, signal
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    finish(self, *args, **keys)
    done.append(1)
Distillation.finish = killed
"""


@pytest.mark.parametrize("launcher", LAUNCHERS, indirect=True)
def test_a_killed_sweep_is_resumed_to_the_same_table(kd_run: Run, tmp_path: Path, launcher: str) -> None:
    argv = ("T=1,4", "seed=0,1", f"hydra/launcher={launcher}", "precision=float64")
    whole = sweep(kd_run, *argv, "hydra.sweep.dir=whole")
    sweep(kd_run, *argv, code=-9, prelude=KILLED)
    done = sorted((tmp_path / "out").glob("*/summary.json"))
    assert len(done) == 2
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in done}
    records = {path: (path.parent / ".hydra" / "config.yaml").read_text() for path in done}
    resumed = kd_run("-m", *TINY, *argv, "resume=out")
    assert resumed.code == 0, resumed.err
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in done} == before
    if launcher == "fused":
        assert {path: (path.parent / ".hydra" / "config.yaml").read_text() for path in done} == records
    assert resumed.out.replace("out", "whole") == whole.out.replace("out", "whole")
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    for one, other in zip(jobs(tmp_path / "out"), jobs(tmp_path / "whole"), strict=True):
        close(rows(one), rows(other), 1e-9)
        close(summary(one), summary(other), 1e-9)


# ---------------------------------------------------------------- T=auto


def test_auto_chooses_on_validation_data_and_is_the_run_with_that_value(kd_run: Run, tmp_path: Path) -> None:
    argv = ("training.epochs=3", "precision=float64", "optimizer.lr=0.03")
    ran = sweep(kd_run, "T=auto", *argv)
    (job,) = jobs(tmp_path / "out")
    told = summary(job)
    auto = told["auto"]
    assert [tried["T"] for tried in auto["tried"]] == [1, 1.5, 2, 3, 4, 5, 8, 10, 20]
    best = min(auto["tried"], key=lambda tried: (-tried["val_accuracy"], tried["val_nll"]))
    assert auto["tried"][auto["chosen"]] == best
    assert told["T"] == best["T"]
    assert f"at T = {best['T']:g}" in ran.err
    given = sweep(kd_run, f"T={best['T']}", *argv, "hydra.sweep.dir=given")
    assert given.code == 0
    (explicit,) = jobs(tmp_path / "given")
    chosen, wanted = (load_file(path / "student.safetensors") for path in (job, explicit))
    for name, value in wanted.items():
        assert (chosen[name] - value).abs().max() < 1e-9
    close([row for row in rows(job) if row["role"] == "student"],
          [row for row in rows(explicit) if row["role"] == "student"], 1e-9)  # fmt: skip
    close(told["student"], summary(explicit)["student"], 1e-9)


def test_a_run_with_auto_shows_the_curve_and_what_was_chosen(kd_run: Run) -> None:
    ran = kd_run(*TINY, "T=auto", "alpha=auto")
    assert ran.code == 0, ran.err
    auto = ran.summary["auto"]
    assert len(auto["tried"]) == 9 * 6
    assert auto["keys"] == ["T", "alpha"]
    assert "chosen on validation data" in ran.out
    page = (ran.run_dir / "report.html").read_text()
    assert "chosen on validation data" in page.lower()


def test_auto_needs_validation_data_and_something_to_choose(kd_run: Run) -> None:
    ran = kd_run(*TINY, "T=auto", "dataset.val_fraction=0")
    assert ran.code == 1
    assert "choose on validation data, and dataset.val_fraction is 0" in ran.err
    ran = kd_run(*TINY, "T=auto", "method=hard")
    assert ran.code == 1
    assert "method=hard has no T to choose" in ran.err


# ---------------------------------------------------------------- other launchers and sweepers


def plug_in(name: str) -> Any:
    found = importlib.util.find_spec("hydra_plugins") and importlib.util.find_spec(f"hydra_plugins.{name}")
    return pytest.mark.skipif(found is None, reason=f"{name} is not installed")


# In a process of its own kind: these start others, which multiprocessing's daemons may not.
def real_run(folder: Path, *argv: str) -> Ran:
    command = [sys.executable, "-m", "kd_cli", "-m", *TINY, *argv, OUT]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    return Ran(done.returncode, done.stdout, done.stderr, folder, jobs(folder / "out"))


@plug_in("hydra_joblib_launcher")
def test_joblib_runs_jobs_side_by_side_and_trains_the_teacher_once(tmp_path: Path) -> None:
    ran = real_run(tmp_path, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "T=1,2,-1")
    assert ran.code == 1
    assert "3 runs: 2 completed, 1 failed" in ran.out or "3 runs: 1 failed, 2 completed" in ran.out
    assert re.search(r"failed: out/002_T=-1_\w+: T is -1", ran.err)
    fresh = [summary(job)["teacher"]["from_store"] for job in ran.run_dirs if (job / "summary.json").exists()]
    assert sorted(fresh) == [False, True]
    assert [job.name[:8] for job in ran.run_dirs] == ["000_T=1_", "001_T=2_", "002_T=-1"]


@plug_in("hydra_optuna_sweeper")
def test_optuna_searches_in_batches_that_are_trained_together(tmp_path: Path) -> None:
    ran = real_run(
        tmp_path,
        *("hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2", "hydra.sweeper.sampler.seed=1"),
        *("T=interval(1,10)", "alpha=choice(0.5,1)"),
    )
    assert ran.code == 0, ran.err
    assert len(ran.run_dirs) == 4
    best = yaml.safe_load((tmp_path / "out" / "optimization_results.yaml").read_text())
    errors = [1 - summary(job)["student"]["val"]["accuracy"] for job in ran.run_dirs]
    assert best["best_value"] == pytest.approx(min(errors))
    assert "4 runs: 4 completed" in ran.out


def test_jobs_of_a_parallel_launcher_spread_over_the_gpus(
    loader: tuple[Any, DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    found, master = loader
    config = found.load_sweep_config(master, ["hydra.job.num=5"])
    hydra = config.hydra
    plain = checked(without_hydra(config), hydra)
    for count, device in ((0, "auto"), (1, "auto"), (2, "cuda:1"), (4, "cuda:1"), (3, "cuda:2")):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        assert spread(plain, 5).device == device


# ---------------------------------------------------------------- how many at once


@pytest.mark.parametrize(
    ("each", "expected", "tried"),
    [
        ({1: 1.0, 4: 0.5, 16: 0.3, 64: 0.2, 256: 0.1, 300: 0.05}, 300, 6),  # the largest is fastest
        ({1: 1.0, 4: 0.5, 16: 0.3, 64: 0.2, 256: 0.195, 300: 0.01}, 64, 5),  # 256 gains nothing: 300 is not tried
        ({1: 1.0, 4: 0.98, 16: 1.1, 64: 1.2}, 1, 4),  # as fast one by one
        ({1: 1.0, 4: 0.5, 16: 0.52, 64: 0.2, 256: 0.3}, 64, 5),
    ],
)
def test_the_smallest_of_the_fastest_stacks_is_taken(each: dict[int, float], expected: int, tried: int) -> None:
    best, seconds = smallest_fast_size(300, lambda size: each[size])
    assert best == expected
    assert list(seconds) == list(each)[:tried]


def test_what_was_measured_is_kept_for_the_next_sweep(kd_run: Run) -> None:
    first = sweep(kd_run, "seed=0,1", "hydra.sweep.dir=first")
    measured = re.findall(r"2 × tinymlp: (\d+) at once, .* measured", first.err)
    notes = Path(os.environ["KD_STORE"]) / "stack-sizes.json"
    assert list(json.loads(notes.read_text()).values()) == [int(size) for size in measured]
    before = notes.read_bytes()
    assert "measured" not in sweep(kd_run, "seed=2,3", "hydra.sweep.dir=second").err
    assert notes.read_bytes() == before


@pytest.mark.parametrize("n", range(1, 40))
def test_stacks_are_as_equal_as_can_be(n: int) -> None:
    keys = [str(i) for i in range(n)]
    for size in range(1, 12):
        stacks = parts(keys, size)
        assert [key for stack in stacks for key in stack] == keys
        lengths = [len(stack) for stack in stacks]
        assert max(lengths) <= size
        assert max(lengths) - min(lengths) <= 1
        assert min(lengths) > 1 or n == 1 or size <= 2  # nothing is left over by itself
