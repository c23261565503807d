"""Hugging Face data sets on disk: Parquet and Arrow files, their features, their parts, bad ones."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image
from process import Ran

from kd_cli.data.folders import imagefolder
from kd_cli.data.huggingface import huggingface
from kd_cli.data.source import Source
from kd_cli.errors import DataError

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"},
    "note": {"dtype": "string", "_type": "Value"},
}


def jpeg(i: int) -> bytes:
    """A picture of 20 x 16 pixels, each number another."""
    pixels = np.random.default_rng(i).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).resize((20, 16)).save(stream, "JPEG")
    return stream.getvalue()


def table(numbers: Sequence[int], labels: Sequence[Any], *, features: Any = FEATURES, inside: bool = True) -> Any:
    pictures = [{"bytes": jpeg(i) if inside else None, "path": f"{i}.jpg"} for i in numbers]
    found = pa.table({"image": pictures, "label": labels, "note": [str(i) for i in numbers]})
    if features is None:
        return found
    return found.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A folder as on the Hub: the training part in two files, a validation and a test part."""
    folder = tmp_path / "pets" / "data"
    folder.mkdir(parents=True)
    for name, numbers in {
        "train-00000-of-00002": range(6),
        "train-00001-of-00002": range(6, 9),
        "validation-00000-of-00001": range(9, 12),
        "test-00000-of-00001": range(12, 18),
    }.items():
        parquet.write_table(table(numbers, [i % 3 for i in numbers]), folder / f"{name}.parquet")
    return folder.parent


def read(path: Path, **keys: Any) -> Source:
    return huggingface(data_dir=path.parent, path=str(path), image_size=8, **keys)


def test_parts_labels_and_class_names_are_those_of_the_files(hub: Path, tmp_path: Path) -> None:
    found = read(hub)
    assert found.class_names == ("cat", "dog", "owl")
    assert found.train_labels.tolist() == [i % 3 for i in range(9)]
    assert found.val_labels is not None
    assert found.val_labels.tolist() == [0, 1, 2]
    assert found.test_labels.tolist() == [i % 3 for i in range(12, 18)]
    assert found.test_names[0] == "test row 0 (12.jpg)"
    assert "pictures are the column image, labels the column label; not used: note" in found.notes
    # The pictures are those that a folder of the same files gives.
    for i in range(18):
        part = "train" if i < 9 else "val" if i < 12 else "test"
        file = tmp_path / "folder" / part / ["cat", "dog", "owl"][i % 3] / f"{i:02}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(jpeg(i))
    same = imagefolder(data_dir=tmp_path, root=str(tmp_path / "folder"), image_size=8)
    order = torch.tensor([0, 3, 6, 1, 4, 7, 2, 5, 8])  # class by class
    assert torch.equal(found.train_images[order], same.train_images)


def test_arrow_files_of_save_to_disk_are_read(hub: Path, tmp_path: Path) -> None:
    for part, numbers in (("train", range(9)), ("test", range(12, 18))):
        folder = tmp_path / "saved" / part
        folder.mkdir(parents=True)
        rows = table(numbers, [i % 3 for i in numbers])
        with pa.ipc.new_stream(folder / "data-00000-of-00001.arrow", rows.schema) as stream:
            stream.write_table(rows)
    found, expected = read(tmp_path / "saved"), read(hub)
    assert torch.equal(found.train_images, expected.train_images)
    assert torch.equal(found.test_labels, expected.test_labels)


def test_one_file_without_a_description_is_split_and_its_texts_are_the_classes(tmp_path: Path) -> None:
    rows = table(range(20), ["no", "yes"] * 10, features=None).drop_columns(["note"])
    parquet.write_table(rows, tmp_path / "all.parquet")
    found = read(tmp_path / "all.parquet")
    assert found.class_names == ("no", "yes")
    assert (len(found.train_labels), len(found.test_labels)) == (16, 4)
    assert any("has no test part: 4 of its 20 pictures test" in note for note in found.notes)


def two_labels() -> Any:
    both = {**FEATURES, "kind": FEATURES["label"]}
    return table(range(4), [0, 1, 0, 1], features=both).append_column("kind", pa.array([0, 0, 1, 1]))


BAD: dict[str, tuple[Callable[[], Any], dict[str, Any], str]] = {
    "two labels": (two_labels, {}, "dataset.label is not given, and there are several columns for it: label, kind"),
    "unknown column": (two_labels, {"label": "class"}, "dataset.label is class, and bad.parquet has no such column"),
    "pictures elsewhere": (lambda: table(range(4), [0] * 4, inside=False), {}, "does not hold the picture itself"),
    "no label": (
        lambda: table(range(4), [0, 1, -1, 0]),
        {},
        r"train row 2 \(2.jpg\): its label is -1, and there are 3",
    ),
    "no pictures": (lambda: pa.table({"label": [0, 1]}), {}, "dataset.image is not given, and there are none"),
    "damaged picture": (
        lambda: pa.table({"image": [b"\xff\xd8no"] * 8, "label": [0, 1] * 4}),
        {},
        "the picture train row 0 cannot be used",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_read_is_refused(tmp_path: Path, case: str) -> None:
    make, keys, said = BAD[case]
    parquet.write_table(make(), tmp_path / "bad.parquet")
    with pytest.raises(DataError, match=said):
        read(tmp_path / "bad.parquet", **keys)


def test_files_and_folders_that_are_none_are_refused(tmp_path: Path, hub: Path) -> None:
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "empty").mkdir()
    for path, said in (
        (tmp_path / "broken.parquet", "broken.parquet cannot be read"),
        (tmp_path / "empty", "holds no Parquet or Arrow file"),
        (tmp_path / "absent", "there is no file or folder"),
    ):
        with pytest.raises(DataError, match=said):
            read(path)
    other = hub / "other"
    other.mkdir()
    parquet.write_table(table(range(3), [0, 1, 2]), other / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match="has the part train in several folders: data, other"):
        read(hub)


def test_a_run_learns_from_a_parquet_file(tmp_path: Path, kd_run: Callable[..., Ran]) -> None:
    parquet.write_table(table(range(60), [i % 3 for i in range(60)]), tmp_path / "pets.parquet")
    ran = kd_run(*TINY, "dataset=huggingface", "dataset.path=pets.parquet", "dataset.image_size=8")
    assert ran.code == 0, ran.err
    assert ran.summary["dataset"]["class_names"] == ["cat", "dog", "owl"]
