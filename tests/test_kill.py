"""Killed at any moment, a run ends as if it had never been killed.

Real processes are killed by SIGKILL at random times, and at random operations on files: before a file is opened,
renamed or removed, or when a part of its contents has been written. Each is then resumed, and may be killed again.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from process import Ran, Running

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")

SEED = int(os.environ.get("KD_KILL_SEED", "20150309"))
KILLS = int(os.environ.get("KD_KILLS", "8"))  # for each of the scenarios
EVERY = "checkpoint.every=1"
LONGER = ["training.epochs=3", "teacher_training.epochs=3"]
SCENARIOS = {
    "augmented and with dropout": [*LONGER, "training.jitter=1", "student.dropout=0.3", "teacher.dropout=0.3"],
    "an ensemble and T=auto": [*LONGER, "teacher.members=3", "T=auto"],
    "a sweep": ["-m", *LONGER, "T=1,4", "seed=0,1,2", "optimizer.lr=1e-3,2e-3"],
    "a sweep of convolutional networks": [
        *("-m", "teacher_training.epochs=2", "training.epochs=2", "student=cnn", "student.channels=[3,5]"),
        *("student.hidden=9", "seed=0,1,2,3,4"),
    ],
}
STACKS = """
import kd_cli.runs.stack_size as stack_size
stack_size.seconds_of_step = lambda *args: 1.0  # the largest stack is the fastest, whatever else this machine does
stack_size.memory_of_one = lambda *args: 1
stack_size.free_memory = lambda *args: 4
"""
# Kills at operation number `at`; for `at` = 0 counts them into a file.
OPERATIONS = """
import os, pathlib, signal, sys
count, at, here = 0, {at}, {here!r}
def reached(tear=lambda: None):
    global count
    count += 1
    if at == 0:
        pathlib.Path({count!r}).write_text(str(count))
    if count == at:
        tear()
        os.kill(os.getpid(), signal.SIGKILL)
def torn(path):
    with open(path, "ab") as file:
        file.write(b'{{"role": "stu')
def audited(event, args):
    if event == "open" and isinstance(args[0], str) and args[0].startswith(here) and args[2] & 3:
        appending = isinstance(args[1], str) and "a" in args[1]
        reached((lambda: torn(args[0])) if appending and args[0].endswith(".jsonl") else lambda: None)
    elif event in ("os.rename", "os.remove", "os.mkdir") and str(args[0]).startswith(here):
        reached()
sys.addaudithook(audited)
fsync = os.fsync
def cut(handle):
    path = os.readlink(f"/proc/self/fd/{{handle}}")
    def half():
        os.truncate(path, os.path.getsize(path) // 2)
    reached(half)
    fsync(handle)
if os.path.isdir("/proc/self/fd"):
    os.fsync = cut
"""


def times_aside(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: times_aside(v) for k, v in value.items() if k not in ("seconds", "examples_per_second", "latency")}
    return [times_aside(item) for item in value] if isinstance(value, list) else value


def results(out: Path) -> dict[str, Any]:
    """All that a run or sweep has left, times aside: bytes of weights, rows, summaries, the names of other files."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file()):
        name = str(path.relative_to(out))
        if path.name in ("student.safetensors", "student.json", "examples.json"):
            found[name] = path.read_bytes()
        elif path.name == "summary.json":
            found[name] = times_aside(json.loads(path.read_text()))
        elif path.name == "metrics.jsonl":
            found[name] = [times_aside(json.loads(line)) for line in path.read_text().splitlines()]
        else:
            found[name] = None
    return found


def left_over(store: Path) -> list[str]:
    """What a killed process may leave in the store and nobody needs."""
    folders = [store, store / "partial", store / "locks"]
    names = [path.name for folder in folders if folder.is_dir() for path in folder.iterdir()]
    return [name for name in names if name.startswith(".") or name.endswith((".lock", ".state", ".previous"))]


class Killed:
    """Starts a command in a folder of its own, kills it, resumes it."""

    def __init__(self, start: Callable[..., Running], folder: Path, argv: list[str]) -> None:
        self.start, self.folder, self.out, self.store = start, folder, folder / "out", folder / "store"
        sweeping = "-m" in argv
        where = f"hydra.{'sweep' if sweeping else 'run'}.dir=out"
        flags, words = [a for a in argv if a == "-m"], [a for a in argv if a != "-m"]
        tiny = [a for a in TINY if not (a.startswith("student") and "student=cnn" in argv)]
        self.argv = [*flags, *tiny, EVERY, "store_dir=store", where, *words]

    def next(self, prelude: str = "") -> Running:
        begun = (self.out / ".hydra" / "overrides.yaml").is_file() or (self.out / ".command.json").is_file()
        argv = ["resume=out"] if begun else self.argv
        return self.start(*argv, folder=self.folder, prelude=STACKS + prelude)

    def operations(self, at: int) -> str:
        return OPERATIONS.format(at=at, here=str(self.folder), count=str(self.folder.parent / "count"))

    def finish(self) -> Ran:
        ran = self.next().wait()
        assert ran.code == 0, ran.err
        return ran


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_a_killed_run_ends_as_if_never_killed(
    start: Callable[..., Running], tmp_path: Path, scenario: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(f"{SEED} {scenario}")
    folder = tmp_path / "work"
    whole = Killed(start, folder, SCENARIOS[scenario])
    started = time.monotonic()
    ran = whole.next(whole.operations(0)).wait()
    seconds = time.monotonic() - started
    assert ran.code == 0, ran.err
    operations = int((tmp_path / "count").read_text())
    expected = results(whole.out)
    assert not left_over(whole.store)
    shutil.rmtree(folder)

    kills = {"by time": 0, "in a file": 0}
    while sum(kills.values()) < KILLS:
        folder.mkdir()
        moments = []
        for _ in range(rng.randint(1, 3)):
            if rng.random() < 0.7:
                at = rng.randint(1, operations)
                process = whole.next(whole.operations(at)).process
                process.join(60)
                moments.append(f"operation {at}")
                kind = "in a file"
            else:
                process = whole.next().process
                delay = rng.uniform(0, seconds)
                process.join(delay)
                os.kill(process.pid or 0, signal.SIGKILL) if process.is_alive() else None
                process.join(60)
                moments.append(f"{delay:.3f} s")
                kind = "by time"
            assert process.exitcode in (0, -signal.SIGKILL), (moments, process.exitcode)
            if process.exitcode == 0:
                break
            kills[kind] += 1
        whole.finish()
        assert results(whole.out) == expected, (SEED, moments)
        assert not left_over(whole.store), (SEED, moments)
        shutil.rmtree(folder)
    with capsys.disabled():
        print(f"\n{scenario}: {kills} killed, 0 lost (seed {SEED}, {operations} operations on files)")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("sweep", [False, True], ids=["a run", "a sweep"])
def test_asked_to_stop_it_ends_the_epoch_saves_and_says_how_to_go_on(
    start: Callable[..., Running], tmp_path: Path, how: signal.Signals, sweep: bool
) -> None:
    whole = Killed(start, tmp_path / "work", [*(["-m", "seed=0,1"] if sweep else []), "teacher_training.epochs=100000"])
    whole.argv[whole.argv.index(EVERY)] = "checkpoint.every=100000"
    running = whole.next()
    rows = wait_for_rows(whole.out)
    os.kill(running.process.pid or 0, how)
    ran = running.wait()
    assert ran.code == 130
    assert "stopping at the end of this epoch" in ran.err
    assert "stopped after epoch" in ran.err
    assert "hint: kd-run resume=out goes on from there" in ran.err
    assert "Traceback" not in ran.err
    assert list((whole.store / "partial").glob("*.state"))
    stopped = json.loads(rows.read_text().splitlines()[-1])["epoch"]
    again = whole.next()
    deadline = time.monotonic() + 60
    while not rows.exists() or len(rows.read_text().splitlines()) <= stopped:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    again.process.kill()
    again.process.join()
    epochs = [json.loads(line)["epoch"] for line in rows.read_text().splitlines()[: stopped + 1]]
    assert epochs == list(range(1, stopped + 2))


def test_under_another_number_of_threads_it_goes_on_and_says_so(start: Callable[..., Running], tmp_path: Path) -> None:
    whole = Killed(start, tmp_path / "work", ["teacher_training.epochs=100000"])
    running = whole.next()
    rows = wait_for_rows(whole.out)
    os.kill(running.process.pid or 0, signal.SIGINT)
    assert running.wait().code == 130
    stopped = json.loads(rows.read_text().splitlines()[-1])["epoch"]
    again = whole.next("import torch\ntorch.set_num_threads(2)\n")
    said = "teacher tinymlp: saved with 1 thread, continuing with 2 threads: the last digits may differ"
    deadline = time.monotonic() + 60
    while not (again.outputs[1].exists() and said in again.outputs[1].read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(again.process.pid or 0, signal.SIGINT)
    assert again.wait().code == 130
    epochs = [json.loads(line)["epoch"] for line in rows.read_text().splitlines()]
    assert len(epochs) >= stopped
    assert epochs == list(range(1, len(epochs) + 1))


def test_ctrl_c_twice_stops_at_once(start: Callable[..., Running], tmp_path: Path) -> None:
    slow = ["training.batch_size=1", "teacher_training.batch_size=1", "teacher.hidden=[900,900]"]
    whole = Killed(start, tmp_path / "work", [*slow, "teacher_training.epochs=1000"])
    running = whole.next()
    wait_for_rows(whole.out)
    os.kill(running.process.pid or 0, signal.SIGINT)
    for _ in range(600):
        if "Ctrl-C again" in running.outputs[1].read_text():
            break
        time.sleep(0.01)
    os.kill(running.process.pid or 0, signal.SIGINT)
    ran = running.wait()
    assert ran.code == 130
    assert "interrupted" in ran.err
    assert "stopped after epoch" not in ran.err
    assert "Traceback" not in ran.err
    assert not list(whole.store.rglob("*.lock"))


def wait_for_rows(out: Path) -> Path:
    """The metrics of the first run that has some."""
    for _ in range(1200):
        if found := [path for path in out.rglob("metrics.jsonl") if path.stat().st_size]:
            return found[0]
        time.sleep(0.05)
    raise TimeoutError(f"nothing is trained in {out}")
