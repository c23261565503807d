"""One training by several processes under torchrun: equal to one process, one writer, resumed, ended together."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from made import InMemory, adamw, examples, model, small, some_weights
from process import Ran

from kd_cli import processes
from kd_cli.config.read import batchnorm_parts
from kd_cli.errors import StorageError
from kd_cli.learn.divided import DividedLearner
from kd_cli.learn.methods import Hard
from kd_cli.learn.objective import Objective
from kd_cli.learn.processes import Processes
from kd_cli.learn.teachers import MappedTeacher
from kd_cli.processes import Place, command_name, launched
from kd_cli.runs.several import SharedCheckpoint, Taught
from kd_cli.storage.run_dir import RunDir

HERE = Path(__file__).parent
PLACE = {"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "localhost", "MASTER_PORT": "1", "LOCAL_RANK": "1"}


def torchrun(n: int, *argv: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a program of Python in n processes on this machine."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n}", *argv]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=240)


ALIKE = ("plain", "augmented, taught live", "dropout", "batchnorm", "accumulated, clipped, averaged")
ALIKE += ("similarity", "hints", "coupled, random loss")


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.long)])
def test_several_processes_train_what_one_trains_to_rounding(tmp_path: Path, n: int) -> None:
    ran = torchrun(n, str(HERE / "divided_program.py"), folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    for rank, found in enumerate(json.loads(ran.stdout)):
        for case, compared in found.items():
            assert compared["alike"], f"{case}: process {rank} ends with other weights than process 0"
        assert {case for case in ALIKE if found[case]["difference"] >= 1e-5} == set(), f"process {rank}"
        assert found["batchnorm of each part"]["difference"] > 1e-3  # another training


def losses(path: Path) -> list[float]:
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [row[key] for row in rows for key in ("loss", "val_nll")]


# The second process is killed when it enters epoch 3 of the distilled student's training.
DYING = """
import os, signal
from kd_cli.learn.divided import DividedLearner
training = DividedLearner.training
def dies(self, role, epoch):
    if os.environ["RANK"] == "1" and type(self.method).__name__ == "SoftTargets" and epoch == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return training(self, role, epoch)
DividedLearner.training = dies
"""


@pytest.fixture
def together(start: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Ran]]:
    """Run `kd-run` in several processes at once, with the variables that torchrun sets, until all have ended."""

    def run(n: int, *argv: str, prelude: str = "") -> list[Ran]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        place = {**PLACE, "WORLD_SIZE": str(n), "MASTER_PORT": port}
        started = []
        for rank in range(n):
            for name, value in {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}.items():
                monkeypatch.setenv(name, value)
            started.append(start(*argv, prelude=prelude))
        for name in place:
            monkeypatch.delenv(name)
        return [one.wait() for one in started]

    return run


@pytest.mark.long
def test_a_run_by_two_processes_is_that_of_one_and_goes_on_after_a_process_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Any, together: Callable[..., list[Ran]]
) -> None:
    keys = [*TINY, "training.epochs=4", "training.jitter=1", "checkpoint.every=1"]
    one = tiny(*keys[len(TINY) :])
    runs = {name: tmp_path / name for name in ("whole", "killed")}

    monkeypatch.setenv("KD_STORE", str(tmp_path / "store-whole"))
    ran = torchrun(2, "-m", "kd_cli", *keys, f"hydra.run.dir={runs['whole']}", folder=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("student by soft_targets") == 1  # one process writes
    assert losses(runs["whole"]) == pytest.approx(losses(one.run_dir), abs=1e-5)
    summary = json.loads((runs["whole"] / "summary.json").read_text())
    assert summary["processes"] == 2
    assert summary["command"].startswith("torchrun --nproc-per-node=2 -m kd_cli ")

    monkeypatch.setenv("KD_STORE", str(tmp_path / "store-killed"))
    left, killed = together(2, *keys, f"hydra.run.dir={runs['killed']}", prelude=DYING)
    assert (left.code, killed.code) == (1, -signal.SIGKILL)
    assert "error: a process of this training has ended" in left.err
    assert not (runs["killed"] / "summary.json").exists()
    resumed = together(2, f"resume={runs['killed']}")
    assert [one.code for one in resumed] == [0, 0], resumed[0].err
    assert resumed[1].out + resumed[1].err == ""
    for name in ("student.safetensors", "student.json"):
        assert (runs["killed"] / name).read_bytes() == (runs["whole"] / name).read_bytes()
    assert losses(runs["killed"]) == losses(runs["whole"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-m", "T=1,2"], "error: torchrun has started 2 processes, which train one run together, and this is a sweep"),
        (
            ["method=theseus", "teacher.hidden=[8]", "student.hidden=[8]"],
            "error: method=theseus trains a student in its teacher's place in one process",
        ),
        (["peers=2", "method=mutual"], "error: peers learn from each other in one process, and torchrun has started 2"),
    ],
)
def test_what_several_processes_cannot_train_is_refused_before_training(
    tmp_path: Path, argv: list[str], message: str, together: Callable[..., list[Ran]]
) -> None:
    first, other = together(2, *TINY, *argv)
    assert (first.code, other.code) == (1, 0)
    assert message in first.err
    assert other.out + other.err == ""
    assert not list(tmp_path.glob("**/metrics.jsonl"))


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched() is None
    assert command_name() == "kd-run"
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    assert launched() == Place(rank=1, size=4, on_machine=1)
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert launched() is None


@pytest.mark.parametrize("n", [1, 3, 4, 10, 128])
def test_the_parts_of_a_batch_are_all_of_it_and_differ_by_one_example_at_most(n: int) -> None:
    parts = [range(n)[Processes(rank, 4).part(n)] for rank in range(4)]
    assert [i for part in parts for i in part] == list(range(n))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert all(len(range(n)[Processes(rank, 4).taken(n)]) for rank in range(4))


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_process_announces_the_examples_that_it_asks_for(rank: int) -> None:
    module, data = model(small), examples(20)
    keys: dict[str, Any] = {"seed": 0, "objective": Objective(Hard(), some_weights()), "processes": Processes(rank, 3)}
    learner = DividedLearner(module, adamw(module.parameters()), **keys)
    order, sizes = torch.randperm(20)[None], [9, 9, 2]
    announced, own = learner.asked_for(order, sizes)
    batches = [batch.index for batch in learner.taken(data.blocks(order, sizes))]
    assert [batch.shape[1] for batch in batches] == list(own)
    assert torch.equal(torch.cat(batches, 1), announced)


def test_logits_that_stay_in_their_files_reach_the_other_processes() -> None:
    members, rows = [torch.randn(9, 3), torch.randn(9, 3)], torch.tensor([7, 2, 5])
    taught = Taught.of(MappedTeacher(members, rows, combine="arithmetic"), None)
    assert taught is not None
    assert taught.logits is not None
    assert taught.logits.equal(torch.stack(members)[:, rows])
    assert taught.combine == "arithmetic"


def test_a_run_goes_on_with_as_many_processes_as_it_was_begun_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    RunDir(tmp_path / "run").begin("kd-run", {"config": {}})
    RunDir(tmp_path / "run", again=True).begin("kd-run", {"config": {}})
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(StorageError, match="begun by 4 processes under torchrun, and this is 2 processes"):
        RunDir(tmp_path / "run", again=True).begin("kd-run", {"config": {}})


def test_batchnorm_of_each_part_is_in_the_fingerprint_only_with_several_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    each, whole = {"sync_batchnorm": False}, {"sync_batchnorm": True}
    assert batchnorm_parts(each) == batchnorm_parts(whole) == {}
    for name, value in PLACE.items():
        monkeypatch.setenv(name, value)
    assert processes.count() == 4
    assert batchnorm_parts(whole) == {}
    assert batchnorm_parts(each) == {"batchnorm_parts": 4}


class Alone(Processes):
    """One process, whose values reach itself."""

    def from_first(self, value: Any) -> Any:
        return value


def test_process_0_alone_reads_and_writes_the_checkpoint() -> None:
    kept = InMemory()
    first = SharedCheckpoint(Alone(0, 1), kept)
    first.save({"epoch": 1, "x": torch.ones(1)})
    loaded = first.load()
    assert loaded is not None
    assert loaded["epoch"] == 1
    other = SharedCheckpoint(Alone(1, 2), None)
    assert not other.due(1)
    other.save({"epoch": 2})
    loaded = first.load()
    assert loaded is not None
    assert loaded["epoch"] == 1
