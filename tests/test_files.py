"""Files that others read appear whole or not at all; damage is noticed; each thing is made once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import TINY
from process import Ran, Running

from kd_cli.commands.kd_report import arguments, report
from kd_cli.errors import StorageError
from kd_cli.locks import Held, lock, tidy_locks
from kd_cli.report.read import read_run
from kd_cli.storage.files import MAKING, checksum, making, replacing, tidy, write_json, write_tensors, write_text
from kd_cli.storage.run_dir import read_summary
from kd_cli.storage.training_state import TrainingState, forget

fcntl = pytest.importorskip("fcntl")
HINTS = ("free some space", "choose another", "hydra.run.dir=")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("finished")
    ran = Running((*TINY, "store_dir=store", "hydra.run.dir=out"), folder).wait()
    assert ran.code == 0, ran.err
    return ran


# ---------------------------------------------------------------- damage


def flip(path: Path, share: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 1))] ^= 0x04
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "a bit flipped at the start": lambda path: flip(path, 0.02),
    "a bit flipped in the middle": lambda path: flip(path, 0.5),
    "a bit flipped at the end": lambda path: flip(path, 0.97),
    "of another program": lambda path: path.write_text('{"status": "completed"}\n'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_summary_is_noticed(finished: Ran, tmp_path: Path, damage: str, kd_run: Callable[..., Ran]) -> None:
    run = Path(shutil.copytree(finished.run_dir, tmp_path / "out"))
    DAMAGE[damage](run / "summary.json")
    with pytest.raises(StorageError, match=r"summary\.json cannot be read[^$]*hint: remove it"):
        read_summary(run)
    with pytest.raises(ValueError, match=r"summary\.json"):
        read_run(run)
    ran = kd_run("resume=out")
    assert ran.code == 1
    assert "summary.json cannot be read" in ran.err
    (run / "summary.json").unlink()
    assert kd_run("resume=out").code == 0
    assert checksum(run / "student.safetensors") == checksum(finished.run_dir / "student.safetensors")


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_metrics_are_noticed(finished: Ran, tmp_path: Path, damage: str) -> None:
    run = Path(shutil.copytree(finished.run_dir, tmp_path / "out"))
    DAMAGE[damage](run / "metrics.jsonl")
    notes: list[str] = []
    read_run(run, notes)
    assert any("metrics.jsonl is not what the run wrote" in note for note in notes)


def test_a_report_leaves_out_what_it_cannot_read_and_says_so(
    finished: Ran, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for k, damage in enumerate([None, *DAMAGE.values()]):
        run = Path(shutil.copytree(finished.run_dir, tmp_path / "runs" / f"{k}"))
        if damage is not None:
            damage(run / "summary.json")
    report(arguments([str(tmp_path / "runs"), "--out", str(tmp_path / "report")]))
    said = capsys.readouterr()
    assert "1 completed" in said.out
    assert said.err.count("is left out: summary.json") == len(DAMAGE)


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("which", ["the last", "both"])
def test_a_damaged_training_state_is_not_used(tmp_path: Path, damage: str, which: str) -> None:
    state = TrainingState(tmp_path / "x.state", every=(1, 0.0))
    for epoch in (1, 2):
        state.save({"epoch": epoch})
    for path in [state.path, state.previous][: 1 if which == "the last" else 2]:
        DAMAGE[damage](path)
    assert state.load() == ({"epoch": 1} if which == "the last" else None)


# ---------------------------------------------------------------- whole or not at all


def test_what_a_killed_process_left_is_removed_and_what_a_running_one_writes_is_not(tmp_path: Path) -> None:
    (tmp_path / ".a.json.dead.tmp").write_text("half")
    (tmp_path / f"{MAKING}dead").mkdir()
    (tmp_path / f"{MAKING}dead" / "weights").touch()
    (tmp_path / "own.tmp").touch()
    with replacing(tmp_path / "a.json") as temporary, making(tmp_path) as folder:
        temporary.write_text("whole")
        code = f"from pathlib import Path; from kd_cli.storage.files import tidy; tidy(Path({str(tmp_path)!r}))"
        subprocess.run([sys.executable, "-c", code], check=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([temporary.name, folder.name, "own.tmp"])
        folder.rename(tmp_path / "made")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "made", "own.tmp"]
    tidy(tmp_path / "there is none")


def test_tensors_are_written_to_the_file_that_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    inodes = []
    replace = os.replace

    def noted(source: Path, target: Path) -> None:
        with open(source, "rb") as file, pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        inodes.append(os.stat(source).st_ino)
        replace(source, target)

    monkeypatch.setattr(os, "replace", noted)
    write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(3)})
    write_json(tmp_path / "a.json", {})
    write_text(tmp_path / "a.txt", "a")
    assert len(inodes) == 3


def test_states_whose_results_are_there_are_forgotten(tmp_path: Path) -> None:
    results = [tmp_path / "one", tmp_path / "two"]
    for name, files in (("a", results), ("b", results[:1]), ("c", [])):
        TrainingState(tmp_path / "partial" / f"{name}.state", every=(1, 0.0), results=files).save({})
    (tmp_path / "one").touch()
    forget(tmp_path / "partial")
    assert sorted(path.name for path in (tmp_path / "partial").iterdir()) == ["a.state", "c.state"]
    (tmp_path / "two").touch()
    forget(tmp_path / "partial")
    assert [path.name for path in (tmp_path / "partial").iterdir()] == ["c.state"]


# ---------------------------------------------------------------- locks


def test_a_lock_keeps_others_out_and_leaves_nothing(tmp_path: Path) -> None:
    code = """
import sys, time
from pathlib import Path
from kd_cli.locks import lock
folder = Path(sys.argv[1])
for _ in range(40):
    with lock(folder / "x.lock", waiting=lambda seconds: None):
        number = int((folder / "number").read_text())
        time.sleep(0.0005)
        (folder / "number").write_text(str(number + 1))
"""
    (tmp_path / "number").write_text("0")
    processes = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [process.wait(100) for process in processes] == [0] * 4
    assert (tmp_path / "number").read_text() == "160"
    assert [path.name for path in tmp_path.iterdir()] == ["number"]


def test_a_lock_that_is_held_is_told_and_that_of_a_killed_process_is_free(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with lock(path):
        with pytest.raises(Held), lock(path):
            pass
        tidy_locks(tmp_path)
        assert path.exists()
    assert not path.exists()
    path.touch()  # a killed process holds nothing
    with lock(path):
        pass
    path.touch()
    tidy_locks(tmp_path)
    assert not path.exists()


def test_two_processes_do_not_run_in_one_directory(start: Callable[..., Running], tmp_path: Path) -> None:
    first = start(*TINY, "training.epochs=100000", "checkpoint.every=1", "hydra.run.dir=out", "store_dir=store")
    for _ in range(600):
        if (tmp_path / "out" / "metrics.jsonl").exists():
            break
        time.sleep(0.05)
    second = start("resume=out").wait()
    first.process.kill()
    first.process.join()
    assert second.code == 1
    assert "another process is at work in" in second.err
    assert "hint: " in second.err


# ---------------------------------------------------------------- disks that are full or cannot be written

# Fails every write below a folder from some moment on, as a full disk does.
FULL = """
import builtins, errno, io, os, pathlib
real, count = io.open, 0
def full(file, mode="r", *args, **keys):
    global count
    if isinstance(file, (str, os.PathLike)) and set(mode) & set("wax") and {where!r} in str(file):
        count += 1
        if count > {after}:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
    return real(file, mode, *args, **keys)
io.open = builtins.open = full
"""


@pytest.mark.parametrize("after", range(0, 16, 2))
@pytest.mark.parametrize("where", ["out", "store"])
@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_with_a_message_and_it_can_go_on(
    kd_run: Callable[..., Ran], tmp_path: Path, finished: Ran, where: str, after: int
) -> None:
    argv = (*TINY, "store_dir=store", "hydra.run.dir=out", "checkpoint.every=1")
    ran = kd_run(*argv, prelude=FULL.format(where=f"/{where}/", after=after))
    if ran.code:
        assert "Traceback" not in ran.err, ran.err
        assert "error: cannot write" in ran.err
        assert any(hint in ran.err for hint in HINTS)
        assert not (tmp_path / "out" / "summary.json").exists()
        again = ("resume=out",) if (tmp_path / "out" / ".hydra" / "overrides.yaml").exists() else argv
        assert kd_run(*again).code == 0
    assert checksum(tmp_path / "out" / "student.safetensors") == checksum(finished.run_dir / "student.safetensors")
    left = [path.name for path in tmp_path.rglob("*") if path.name.endswith((".tmp", ".lock", ".state"))]
    assert not left


@pytest.mark.parametrize("limit", [100, 3_000, 9_000, 30_000])
def test_files_that_may_not_grow_end_the_run_with_a_message(
    kd_run: Callable[..., Ran], tmp_path: Path, limit: int, finished: Ran
) -> None:
    with contextlib.suppress(FileNotFoundError):
        shutil.copytree(finished.folder / "store", tmp_path / "store")
    before = {path: checksum(path) for path in (tmp_path / "store").rglob("*.*") if path.is_file()}
    ran = kd_run(*TINY, "student.hidden=[120]", "store_dir=store", "hydra.run.dir=out", limit=limit)
    assert ran.code == 1
    assert "error: " in ran.err
    assert "Traceback" not in ran.err, ran.err
    assert not (tmp_path / "out" / "summary.json").exists()
    assert {path: checksum(path) for path in before} == before


def unprivileged(folder: Path, *argv: str) -> subprocess.Popen[str]:
    """`kd-run` as a user to whom a folder's permissions apply: root without the right to pass over them."""
    drop: list[str] = []
    if os.geteuid() == 0:
        tool = shutil.which("setpriv")
        if tool is None:
            pytest.skip("root writes everywhere, and there is no setpriv to take that from it")
        rights = ["dac_override", "dac_read_search", "fowner"]
        drop = [tool, "--bounding-set", ",".join(f"-{right}" for right in rights)]
    command = [*drop, sys.executable, "-m", "kd_cli", *argv]
    return subprocess.Popen(command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@contextlib.contextmanager
def read_only(*folders: Path) -> Iterator[None]:
    """The folders, and all in them, without leave to write."""
    some = [path for folder in folders for path in (folder, *folder.rglob("*")) if path.is_dir()]
    for path in some:
        path.chmod(0o555)
    try:
        yield
    finally:
        for path in some:
            path.chmod(0o755)


@pytest.mark.parametrize("where", ["out", "store", "cwd"])
def test_a_read_only_folder_ends_the_run_with_a_message_and_harms_nothing(
    tmp_path: Path, finished: Ran, where: str
) -> None:
    shutil.copytree(finished.folder / "store", tmp_path / "store")
    (tmp_path / "out").mkdir()
    before = {path: checksum(path) for path in (tmp_path / "store").rglob("*.*") if path.is_file()}
    run_dir = {"out": "hydra.run.dir=out/run", "store": "hydra.run.dir=fresh", "cwd": "hydra.run.dir=new/run"}[where]
    with read_only(tmp_path if where == "cwd" else tmp_path / where):
        process = unprivileged(tmp_path, *TINY, "student.hidden=[9]", "store_dir=store", run_dir)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1, out + err
    assert "Traceback" not in err
    assert "error: cannot write" in err
    assert "hint: " in err
    assert not list(tmp_path.rglob("summary.json"))
    assert {path: checksum(path) for path in before} == before


@pytest.mark.slow
def test_a_folder_that_becomes_read_only_in_the_middle_ends_the_run_and_it_can_go_on(tmp_path: Path) -> None:
    argv = (*TINY, "training.epochs=200", "checkpoint.every=1", "store_dir=store", "hydra.run.dir=out")
    process = unprivileged(tmp_path, *argv)
    metrics = tmp_path / "out" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 5):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.02)
    with read_only(tmp_path / "out", tmp_path / "store"):
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1, out + err
    assert "Traceback" not in err
    assert "error: cannot write" in err
    assert not (tmp_path / "out" / "summary.json").exists()
    again = unprivileged(tmp_path, "resume=out")
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, out + err
    assert (tmp_path / "out" / "summary.json").exists()


def test_every_finished_run_notes_what_it_wrote(finished: Ran) -> None:
    noted = json.loads((finished.run_dir / ".checksums.json").read_text())
    assert set(noted) == {
        *("metrics.jsonl", "student.safetensors", "student.json", "examples.json", "predictions.json", "summary.json")
    }
    assert {name: checksum(finished.run_dir / name) for name in noted} == noted
