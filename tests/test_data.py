"""Data sets: what they hold, how they are split and normalised, and what is said of those that cannot be used."""

import dataclasses
import gzip
import hashlib
import http.server
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from made_mnist import RAW, write_mnist

from kd_cli.data.digits import digits
from kd_cli.data.duplicates import known
from kd_cli.data.normalisation import normalise
from kd_cli.data.prepare import prepare
from kd_cli.data.source import Source
from kd_cli.data.torchvision import torchvision_dataset
from kd_cli.errors import ConfigError, DataError
from kd_cli.vision import import_torchvision


@pytest.fixture(scope="session")
def source():
    return digits(data_dir="unused", split="random")


@pytest.fixture
def offline(monkeypatch):
    """No network at all: every request goes to a port where nothing listens."""
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)


def small(train=40, test=20, classes=3, shape=(2, 5, 4), dtype=torch.uint8) -> Source:
    g = torch.Generator().manual_seed(0)

    def part(n):
        images = torch.randint(0, 256, (n, *shape), generator=g, dtype=torch.uint8)
        if dtype != torch.uint8:
            images = images.to(dtype) / 255
        return images, torch.arange(n) % classes

    return Source("small", *part(train), *part(test), class_names=tuple("abcdefgh"[:classes]))


# ---------------------------------------------------------------- the validation part


def test_the_validation_part_follows_the_recorded_rule(source):
    data = prepare(source, val_fraction=0.25)
    order = np.random.RandomState(20150309).permutation(1200)
    torch.testing.assert_close(data.val.images, source.train_images[np.sort(order[:300])], rtol=0, atol=0)
    torch.testing.assert_close(data.train.labels, source.train_labels[np.sort(order[300:])], rtol=0, atol=0)
    assert data.split_rule == (
        "of the 1200 training examples, the 300 whose positions come first in numpy's "
        "RandomState(20150309).permutation(1200) validate; the others train"
    )


def test_the_rule_is_frozen():
    assert np.random.RandomState(20150309).permutation(10).tolist() == [7, 6, 8, 0, 5, 3, 1, 4, 2, 9]


def test_without_a_validation_part_everything_trains_in_its_order(source):
    data = prepare(source, val_fraction=0)
    assert (len(data.train), len(data.val)) == (1200, 0)
    assert data.val.images.shape == (0, 1, 8, 8)
    assert data.train.images.equal(source.train_images)


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan"), True, "0.1", None])
def test_a_validation_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(DataError, match=r"val_fraction is .*; it must be a number, at least 0 and below 1"):
        prepare(small(), val_fraction=fraction)


@pytest.mark.parametrize(("fraction", "left"), [(0.99, "0 to train on and 40"), (0.01, "40 to train on and 0")])
def test_a_validation_fraction_that_empties_a_part_is_refused(fraction, left):
    with pytest.raises(DataError, match=left):
        prepare(small(), val_fraction=fraction)


def test_a_class_gives_the_same_share_to_the_validation_part_and_keeps_the_rest():
    source = small(train=37, classes=3)
    labels = torch.tensor([0] * 24 + [1] * 3 + [2] * 10)
    data = prepare(dataclasses.replace(source, train_labels=labels), val_fraction=0.2)
    assert data.class_counts()["val"] == [4, 1, 2]
    assert data.class_counts()["train"] == [20, 2, 8]
    order = np.random.RandomState(20150309).permutation(37)
    common = np.sort([i for i in order if i < 24][:4])
    assert data.val.images[data.val.labels == 0].equal(source.train_images[common])
    assert "of each class of the 37 training examples, the same share, 7 in all" in data.split_rule


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.9])
def test_the_last_example_of_a_class_trains(fraction):
    labels = torch.tensor([0] * 37 + [1, 2, 2])
    data = prepare(dataclasses.replace(small(), train_labels=labels), val_fraction=fraction)
    assert min(data.class_counts()["train"]) >= 1
    assert sum(data.class_counts()["train"]) + sum(data.class_counts()["val"]) == 40


def test_classes_without_examples_are_noted():
    source = small(train=40, test=20, classes=3)
    labels = torch.tensor([0] * 39 + [1])
    data = prepare(
        dataclasses.replace(source, train_labels=labels, test_labels=torch.zeros(20).long()), val_fraction=0.1
    )
    assert "no training examples: class c" in data.notes
    assert "no validation examples: classes b, c" in data.notes
    assert "no test examples: classes b, c" in data.notes
    assert data.class_counts() == {"train": [35, 1, 0], "val": [4, 0, 0], "test": [20, 0, 0]}


def test_groups_stay_whole():
    groups = torch.arange(40) // 8
    data = prepare(dataclasses.replace(small(), groups=groups), val_fraction=0.3)
    first = np.random.RandomState(20150309).permutation(5)[0]
    assert data.val.images.equal(small().train_images[8 * first : 8 * first + 8])
    assert len(prepare(dataclasses.replace(small(), groups=groups), val_fraction=0.01 + 1 / 40).val) == 8
    assert len(prepare(dataclasses.replace(small(), groups=groups), val_fraction=0.99 - 1 / 40).val) == 32


def test_one_group_cannot_be_divided():
    with pytest.raises(DataError, match="it leaves 40 to train on and 0 to validate on"):
        prepare(dataclasses.replace(small(), groups=torch.zeros(40).long()), val_fraction=0.3)


def test_a_published_validation_part_validates():
    val = small(train=12, test=1)
    source = dataclasses.replace(small(), val_images=val.train_images, val_labels=val.train_labels)
    data = prepare(source, val_fraction=0.1)
    assert (len(data.train), len(data.val), len(data.test)) == (40, 12, 20)
    assert data.val.images.equal(val.train_images)
    assert any("its 12 examples validate, and val_fraction has no effect" in note for note in data.notes)
    assert prepare(source, val_fraction=0).fingerprint == data.fingerprint
    assert prepare(small(), val_fraction=0).fingerprint != data.fingerprint


# ---------------------------------------------------------------- normalisation


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_mean_and_deviation_are_those_of_each_channel_of_the_training_part(dtype):
    data = prepare(small(dtype=dtype), val_fraction=0.25)
    pixels = data.train.images.double() / (255 if dtype == torch.uint8 else 1)
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-6)
    assert data.std == pytest.approx(pixels.std((0, 2, 3), unbiased=False).tolist(), rel=1e-6)


def test_each_feature_of_a_table_is_standardised():
    source = small(shape=(5,), dtype=torch.float32)
    units = torch.tensor([1.0, 1000.0, 1e-3, 1e6, 1.0])
    for rows in (source.train_images, source.test_images):
        rows *= units
        rows += 7 * units
    data = prepare(source, val_fraction=0)
    assert data.shape == (5,)
    assert data.mean == pytest.approx(data.train.images.double().mean(0).tolist(), rel=1e-6)
    assert data.std == pytest.approx(data.train.images.double().std(0, unbiased=False).tolist(), rel=1e-6)
    rows = normalise(data.train.images, data.mean, data.std, torch.float64)
    torch.testing.assert_close(rows.mean(0), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(rows.std(0, unbiased=False), torch.ones(5, dtype=torch.float64), rtol=0, atol=1e-5)


def test_a_constant_feature_is_noted_and_not_divided_by_nothing():
    source = small(shape=(5,), dtype=torch.float32)
    source.train_images[:, 2] = 0.1
    source.test_images[:, 2] = 0.1
    data = prepare(source, val_fraction=0)
    assert data.std[2] == 1
    assert normalise(data.test.images, data.mean, data.std, torch.float32)[:, 2].abs().max() < 1e-6
    assert "1 feature of 5 is constant in the training part: 2 (counted from 0)" in data.notes


@pytest.mark.parametrize(("shape", "dtype"), [((13,), torch.uint8), ((7, 13), torch.float32)])
def test_flattened_pictures_and_sequences_have_one_mean(shape, dtype):
    data = prepare(small(shape=shape, dtype=dtype), val_fraction=0)
    scale = 255 if dtype == torch.uint8 else 1
    assert data.mean == pytest.approx((float(data.train.images.double().mean()) / scale,), rel=1e-6)
    assert len(data.std) == 1


@pytest.mark.parametrize(("dtype", "value"), [(torch.uint8, 77), (torch.float32, 0.1), (torch.float32, 0.0)])
def test_a_constant_channel_is_not_divided_by_nothing(dtype, value):
    source = small(dtype=dtype)
    for images in (source.train_images, source.test_images):
        images[:, 1] = value
    data = prepare(source, val_fraction=0)
    assert data.std[1] == 1
    assert normalise(data.test.images, data.mean, data.std, torch.float32)[:, 1].abs().max() < 1e-6


def test_more_examples_than_one_chunk_are_normalised_alike():
    data = prepare(small(train=9001, shape=(1, 2, 2)), val_fraction=0)
    images = normalise(data.train.images, data.mean, data.std, torch.float64)
    torch.testing.assert_close(images.mean(), torch.tensor(0.0, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(images.std(unbiased=False), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_normalising_leaves_the_images_as_they_were(source, dtype):
    before = source.train_images.clone()
    images = normalise(source.train_images, (0.5,), (0.25,), dtype)
    assert source.train_images.equal(before)
    torch.testing.assert_close(images, ((before - 0.5) / 0.25).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_bytes_and_their_floats_are_normalised_to_the_same(dtype):
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    as_bytes = normalise(images, (0.1307,), (0.3081,), dtype)
    as_floats = normalise(images.double() / 255, (0.1307,), (0.3081,), dtype)
    assert as_bytes.dtype == dtype
    torch.testing.assert_close(as_bytes, as_floats)


# ---------------------------------------------------------------- the fingerprint


def test_the_fingerprint_changes_with_everything_that_is_trained_or_tested_on(source):
    def changed(field, edit):
        return dataclasses.replace(source, **{field: edit(getattr(source, field).clone())})

    def nudge(images):
        images[-1, 0, 0, 0] += 0.5
        return images

    def swap(labels):
        labels[0] = (labels[0] + 1) % 10
        return labels

    sources = [
        source,
        changed("train_images", nudge),
        changed("test_images", nudge),
        changed("train_labels", swap),
        changed("test_labels", swap),
        dataclasses.replace(source, class_names=tuple("abcdefghij")),
        dataclasses.replace(
            source, train_images=source.train_images.mT.reshape(-1, 8, 8), test_images=source.test_images[:, 0]
        ),
    ]
    found = [prepare(s, val_fraction=0.25).fingerprint for s in sources]
    found.append(prepare(source, val_fraction=0.26).fingerprint)
    assert len(set(found)) == len(found)


def test_the_fingerprint_knows_contents_and_not_memory_or_name(source):
    strided = torch.empty(1200, 1, 8, 16)[..., ::2]
    other = dataclasses.replace(source, name="other", train_images=strided.copy_(source.train_images))
    assert prepare(other, val_fraction=0.25).fingerprint == prepare(source, val_fraction=0.25).fingerprint


def test_the_fingerprint_knows_the_rule_of_the_split():
    sources = [small(), dataclasses.replace(small(), by_class=False)]
    sources += [dataclasses.replace(small(), groups=torch.arange(40) // n) for n in (5, 10)]
    assert len({prepare(s, val_fraction=0.25).fingerprint for s in sources}) == 4
    assert len({prepare(s, val_fraction=0).fingerprint for s in sources}) == 1


# ---------------------------------------------------------------- what is noted


def test_what_a_source_notes_reaches_the_data_set():
    data = prepare(dataclasses.replace(small(), notes=["3 rows were left out"]), val_fraction=0.1)
    assert data.notes[0] == "3 rows were left out"


def test_examples_in_two_parts_are_counted():
    source = small()
    source.test_images[3:6] = source.train_images[:3]
    source.test_images[6] = source.train_images[0]
    source.test_images[7] = source.train_images[0]
    source.test_images[7, 0, 0, 0] += 1
    assert "4 test pictures of 20 are identical to a training picture" in prepare(source, val_fraction=0).notes
    source.train_images[20:] = source.train_images[:20]
    notes = prepare(source, val_fraction=0.25).notes
    assert any("validation pictures of 10 are identical to a training picture" in note for note in notes)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3,), (1, 3, 3), (2, 7)])
def test_identical_examples_are_found_whatever_their_size(dtype, shape):
    ours, others = small(shape=shape, dtype=dtype).train_images, small(shape=shape, dtype=dtype).test_images
    expected = [any(torch.equal(one, other) for other in others) for one in ours]
    assert known(ours, others).tolist() == expected
    assert known(ours, ours[5:9]).tolist() == [any(torch.equal(o, p) for p in ours[5:9]) for o in ours]
    assert known(ours, ours[:0]).tolist() == [False] * 40


def test_blank_pictures_are_named():
    source = small()
    source.train_images[4] = 9
    source.test_images[7, 0], source.test_images[7, 1] = 3, 200
    source.test_images[8, 0] = 3  # only one of its channels
    names = tuple(f"{i}.png" for i in range(40))
    notes = prepare(dataclasses.replace(source, train_names=names), val_fraction=0).notes
    assert "2 pictures have the same value in every pixel: 4.png, test example 7" in notes


def test_names_follow_their_examples():
    names = tuple(f"{i}.png" for i in range(40))
    data = prepare(dataclasses.replace(small(), train_names=names), val_fraction=0.25)
    for split in (data.train, data.val):
        for image, name in zip(split.images, split.names, strict=True):
            assert torch.equal(image, small().train_images[int(name.removesuffix(".png"))])
    assert data.test.names == ()


# ---------------------------------------------------------------- where the channels are


@pytest.mark.parametrize("shape", [(8, 8, 3), (28, 28, 1), (32, 16, 4)])
def test_images_that_look_like_channels_last_are_asked_about(shape):
    with pytest.raises(DataError, match=r"channels of .* pixels, or .* pixels of \d channels?\?") as caught:
        prepare(small(shape=shape), val_fraction=0)
    assert "permute(0, 3, 1, 2)" in caught.value.hint
    for said in ("channels_first=False", "channels_first=True"):
        assert said in caught.value.hint


def test_a_source_may_say_where_its_channels_are():
    source = small(shape=(8, 9, 3))
    last = prepare(dataclasses.replace(source, channels_first=False), val_fraction=0)
    assert last.shape == (3, 8, 9)
    assert last.train.images.equal(source.train_images.permute(0, 3, 1, 2))
    assert last.test.images.equal(source.test_images.permute(0, 3, 1, 2))
    assert len(last.mean) == 3
    assert prepare(dataclasses.replace(source, channels_first=True), val_fraction=0).shape == (8, 9, 3)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 28, 28), (3, 4, 4), (2, 5, 4), (1, 40, 3)])
def test_channels_first_are_not_asked_about(shape):
    assert prepare(small(shape=shape), val_fraction=0).shape == shape


# ---------------------------------------------------------------- sources that cannot be used


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train_labels": torch.zeros(39, dtype=torch.int64)}, "train_images are 40 and train_labels 39"),
        ({"train_labels": torch.full((40,), 3)}, "go from 3 to 3; with 3 classes they must lie in 0..2"),
        ({"test_labels": torch.full((20,), -1)}, "test_labels go from -1 to -1"),
        ({"test_labels": torch.zeros(20, dtype=torch.int32)}, "test_labels are torch.int32"),
        ({"test_labels": torch.zeros(20, 1, dtype=torch.int64)}, r"with 3 labels they must be \[N,3\] of 0 and 1"),
        ({"train_images": torch.zeros(40, 2, 5, 4, dtype=torch.int64)}, "must be torch.uint8 or floating point"),
        ({"train_images": torch.zeros(40, dtype=torch.uint8)}, "shape of one example"),
        ({"train_images": torch.zeros(40, 2, 4, 5, dtype=torch.uint8)}, "they must be alike"),
        ({"train_images": torch.full((40, 2, 5, 4), float("nan"))}, "infinite or not numbers"),
        ({"test_images": torch.full((20, 2, 5, 4), float("-inf"))}, "test_images hold values that are infinite"),
        ({"test_images": torch.zeros(0, 2, 5, 4), "test_labels": torch.zeros(0, dtype=torch.int64)}, "are empty"),
        ({"train_images": np.zeros((40, 2, 5, 4))}, "must be a tensor on the CPU, and is a ndarray"),
        ({"train_images": torch.zeros(40, 2, 5, 4, device="meta")}, "and is on meta"),
        ({"class_names": ("only",)}, "names of two or more classes"),
        ({"class_names": (0, 1, 2)}, "names of two or more classes"),
        (
            {"val_images": torch.zeros(3, 2, 5, 4, dtype=torch.uint8)},
            "val_images and val_labels must be given together",
        ),
        (
            {"val_images": torch.zeros(3, 2, 5, 4), "val_labels": torch.zeros(3, dtype=torch.int64)},
            "val_images are torch.float32",
        ),
        ({"groups": torch.zeros(39, dtype=torch.int64)}, r"groups are torch.int64 of shape \(39,\)"),
        ({"test_names": ("a.png",)}, "test_names are 1 and test_labels 20"),
    ],
)
def test_a_source_that_cannot_be_used_is_refused_by_name(change, said):
    with pytest.raises(DataError, match=said) as caught:
        prepare(dataclasses.replace(small(), **change), val_fraction=0)
    assert "data set small" in str(caught.value)


def test_a_function_that_returns_something_else_is_told_what_to_return():
    with pytest.raises(DataError, match=r"must return a kd_cli.data.source.Source, and this one returned a tuple"):
        prepare((torch.zeros(3), torch.zeros(3)), val_fraction=0)


# ---------------------------------------------------------------- torchvision's data sets


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST", "KMNIST"])
def test_files_in_mnists_format_are_read_as_they_lie(tmp_path, name, offline):
    files = write_mnist(tmp_path, name)
    source = torchvision_dataset(data_dir=tmp_path, name=name)
    assert source.train_images.shape == (30, 1, 28, 28)
    assert source.train_images.dtype == torch.uint8
    assert source.train_images.numpy().tobytes() == files[0].read_bytes()[16:]
    assert source.test_labels.tolist() == list(files[3].read_bytes()[8:])
    assert len(prepare(source, val_fraction=0.1).val) == 3
    assert sorted(os.listdir(tmp_path)) == [name]  # reading leaves nothing behind


def test_mnist_itself_is_what_it_is_known_to_be():
    if not (Path(os.environ.get("KD_DATA", "/nowhere")) / "MNIST" / "raw" / RAW[0]).exists():
        pytest.skip("KD_DATA has no MNIST")
    source = torchvision_dataset(data_dir=os.environ["KD_DATA"], name="MNIST")
    assert hashlib.md5(source.train_images.numpy()).hexdigest() == "6510e85a72c3e9475c492d559d3770d2"
    assert source.test_images.shape == (10000, 1, 28, 28)
    assert source.train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    data = prepare(source, val_fraction=0)
    assert data.mean == pytest.approx((0.1307,), abs=5e-5)
    assert data.std == pytest.approx((0.3081,), abs=5e-5)


@pytest.mark.parametrize("name", ["MNIST", "CIFAR10", "CIFAR100"])
def test_data_that_cannot_be_downloaded_are_named_with_the_ways_on(tmp_path, name, offline, capfd):
    begun = time.monotonic()
    with pytest.raises(DataError, match=f"{name} is missing or incomplete in {tmp_path}") as caught:
        torchvision_dataset(data_dir=tmp_path, name=name)
    assert time.monotonic() - begun < 10
    assert "could not be downloaded" in caught.value.message
    assert "\n" not in caught.value.message
    for way in ("dataset=digits", "data_dir=", "KD_DATA"):
        assert way in caught.value.hint
    assert capfd.readouterr() == ("", "")
    assert [entry for entry in tmp_path.rglob("*") if not entry.name.endswith(".lock")] == []


def test_a_folder_that_cannot_be_made_is_said(tmp_path, offline):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"MNIST is missing or incomplete .* could not be downloaded: .*file"):
        torchvision_dataset(data_dir=tmp_path / "file", name="MNIST")


def test_archives_that_somebody_put_there_are_unpacked(tmp_path, offline, monkeypatch):
    write_mnist(tmp_path / "elsewhere")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    published = []
    for file in RAW:
        packed = gzip.compress((tmp_path / "elsewhere" / "MNIST" / "raw" / file).read_bytes())
        (raw / f"{file}.gz").write_bytes(packed)
        published.append((f"{file}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setattr(import_torchvision().datasets.MNIST, "resources", published)
    assert len(torchvision_dataset(data_dir=tmp_path, name="MNIST").train_labels) == 30
    assert sorted(os.listdir(raw)) == sorted([*RAW, *(f"{file}.gz" for file in RAW)])


def test_a_damaged_archive_is_neither_unpacked_nor_overwritten(tmp_path, offline):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / f"{RAW[0]}.gz").write_bytes(b"half a downlo")
    with pytest.raises(DataError, match="could not be downloaded"):
        torchvision_dataset(data_dir=tmp_path, name="MNIST")
    assert [(f.name, f.read_bytes()) for f in raw.iterdir()] == [(f"{RAW[0]}.gz", b"half a downlo")]


@pytest.mark.parametrize("left", [0, 3, 16, 1000])
def test_half_a_file_is_not_taken_for_a_whole_one(tmp_path, left, offline):
    files = write_mnist(tmp_path)
    files[0].write_bytes(files[0].read_bytes()[:left])
    with pytest.raises(DataError, match=r"MNIST in .*MNIST/raw cannot be read") as caught:
        torchvision_dataset(data_dir=tmp_path, name="MNIST")
    assert "remove that folder" in caught.value.hint


def test_a_pickle_that_is_not_the_published_one_is_never_opened(tmp_path, offline):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for file in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta"]:
        (folder / file).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(DataError, match="CIFAR10 is missing or incomplete"):
        torchvision_dataset(data_dir=tmp_path, name="CIFAR10")
    assert not (tmp_path / "sprung").exists()


SERVED = """
import json, sys
from kd_cli.data.torchvision import torchvision_dataset
from kd_cli.vision import import_torchvision
mnist = import_torchvision().datasets.MNIST
mnist.mirrors, mnist.resources = [sys.argv[1]], json.loads(sys.argv[2])
print(len(torchvision_dataset(data_dir=sys.argv[3], name="MNIST").train_labels))
"""


@pytest.mark.slow
def test_two_processes_download_once(tmp_path, monkeypatch):
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    served, published = [], []
    for file in write_mnist(tmp_path / "mirror"):
        packed = gzip.compress(file.read_bytes())
        (tmp_path / "mirror" / f"{file.name}.gz").write_bytes(packed)
        published.append((f"{file.name}.gz", hashlib.md5(packed).hexdigest()))

    class Mirror(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path / "mirror"))

        def do_GET(self):
            served.append(self.path)
            time.sleep(0.1)
            super().do_GET()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mirror) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/"
        command = [sys.executable, "-c", SERVED, url, json.dumps(published), str(tmp_path / "data")]
        pair = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        assert [process.communicate(timeout=120)[0] for process in pair] == ["30\n", "30\n"]
        server.shutdown()
    assert len(served) == 2 * len(RAW)  # torchvision asks once for redirects and once for the file
    assert sorted(os.listdir(tmp_path / "data")) == ["MNIST"]
    assert sorted(os.listdir(tmp_path / "data" / "MNIST" / "raw")) == sorted(RAW)


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="name is 'SVHN'; it must be one of MNIST, FashionMNIST, KMNIST, CIFAR10"):
        torchvision_dataset(data_dir="unused", name="SVHN")
