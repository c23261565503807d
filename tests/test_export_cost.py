"""What kd-export measures and keeps: latencies, memory, earlier forms, the run's teacher."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from process import Ran
from torch import nn

from kd_cli.commands import kd_export
from kd_cli.config.options import conf_dir
from kd_cli.errors import ExportError
from kd_cli.export.forms import pt2_bytes
from kd_cli.export.latency import described, side_by_side, threads
from kd_cli.export.memory import STATUS, peak_memory
from kd_cli.export.run_data import shipped_readers
from kd_cli.export.ship import Shipment
from kd_cli.export.teacher import Combined
from kd_cli.storage.files import read_json

pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command adds the current folder to the paths that are searched."""
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_latencies_are_medians_percentiles_and_throughput_of_known_times() -> None:
    found = described([0.001 * i for i in range(1, 22)], batch=4)
    assert found == {"median_ms": 11.0, "p95_ms": 20.0, "per_second": round(4 / 0.011, 1), "calls": 21}
    assert described([0.5], batch=1)["p95_ms"] == 500.0


def test_models_take_turns() -> None:
    order: list[str] = []
    found = side_by_side({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, batch=1, seconds=0.0)
    assert "".join(order) == "aabb" + "ab" * 5
    assert {one["calls"] for one in found.values()} == {5}


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    with threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.is_file(), reason="memory is measured on Linux")
def test_the_memory_of_a_model_holds_its_weights(tmp_path: Path) -> None:
    from kd_cli.export.student import Student

    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 200_000), nn.Linear(200_000, 4)).requires_grad_(False)
    sizes = {"classes": tuple("abcd"), "input_shape": (1, 8, 8), "dtype": torch.float32}
    student = Student(network, mean=[0.5], std=[0.5], **sizes)
    (tmp_path / "model.pt2").write_bytes(pt2_bytes(student))
    found = peak_memory("pt2", tmp_path / "model.pt2", batch=2, shape=(1, 8, 8), kind="float32")
    assert found is not None
    weights = sum(4 * parameter.numel() for parameter in network.parameters())
    assert weights < found["model"] < 5 * weights
    assert found["model"] < found["process"]
    assert peak_memory("pt2", tmp_path / "none.pt2", batch=2, shape=(1, 8, 8), kind="float32") is None


@pytest.mark.slow
def test_a_second_export_keeps_the_first_and_measures_both(
    tiny: Callable[..., Ran], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kd_cli.export.cost.BATCHES", (1, 4))
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)  # a machine of one core
    ran = tiny()
    folder = ran.run_dir / "export"
    kd_export.main([str(ran.run_dir), "--pt2", "--no-cost"])
    (folder / "student.onnx").write_bytes(b"as a form that was made before")
    record = read_json(folder / "export.json")
    record["forms"]["onnx"] = record["forms"]["pt2"] | {"file": "student.onnx", "bytes": 29}  # not what lies there
    record["refused"] = {"int8": {"errors": 500}}
    (folder / "export.json").write_text(json.dumps(record))
    kd_export.main([str(ran.run_dir), "--pt2"])
    record = read_json(folder / "export.json")
    assert list(record["forms"]) == ["pt2"]
    assert record["refused"] == {"int8": {"errors": 500}}
    rows = record["cost"]["rows"]
    assert list(rows) == ["teacher", "student", "pt2"]
    for name, report in (("teacher", "teacher"), ("student", "student"), ("pt2", "student")):
        trained = ran.summary[report]
        assert (rows[name]["flops"], rows[name]["parameters"]) == (trained["flops"], trained["parameters"])
        assert rows[name]["errors"] == trained["test"]["errors"]
        assert {one["batch"] for one in rows[name]["latency"]} == {1, 4}
        assert all(0 < one["median_ms"] <= one["p95_ms"] for one in rows[name]["latency"])
    assert rows["student"]["bytes"] == 4 * ran.summary["student"]["parameters"]
    assert "milliseconds, median" in capsys.readouterr().out
    page = (ran.run_dir / "report.html").read_text()
    assert "Errors against latency" in page
    assert re.search(r"student alone: \d+ errors, [\d.]+ ms", page)
    card = (folder / "README.md").read_text()
    assert f"| student.pt2 | {rows['pt2']['errors']} of " in card
    assert f"| student, PyTorch | {rows['student']['latency'][0]['median_ms']:.3f} (" in card


@pytest.mark.slow
def test_the_teacher_is_exported_as_the_run_reported_it(
    tiny: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    ran = tiny("teacher.members=2", "teacher.combine=arithmetic")
    argv = [str(ran.run_dir), "--pt2", "--teacher", "--no-cost", "--to", str(tmp_path / "shipped")]
    kd_export.main(argv)
    record = read_json(tmp_path / "shipped" / "export.teacher.json")
    trained = ran.summary["teacher"]
    assert record["fingerprint"] == trained["fingerprint"]
    for found in (record["teacher"], record["forms"]["pt2"]):
        assert found["errors"] == trained["test"]["errors"]
        assert found["nll"] == pytest.approx(trained["test"]["nll"], abs=1e-6)
    assert (tmp_path / "shipped" / "teacher.pt2").is_file()
    shutil.rmtree(os.environ["KD_STORE"])
    with pytest.raises(SystemExit, match="does not hold the run's teacher"):
        kd_export.main(argv)


def test_several_teachers_are_one_network() -> None:
    members = [nn.Linear(3, 4), nn.Linear(3, 4)]
    images = torch.randn(5, 3)
    mean = sum(member(images).softmax(-1) for member in members) / 2
    torch.testing.assert_close(Combined(members, "arithmetic")(images).softmax(-1), mean)
    logits = sum(member(images) for member in members) / 2
    torch.testing.assert_close(Combined(members, "geometric")(images), logits)


def test_the_data_sets_that_need_no_trust_are_those_of_the_shipped_options() -> None:
    named = {re.search(r"_target_: (\S+)", file.read_text())[1] for file in (conf_dir() / "dataset").glob("*.yaml")}
    assert shipped_readers() == named
    assert all(name.startswith("kd_cli.data.") for name in named)


def test_an_int8_form_that_is_refused_leaves_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kd_cli.data.digits import digits
    from kd_cli.data.prepare import prepare
    from kd_cli.export.student import Student

    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    data = prepare(digits(data_dir=tmp_path), val_fraction=0.2)
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).requires_grad_(False)
    model = Student(
        network,
        mean=data.mean,
        std=data.std,
        classes=data.class_names,
        input_shape=data.shape,
        dtype=torch.float32,
        values="floats",
    ).eval()
    monkeypatch.setattr("kd_cli.export.int8.AGREEMENT", 1.1)
    shipment = Shipment("student", model, data, tmp_path / "shipped", {"fingerprint": "f", "role": "student"})
    with pytest.raises(ExportError, match="the file was not written"):
        shipment.add("int8")
    refused = read_json(tmp_path / "shipped" / "export.json")["refused"]["int8"]
    assert refused["quantisation"] == "dynamic"
    assert refused["total"] == len(data.test)
    assert 0.9 < refused["agreement"] <= 1
    assert not (tmp_path / "shipped" / "student.int8.onnx").exists()
