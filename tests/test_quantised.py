"""Students that simulate int8: what is rounded, what gradients see, and that the int8 file computes the same."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from process import Ran
from torch import Tensor, nn

from kd_cli.errors import ConfigError
from kd_cli.experiments.quantised import table
from kd_cli.export.forms import run_onnx
from kd_cli.export.ship import int8_form
from kd_cli.export.student import Student
from kd_cli.models.cnn import cnn
from kd_cli.models.mlp import mlp
from kd_cli.models.quantised import (
    Int8Conv2d,
    Int8Linear,
    in_floats,
    int8_layers,
    quantised,
    ranges_in_order,
    rounded,
    rounded_weights,
)

SIZES = {"input_shape": (1, 8, 8), "num_classes": 4}
small_cnn = functools.partial(cnn, channels=[3, 4], hidden=8)


def pooled(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A network with BatchNorm, a depthwise convolution and a sum of three paths, one of them the input itself."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6)
            self.depthwise, self.again = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)
            self.short, self.fc = nn.Conv2d(6, 6, 1), nn.Linear(6, num_classes)

        def forward(self, images: Tensor) -> Tensor:
            x = self.norm(self.first(images)).relu()
            return self.fc((self.again(self.depthwise(x)) + self.short(x) + x).relu().mean((2, 3)))

    return Net()


def trained(build: Callable[..., nn.Module], steps: int = 30) -> nn.Module:
    """A quantised network after a few steps on made images, in eval mode."""
    torch.manual_seed(0)
    network = quantised(network=build, **SIZES)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.02)
    images, labels = torch.rand(64, *SIZES["input_shape"]), torch.arange(64) % 4
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images + 0.3 * labels[:, None, None, None]), labels).backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


def test_values_are_rounded_to_steps_and_clipped_at_the_ends() -> None:
    values = torch.tensor([-9.0, -1.2, -0.2, 0.0, 0.26, 0.74, 100.0])
    found = rounded(values, torch.tensor(0.5), torch.tensor(-120.0), -128)
    assert found.tolist() == [-4.0, -1.0, 0.0, 0.0, 0.5, 0.5, 100.0]
    assert rounded(torch.tensor([200.0]), torch.tensor(0.5), torch.tensor(-120.0), -128).item() == 0.5 * 247


def test_gradients_pass_inside_the_range_and_stop_outside() -> None:
    values = torch.tensor([-9.0, 0.3, 300.0], requires_grad=True)
    rounded(values, torch.tensor(0.5), torch.tensor(-120.0), -128).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [0.0, 1.0, 0.0]


def test_weights_have_255_levels_for_each_output_channel() -> None:
    weight = torch.randn(5, 3, 3, 3) * torch.tensor([0.01, 0.1, 1.0, 10.0, 0.0])[:, None, None, None]
    found = rounded_weights(weight)
    steps = weight.abs().flatten(1).amax(1) / 127
    for own, kept, step in zip(weight[:4], found, steps, strict=False):
        torch.testing.assert_close(kept / step, (kept / step).round(), rtol=0, atol=1e-4)
        assert (own - kept).abs().max() <= step / 2 * 1.001
        assert kept.abs().max() == pytest.approx(float(own.abs().max()))
    assert found[4].equal(weight[4])
    torch.testing.assert_close(rounded_weights(3 * weight), 3 * found)  # so BatchNorm can be folded into it


def test_names_and_initial_weights_are_those_of_the_network_itself() -> None:
    torch.manual_seed(3)
    plain = small_cnn(**SIZES)
    torch.manual_seed(3)
    network = quantised(network=small_cnn, **SIZES)
    assert [type(layer) for layer in int8_layers(network)] == [Int8Conv2d, Int8Conv2d, Int8Linear, Int8Linear]
    assert {name: one.shape for name, one in plain.named_parameters()} == {
        name: one.shape for name, one in network.named_parameters()
    }
    assert all(one.equal(plain.state_dict()[name]) for name, one in network.named_parameters())
    images = torch.rand(6, 1, 8, 8)
    network.eval()
    with torch.no_grad(), in_floats(network):
        torch.testing.assert_close(network(images), plain.eval()(images))
    difference = (network(images) - plain(images)).abs().max()
    assert 0 < difference < 0.05


def test_ranges_follow_the_batches_in_training_only() -> None:
    layer = Int8Linear(2, 1)
    layer.begin()
    layer(torch.tensor([[1.0, 3.0]]))
    assert (float(layer.low), float(layer.high)) == (0.0, 3.0)  # 0 is always in it
    layer(torch.tensor([[-2.0, 13.0]]))
    assert (float(layer.low), float(layer.high)) == (pytest.approx(-0.2), pytest.approx(4.0))
    layer.eval()(torch.tensor([[100.0, -100.0]]))
    assert float(layer.high) == pytest.approx(4.0)
    assert ranges_in_order(layer, layer, torch.zeros(1, 2)) == [(pytest.approx(-0.2), pytest.approx(4.0))]


@pytest.mark.parametrize("build", [lambda **_: nn.Flatten(), lambda **_: nn.Linear(64, 4)])
def test_a_network_without_such_layers_is_refused(build: Callable[..., nn.Module]) -> None:
    with pytest.raises(ConfigError, match="quantise=int8"):
        quantised(network=build, **SIZES)


@pytest.mark.slow
@pytest.mark.parametrize("build", [functools.partial(mlp, hidden=[12]), small_cnn, pooled], ids=["mlp", "cnn", "norm"])
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")
def test_the_int8_file_has_the_scales_of_the_training(build: Callable[..., nn.Module], tmp_path: Path) -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    import onnxruntime

    network = trained(build)
    classes = tuple("abcd")
    student = Student(network, mean=[0.5], std=[0.25], classes=classes, input_shape=(1, 8, 8), dtype=torch.float32)
    student.eval()
    images = torch.rand(40, 1, 8, 8)
    content, how = int8_form(student, {}, torch.zeros(8, 1, 8, 8))  # calibration images that would give other scales
    assert how == "in training"
    assert student.network(images).equal(network(images))
    assert all(layer.simulates for layer in int8_layers(network))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
    wanted = student(images)
    close = ((found - wanted).abs() < 1e-4 * wanted.abs().max()).float().mean()
    assert close > 0.9  # all, but where a sum's rounding moves a value across the middle between two steps
    path = tmp_path / "student.int8.onnx"
    path.write_bytes(content)
    assert (run_onnx(path)(images).argmax(1) == wanted.argmax(1)).float().mean() > 0.9  # in integers


@pytest.mark.long
def test_a_run_trains_the_student_in_int8_and_the_teacher_in_floats(tiny: Callable[..., Ran]) -> None:
    from kd_cli import load_student

    ran = tiny("student.quantise=int8")
    assert sum("simulates int8, alone and distilled" in note for note in ran.summary["notes"]) == 1
    student = load_student(ran.run_dir)
    layers = int8_layers(student.network)
    assert len(layers) == 2
    assert all(int(layer.batches) > 0 and float(layer.high) > 0 for layer in layers)
    rebuilt = json.loads((ran.run_dir / "student.json").read_text())["model"]
    assert rebuilt["network"]["_target_"] == "kd_cli.models.mlp.mlp"
    plain = tiny("hydra.run.dir=plain")
    assert plain.summary["student_alone"]["fingerprint"] != ran.summary["student_alone"]["fingerprint"]
    assert plain.summary["teacher"]["fingerprint"] == ran.summary["teacher"]["fingerprint"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")
def test_a_sweep_of_both_ends_with_the_errors_of_their_files(kd_run: Callable[..., Ran], tmp_path: Path) -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    small = ["seed=0", "training.epochs=1", "teacher_training.epochs=1", "teacher.hidden=[8]", "student.channels=[4]"]
    ran = kd_run("experiment=quantised_digits", *small, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert ran.code == 0, ran.err
    rows = json.loads((tmp_path / "sweep" / "quantised.json").read_text())
    assert [(row["quantise"], row["quantisation"]) for row in rows] == [(None, "static"), ("int8", "in training")]
    for row, folder in zip(rows, ran.run_dirs, strict=True):
        summary = json.loads((folder / "summary.json").read_text())
        assert row["errors"]["student"] == summary["student"]["test"]["errors"]
        assert row["errors"]["file"] == pytest.approx(row["errors"]["student"], abs=26)  # a twentieth of the test part
    assert "no interval; paired by seed, n = 1" in (tmp_path / "sweep" / "quantised.md").read_text()


@pytest.mark.slow
def test_a_method_that_extends_the_student_is_refused_before_training(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run("method=simkd", "teacher=resnet8x4", "student=cnn", "student.quantise=int8")
    assert ran.code == 1
    assert "method=simkd adds parts to the student, which student.quantise=int8 does not know" in ran.err
    assert "epochs in" not in ran.err


def test_the_table_pairs_the_files_by_seed() -> None:
    def row(seed: int, kind: str | None, file: int) -> dict[str, object]:
        errors = {"teacher": 5, "student_alone": 9, "student": 7, "file": file}
        return {"seed": seed, "quantise": kind, "errors": errors, "agreement": 0.99, "bytes": 1000}

    rows = [
        row(0, None, 10),
        row(0, "int8", 7),
        row(1, None, 12),
        row(1, "int8", 8),
        row(2, None, 9),
        row(2, "int8", 7),
    ]
    text = table(rows, total=100)
    assert "| student, int8 after training | 10.3 ± 1.5 | 1,000 |" in text
    assert "| student, int8 in training, its file | 7.3 ± 0.6 | 1,000 |" in text
    assert "-3.0 errors (± 2.5, 95 % interval; paired by seed, n = 3)" in text
