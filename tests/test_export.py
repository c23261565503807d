"""Exported students: they predict what the PyTorch student predicts, or they are not written."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from process import Ran
from torch import nn

from kd_cli import load_student
from kd_cli.commands import kd_export
from kd_cli.config.build import build
from kd_cli.data.digits import digits
from kd_cli.errors import ExportError
from kd_cli.export.forms import onnx_bytes, pt2_bytes, run_onnx, run_pt2
from kd_cli.export.parity import compare, logits_of
from kd_cli.export.student import Student
from kd_cli.models.cnn import cnn
from kd_cli.models.torchvision import torchvision_model

FORMS = ["pt2", "onnx"]
SLOW = pytest.mark.slow
pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")


def export(argv: list[str]) -> None:
    kd_export.main([*argv, "--no-cost"])  # which tests/test_export_cost.py measures


def needs(form: str) -> None:
    if form == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")


def student_of(network: nn.Module, shape: tuple[int, ...], values: str = "floats", mean: float = 0.5) -> Student:
    channels = shape[0]
    numbers = {"mean": [mean] * channels, "std": [0.25] * channels}
    return Student(
        network, **numbers, classes=tuple("abcd"), input_shape=shape, dtype=torch.float32, values=values
    ).requires_grad_(False)


def differences(student: Student, form: str, folder: Path, examples: int = 2) -> float:
    """The largest difference from the student, over max(1, |logit|), in batches of 1, 2, 3 and 5."""
    path = folder / f"student.{form}"
    content = onnx_bytes(student, {}, examples) if form == "onnx" else pt2_bytes(student, examples)
    path.write_bytes(content)
    predict = run_onnx(path) if form == "onnx" else run_pt2(path)
    images = torch.rand(11, *student.input_shape)
    images = (255 * images).byte() if student.values == "bytes" else images
    reference = logits_of(student.eval(), images)
    return float(((logits_of(predict, images) - reference).abs() / reference.abs().clamp(min=1)).max())


@SLOW
@pytest.mark.parametrize("form", FORMS)
def test_an_export_reports_what_the_run_reported(tiny: Callable[..., Ran], form: str, tmp_path: Path) -> None:
    needs(form)
    ran = tiny()
    export([str(ran.run_dir), f"--{form}", "--to", str(tmp_path / "shipped")])
    record = json.loads((tmp_path / "shipped" / "export.json").read_text())
    trained = ran.summary["student"]["test"]
    (row,) = record["forms"].values()
    for found in (record["student"], row):
        assert found["errors"] == trained["errors"]
        assert found["nll"] == pytest.approx(trained["nll"], abs=1e-6)
        assert found["ece"] == pytest.approx(trained["ece"], abs=1e-6)
    path = tmp_path / "shipped" / row["file"]
    assert row["bytes"] == path.stat().st_size
    images = digits(data_dir=tmp_path).test_images[:7]
    predict = run_onnx(path) if form == "onnx" else run_pt2(path)
    torch.testing.assert_close(predict(images), load_student(ran.run_dir)(images))


@SLOW
def test_a_student_of_one_label_is_compared_by_its_decisions(tiny: Callable[..., Ran], tmp_path: Path) -> None:
    ran = tiny("method=binary", "dataset.positive=3")
    export([str(ran.run_dir), "--pt2", "--to", str(tmp_path / "shipped")])
    record = json.loads((tmp_path / "shipped" / "export.json").read_text())
    assert record["student"]["errors"] == ran.summary["student"]["test"]["errors"]
    assert record["student"]["nll"] == pytest.approx(ran.summary["student"]["test"]["nll"], abs=1e-6)
    assert record["forms"]["pt2"]["agreement"] == 1


@SLOW
def test_an_onnx_file_names_its_run_and_classes_and_no_path_of_the_machine(
    tiny: Callable[..., Ran], tmp_path: Path
) -> None:
    needs("onnx")
    import onnx

    ran = tiny()
    export([str(ran.run_dir), "--onnx", "--to", str(tmp_path / "shipped")])
    content = (tmp_path / "shipped" / "student.onnx").read_bytes()
    model = onnx.load_from_string(content)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(metadata["classes"]) == [str(digit) for digit in range(10)]
    assert metadata["run"] == json.loads((ran.run_dir / "run.json").read_text())["identity"]
    assert metadata["fingerprint"] == ran.summary["student"]["fingerprint"]
    assert [graph_input.name for graph_input in model.graph.input] == ["images"]
    assert b".py" not in content
    assert str(ran.run_dir).encode() not in content


@SLOW
@pytest.mark.parametrize(("form", "examples"), [("onnx", 1), ("onnx", 2), ("pt2", 2)])
def test_the_batch_axis_is_free_whatever_the_example(form: str, examples: int, tmp_path: Path) -> None:
    needs(form)
    student = student_of(cnn(input_shape=(3, 8, 8), num_classes=4, channels=[5], hidden=7), (3, 8, 8), "bytes")
    assert differences(student, form, tmp_path, examples) < 1e-5


def test_a_batch_axis_that_an_example_of_one_fixes_is_refused() -> None:
    student = student_of(cnn(input_shape=(3, 8, 8), num_classes=4, channels=[5], hidden=7), (3, 8, 8), "bytes")
    with pytest.raises(ExportError, match="batch"):  # torch.export takes the 1 for a constant, and says so
        pt2_bytes(student, 1)


CONF = Path(__file__).parent.parent / "conf" / "model"
SHIPPED = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem not in ("torchvision", "timm"))


@SLOW
@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_model_is_exported(name: str, tmp_path: Path) -> None:
    needs("onnx")
    torch.manual_seed(0)
    node = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    network = build(node, where="model", input_shape=(3, 32, 32), num_classes=4)
    assert differences(student_of(network, (3, 32, 32), "bytes"), "onnx", tmp_path) < 1e-4


@SLOW
@pytest.mark.parametrize("form", FORMS)
def test_a_module_left_in_training_mode_is_exported_in_eval_mode(form: str, tmp_path: Path) -> None:
    needs(form)
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    student = student_of(network, (3, 2, 2))
    student.train()
    assert differences(student, form, tmp_path) < 1e-5


@SLOW
@pytest.mark.parametrize("form", FORMS)
def test_a_mean_that_half_precision_would_clip_is_kept(form: str, tmp_path: Path) -> None:
    needs(form)
    student = student_of(nn.Linear(3, 4), (3,), mean=100_000.0)
    student.std.fill_(50_000.0)
    assert differences(student, form, tmp_path) < 1e-5


@SLOW
@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5"])
def test_torchvisions_models_are_exported(name: str, tmp_path: Path) -> None:
    needs("onnx")
    torch.manual_seed(0)
    network = torchvision_model(name=name, input_shape=(3, 64, 64), num_classes=4)
    assert differences(student_of(network, (3, 64, 64), "bytes"), "onnx", tmp_path) < 1e-4


class Branching(nn.Module):
    """A user's model that looks at the values of its input."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :4] if images.sum() > 0 else images.flatten(1)[:, 4:8]


def test_a_model_that_looks_at_values_is_refused_with_advice() -> None:
    with pytest.raises(ExportError, match="cannot be exported") as refused:
        pt2_bytes(student_of(Branching(), (3, 2, 2)))
    assert "must not branch on values" in str(refused.value)


@SLOW
def test_a_form_that_differs_is_refused_and_leaves_no_file(
    tiny: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = tiny()
    (tmp_path / "shipped").mkdir()
    (tmp_path / "shipped" / "student.pt2").write_bytes(b"an earlier export")
    monkeypatch.setattr("kd_cli.export.parity.TOLERANCE", -1.0)  # which even equal logits are beyond
    with pytest.raises(SystemExit) as ended:
        export([str(ran.run_dir), "--pt2", "--to", str(tmp_path / "shipped")])
    assert "student.pt2 differs from the PyTorch student" in str(ended.value)
    assert [path.name for path in (tmp_path / "shipped").iterdir()] == ["export.json"]
    record = json.loads((tmp_path / "shipped" / "export.json").read_text())
    assert record["forms"] == {}
    assert record["refused"]["pt2"]["errors"] == ran.summary["student"]["test"]["errors"]
    assert "differs from the PyTorch student" in record["refused"]["pt2"]["why"]


def test_differences_are_measured_against_known_numbers() -> None:
    from kd_cli.data.source import Split

    reference = torch.tensor([[10.0, 0.0], [0.0, 1.0]]).double()
    found = compare(
        reference + torch.tensor([[0.5, 0.0], [0.0, -0.2]]), reference, Split(torch.zeros(2, 1), torch.tensor([0, 0]))
    )
    assert (found.errors, found.total, found.agreement) == (1, 2, 1.0)
    assert found.largest_difference == pytest.approx(0.5)
    assert found.relative == pytest.approx(0.2)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no summary\.json"):
        export([str(tmp_path), "--pt2"])


MINE = """
from torch import nn


def net(*, input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, num_classes))
"""


@SLOW
def test_a_users_own_model_is_exported_with_trust(
    kd_run: Callable[..., Ran],
    own_code: Callable[..., list[str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    flags = own_code({"mine_shipped.py": MINE, "model/mine": "# mine\n_target_: mine_shipped.net\n"})
    arguments = ["teacher=tinymlp", "student=mine", "training.epochs=1", "teacher_training.epochs=1"]
    ran = kd_run(*flags, *arguments)
    assert ran.code == 0, ran.err
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="code that kd_cli does not ship"):
        export([str(ran.run_dir), "--pt2"])
    export([str(ran.run_dir), "--pt2", "--trust"])
    assert f"{ran.summary['student']['test']['errors']} of 516" in capsys.readouterr().out


def test_another_data_set_than_the_runs_is_refused(tiny: Callable[..., Ran], tmp_path: Path) -> None:
    ran = tiny()
    config = ran.run_dir / ".hydra" / "config.yaml"
    config.write_text(config.read_text().replace("split: hand", "split: random"))
    with pytest.raises(SystemExit, match="is not the one of the run"):
        export([str(ran.run_dir), "--pt2", "--to", str(tmp_path / "shipped")])
    assert not (tmp_path / "shipped").exists()


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command adds the current folder to the paths that are searched."""
    monkeypatch.setattr(sys, "path", list(sys.path))
