"""Students of 8-bit weights: small, close to the student, or not written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from kd_cli.data.digits import digits
from kd_cli.errors import ExportError
from kd_cli.export.parity import Parity, logits_of
from kd_cli.export.student import Student
from kd_cli.models.cnn import cnn
from kd_cli.models.mlp import mlp

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from kd_cli.export.forms import onnx_bytes, run_onnx  # noqa: E402
from kd_cli.export.int8 import CALIBRATION, calibration_images, check_int8, int8_bytes  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")
SHAPE = (1, 8, 8)
STUDENT = Parity(errors=10, total=1000, nll=0.1, ece=0.01, agreement=1.0, largest_difference=0.0, relative=0.0)


def student_of(network: torch.nn.Module) -> Student:
    classes = tuple("0123456789")
    return Student(
        network.requires_grad_(False), mean=[0.3], std=[0.38], classes=classes, input_shape=SHAPE, dtype=torch.float32
    ).eval()


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [[800, 800], [1200, 1200]], ids=["smallmlp", "bigmlp"])
def test_a_fully_connected_student_is_at_least_three_and_a_half_times_smaller(
    hidden: list[int], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    student = student_of(mlp(input_shape=SHAPE, num_classes=10, hidden=hidden))
    images = digits(data_dir=tmp_path).test_images
    floats = onnx_bytes(student, {"name": "mine"})
    content, how = int8_bytes(floats, images)
    assert how == "dynamic"
    assert len(floats) / len(content) >= 3.5
    path = tmp_path / "int8.onnx"
    path.write_bytes(content)
    found, wanted = logits_of(run_onnx(path), images), logits_of(student, images)
    assert 0 < (found - wanted).abs().max() < 0.05 * wanted.abs().max()


@pytest.mark.slow
def test_a_convolutional_student_is_calibrated_per_channel_and_keeps_its_metadata(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = student_of(cnn(input_shape=SHAPE, num_classes=10, channels=[8, 16], hidden=32))
    images = digits(data_dir=tmp_path).test_images
    content, how = int8_bytes(onnx_bytes(student, {"name": "mine"}), images)
    assert how == "static"
    model = onnx.load_from_string(content)
    assert [(entry.key, entry.value) for entry in model.metadata_props] == [("name", "mine")]
    kinds = {node.op_type for node in model.graph.node}
    assert {"QuantizeLinear", "DequantizeLinear", "Conv"} <= kinds
    weights = [tensor for tensor in model.graph.initializer if tensor.name.endswith("_scale") and tensor.dims]
    assert {8, 16} <= {tensor.dims[0] for tensor in weights}
    path = tmp_path / "int8.onnx"
    path.write_bytes(content)
    found, wanted = logits_of(run_onnx(path), images), logits_of(student, images)
    assert 0 < (found - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_calibration_takes_examples_from_the_whole_training_part() -> None:
    train = torch.arange(10_000).reshape(-1, 1)
    taken = calibration_images(train)[:, 0]
    assert len(taken.unique()) == CALIBRATION
    assert (taken[0], taken[-1]) == (0, 9_999)
    assert len(calibration_images(train[:5])) == 5


@pytest.mark.parametrize(("errors", "agreement"), [(21, 0.99), (10, 0.979), (10, float("nan"))])
def test_a_form_that_errs_or_disagrees_too_often_is_refused(errors: int, agreement: float) -> None:
    with pytest.raises(ExportError, match="was not written"):
        check_int8(dataclasses.replace(STUDENT, errors=errors, agreement=agreement), STUDENT, "student.int8.onnx")


@pytest.mark.parametrize(("errors", "agreement"), [(20, 0.98), (3, 1.0)])
def test_a_form_within_the_tolerance_is_accepted(errors: int, agreement: float) -> None:
    check_int8(dataclasses.replace(STUDENT, errors=errors, agreement=agreement), STUDENT, "student.int8.onnx")
