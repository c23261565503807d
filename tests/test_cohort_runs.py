"""Jobs of a sweep that do not stack are trained side by side, to the bytes of runs by themselves."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from process import Ran

Run = Callable[..., Ran]

NET = """
from torch import nn

def net(input_shape, num_classes, width=6):
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(),
        nn.Linear(36 * width, num_classes),
    )
"""
OUT = "hydra.sweep.dir=out"
LIVE = ["training.crop=1", "training.flip=true", "device=cpu"]
SHORT = ["teacher=tinymlp", "teacher_training.epochs=1", "training.epochs=2", "training.keep=best", *LIVE]


@pytest.fixture
def own(own_code: Callable[..., list[str]]) -> list[str]:
    """Words that choose a student with BatchNorm and dropout, taught live."""
    flags = own_code({"own_of_cohorts.py": NET, "model/own": "_target_: own_of_cohorts.net\nwidth: 6\n"})
    return [*flags, *SHORT, "student=own"]


def jobs(folder: Path) -> list[Path]:
    return sorted(path.parent for path in folder.glob("*/.hydra"))


def summary(job: Path) -> dict[str, Any]:
    return json.loads((job / "summary.json").read_text())


def results(job: Path) -> tuple[Any, ...]:
    """What a run leaves that its course decides: weights, metrics, results."""
    rows = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["examples_per_second"]
    told = summary(job)
    models = {role: {**told[role], "seconds": 0, "from_store": None} for role in ("student", "student_alone")}
    return (job / "student.safetensors").read_bytes(), (job / "student.json").read_bytes(), rows, models


def side_by_side(kd_run: Run, *argv: str, code: int = 0, **options: Any) -> Ran:
    ran = kd_run("-m", *argv, **options)
    assert ran.code == code, ran.err
    return ran


def assert_equal_to_alone(kd_run: Run, folder: Path, argv: list[str], monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Fused and one after the other the jobs leave the same bytes."""
    ran = side_by_side(kd_run, *argv, "hydra.sweep.dir=fused")
    monkeypatch.setenv("KD_STORE", str(folder / "another-store"))
    side_by_side(kd_run, *argv, "hydra/launcher=basic", "hydra.sweep.dir=basic")
    together, alone = jobs(folder / "fused"), jobs(folder / "basic")
    assert len(together) == len(alone) > 1
    for one, other in zip(together, alone, strict=True):
        assert results(one) == results(other)
        assert summary(one)["trained_with"] == {
            "in_one_stack": [],
            "side_by_side": [job.name for job in together if job != one],
            "equal_to_alone": "bytes",
            "threads": 1,
            "at_once": 1,
        }
        assert summary(other)["trained_with"] is None
    return ran


@pytest.mark.slow
def test_temperatures_of_a_network_with_batchnorm_give_the_bytes_of_single_runs(
    kd_run: Run, own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = assert_equal_to_alone(kd_run, tmp_path, [*own, "T=1,2,8"], monkeypatch)
    page = (jobs(tmp_path / "fused")[0] / "report.html").read_text()
    assert "trained side by side with 2 others: the bytes of a run alone" in page
    said = "3 students side by side on the same batches, with one pass of the teacher for all: BatchNorm2d keeps"
    assert ran.err.count(said) == 1
    assert "one by one" not in ran.err


@pytest.mark.slow
def test_students_of_other_sizes_methods_and_optimisers_share_batches(
    kd_run: Run, own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept = ["student.width=4,8", "method=soft_targets,dkd", "optimizer=adamw,sgd"]
    ran = assert_equal_to_alone(kd_run, tmp_path, [*own, *swept], monkeypatch)
    alone, distilled = re.findall(r"side by side.*: they differ in (.*?) \(000_", ran.err)
    assert set(alone.split(", ")) == {"optimizer", "student.width"}
    assert set(distilled.split(", ")) == {"optimizer", "method", "student.width"}
    assert "2 students alone side by side on the same batches:" not in ran.err  # four: two widths, two optimisers
    assert "4 students alone side by side on the same batches:" in ran.err


def test_students_of_unlike_architectures_share_one_pass_of_a_live_teacher(
    kd_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*SHORT, "student=tinymlp,smallmlp,cnn"]
    ran = assert_equal_to_alone(kd_run, tmp_path, argv, monkeypatch)
    said = "3 students side by side on the same batches, with one pass of the teacher for all: they differ in student ("
    assert said in ran.err


def test_a_teacher_that_is_looked_up_serves_all_too(
    kd_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = ["teacher=tinymlp", "teacher_training.epochs=1", "training.epochs=2", "student=tinymlp,cnn", "device=cpu"]
    ran = assert_equal_to_alone(kd_run, tmp_path, argv, monkeypatch)
    assert "2 students side by side on the same batches: they differ in student (" in ran.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "students",
    [["student=resnet8x4,mobilenetv2", "T=4"], ["student=torchvision", "student.name=shufflenet_v2_x0_5", "T=1,4"]],
    ids=["cifar", "torchvision"],
)
def test_published_networks_give_the_bytes_of_single_runs(
    kd_run: Run, students: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_equal_to_alone(kd_run, tmp_path, [*SHORT, *students, "training.epochs=1"], monkeypatch)


def test_stacks_are_trained_side_by_side_too_and_a_summary_says_that_they_are_equal_to_rounding(
    kd_run: Run, tmp_path: Path
) -> None:
    prelude = "import kd_cli.runs.stack_size as sizes\nsizes.seconds_of_step = lambda *args: 1.0\n"
    side_by_side(kd_run, *SHORT, "student=tinymlp,cnn", "T=1,4", OUT, prelude=prelude)
    names = [job.name for job in jobs(tmp_path / "out")]  # both temperatures of tinymlp, then of cnn
    told = [summary(job)["trained_with"] for job in jobs(tmp_path / "out")]
    assert [one["equal_to_alone"] for one in told] == ["rounding"] * 4
    assert told[0]["in_one_stack"] == [names[1]]
    assert told[0]["side_by_side"] == names[2:]
    page = (jobs(tmp_path / "out")[0] / "report.html").read_text()
    assert "in one stack with 1 other and side by side with 2 others: equal to a run alone up to rounding" in page


def test_a_student_that_diverges_changes_no_other_and_fails_alone(
    kd_run: Run, own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*own, "optimizer=sgd", "alpha=1,1e30,2"]
    ran = side_by_side(kd_run, *argv, "hydra.sweep.dir=fused", code=1)
    monkeypatch.setenv("KD_STORE", str(tmp_path / "another-store"))
    side_by_side(kd_run, *argv, "hydra.sweep.dir=basic", "hydra/launcher=basic", code=1)
    together, alone = jobs(tmp_path / "fused"), jobs(tmp_path / "basic")
    for k in (0, 2):
        assert results(together[k]) == results(alone[k])
    assert "3 runs: 2 completed, 1 " in ran.out


RAISES = """
import torch

class Distil:
    calls = 0

def distil(student, teacher, labels, T, alpha, beta):
    Distil.calls += torch.is_grad_enabled()
    if Distil.calls > 14:
        raise RuntimeError("my own bug")
    return torch.nn.functional.cross_entropy(student, labels)
"""


def test_a_student_whose_training_raises_fails_alone(
    kd_run: Run, own_code: Callable[..., list[str]], own: list[str], tmp_path: Path
) -> None:
    own_code({"raises.py": RAISES, "method/bug": "_target_: raises.distil\n"})
    ran = side_by_side(kd_run, *own, "method=soft_targets,bug,dkd", OUT, code=1)
    side_by_side(kd_run, *own, "method=soft_targets,dkd", "hydra.sweep.dir=well")
    assert "3 × student" not in ran.err
    assert "3 students side by side: my own bug; they are trained one by one now" in ran.err
    first, bad, last = jobs(tmp_path / "out")
    assert not (bad / "summary.json").exists()
    for one, other in zip((first, last), jobs(tmp_path / "well"), strict=True):
        assert results(one) == results(other)
        assert summary(one)["trained_with"] is None


ONE_IS_TOO_FEW = """
from own_of_cohorts import net
from torch import nn

class Net(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        if len(images) == 1:
            raise ValueError("one is too few")
        return self.inner(images)

def proud(input_shape, num_classes):
    return Net(net(input_shape, num_classes))
"""


def test_a_network_that_fails_on_one_example_fails_alone(
    kd_run: Run, own_code: Callable[..., list[str]], own: list[str], tmp_path: Path
) -> None:
    own_code({"proud.py": ONE_IS_TOO_FEW, "model/proud": "_target_: proud.proud\n"})
    ran = side_by_side(kd_run, *own, "student=own,proud,cnn", "training.batch_size=93", OUT, code=1)
    assert "student proud alone is trained by itself: its memory cannot be estimated (one is too few)" in ran.err
    assert [(job / "summary.json").exists() for job in jobs(tmp_path / "out")] == [True, False, True]


KILLED = """
import os, signal
from kd_cli.storage.training_state import TrainingState
def killed(self, state, save=TrainingState.save):
    save(self, state)
    if state["epoch"] == 1 and "learners" in state["learner"] and len(state["learner"]["learners"]) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
TrainingState.save = killed
"""
KILLED_BETWEEN_RESULTS = """
import os, signal
from kd_cli.runs.distil import Distillation
def killed(self, *args, finish=Distillation.finish, done=[], **keys):
    if len(done) == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    finish(self, *args, **keys)
    done.append(1)
Distillation.finish = killed
"""


@pytest.mark.parametrize("prelude", [KILLED, KILLED_BETWEEN_RESULTS], ids=["training", "finishing"])
def test_a_killed_cohort_is_resumed_to_the_same_bytes(
    kd_run: Run, own: list[str], tmp_path: Path, prelude: str
) -> None:
    argv = [*own, "T=1,2,8", OUT, "checkpoint.every=1"]
    whole = side_by_side(kd_run, *argv)
    expected = [(results(job), summary(job)["trained_with"]) for job in jobs(tmp_path / "out")]
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(os.environ["KD_STORE"])
    killed = side_by_side(kd_run, *argv, code=-9, prelude=prelude)
    assert killed.code == -9
    resumed = kd_run("resume=out")
    assert resumed.code == 0, resumed.err
    assert [(results(job), summary(job)["trained_with"]) for job in jobs(tmp_path / "out")] == expected
    assert resumed.out == whole.out
    assert not list(Path(os.environ["KD_STORE"]).glob("partial/*.state"))


NO_ROOM = """
import torch
from kd_cli.runs.group import Group
def train(self, *args, train=Group.train, **keys):
    if len(self.numbers) > 2:
        raise torch.OutOfMemoryError("made: no room")
    return train(self, *args, **keys)
Group.train = train
"""


def test_a_cohort_that_does_not_fit_is_halved(kd_run: Run, own: list[str], tmp_path: Path) -> None:
    side_by_side(kd_run, *own, "T=1,2,4,8,16", "hydra.sweep.dir=whole")
    ran = side_by_side(kd_run, *own, "T=1,2,4,8,16", "hydra.sweep.dir=halved", prelude=NO_ROOM)
    assert "5 models do not fit in the memory of cpu together; halving" in ran.err
    assert "3 models do not fit in the memory of cpu together; halving" in ran.err
    for one, other in zip(jobs(tmp_path / "halved"), jobs(tmp_path / "whole"), strict=True):
        assert results(one) == results(other)
    told = [summary(job)["trained_with"] for job in jobs(tmp_path / "halved")]
    assert sum(one is not None and len(one["side_by_side"]) == 1 for one in told) == 4


def test_as_many_are_trained_side_by_side_as_fit_by_the_estimate(kd_run: Run, own: list[str]) -> None:
    weights, step = 100, 1000
    prelude = (
        "import kd_cli.runs.cohorts as cohorts\n"
        f"cohorts.memory_of_weights = lambda *args: {weights}\n"
        f"cohorts.memory_of_step = lambda *args: {step}\n"
        f"cohorts.free_memory = lambda *args: {step + 2 * weights}\n"
    )
    ran = side_by_side(kd_run, *own, "T=1,2,4,8,16", OUT, prelude=prelude)
    assert ran.err.count("2 students side by side") == 2


TWO_AT_ONCE = """
import torch
import kd_cli.runs.workers as workers
torch.set_num_threads(2)
workers.seconds_of_epoch = lambda stage, stacks, n: 1 / n
"""


@pytest.mark.slow
def test_students_that_are_trained_two_at_a_time_are_equal_to_rounding_and_a_summary_says_so(
    kd_run: Run, own: list[str], tmp_path: Path
) -> None:
    argv = [*own, "student=cnn", "precision=float64", "optimizer=adamw,sgd", "T=1,4"]
    ran = side_by_side(kd_run, *argv, "hydra.sweep.dir=fused", prelude=TWO_AT_ONCE)
    assert "2 at a time" in ran.err
    side_by_side(kd_run, *argv, "hydra.sweep.dir=basic", "hydra/launcher=basic")
    for one, other in zip(jobs(tmp_path / "fused"), jobs(tmp_path / "basic"), strict=True):
        told = summary(one)["trained_with"]
        assert (told["equal_to_alone"], told["threads"], told["at_once"]) == ("rounding", 2, 2)
        losses = [[row["loss"] for row in results(job)[2]] for job in (one, other)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.slow
def test_students_trained_two_at_a_time_are_resumed_to_the_same_bytes(
    kd_run: Run, own: list[str], tmp_path: Path
) -> None:
    argv = [*own, "T=1,2,8", OUT, "checkpoint.every=1"]
    side_by_side(kd_run, *argv, prelude=TWO_AT_ONCE)
    expected = [results(job) for job in jobs(tmp_path / "out")]
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(os.environ["KD_STORE"])
    assert side_by_side(kd_run, *argv, code=-9, prelude=TWO_AT_ONCE + KILLED)
    resumed = kd_run("resume=out", prelude=TWO_AT_ONCE)
    assert resumed.code == 0, resumed.err
    assert [results(job) for job in jobs(tmp_path / "out")] == expected


@pytest.mark.slow
def test_whether_several_at_once_are_faster_is_measured_and_kept(kd_run: Run, tmp_path: Path) -> None:
    argv = [*SHORT, "student=resnet20", "T=1,2", "training.epochs=1"]
    prelude = "import torch\ntorch.set_num_threads(2)\n"
    ran = side_by_side(kd_run, *argv, "hydra.sweep.dir=first", prelude=prelude)
    (said,) = re.findall(r"2 models side by side: ([12]) at a time, measured", ran.err)
    assert summary(jobs(tmp_path / "first")[0])["trained_with"]["at_once"] == int(said)
    again = side_by_side(kd_run, *argv, "hydra.sweep.dir=second", prelude=prelude)
    assert "at a time, measured" not in again.err


def test_a_users_own_code_is_not_run_beside_itself(kd_run: Run, own: list[str], tmp_path: Path) -> None:
    prelude = "import torch\nimport kd_cli.runs.workers as workers\ntorch.set_num_threads(2)\nworkers.GAIN = 1e9\n"
    own_method = [*own, "student=cnn", "method=bug", "optimizer=adamw,sgd", "training.epochs=1"]
    (tmp_path / "raises.py").write_text(RAISES.replace("> 14", "> 10**9"))
    (tmp_path / "conf" / "method").mkdir(parents=True, exist_ok=True)
    (tmp_path / "conf" / "method" / "bug.yaml").write_text("_target_: raises.distil\n")
    side_by_side(kd_run, *own_method, OUT, prelude=prelude)
    assert summary(jobs(tmp_path / "out")[0])["trained_with"]["at_once"] == 1
    shipped = [*own, "student=cnn", "optimizer=adamw,sgd", "training.epochs=1"]
    side_by_side(kd_run, *shipped, "hydra.sweep.dir=shipped", prelude=prelude)
    assert summary(jobs(tmp_path / "shipped")[0])["trained_with"]["at_once"] == 2
