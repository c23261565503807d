"""Own pictures through the command: what is said, and what stands in summary.json."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

WORDS = ("dataset=imagefolder", "dataset.image_size=8")


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Pictures of 24 pixels in two classes, some of them twice."""
    random = np.random.default_rng(0)
    for c, name in enumerate(("cat", "dog")):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(10):
            pixels = random.integers(0, 90, (24, 24, 3), dtype=np.uint8)
            pixels[12 * c : 12 * c + 12] += 130
            Image.fromarray(pixels).save(tmp_path / "pets" / name / f"{i}.png")
    return tmp_path / "pets"


def summary(folder: Path) -> dict:
    [file] = folder.glob("outputs/*/*/summary.json")
    return json.loads(file.read_text())


def test_what_is_noted_of_the_pictures_is_said_and_recorded(tiny, pets, tmp_path):
    (pets / "cat" / "notes.txt").write_text("no picture")
    (pets / "dog" / ".ipynb_checkpoints").mkdir()
    ran = tiny(*WORDS, f"dataset.root={pets}")
    notes = summary(tmp_path)["notes"]
    for said in (
        "hidden and system folders are left out: .ipynb_checkpoints",
        "1 file passed over, which Pillow does not read: .txt (1)",
        "pets has no test part: 4 of its 20 pictures test, the same share of each class",
    ):
        assert said in notes
        assert said in " ".join((ran.out + ran.err).split())


def test_a_flat_folder_serves_as_transfer_set_in_the_sizes_of_the_data(tiny, pets, tmp_path):
    (tmp_path / "flat").mkdir()
    for i, file in enumerate(sorted(pets.rglob("*.png"))):
        Image.open(file).resize((30, 30)).save(tmp_path / "flat" / f"{i}.png")
    flat = f"name: imagefolder, root: {tmp_path / 'flat'}"
    tiny(*WORDS, f"dataset.root={pets}", f"transfer.data={{{flat}}}", folder=tmp_path / "inherited")
    tiny(*WORDS, f"dataset.root={pets}", f"transfer.data={{{flat}, image_size: 12}}", folder=tmp_path / "other")
    for folder in ("inherited", "other"):
        notes = summary(tmp_path / folder)["notes"]
        assert f"transfer.data: image_size is 8 and channels is 3, as in {pets.name}" in notes


def test_grey_data_are_joined_by_grey_transfer_pictures(tiny, pets, tmp_path):
    tiny(f"transfer.data={{name: imagefolder, root: {pets}}}")  # the digits: 8x8 pixels, grey
    notes = summary(tmp_path)["notes"]
    assert "transfer.data: image_size is 8 and channels is 1, as in digits" in notes
    assert "transfer.data: pets as transfer.data: its training part is used, 4 held-out examples are not" in notes


def test_a_flat_folder_as_data_set_is_refused_before_anything_trains(kd_run, pets):
    ran = kd_run(*WORDS, f"dataset.root={pets / 'cat'}")
    assert ran.code == 1
    assert "data set cat has pictures without labels" in ran.err
    assert "Traceback" not in ran.err


def test_a_run_with_a_class_that_is_no_utf8_writes_its_summary(tiny, pets, tmp_path):
    os.rename(pets / "cat", os.path.join(os.fsencode(pets), b"caf\xe9"))
    tiny(*WORDS, f"dataset.root={pets}")
    assert any("is not UTF-8" in note for note in summary(tmp_path)["notes"])


def test_an_mlp_on_photographs_is_advised(tiny, pets, tmp_path):
    tiny("dataset=imagefolder", "dataset.image_size=32", f"dataset.root={pets}")
    assert any("try teacher=cnn student=cnn" in note for note in summary(tmp_path)["notes"])
