"""Data sets: what they hold, how they are split and normalised, and what is said of those that cannot be used."""

import dataclasses
import gzip
import hashlib
import http.server
import importlib.util
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
from PIL import Image

from kd_cli.data.digits import digits
from kd_cli.data.folders import imagefolder
from kd_cli.data.normalisation import normalise
from kd_cli.data.source import Source, prepare
from kd_cli.data.torchvision import torchvision_dataset
from kd_cli.errors import ConfigError, DataError
from kd_cli.vision import import_torchvision


@pytest.fixture(scope="session")
def source():
    return digits(data_dir="unused")


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


# ---------------------------------------------------------------- the digits


def test_the_digits_are_real_and_split_the_same_way_everywhere(source):
    assert source.train_images.shape == (1200, 1, 8, 8)
    assert source.test_images.shape == (597, 1, 8, 8)
    assert source.train_images.dtype == torch.float32
    assert source.train_images.aminmax() == (0, 1)
    assert sorted(set(source.test_labels.tolist())) == list(range(10))
    data = prepare(source, val_fraction=0.16666667)
    assert (len(data.train), len(data.val), len(data.test)) == (1000, 200, 597)
    assert data.fingerprint == "c6664f227376bda3b419870caf67ac95"


def test_no_digit_is_in_two_parts(source):
    data = prepare(source, val_fraction=0.16666667)
    rows = torch.cat([part.images.flatten(1) for part in (data.train, data.val, data.test)])
    assert len(rows.unique(dim=0)) == 1797


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


# ---------------------------------------------------------------- normalisation


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_mean_and_deviation_are_those_of_each_channel_of_the_training_part(dtype):
    data = prepare(small(dtype=dtype), val_fraction=0.25)
    pixels = data.train.images.double() / (255 if dtype == torch.uint8 else 1)
    assert data.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-6)
    assert data.std == pytest.approx(pixels.std((0, 2, 3), unbiased=False).tolist(), rel=1e-6)


def test_data_that_are_no_images_have_one_mean():
    data = prepare(small(shape=(13,), dtype=torch.float32), val_fraction=0)
    assert data.shape == (13,)
    assert data.mean == pytest.approx((float(data.train.images.mean()),))
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


# ---------------------------------------------------------------- sources that cannot be used


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train_labels": torch.zeros(39, dtype=torch.int64)}, "train_images are 40 and train_labels 39"),
        ({"train_labels": torch.full((40,), 3)}, "go from 3 to 3; with 3 classes they must lie in 0..2"),
        ({"test_labels": torch.full((20,), -1)}, "test_labels go from -1 to -1"),
        ({"test_labels": torch.zeros(20, dtype=torch.int32)}, "test_labels are torch.int32"),
        ({"test_labels": torch.zeros(20, 1, dtype=torch.int64)}, r"of shape \(20, 1\); they must be torch.int64"),
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
    assert set(os.listdir(tmp_path / "data")) <= {"MNIST", ".MNIST.lock"}
    assert sorted(os.listdir(tmp_path / "data" / "MNIST" / "raw")) == sorted(RAW)


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="name is 'SVHN'; it must be one of MNIST, FashionMNIST, KMNIST, CIFAR10"):
        torchvision_dataset(data_dir="unused", name="SVHN")


# ---------------------------------------------------------------- folders of pictures


def picture(path: Path, colour, size=(12, 8), mode="RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def zoo(tmp_path):
    """Ten pictures of each of two classes; how red they are tells which is which."""
    for i in range(10):
        picture(tmp_path / "zoo" / "cat" / f"{i}.png", (100 + i, 0, 0))
        picture(tmp_path / "zoo" / "dog" / f"{i}.png", (200 + i, 0, 0))
    return tmp_path / "zoo"


def read(root, data_dir="/nowhere", **keys):
    return imagefolder(data_dir=data_dir, root=str(root), **{"image_size": 6, **keys})


def test_a_folder_per_class_is_split_by_the_recorded_rule(zoo):
    source = read(zoo, test_fraction=0.25)
    assert source.class_names == ("cat", "dog")
    assert source.train_images.shape == (15, 3, 6, 6)
    assert source.train_images.dtype == torch.uint8
    red = torch.cat([source.train_images, source.test_images])[:, 0, 0, 0]
    assert sorted(red.tolist()) == [*range(100, 110), *range(200, 210)]
    assert ((red >= 200).long() == torch.cat([source.train_labels, source.test_labels])).all()
    order = np.random.RandomState(20150309).permutation(20)
    assert source.test_images[:, 0, 0, 0].tolist() == [100 + i % 10 + 100 * (i // 10) for i in np.sort(order[:5])]


def test_train_and_test_folders_are_taken_as_they_are(tmp_path):
    for part, n in (("train", 3), ("test", 2), ("val", 9)):
        for name in ("b", "a"):
            for i in range(n):
                picture(tmp_path / part / name / "deeper" / f"{i}.jpeg", 9, mode="L")
    source = read(tmp_path, channels=1)
    assert source.class_names == ("a", "b")
    assert source.train_images.shape == (6, 1, 6, 6)
    assert source.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.test_labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("size", [(30, 10), (10, 30)])
def test_the_shorter_side_is_scaled_and_the_centre_kept(zoo, size):
    wide = Image.fromarray(np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3), np.uint8))
    for i in range(10):
        wide.save(zoo / "cat" / f"{i}.png")
    scaled = wide.resize((size[0] // 2, size[1] // 2), Image.Resampling.BILINEAR)
    left, top = (scaled.width - 5) // 2, (scaled.height - 5) // 2
    expected = torch.from_numpy(np.array(scaled.crop((left, top, left + 5, top + 5)))).permute(2, 0, 1)
    source = read(zoo, image_size=5)
    assert (source.train_images[source.train_labels == 0] == expected).all()


def test_grey_palette_and_transparent_pictures_become_three_channels(zoo):
    picture(zoo / "cat" / "0.png", 7, mode="L")
    picture(zoo / "cat" / "1.gif", 7, mode="P")
    picture(zoo / "cat" / "2.png", (7, 7, 7, 0), mode="RGBA")
    assert read(zoo).train_images.shape[1:] == (3, 6, 6)


def test_what_is_no_picture_is_passed_over(zoo):
    (zoo / "notes.txt").touch()
    (zoo / "cat" / "Thumbs.db").touch()
    (zoo / "cat" / "._0.png").touch()
    (zoo / ".cache").mkdir()
    assert len(read(zoo).train_labels) == 16


def test_a_relative_root_is_found_where_one_stands_and_in_the_data_folder(zoo, monkeypatch, tmp_path):
    assert len(read("zoo", data_dir=zoo.parent).train_labels) == 16
    monkeypatch.chdir(zoo.parent)
    assert len(read("zoo").train_labels) == 16
    with pytest.raises(DataError, match=r"root is pets, and there is no folder .*/pets nor /nowhere/pets"):
        read("pets")


@pytest.mark.parametrize("damage", [b"", b"not a picture", "truncated"])
def test_an_unreadable_picture_is_named(zoo, damage):
    file = zoo / "dog" / "3.png"
    file.write_bytes(file.read_bytes()[:50] if damage == "truncated" else damage)
    with pytest.raises(DataError, match=r"the picture .*zoo/dog/3\.png cannot be used"):
        read(zoo)


@pytest.mark.parametrize("limit", [50, 90])
def test_a_decompression_bomb_is_an_error(zoo, limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # PIL warns above it and refuses above twice as much
    with pytest.raises(DataError, match=r"the picture .*0\.png cannot be used: Image size \(96 pixels\) exceeds"):
        read(zoo)


def test_sixteen_bits_are_not_cut_to_eight_in_silence(zoo):
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(zoo / "cat" / "0.png")
    with pytest.raises(DataError, match=r"0\.png cannot be used: it has more than 8 bits per channel"):
        read(zoo)


def test_folders_that_are_no_data_set_are_told_why(tmp_path, zoo):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing has 0 class folders; it must have two or more"):
        read(tmp_path / "nothing")
    (zoo / "fish").mkdir()
    with pytest.raises(DataError, match="zoo/fish has no pictures, and so the class fish has no examples"):
        read(zoo)


def test_train_and_test_must_have_the_same_classes(tmp_path):
    for path in ("train/a/0.png", "train/b/0.png", "test/a/0.png", "test/c/0.png"):
        picture(tmp_path / path, 0)
    with pytest.raises(DataError, match="the same classes; only one of them has b, c"):
        read(tmp_path)


def test_a_train_folder_without_a_test_folder_is_not_taken_for_a_class(tmp_path):
    for path in ("train/a/0.png", "val/a/0.png"):
        picture(tmp_path / path, 0)
    with pytest.raises(DataError, match="has a folder train and no folder test"):
        read(tmp_path)


def test_a_class_may_be_called_train(zoo):
    picture(zoo / "train" / "0.png", 0)
    assert read(zoo).class_names == ("cat", "dog", "train")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": 6.0}, "image_size is 6.0"),
        ({"channels": 4}, "channels is 4"),
        ({"test_fraction": 0}, "test_fraction is 0"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0"),
    ],
)
def test_keys_outside_their_range_are_refused(zoo, keys, said):
    with pytest.raises(ConfigError, match=said):
        read(zoo, **keys)


def test_a_test_fraction_that_empties_a_part_is_refused(zoo):
    with pytest.raises(DataError, match=r"test_fraction=0.01 makes 0 the test part"):
        read(zoo, test_fraction=0.01)


def test_the_digits_are_those_that_scikit_learn_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    ours = digits(data_dir="unused")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)  # its file is elsewhere
    other = digits(data_dir="unused")
    for source in (ours, other):
        images = torch.cat([source.train_images, source.test_images])
        labels = torch.cat([source.train_labels, source.test_labels])
        table = torch.cat([images.flatten(1), labels[:, None]], 1).double()
        loaded = torch.from_numpy(np.column_stack([bunch.data / 16, bunch.target]))
        assert sorted(table.tolist()) == sorted(loaded.tolist())
    assert torch.equal(ours.train_images, other.train_images)
    assert ours.train_images.dtype == other.train_images.dtype == torch.float32
