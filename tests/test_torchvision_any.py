"""`dataset=torchvision`: data sets by name, their parts and their traps, on files in their own formats."""

from __future__ import annotations

import bz2
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from made_mnist import idx, write_mnist
from PIL import Image
from process import Ran

from kd_cli.data.prepare import prepare, unlabelled
from kd_cli.data.torchvision import torchvision_dataset
from kd_cli.data.torchvision_any import KNOWN, REFUSED, _opened, any_dataset
from kd_cli.errors import ConfigError, DataError
from kd_cli.vision import import_torchvision

RANDOM = np.random.RandomState(0)


def write_emnist(root: Path, split: str, first: int, classes: int) -> dict[str, np.ndarray]:
    (root / "EMNIST/raw").mkdir(parents=True)
    written = {}
    for part, n in (("train", 3 * classes), ("test", classes)):
        images, labels = RANDOM.randint(0, 256, (n, 28, 28)), np.arange(n) % classes + first
        written[part] = images
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            (root / f"EMNIST/raw/emnist-{split}-{part}-{kind}-ubyte").write_bytes(idx(array))
    return written


def write_folders(folder: Path, names: tuple[str, ...], n: int) -> None:
    for c, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(n):
            Image.new("RGB", (12 + i, 9), (50 * c, 10 * i, 0)).save(folder / name / f"{i}.jpg")


def published(monkeypatch: pytest.MonkeyPatch, kind: Any, attribute: str, path: Path) -> None:
    """Let a file that was made here be the published one, by its checksum in torchvision's list."""
    made = hashlib.md5(path.read_bytes()).hexdigest()
    entries = getattr(kind, attribute)
    if isinstance(entries, dict):
        changed: Any = {key: [*row[:2], made] if row[1] == path.name else row for key, row in entries.items()}
    else:
        changed = [[row[0], made] if row[0] == path.name else row for row in entries]
    monkeypatch.setattr(kind, attribute, changed)


def test_emnists_letters_stand_upright_and_are_counted_from_0(tmp_path: Path) -> None:
    written = write_emnist(tmp_path, "letters", 1, 26)
    source = any_dataset(data_dir=tmp_path, name="EMNIST", options={"split": "letters"})
    assert torch.equal(source.train_images[:, 0], torch.from_numpy(written["train"]).mT.byte())
    assert source.train_labels.tolist() == [*range(26)] * 3
    assert source.class_names == tuple("abcdefghijklmnopqrstuvwxyz")
    assert "EMNIST's letters are counted from 1, and 1 is subtracted" in source.notes
    assert len(prepare(source, val_fraction=0.3).val) == 23


def test_emnists_balanced_classes_keep_their_numbers(tmp_path: Path) -> None:
    write_emnist(tmp_path, "balanced", 0, 47)
    source = any_dataset(data_dir=tmp_path, name="EMNIST", options={"split": "balanced"})
    assert source.test_labels.tolist() == [*range(47)]
    assert source.class_names[9:12] == ("9", "A", "B")
    assert len(source.class_names) == 47


def test_usps_is_read(tmp_path: Path) -> None:
    for file, labels in (("usps.bz2", [1, 2, 10, 2]), ("usps.t.bz2", [10, 1])):
        pixels = " ".join(f"{i + 1}:{-1 if i else 1}" for i in range(256))
        (tmp_path / file).write_bytes(bz2.compress("".join(f"{label} {pixels}\n" for label in labels).encode()))
    source = any_dataset(data_dir=tmp_path, name="USPS")
    assert source.train_labels.tolist() == [0, 1, 9, 1]
    assert source.train_images.shape == (4, 1, 16, 16)
    assert source.train_images[0].flatten()[:3].tolist() == [255, 0, 0]
    assert source.class_names == tuple("0123456789")


def test_svhns_10_is_a_0_and_its_channels_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    savemat = pytest.importorskip("scipy.io").savemat
    kind = import_torchvision().datasets.SVHN
    pixels = RANDOM.randint(0, 256, (32, 32, 3, 4)).astype(np.uint8)
    for part in ("train", "test"):
        file = tmp_path / f"{part}_32x32.mat"
        savemat(file, {"X": pixels, "y": np.array([[1], [10], [2], [10]], dtype=np.uint8)})
        published(monkeypatch, kind, "split_list", file)
    source = any_dataset(data_dir=tmp_path, name="SVHN")
    assert source.train_labels.tolist() == [1, 0, 2, 0]
    assert torch.equal(source.train_images, torch.from_numpy(pixels).permute(3, 2, 0, 1))
    assert source.notes == ["SVHN: its part extra, of easier pictures, is not used"]


def test_stl10s_unlabelled_pictures_are_a_transfer_set_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = import_torchvision().datasets.STL10
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    pixels = RANDOM.randint(0, 256, (4, 3, 96, 96)).astype(np.uint8)
    for part in ("train", "test", "unlabeled"):
        pixels.tofile(folder / f"{part}_X.bin")
        np.array([1, 2, 10, 1], dtype=np.uint8).tofile(folder / f"{part}_y.bin")
    for attribute, names in (
        ("train_list", ("train_X", "train_y", "unlabeled_X")),
        ("test_list", ("test_X", "test_y")),
    ):
        for name in names:
            published(monkeypatch, kind, attribute, folder / f"{name}.bin")
    source = any_dataset(data_dir=tmp_path, name="STL10")
    assert source.train_labels.tolist() == [0, 1, 9, 0]
    assert torch.equal(source.train_images, torch.from_numpy(pixels).mT)  # its files hold columns first
    others = any_dataset(data_dir=tmp_path, name="STL10", options={"split": "unlabeled"})
    assert torch.equal(unlabelled(others)[0], source.train_images)
    with pytest.raises(DataError, match="has pictures without labels"):
        prepare(others, val_fraction=0.1)
    with pytest.raises(ConfigError, match="takes STL10's train and test itself"):
        any_dataset(data_dir=tmp_path, name="STL10", options={"split": "train+unlabeled"})


def test_a_data_set_without_parts_is_split_class_by_class(tmp_path: Path) -> None:
    write_folders(tmp_path / "eurosat/2750", ("Forest", "River"), 10)
    source = any_dataset(data_dir=tmp_path, name="EuroSAT", image_size=8)
    assert source.test_labels.bincount().tolist() == [2, 2]
    assert source.class_names == ("Forest", "River")
    assert source.train_images.shape == (16, 3, 8, 8)
    assert "EuroSAT has no test part: 4 of its 20 pictures test, the same share of each class" in source.notes
    with pytest.raises(ConfigError, match="the pictures of EuroSAT are of unequal size"):
        any_dataset(data_dir=tmp_path, name="EuroSAT")


def test_parts_of_other_names_are_found(tmp_path: Path) -> None:
    for part, n in (("train", 4), ("valid", 2), ("test", 3)):
        write_folders(tmp_path / "country211" / part, ("AD", "AE"), n)
    source = any_dataset(data_dir=tmp_path, name="Country211", image_size=8, channels=1)
    assert [len(labels) for labels in (source.train_labels, source.val_labels, source.test_labels)] == [8, 4, 6]
    assert source.class_names == ("AD", "AE")
    assert source.train_images.shape[1:] == (1, 8, 8)


def test_mnist_has_the_parts_that_its_own_option_has(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    one, other = any_dataset(data_dir=tmp_path, name="MNIST"), torchvision_dataset(data_dir=tmp_path, name="MNIST")
    assert torch.equal(one.train_images, other.train_images)
    assert prepare(one, val_fraction=0.1).fingerprint == prepare(other, val_fraction=0.1).fingerprint


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_torchvision_knows_the_parts_by_these_keys(name: str, tmp_path: Path) -> None:
    if name == "PCAM":
        pytest.importorskip("h5py")
    kind, parts = getattr(import_torchvision().datasets, name), KNOWN[name]
    options = {"split": "letters"} if name == "EMNIST" else {}
    for keys in (parts.train, parts.val, parts.test):
        assert keys is None or _opened(kind, tmp_path, {**options, **keys}, None) is None  # its files are not there


def test_a_data_set_that_is_none_of_classes_is_refused_with_the_reason(tmp_path: Path) -> None:
    for name, said in (
        ("VOCDetection", "no data set of pictures with one class each"),
        ("SVNH", "torchvision does not have"),
        *((name, reason) for name, reason in REFUSED.items()),
    ):
        with pytest.raises(ConfigError) as refused:
            any_dataset(data_dir=tmp_path, name=name)
        assert said in str(refused.value)


def test_options_that_a_data_set_does_not_have_are_refused(tmp_path: Path) -> None:
    for name, options, said in (
        ("EMNIST", {}, "EMNIST is six data sets, and dataset.options says not which"),
        ("EMNIST", {"split": "letter"}, "EMNIST is six data sets"),
        ("DTD", {"split": "val"}, "has 'split', which is no key of DTD to choose"),
        ("SVHN", {"download": True}, "has 'download', which is no key of SVHN to choose"),
        ("FGVCAircraft", {"annotation_levl": "family"}, "did you mean annotation_level?"),
    ):
        with pytest.raises(ConfigError) as refused:
            any_dataset(data_dir=tmp_path, name=name, options=options)
        assert said in str(refused.value)


def test_a_run_on_letters_says_what_was_mended(kd_run: Callable[..., Ran], tmp_path: Path) -> None:
    write_emnist(tmp_path / "data", "letters", 1, 26)
    keys = ["dataset=torchvision", "dataset.name=EMNIST", "+dataset.options.split=letters", f"data_dir={tmp_path}/data"]
    ran = kd_run(*TINY, *keys)
    assert ran.code == 0, ran.err
    assert "EMNIST's pictures lie on their side in its files, and are turned" in ran.summary["notes"]
    assert ran.summary["dataset"]["name"] == "emnist"


def test_a_place_other_than_memory_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"dataset.keep is 'disk', and torchvision's data sets are held in memory"):
        any_dataset(data_dir=tmp_path, name="SVHN", keep="disk")
