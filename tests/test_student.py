"""A loaded student: one expression from pixels to logits, which exports; its input in every usual form."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from process import Ran, Running
from torch import Tensor, nn

from kd_cli import load_student
from kd_cli.data.digits import digits
from kd_cli.data.normalisation import normalise
from kd_cli.errors import CheckpointError, DataError
from kd_cli.export.student import Student
from kd_cli.models.cnn import cnn

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture
def student() -> Student:
    torch.manual_seed(0)
    network = cnn(input_shape=(3, 8, 6), num_classes=4, channels=[5], hidden=7).eval().requires_grad_(False)
    return Student(
        network,
        mean=MEAN,
        std=STD,
        classes=tuple("abcd"),
        input_shape=(3, 8, 6),
        dtype=torch.float32,
        values="bytes",
        range=(0.0, 1.0),
    ).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randint(0, 256, (5, 3, 8, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def expected(student: Student, images: Tensor) -> Tensor:
    """As in training."""
    return student.network(normalise(images, MEAN, STD, torch.float32))


# ---------------------------------------------------------------- exports


def test_its_input_is_normalised_as_in_training_bit_for_bit(student: Student, images: Tensor) -> None:
    assert student(images).equal(expected(student, images))
    floats = torch.rand(5, 3, 8, 6)
    assert student(floats).equal(expected(student, floats))


def test_mean_and_std_are_buffers_of_its_state(student: Student) -> None:
    assert {"mean", "std"} <= set(student.state_dict())
    assert student.mean.flatten().tolist() == pytest.approx(MEAN)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace.*is deprecated")  # a FutureWarning from torch 2.15 on
def test_a_trace_is_right_for_more_rows_than_any_chunk(student: Student) -> None:
    traced = torch.jit.trace(student, torch.rand(4, 3, 8, 6))
    many = torch.rand(5000, 3, 8, 6)
    torch.testing.assert_close(traced(many), student(many))
    as_bytes = torch.randint(0, 256, (5000, 3, 8, 6), dtype=torch.uint8)
    torch.testing.assert_close(torch.jit.trace(student, as_bytes[:4])(as_bytes), student(as_bytes))


@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # torch 2.6 on Python 3.13.0 only
@pytest.mark.parametrize("kind", [torch.float32, torch.uint8], ids=str)
def test_it_exports_with_any_number_of_images(student: Student, images: Tensor, kind: torch.dtype) -> None:
    example = images if kind == torch.uint8 else images.float() / 255
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(student, (example,), dynamic_shapes={"images": {0: batch}}).module()
    for n in (1, 7, 5000):
        many = example[torch.arange(n) % len(example)]
        torch.testing.assert_close(program(many), student(many))


def test_it_runs_in_double_and_half_precision(student: Student, images: Tensor) -> None:
    single = student(images)
    torch.testing.assert_close(student.double()(images), single.double(), atol=1e-5, rtol=1e-4)
    assert student(images.double() / 255).dtype == torch.float64
    torch.testing.assert_close(student.bfloat16()(images).float(), single, atol=0.1, rtol=0.1)
    assert student.half()(images).dtype == torch.float16


def test_it_is_quantised_dynamically(student: Student, images: Tensor) -> None:
    before = student(images)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao.quantization moves to another package
        small = torch.ao.quantization.quantize_dynamic(student, {nn.Linear}, dtype=torch.qint8)
        after = small(images)
    assert any("quantized" in type(module).__module__ for module in small.modules())
    torch.testing.assert_close(after, before, atol=0.05, rtol=0.2)


# ---------------------------------------------------------------- what it takes


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.int16, torch.uint8], ids=str)
def test_integers_of_any_type_are_bytes(student: Student, images: Tensor, kind: torch.dtype) -> None:
    assert student(images.to(kind)).equal(expected(student, images))


@pytest.mark.parametrize("kind", ["uint8", "int64", "uint16", ">i4", "float64", "float32"])
def test_arrays_are_taken_with_channels_first_or_last(student: Student, images: Tensor, kind: str) -> None:
    array = images.numpy().astype(kind)
    if "float" in kind:
        array = array / 255
    for given in (array, np.moveaxis(array, 1, -1)):
        torch.testing.assert_close(student(given), expected(student, images))
    torch.testing.assert_close(student(np.moveaxis(array[0], 0, -1)), expected(student, images[:1]))


def test_one_picture_or_many_are_taken(student: Student, images: Tensor) -> None:
    wanted = expected(student, images)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    torch.testing.assert_close(student(pictures[0]), wanted[:1])
    torch.testing.assert_close(student(pictures), wanted)
    torch.testing.assert_close(student(images[0]), wanted[:1])
    torch.testing.assert_close(student(list(images)), wanted)
    torch.testing.assert_close(student.probabilities(pictures[1]), wanted[1:2].softmax(-1))


def test_grey_transparent_and_turned_pictures_are_seen_as_they_look(student: Student) -> None:
    grey = Image.new("L", (6, 8), 100)
    assert student(grey).equal(student(torch.full((1, 3, 8, 6), 100, dtype=torch.uint8)))
    clear = Image.new("RGBA", (6, 8), (0, 0, 0, 0))
    assert student(clear).equal(student(torch.full((1, 3, 8, 6), 255, dtype=torch.uint8)))
    pixels = np.arange(144, dtype=np.uint8).reshape(8, 6, 3)
    turned = Image.fromarray(np.ascontiguousarray(pixels[::-1, ::-1]))
    turned.getexif()[0x0112] = 3
    assert student(turned).equal(student(pixels))


def test_grey_arrays_without_a_channel_are_taken() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).requires_grad_(False)
    own = Student(network, mean=(0.5,), std=(0.2,), classes=tuple("abc"), input_shape=(1, 8, 8), dtype=torch.float32)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8), dtype=np.uint8)
    assert own(pixels).equal(own(pixels[:, None]))
    assert own(pixels[0]).equal(own(pixels[:1]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (torch.zeros(2, 3, 9, 6), r"shape \[2, 3, 9, 6\]; this student takes \[B, 3, 8, 6\]"),
        (torch.zeros(2, 1, 8, 6), "the shape"),
        (torch.zeros(144), "the shape"),
        (torch.zeros(2, 8, 6, 3), "the shape"),
        (torch.tensor(1.0), "the shape"),
        (255 * torch.rand(2, 3, 8, 6), "takes floats from 0 to 1, or bytes"),
        (-2 * torch.rand(2, 3, 8, 6), "takes floats from 0 to 1"),
        (torch.full((1, 3, 8, 6), 300), "values from 300 to 300, and bytes go from 0 to 255"),
        (torch.full((1, 3, 8, 6), -1), "values from -1"),
        (torch.full((1, 3, 8, 6), float("nan")), "not numbers"),
        (torch.ones(1, 3, 8, 6, dtype=torch.bool), "the input holds bool"),
        (torch.ones(1, 3, 8, 6, dtype=torch.complex64), "the input holds complex64"),
        (np.full((1, 3, 8, 6), "x"), "the input holds <U1"),
        ("cat.jpg", "the input is a str"),
        (Path("cat.jpg"), "the input is a P"),
        (None, "the input is a NoneType"),
        ([], "no images"),
        (Image.new("RGB", (7, 8)), "the picture is 7x8 pixels; this student takes 6x8"),
    ],
)
def test_what_it_cannot_take_is_named(student: Student, given: Any, said: str) -> None:
    with pytest.raises(DataError, match=said):
        student(given)


def test_no_image_is_no_error(student: Student) -> None:
    assert student(torch.zeros(0, 3, 8, 6)).shape == (0, 4)


def test_values_of_a_table_are_not_taken_for_pixels() -> None:
    network = nn.Linear(3, 2).requires_grad_(False)
    own = Student(
        network,
        mean=(900.0, 0.1, 5.0),
        std=(300.0, 0.02, 1.0),
        classes=("a", "b"),
        input_shape=(3,),
        dtype=torch.float32,
        values="floats",
        range=(0.01, 2500.0),
    )
    row = torch.tensor([1200.0, 0.08, 7.0])
    torch.testing.assert_close(own(row), network(torch.tensor([[1.0, -1.0, 2.0]])))
    with pytest.raises(DataError, match=r"int64, and this student was trained on floats from 0\.01 to 2500"):
        own(row.long())


# ---------------------------------------------------------------- of a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    ran = Running((*TINY, "store_dir=store", "hydra.run.dir=out"), tmp_path_factory.mktemp("run")).wait()
    assert ran.code == 0, ran.err
    return ran


def test_a_loaded_student_makes_the_errors_that_the_run_reported(run: Ran) -> None:
    loaded, source = load_student(run.run_dir), digits(data_dir="unused")
    errors = int((loaded(source.test_images).argmax(1) != source.test_labels).sum())
    assert errors == run.summary["student"]["test"]["errors"]
    with pytest.raises(DataError, match="int64, and this student was trained on floats from 0 to 1"):
        loaded((16 * source.test_images).long())
    with pytest.raises(DataError, match="takes floats from 0 to 1"):
        loaded(16 * source.test_images)


def test_a_run_of_an_older_version_is_loaded(run: Ran, tmp_path: Path) -> None:
    old = Path(shutil.copytree(run.run_dir, tmp_path / "old"))
    record = json.loads((old / "student.json").read_text())
    for key in ("code", "values", "range", "normalize"):
        del record[key]
    record["model"]["_target_"] = "kd_cli.zoo.models.mlp"
    (old / "student.json").write_text(json.dumps(record))
    (old / ".checksums.json").unlink()
    images = digits(data_dir="unused").test_images
    assert load_student(old)(images).equal(load_student(run.run_dir)(images))
    assert load_student(old)((images * 255).long()).shape == (516, 10)  # what its data were is not known


MODEL = """
from torch import nn
def net(*, input_shape, num_classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.{activation}(), nn.Linear(9, num_classes))
"""
LOAD = """
import sys
sys.path.insert(0, ".")
from kd_cli import load_student
try:
    load_student("out", **{keys})
    print("loaded")
except Exception as error:
    print(type(error).__name__, error)
"""


@pytest.mark.slow
def test_a_student_whose_code_was_changed_is_refused_unless_that_is_accepted(
    kd_run: Callable[..., Ran], tmp_path: Path
) -> None:
    def loaded(**keys: bool) -> str:
        command = [sys.executable, "-c", LOAD.format(keys=keys)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    own = tmp_path / "own_net.py"
    own.write_text(MODEL.format(activation="ReLU"))
    argv = [word for word in TINY if "student" not in word]
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "own.yaml").write_text("# own\n_target_: own_net.net\n")
    ran = kd_run("--config-dir", "conf", *argv, "student=own", "hydra.run.dir=out", "store_dir=store")
    assert ran.code == 0, ran.err
    assert "CheckpointError" in loaded()
    assert loaded(trust=True) == "loaded\n"
    own.write_text(MODEL.format(activation="Sigmoid"))
    said = loaded(trust=True)
    assert "own_net: this code was changed since the run" in said
    assert "same_code=False" in said
    assert loaded(trust=True, same_code=False) == "loaded\n"


def test_weights_and_record_that_do_not_belong_together_are_refused(run: Ran, tmp_path: Path) -> None:
    other = Path(shutil.copytree(run.run_dir, tmp_path / "other"))
    content = bytearray((other / "student.safetensors").read_bytes())
    content[-3] ^= 1
    (other / "student.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"student\.safetensors was changed since the run wrote it"):
        load_student(other)
