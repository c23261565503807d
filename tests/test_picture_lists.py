"""`dataset.files`: a CSV file that names pictures, their classes and their parts, in place of class folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from PIL import Image
from process import Ran

from kd_cli.data.folders import imagefolder
from kd_cli.data.prepare import prepare
from kd_cli.data.source import Source
from kd_cli.errors import DataError

COLOURS = {"cat": (200, 40, 0), "dog": (0, 40, 200)}


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Twelve pictures of two classes in folders that say nothing of them, and one that no list names."""
    for i in range(13):
        file = tmp_path / f"photos/day{i % 3}/{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        red, green, blue = COLOURS[label_of(i)]
        Image.new("RGB", (9, 8), (red, green + 3 * i, blue)).save(file)
    return tmp_path / "photos"


def label_of(i: int) -> str:
    return "cat" if i % 4 else "dog"


def write(path: Path, head: str, *lines: str) -> str:
    path.write_text("\n".join([head, *lines]) + "\n")
    return str(path)


def read(pictures: Path, files: str, **keys: Any) -> Source:
    return imagefolder(data_dir=pictures.parent / "data", root=str(pictures), image_size=4, files=files, **keys)


def test_a_list_names_classes_and_parts(pictures: Path) -> None:
    parts = ["train"] * 8 + ["valid", "val", "Test", "test"]
    lines = [f"day{i % 3}/{i:02}.png,{label_of(i)},{parts[i]}" for i in range(12)]
    source = read(pictures, write(pictures.parent / "list.csv", "path,label,split", *lines))
    assert source.class_names == ("cat", "dog")
    assert source.train_labels.tolist() == [int(i % 4 == 0) for i in range(8)]
    assert source.val_labels.tolist() == [1, 0]
    assert source.test_names == ("day1/10.png", "day2/11.png")
    assert source.train_images[5, :, 0, 0].tolist() == [200, 55, 0]
    assert "1 picture of photos is not in list.csv, and not used" in source.notes


def test_a_list_without_parts_is_split_class_by_class(pictures: Path) -> None:
    lines = [f"day{i % 3}/{i:02}.png,{label_of(i)}" for i in range(12)]
    write(pictures / "list.csv", "path,label", *lines)
    source = read(pictures, "list.csv", test_fraction=0.34)  # found below the folder of pictures
    assert source.test_labels.bincount().tolist() == [3, 1]
    assert source.train_labels.bincount().tolist() == [6, 2]
    assert any("list.csv names no test part: 4 of its 12 pictures test" in note for note in source.notes)


def test_a_picture_that_is_in_two_parts_under_two_names_is_reported(pictures: Path) -> None:
    (pictures / "copy.png").write_bytes((pictures / "day0/00.png").read_bytes())
    lines = [f"day{i % 3}/{i:02}.png,{label_of(i)},train" for i in range(12)]
    path = write(pictures / "list.csv", "path,label,split", *lines, "copy.png,dog,test", "day0/12.png,dog,test")
    notes = prepare(read(pictures, path), val_fraction=0.0).notes
    assert "1 test picture of 2 is identical to a training picture" in notes


@pytest.mark.parametrize(
    ("head", "line", "said"),
    [
        ("path,class", "day0/00.png,cat", "has no column label; its first line is 'path,class'"),
        ("path,label", "day0/00.png,", "line 2: day0/00.png has no label"),
        ("path,label", "day0/99.png,cat", "line 2: there is no file"),
        ("path,label", "../list.csv,cat", "line 2: the path '../list.csv' does not lie below"),
        ("path,label", "day0/00.png,cat,dog", "line 2: it has not as many fields as the first line"),
        ("path,label,split", "day0/00.png,cat,later", "line 2: the split 'later' is no part of a data set"),
        ("path,label,split", "day0/00.png,cat,train", "has no picture with the split test"),
        ("path,label", "day0/00.png,cat", "it needs some to test on and some to train on"),
    ],
)
def test_a_list_that_is_wrong_is_refused_by_its_line(pictures: Path, head: str, line: str, said: str) -> None:
    with pytest.raises(DataError, match=said) as refused:
        read(pictures, write(pictures.parent / "list.csv", head, line))
    assert said in str(refused.value)


def test_a_list_that_is_not_there_is_named(pictures: Path) -> None:
    with pytest.raises(DataError, match=r"there is no list .*none\.csv"):
        read(pictures, "none.csv")


def test_a_run_on_a_list_names_its_pictures_in_the_report(kd_run: Callable[..., Ran], pictures: Path) -> None:
    lines = [f"day{i % 3}/{i:02}.png,{label_of(i)}" for i in range(13)]
    write(pictures / "list.csv", "path,label", *lines)
    keys = ["dataset=imagefolder", f"dataset.root={pictures}", "dataset.files=list.csv", "dataset.image_size=8"]
    ran = kd_run(*TINY, *keys)
    assert ran.code == 0, ran.err
    assert ran.summary["dataset"]["class_names"] == ["cat", "dog"]
    assert "day" in (ran.run_dir / "report.html").read_text()
