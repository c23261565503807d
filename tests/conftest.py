"""What all tests share: folders of their own, the command, small data."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
os.environ.setdefault("MKL_CBWR", "AUTO")  # as the command does

import pytest
import torch
from process import Ran, Running

# The smallest run: all three roles for one epoch in half a second.
TINY = [
    *("teacher=tinymlp", "student=tinymlp", "teacher.hidden=[12]", "student.hidden=[8]", "training.epochs=1"),
    *("teacher_training.epochs=1", "teacher_training.jitter=0", "device=cpu"),
]


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's store, data or caches."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("KD_STORE", str(home / "store"))
    monkeypatch.delenv("KD_DATA", raising=False)


@pytest.fixture(scope="session")
def _optuna() -> None:
    pytest.importorskip("optuna", minversion="5.0", reason="pip install 'kd-cli[search]'")


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Running]:
    """Start `kd-run` with arguments in a folder, by default the test's own."""

    def started(*argv: str, folder: Path = tmp_path, limit: int | None = None, prelude: str = "") -> Running:
        folder.mkdir(parents=True, exist_ok=True)
        return Running(argv, folder, limit, prelude)

    return started


@pytest.fixture
def kd_run(start: Callable[..., Running]) -> Callable[..., Ran]:
    """Run `kd-run` with arguments to its end."""

    def run(*argv: str, **options: object) -> Ran:
        return start(*argv, **options).wait()

    return run


@pytest.fixture
def tiny(kd_run: Callable[..., Ran]) -> Callable[..., Ran]:
    """Run the smallest run, with arguments on top, which must end well."""

    def run(*argv: str, **options: object) -> Ran:
        ran = kd_run(*TINY, *argv, **options)
        assert ran.code == 0, ran.err
        return ran

    return run


@pytest.fixture
def own_code(tmp_path: Path) -> Callable[..., list[str]]:
    """Write a user's own files, by default in the test's folder; return the flags with which kd-run finds the YAML.

    `{"net.py": ..., "model/net": ...}`: a name without an ending is that of a YAML file under `conf/`.
    """

    def write(files: Mapping[str, str], folder: Path = tmp_path) -> list[str]:
        for name, text in files.items():
            path = folder / (name if "." in name else f"conf/{name}.yaml")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return ["--config-dir", str(folder / "conf")]

    return write


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
