"""What a run leaves on disk: whole files, the public contract, a student that predicts what was reported."""

from __future__ import annotations

import json
import math
import pickle
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY
from process import Ran, Running
from safetensors.torch import load_file, save_file

from kd_cli import load_student
from kd_cli.data.digits import digits, digits_table
from kd_cli.errors import CheckpointError, StorageError
from kd_cli.metrics import evaluate_logits
from kd_cli.storage.files import new_folder, replacing, write_json, write_tensors, write_text
from kd_cli.storage.run_dir import RunDir

RESULTS = {"errors", "total", "accuracy", "nll", "ece", "recall", "balanced_accuracy", "worst_class"}
MODEL = {"fingerprint", "parameters", "flops", "epochs", "seconds", "from_store", "test"}
SUMMARY = {
    *("status", "command", "dataset", "teacher", "student_alone", "student", "gap_closed", "T", "alpha", "beta"),
    *("method", "seed", "device", "precision", "versions"),
}
ROW = {
    *("role", "epoch", "loss", "soft_loss", "hard_loss", "train_accuracy", "val_accuracy", "val_nll", "lr"),
    "examples_per_second",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A finished run with its own store."""
    folder = tmp_path_factory.mktemp("finished")
    argv = [*TINY, "training.epochs=2", "teacher_training.epochs=3", "T=4", f"store_dir={folder / 'store'}"]
    ran = Running(tuple(argv), folder).wait()
    assert ran.code == 0, ran.err
    return ran


def teacher_weights(ran: Ran) -> Path:
    return ran.folder / "store" / ran.summary["teacher"]["fingerprint"] / "weights.safetensors"


# ---------------------------------------------------------------- the public contract


def test_the_summary_has_the_contracts_keys(finished: Ran) -> None:
    summary = finished.summary
    assert summary.keys() >= SUMMARY
    assert summary["status"] == "completed"
    assert summary["dataset"].keys() >= {"name", "fingerprint", "train", "val", "test", "classes"}
    assert [summary["dataset"][key] for key in ("train", "val", "test", "classes")] == [1023, 258, 516, 10]
    for role, width, inputs in (("teacher", 12, 64), ("student_alone", 8, 64), ("student", 8, 64)):
        model = summary[role]
        assert model.keys() >= MODEL
        assert model["test"].keys() >= RESULTS
        assert model["parameters"] == inputs * width + width + width * 10 + 10
        assert model["flops"] == 2 * (inputs * width + width * 10)
        assert model["epochs"] == (3 if role == "teacher" else 2)
        assert model["test"]["total"] == 516
        assert model["test"]["accuracy"] == pytest.approx(1 - model["test"]["errors"] / 516)
        assert ("agreement" in model["test"]) == (role != "teacher")
    assert (summary["T"], summary["alpha"], summary["beta"], summary["seed"]) == (4, 1, 0.5, 0)
    assert (summary["method"], summary["device"], summary["precision"]) == ("soft_targets", "cpu", "float32")
    assert summary["command"].startswith("kd-run teacher=tinymlp student=tinymlp 'teacher.hidden=[12]'")
    assert summary["versions"].keys() >= {"python", "kd-cli", "torch", "hydra-core", "numpy"}
    errors = [summary[role]["test"]["errors"] for role in ("teacher", "student_alone", "student")]
    assert summary["gap_closed"] == pytest.approx((errors[1] - errors[2]) / (errors[1] - errors[0]))


def test_metrics_hold_an_object_per_role_and_epoch(finished: Ran) -> None:
    rows = finished.metrics
    expected = [("teacher", 1), ("teacher", 2), ("teacher", 3)]
    expected += [(role, epoch) for role in ("student_alone", "student") for epoch in (1, 2)]
    assert [(row["role"], row["epoch"]) for row in rows] == expected
    for row in rows:
        assert row.keys() >= ROW
        assert (row["soft_loss"] is None) == (row["role"] != "student")
        assert all(math.isfinite(row[key]) for key in ROW - {"role", "soft_loss"})
    student = rows[-1]
    assert student["loss"] == pytest.approx(16 * student["soft_loss"] + 0.5 * student["hard_loss"], rel=1e-5)


def test_the_files_of_a_run_are_there_and_the_summary_is_the_last(finished: Ran) -> None:
    names = {"metrics.jsonl", "student.safetensors", "student.json", "run.log", "summary.json"}
    assert names <= {path.name for path in finished.run_dir.iterdir()}
    assert {path.name for path in (finished.run_dir / ".hydra").iterdir()} >= {"config.yaml", "overrides.yaml"}
    assert not [path for path in finished.folder.rglob("*") if path.name.endswith(".tmp") or ".making" in path.name]
    times = {name: (finished.run_dir / name).stat().st_mtime_ns for name in names - {"run.log"}}
    assert max(times, key=times.__getitem__) == "summary.json"


# ---------------------------------------------------------------- the student


def test_the_loaded_student_predicts_exactly_what_the_run_reported(finished: Ran) -> None:
    source = digits(data_dir="")
    with torch.no_grad():
        found = evaluate_logits(load_student(finished.run_dir)(source.test_images), source.test_labels)
    reported = finished.summary["student"]["test"]
    assert (found.errors, found.total) == (reported["errors"], reported["total"])
    assert found.nll == pytest.approx(reported["nll"], abs=1e-6)


OWN_DATA = """
import torch
from kd_cli.data.digits import digits_table
from kd_cli.data.source import Source

def colours(data_dir):
    table = torch.from_numpy(digits_table())
    grey = (table[:, :64] * 15).to(torch.uint8).view(-1, 8, 8)
    images, labels = torch.stack([grey, 255 - grey, grey // 2], 1), table[:, 64].long()
    return Source("colours", images[:900], labels[:900], images[900:], labels[900:], tuple("abcdefghij"))
"""


@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_the_loaded_student_takes_uint8_images_as_the_data_set_has_them(
    kd_run: Callable[..., Ran], own_code: Callable[..., list[str]], precision: str
) -> None:
    flags = own_code({"own_data.py": OWN_DATA, "dataset/colours": "_target_: own_data.colours\nval_fraction: 0.1\n"})
    ran = kd_run(*flags, *TINY, "dataset=colours", "student=cnn", "student.hidden=8", f"precision={precision}")
    assert ran.code == 0, ran.err
    grey = torch.from_numpy(digits_table()[900:, :64] * 15).to(torch.uint8).view(-1, 8, 8)
    images = torch.stack([grey, 255 - grey, grey // 2], 1)
    student = load_student(ran.run_dir)
    assert student.classes == tuple("abcdefghij")
    with torch.no_grad():
        found = evaluate_logits(student(images), torch.from_numpy(digits_table()[900:, 64]).long())
        assert torch.equal(student.probabilities(images[:5]), student(images[:5]).softmax(-1))
    reported = ran.summary["student"]["test"]
    assert found.errors == reported["errors"]
    assert found.nll == pytest.approx(reported["nll"], abs=1e-6)


def test_a_damaged_student_is_refused(finished: Ran, tmp_path: Path) -> None:
    for name in ("student.json", "student.safetensors"):
        (tmp_path / name).write_bytes((finished.run_dir / name).read_bytes())
    load_student(tmp_path)
    data = bytearray((tmp_path / "student.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "student.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match="changed since the run wrote it"):
        load_student(tmp_path)
    (tmp_path / "student.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be rebuilt"):
        load_student(tmp_path)
    with pytest.raises(CheckpointError, match="holds no student"):
        load_student(tmp_path / "nowhere")


# ---------------------------------------------------------------- nothing is written over another run


def test_runs_started_at_the_same_time_have_directories_of_their_own(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    running = [start(*TINY, "hydra.run.dir=${new_dir:out/now}", f"seed={seed}") for seed in (0, 1)]
    runs = [one.wait() for one in running]
    assert [ran.code for ran in runs] == [0, 0], [ran.err for ran in runs]
    summaries = [json.loads((tmp_path / "out" / name / "summary.json").read_text()) for name in ("now", "now-2")]
    assert sorted(summary["seed"] for summary in summaries) == [0, 1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["now", "now-2"]


def test_new_folders_never_meet(tmp_path: Path) -> None:
    made = [new_folder(tmp_path / "a" / "12-00-00") for _ in range(3)]
    assert [path.name for path in made] == ["12-00-00", "12-00-00-2", "12-00-00-3"]


def test_a_run_into_the_directory_of_another_is_refused(kd_run: Callable[..., Ran], tmp_path: Path) -> None:
    assert kd_run(*TINY, "hydra.run.dir=out").code == 0
    files = ["summary.json", "metrics.jsonl", "student.safetensors", "student.json"]
    before = [(tmp_path / "out" / name).read_bytes() for name in files]
    ran = kd_run(*TINY, "hydra.run.dir=out", "T=9")
    assert ran.code == 1
    assert "already holds a run" in ran.err
    assert "hint: " in ran.err
    assert "Traceback" not in ran.err
    assert [(tmp_path / "out" / name).read_bytes() for name in files] == before


def test_a_refused_run_leaves_the_configuration_of_the_other(kd_run: Callable[..., Ran], tmp_path: Path) -> None:
    assert kd_run(*TINY, "hydra.run.dir=out").code == 0
    before = (tmp_path / "out" / ".hydra" / "config.yaml").read_text()
    assert kd_run(*TINY, "hydra.run.dir=out", "T=9").code == 1
    assert (tmp_path / "out" / ".hydra" / "config.yaml").read_text() == before


def test_a_run_directory_refuses_the_files_of_another(tmp_path: Path) -> None:
    RunDir(tmp_path / "run").write_summary({"nll": math.nan})
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["nll"] is None
    with pytest.raises(StorageError, match=r"summary\.json"):
        RunDir(tmp_path / "run")


def test_a_killed_run_leaves_no_summary(start: Callable[..., Running], tmp_path: Path) -> None:
    running = start(*TINY, "training.epochs=100000", "hydra.run.dir=out")
    for _ in range(600):
        if (tmp_path / "out" / "metrics.jsonl").exists():
            break
        time.sleep(0.1)
    time.sleep(0.2)
    running.process.kill()
    running.process.join()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "summary.json" not in names
    assert "student.safetensors" not in names
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["role"] == "teacher"


# ---------------------------------------------------------------- the user's own weights as a teacher


class Evil:
    """What a pickle can do to the one who reads it."""

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("executed"),)


def test_a_checkpoint_is_read_without_running_its_code(kd_run: Callable[..., Ran], tmp_path: Path) -> None:
    torch.save({"1.weight": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    for name, said in (
        ("evil.pt", "holds no tensors; its keys are 1.weight"),
        ("evil.pkl", "cannot be read as weights"),
    ):
        ran = kd_run(*TINY, f"teacher.checkpoint={name}")
        assert ran.code == 1
        assert f"teacher.checkpoint={name} {said}" in ran.err
        assert "hint: save the weights alone" in ran.err
        assert "Traceback" not in ran.err
        assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["mine.pt", "mine.safetensors"])
def test_a_checkpoint_teaches_as_the_teacher_it_came_from(
    tiny: Callable[..., Ran], finished: Ran, tmp_path: Path, name: str
) -> None:
    state = load_file(teacher_weights(finished))
    if name.endswith(".pt"):
        torch.save(state, tmp_path / name)
    else:
        save_file(state, tmp_path / name)
    ran = tiny(f"teacher.checkpoint={name}", "training.epochs=2", "T=4")
    assert ran.summary["teacher"]["test"] == finished.summary["teacher"]["test"]
    assert ran.summary["teacher"]["epochs"] is None
    assert ran.summary["student"]["test"] == finished.summary["student"]["test"]


def test_a_checkpoint_of_another_architecture_is_named(
    kd_run: Callable[..., Ran], finished: Ran, tmp_path: Path
) -> None:
    path = teacher_weights(finished)
    ran = kd_run(*TINY, f"teacher.checkpoint={path}", "teacher.hidden=[13]")
    assert ran.code == 1
    assert "1.weight is (12, 64), the model's is (13, 64)" in ran.err
    assert "hint: give the architecture that these weights come from" in ran.err
    ran = kd_run(*TINY, f"teacher.checkpoint={path}", "teacher.hidden=[12,12]")
    assert ran.code == 1
    assert "5.weight is missing" in ran.err
    state = load_file(path)
    save_file({**state, "3.weight": torch.zeros(7, 12), "3.bias": torch.zeros(7)}, tmp_path / "seven.safetensors")
    ran = kd_run(*TINY, "teacher.checkpoint=seven.safetensors")
    assert ran.code == 1
    assert "its last layer 3, which has 7 classes; digits has 10" in ran.err
    torch.save([1, 2], tmp_path / "list.pt")
    ran = kd_run(*TINY, "teacher.checkpoint=list.pt")
    assert ran.code == 1
    assert "holds no tensors" in ran.err
    assert "Traceback" not in ran.err


# ---------------------------------------------------------------- disks


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"a": 1})

    def fail() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": math.nan})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_where_a_folder_should_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for write in (
        lambda: write_text(tmp_path / "file" / "x", ""),
        lambda: write_tensors(tmp_path / "file" / "x", {"a": torch.ones(1)}),
        lambda: RunDir(tmp_path / "file" / "run"),
        lambda: new_folder(tmp_path / "file" / "run"),
    ):
        with pytest.raises(StorageError, match="cannot write"):
            write()


@pytest.mark.parametrize("key", ["store_dir", "hydra.run.dir"])
def test_a_folder_that_cannot_be_made_ends_the_run_with_a_message(
    kd_run: Callable[..., Ran], tmp_path: Path, key: str
) -> None:
    (tmp_path / "file").write_text("")
    ran = kd_run(*TINY, f"{key}=file/x")
    assert ran.code == 1
    assert "cannot write" in ran.err
    assert f"{key}=" in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("limit", [1500, 4000, 12000])
def test_a_full_disk_ends_the_run_with_a_message(kd_run: Callable[..., Ran], tmp_path: Path, limit: int) -> None:
    """A limit on the size of a file stands for the disk: at one place after the other, writing fails."""
    ran = kd_run(*TINY, "student.hidden=[9]", f"store_dir={tmp_path / 'store'}", limit=limit)
    assert ran.code == 1
    assert "cannot write" in ran.err, ran.err
    assert "File too large" in ran.err
    assert "Traceback" not in ran.err
    assert not list(tmp_path.rglob("summary.json"))
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp") or ".making" in path.name]
