"""The store: what is trained once, is trained once; what is damaged is noticed and made again."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from process import Ran, Running
from torch import Tensor

from kd_cli.commands.kd_store import main as kd_store
from kd_cli.errors import StorageError
from kd_cli.storage.store import Entry, Store

KEY, OTHER = "0123456789abcdef0123456789abcdef", "fedcba9876543210fedcba9876543210"
FILES = ("weights.safetensors", "outputs.safetensors", "entry.json")
REPORT = {"parameters": 12, "seconds": 0.25, "test": {"errors": 3, "nll": 0.123456789}}
HISTORY = [{"role": "teacher", "epoch": 1, "loss": 2.5, "val_nll": None}]


def tensors() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    weights = {"0.weight": torch.arange(12.0).reshape(3, 4).T, "0.count": torch.tensor(7)}
    return weights, {"test": torch.linspace(-1, 1, 30, dtype=torch.float64).reshape(3, 10)}


def put(store: Store, key: str = KEY) -> Entry:
    weights, outputs = tensors()
    with store.lock([key]):
        return store.put(key, weights=weights, outputs=outputs, report=REPORT, history=HISTORY, facts={"seed": 0})


def equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[k], expected[k]) and found[k].dtype == expected[k].dtype for k in found
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


# ---------------------------------------------------------------- entries


def test_what_is_put_is_got(store: Store) -> None:
    assert store.get(KEY) is None
    for entry in (put(store), store.get(KEY)):
        assert entry is not None
        assert (entry.fingerprint, entry.report, entry.history) == (KEY, REPORT, HISTORY)
        assert equal(entry.weights(), tensors()[0])
        assert equal(entry.outputs(), tensors()[1])
    assert store.get(OTHER) is None
    assert {path.name for path in store.root.iterdir()} == {KEY, "locks"}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize("damage", [truncate, flip, empty, grow, Path.unlink])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_noticed_and_set_aside(store: Store, file: str, damage: Callable[[Path], None]) -> None:
    put(store)
    damage(store.root / KEY / file)
    remains = {path.name: path.read_bytes() for path in (store.root / KEY).iterdir()}
    assert store.get(KEY) is None
    (aside,) = store.root.glob("damaged-*")
    assert {path.name: path.read_bytes() for path in (aside / KEY).iterdir()} == remains
    put(store)
    assert store.get(KEY) is not None


def test_a_flipped_bit_anywhere_in_an_entry_is_noticed(store: Store) -> None:
    put(store)
    path = store.root / KEY / "entry.json"
    whole = path.read_bytes()
    for i in range(0, len(whole), 5):
        data = bytearray(whole)
        data[i] ^= 1
        path.write_bytes(data)
        assert store.get(KEY) is None, whole[max(0, i - 20) : i + 1]
        (aside,) = store.root.glob("damaged-*")
        (aside / KEY).rename(path.parent)
        aside.rmdir()


def empty_folder(root: Path) -> None:
    shutil.rmtree(root / KEY)
    (root / KEY).mkdir()


def foreign(root: Path) -> None:
    shutil.rmtree(root / KEY)
    put(Store(root), OTHER)
    shutil.copytree(root / OTHER, root / KEY)


def a_file(root: Path) -> None:
    shutil.rmtree(root / KEY)
    (root / KEY).write_text("not a folder")


@pytest.mark.parametrize("text", ["null", "[]", "7", '{"fingerprint": 3}', '{"checksums": null}'])
def test_json_of_another_kind_is_noticed(store: Store, text: str) -> None:
    put(store)
    (store.root / KEY / "entry.json").write_text(text)
    assert store.get(KEY) is None


@pytest.mark.parametrize("damage", [empty_folder, foreign, a_file])
def test_a_damaged_folder_is_noticed_and_made_again(store: Store, damage: Callable[[Path], None]) -> None:
    put(store)
    damage(store.root)
    assert store.get(KEY) is None
    assert len(list(store.root.glob("damaged-*"))) == 1
    assert put(store).weights().keys() == tensors()[0].keys()
    assert store.get(KEY) is not None


def test_a_failure_while_an_entry_is_written_leaves_nothing(store: Store) -> None:
    weights, outputs = tensors()
    with pytest.raises(TypeError):
        store.put(KEY, weights=weights, outputs=outputs, report={"seconds": object()}, history=[], facts={})
    assert list(store.root.iterdir()) == []


def test_a_store_that_is_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "store").write_text("")
    with pytest.raises(StorageError, match="store_dir="):
        put(Store(tmp_path / "store"))


# ---------------------------------------------------------------- runs that share a store


def test_two_processes_that_want_one_teacher_train_it_once(start: Callable[..., Running], tmp_path: Path) -> None:
    argv = [*TINY, "teacher_training.epochs=60", "training.epochs=20"]
    running = [start(*argv, f"T={T}", folder=tmp_path / f"{T}") for T in (2, 3)]
    runs = [one.wait() for one in running]
    assert [run.code for run in runs] == [0, 0], [run.err for run in runs]
    for role in ("teacher", "student_alone"):
        assert sorted(run.summary[role]["from_store"] for run in runs) == [False, True]
        assert runs[0].summary[role]["test"] == runs[1].summary[role]["test"]
        rows = [[row for row in run.metrics if row["role"] == role] for run in runs]
        assert rows[0] == rows[1] != []


def trained(ran: Ran, role: str = "teacher") -> bool:
    return not ran.summary[role]["from_store"]


def test_a_teacher_serves_every_run_that_does_not_change_it(tiny: Callable[..., Ran]) -> None:
    assert trained(tiny())
    for change in (
        ["T=7", "alpha=0.3", "beta=0.1"],
        ["student.hidden=[9]", "seed=3", "training.epochs=2"],
        ["method=logits", "optimizer.lr=0.01", "training.jitter=1"],
    ):
        ran = tiny(*change)
        assert not trained(ran), change
        assert "from the store" in ran.err


@pytest.mark.parametrize(
    "change",
    [
        "teacher.hidden=[13]",
        "teacher_training.epochs=2",
        "teacher_training.batch_size=32",
        "teacher_training.jitter=1",
        "teacher_optimizer.lr=0.002",
        "teacher_schedule=constant",
        "teacher_training.seed=1",
        "dataset.val_fraction=0.2",
        "precision=float64",
    ],
)
def test_a_teacher_is_trained_again_when_it_would_be_another(
    tiny: Callable[..., Ran], base: tuple[Path, Ran], tmp_path: Path, change: str
) -> None:
    shutil.copytree(base[0], tmp_path / "store")
    ran = tiny(f"store_dir={tmp_path / 'store'}", change)
    assert trained(ran)
    assert ran.summary["teacher"]["fingerprint"] != base[1].summary["teacher"]["fingerprint"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ran]:
    """A store and the run that filled it."""
    folder = tmp_path_factory.mktemp("base")
    ran = Running((*TINY, f"store_dir={folder / 'store'}"), folder).wait()
    assert ran.code == 0, ran.err
    return folder / "store", ran


def results(ran: Ran) -> list[Any]:
    """All that a run says of its models, but for times and what the store had."""
    rows = [{key: value for key, value in row.items() if key != "examples_per_second"} for row in ran.metrics]
    reports = [ran.summary[role] for role in ("teacher", "student_alone", "student")]
    return [rows, [{k: v for k, v in report.items() if k not in ("seconds", "from_store")} for report in reports]]


def test_results_do_not_depend_on_whether_the_store_had_the_teacher(
    tiny: Callable[..., Ran], base: tuple[Path, Ran]
) -> None:
    ran = tiny(f"store_dir={base[0]}")
    assert [trained(ran, role) for role in ("teacher", "student_alone", "student")] == [False, False, True]
    assert results(ran) == results(base[1])


def test_a_damaged_teacher_is_trained_again_to_the_same_results(
    tiny: Callable[..., Ran], base: tuple[Path, Ran], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    shutil.copytree(base[0], store)
    flip(store / base[1].summary["teacher"]["fingerprint"] / "weights.safetensors")
    ran = tiny(f"store_dir={store}")
    assert [trained(ran, role) for role in ("teacher", "student_alone")] == [True, False]
    assert "is damaged" in ran.err
    assert results(ran) == results(base[1])


OWN_MODEL = """
from torch import nn

def net(input_shape, num_classes, width=4):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, num_classes))
"""


def test_a_teacher_is_trained_again_when_its_own_code_is_edited(
    kd_run: Callable[..., Ran], own_code: Callable[..., list[str]]
) -> None:
    flags = own_code({"own_model.py": OWN_MODEL, "model/own": "_target_: own_model.net\nwidth: 4\n"})

    def run() -> bool:
        ran = kd_run(*flags, *TINY[1:2], *TINY[3:], "teacher=own")
        assert ran.code == 0, ran.err
        return trained(ran)

    assert [run(), run()] == [True, False]
    own_code({"own_model.py": OWN_MODEL.replace("Tanh", "ReLU")})
    assert [run(), run()] == [True, False]


# ---------------------------------------------------------------- listing and removing


def aged(store: Store, key: str, days: float) -> None:
    """Set the time of an entry's last use."""
    then = time.time() - days * 86400
    os.utime(store.root / key / "entry.json", (then, then))


def filled(root: Path) -> Store:
    store = Store(root)
    for key, kind in ((KEY, "teacher"), (OTHER, "alone")):
        weights, outputs = tensors()
        report = REPORT | {"name": kind}
        facts = {"kind": kind, "data": "12345678ff"}
        store.put(key, weights=weights, outputs=outputs, report=report, history=HISTORY, facts=facts)
    return store


def test_a_store_lists_what_it_holds_the_least_recently_used_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = filled(tmp_path)
    aged(store, OTHER, 40)
    aged(store, KEY, 20)
    (tmp_path / "partial").mkdir()
    assert [(one.path.name, one.kind, one.data) for one in store.entries()] == [
        (OTHER, "student alone", "12345678"),
        (KEY, "teacher", "12345678"),
    ]
    assert store.entries()[0].bytes == sum(file.stat().st_size for file in (tmp_path / OTHER).iterdir())
    kd_store([str(tmp_path), "--unused", "30"])
    said = capsys.readouterr().out
    assert OTHER in said
    assert KEY not in said
    assert store.get(OTHER) is not None  # which uses it
    assert [one.path.name for one in store.entries()] == [KEY, OTHER]


def test_what_was_not_used_for_long_is_removed_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = filled(tmp_path)
    aged(store, OTHER, 40)
    kd_store([str(tmp_path), "--unused", "30", "--remove"])
    assert "removed: 1 models" in capsys.readouterr().out
    assert store.get(OTHER) is None
    assert store.get(KEY) is not None
    aged(store, KEY, 0.01)
    assert not store.prune(unused=0)  # used a quarter of an hour ago: a run may still read it
    aged(store, KEY, 1)
    with store.lock([KEY]):
        assert not store.prune(unused=0)
    assert [one.path.name for one in store.prune(unused=0)] == [KEY]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["locks"]


def test_a_damaged_entry_that_was_moved_away_is_listed_and_removed(tmp_path: Path) -> None:
    store = filled(tmp_path)
    (tmp_path / KEY / "weights.safetensors").write_bytes(b"")
    assert store.get(KEY) is None
    (moved,) = [one for one in store.entries() if one.kind == "damaged"]
    os.utime(moved.path, (0, 0))
    assert moved.path in [one.path for one in store.prune(unused=86400)]
    assert not moved.path.exists()


@pytest.mark.parametrize("argv", [["--remove"], ["--unused", "-1"], ["--unused", "soon"]])
def test_a_command_that_would_remove_too_much_is_refused(argv: list[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        kd_store([str(tmp_path), *argv])
    assert not list(tmp_path.iterdir())


def test_an_empty_store_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kd_store([str(tmp_path / "none")])
    assert "0 models, 0.0 MB" in capsys.readouterr().out
