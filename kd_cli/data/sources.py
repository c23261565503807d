"""The data sets that ship with the tool, and what every data set is made into.

A data set function returns a `Source`: the images and labels that somebody published, in two parts. `prepare` checks
it, sets a validation part aside and measures what normalises it. A user's own function does as those here do: it takes
`data_dir` and its own keys, by name, and returns a `Source`.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import logging
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_cli.errors import ConfigError, DataError
from kd_cli.storage.locks import lock
from kd_cli.vision import import_torchvision, network_timeout

log = logging.getLogger(__name__)

RULE_SEED = 20150309  # part of the recorded rule and of nothing else; another number is another split
CHUNK = 4096  # examples worked on at a time, so that no float copy of a whole data set is made


@dataclass(frozen=True, eq=False)
class Source:
    """A data set as published: images [N, *shape], uint8 or float, and labels [N], int64, from 0."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Split:
    """Images [N, *shape] and their labels [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """What training and testing use; `mean` and `std` are the training part's, per channel, uint8 counting as 0..1."""

    name: str
    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    split_rule: str
    notes: tuple[str, ...] = ()  # what was left out, changed, filled in or guessed to make it

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example, e.g. (1, 28, 28)."""
        return tuple(self.train.images.shape[1:])


def prepare(source: Source, *, val_fraction: float) -> Dataset:
    """Check a source, set its validation part aside, and measure the mean and deviation of the rest.

    The parts depend on the number of examples and on `val_fraction` alone, never on a run's seed. Raises DataError.
    """
    _check(source)
    if isinstance(val_fraction, bool) or not isinstance(val_fraction, int | float) or not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction is {val_fraction!r}; it must be a number, at least 0 and below 1")
    total = len(source.train_labels)
    count = round(total * val_fraction)
    if count == total or (count == 0 and val_fraction > 0):
        raise DataError(
            f"val_fraction is {val_fraction}: of the {total} training examples of {source.name} it leaves "
            f"{total - count} to train on and {count} to validate on",
            hint="val_fraction=0 does without a validation part",
        )
    val, train = _parts(total, count)
    images = source.train_images[train]
    mean, std = _mean_and_std(images)
    return Dataset(
        name=source.name,
        train=Split(images, source.train_labels[train]),
        val=Split(source.train_images[val], source.train_labels[val]),
        test=Split(source.test_images, source.test_labels),
        class_names=tuple(source.class_names),
        mean=mean,
        std=std,
        fingerprint=_fingerprint(source, val_fraction),
        split_rule=f"of the {total} training examples, the {count} whose positions come first in numpy's "
        f"RandomState({RULE_SEED}).permutation({total}) validate; the others train",
    )


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Images [N, *shape], uint8 or float -> (images - mean) / std in `dtype`, a new tensor; uint8 counts as 0..1."""
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    work = torch.promote_types(dtype, torch.float32)  # half precision would round the mean itself
    per_channel = (-1, 1, 1) if images.dim() == 4 else (-1,)
    shift, width = (
        torch.tensor([scale * value for value in values], dtype=work, device=images.device).reshape(per_channel)
        for values in (mean, std)
    )
    out = torch.empty(images.shape, dtype=dtype, device=images.device)
    for start in range(0, len(images), CHUNK):
        part = images[start : start + CHUNK].to(work, copy=True)
        out[start : start + CHUNK] = part.sub_(shift).div_(width)
    return out


# ---------------------------------------------------------------- data set functions


def digits(*, data_dir: str | Path) -> Source:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels, which come with it: 1,200 to train on, 597 to test on.

    They have no published split; the test part is the first 597 of the recorded permutation.
    """
    table = torch.from_numpy(_digits_table())
    images = table[:, :64].to(torch.float32).div_(16).view(-1, 1, 8, 8)
    labels = table[:, 64].to(torch.int64)
    test, train = _parts(len(labels), len(labels) - 1200)
    return Source("digits", images[train], labels[train], images[test], labels[test], tuple("0123456789"))


def _digits_table() -> np.ndarray:
    """A row for each digit, 64 pixels from 0 to 16 and the label: [1797,65].

    Read from scikit-learn's file, as `sklearn.datasets.load_digits` does; its import would take a second, half of what
    comes before the first training step.
    """
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(folder, "datasets", "data", "digits.csv.gz")
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits  # wherever this version keeps it

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])


def torchvision_dataset(*, data_dir: str | Path, name: str) -> Source:
    """One of torchvision's data sets, read from `data_dir` as torchvision lays it out, or downloaded to there.

    Raises DataError where it is neither there nor to be had, or is damaged.
    """
    if name not in LAYOUTS:
        raise ConfigError(f"name is {name!r}; it must be one of {', '.join(LAYOUTS)}")
    kind = getattr(import_torchvision().datasets, name)
    root = Path(data_dir).expanduser()
    parts = _read(kind, root)
    if parts is None:
        _download(kind, root)
        parts = _read(kind, root)
    if parts is None:
        raise DataError(f"{name} was downloaded to {root} and is gone again", hint="does another program clear it?")
    train, test = parts
    return Source(
        name.lower(), *_image_tensors(train), *_image_tensors(test), class_names=tuple(str(c) for c in train.classes)
    )


def imagefolder(
    *, data_dir: str | Path, root: str, image_size: int, test_fraction: float = 0.2, channels: int = 3
) -> Source:
    """Pictures in a folder per class, under `root` or under its `train` and `test`; square, `image_size` pixels wide.

    The shorter side of a picture is scaled to `image_size` and its centre kept. Where `root` has no `test`, the first
    `test_fraction` of the recorded permutation is the test part. A relative `root` is looked for in the working
    directory, then in `data_dir`. Raises DataError, which names the picture that cannot be read.
    """
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1:
        raise ConfigError(f"image_size is {image_size!r}; it must be a whole number, 1 or more")
    if channels not in (1, 3):
        raise ConfigError(f"channels is {channels!r}; it must be 3 (colour) or 1 (grey)")
    if isinstance(test_fraction, bool) or not isinstance(test_fraction, int | float) or not 0 < test_fraction < 1:
        raise ConfigError(f"test_fraction is {test_fraction!r}; it must be a number above 0 and below 1")
    folder = _picture_root(root, Path(data_dir).expanduser())
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        train, test = _pictures_by_class(folder / "train"), _pictures_by_class(folder / "test")
        if list(train) != list(test):
            only = sorted(set(train) ^ set(test))
            raise DataError(
                f"{folder}: train and test must have the same classes; only one of them has {_listed(only)}",
                hint="make the missing class folders, or take the others away",
            )
        images, labels = _decode_all(train, image_size, channels)
        return Source(folder.name, images, labels, *_decode_all(test, image_size, channels), class_names=tuple(train))

    pictures = _pictures_by_class(folder)
    images, labels = _decode_all(pictures, image_size, channels)
    count = round(len(labels) * test_fraction)
    if count in (0, len(labels)):
        raise DataError(
            f"{folder} has {len(labels)} pictures, and test_fraction={test_fraction} makes {count} the test part",
            hint="it needs some to test on and some to train on: more pictures, or another test_fraction",
        )
    held, kept = _parts(len(labels), count)
    return Source(folder.name, images[kept], labels[kept], images[held], labels[held], class_names=tuple(pictures))


# ---------------------------------------------------------------- what prepare is made of


def _parts(total: int, count: int) -> tuple[Tensor, Tensor]:
    """The recorded rule: the first `count` of a fixed permutation, and the others; both in ascending order.

    numpy promises that RandomState's stream never changes, which torch does not promise of its own.
    """
    order = np.random.RandomState(RULE_SEED).permutation(total)
    return torch.from_numpy(np.sort(order[:count])), torch.from_numpy(np.sort(order[count:]))


def _check(source: Source) -> None:
    if not isinstance(source, Source):
        raise DataError(
            f"a data set function must return a kd_cli.data.sources.Source, and this one returned "
            f"a {type(source).__name__}"
        )
    where = f"data set {source.name}"
    names = source.class_names
    if len(names) < 2 or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: class_names is {names!r}; it must hold the names of two or more classes")
    for part, images, labels in (
        ("train", source.train_images, source.train_labels),
        ("test", source.test_images, source.test_labels),
    ):
        _check_part(f"{where}: {part}", images, labels, len(names))
    train, test = source.train_images, source.test_images
    if train.shape[1:] != test.shape[1:] or train.dtype != test.dtype:
        raise DataError(
            f"{where}: train_images are {train.dtype} of shape {tuple(train.shape[1:])}, and test_images are "
            f"{test.dtype} of shape {tuple(test.shape[1:])}; they must be alike"
        )


def _check_part(what: str, images: Tensor, labels: Tensor, classes: int) -> None:
    for kind, tensor in (("images", images), ("labels", labels)):
        if not isinstance(tensor, Tensor) or tensor.device.type != "cpu":
            raise DataError(f"{what}_{kind} must be a tensor on the CPU, and is {_kind(tensor)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise DataError(f"{what}_images are {images.dtype}; they must be torch.uint8 or floating point")
    if labels.dtype != torch.int64 or labels.dim() != 1:
        raise DataError(
            f"{what}_labels are {labels.dtype} of shape {tuple(labels.shape)}; they must be torch.int64 [N]"
        )
    if images.dim() < 2:
        raise DataError(f"{what}_images have the shape {tuple(images.shape)}; it must be [N, *shape of one example]")
    if len(images) != len(labels):
        raise DataError(f"{what}_images are {len(images)} and {what.split(': ')[-1]}_labels {len(labels)}; one each")
    if images.numel() == 0:
        raise DataError(f"{what}_images are empty, of shape {tuple(images.shape)}; there must be at least one example")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise DataError(
            f"{what}_labels go from {low} to {high}; with {classes} classes they must lie in 0..{classes - 1}"
        )
    if images.is_floating_point() and not all(math.isfinite(float(end)) for end in torch.aminmax(images)):
        raise DataError(f"{what}_images hold values that are infinite or not numbers")  # aminmax passes a NaN on


def _kind(value: Any) -> str:
    return f"on {value.device}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel of [N,C,H,W], of everything for other shapes; a deviation of 0 becomes 1."""
    channels = images.unbind(1) if images.dim() == 4 else (images,)
    moments = _moments_of_bytes if images.dtype == torch.uint8 else _moments_of_floats
    pairs = [moments(channel) for channel in channels]
    # constant images: rounding may leave a deviation that is next to nothing, and dividing by it would blow that up
    return tuple(m for m, _ in pairs), tuple(s if s > 1e-7 * abs(m) else 1.0 for m, s in pairs)


def _moments_of_bytes(values: Tensor) -> tuple[float, float]:
    """From the histogram: exact, and without a copy four times as large."""
    counts = torch.zeros(256, dtype=torch.int64)
    for part in values.split(CHUNK):
        counts += torch.bincount(part.flatten(), minlength=256)
    share = counts.double() / values.numel()
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = (share * levels).sum()
    return float(mean), float((share * (levels - mean) ** 2).sum().sqrt())


def _moments_of_floats(values: Tensor) -> tuple[float, float]:
    mean = sum(float(part.double().sum()) for part in values.split(CHUNK)) / values.numel()
    square = sum(float((part.double() - mean).square_().sum()) for part in values.split(CHUNK)) / values.numel()
    return mean, math.sqrt(square)


def _fingerprint(source: Source, val_fraction: float) -> str:
    """16 bytes of BLAKE2b over all that decides what is trained and tested on, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (source.train_images, source.train_labels, source.test_images, source.test_labels):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    digest.update(repr((tuple(source.class_names), float(val_fraction))).encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- torchvision's data sets

IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
LAYOUTS = {  # where torchvision keeps each below its root: the folder it reads, and the archives it would download
    name: (f"{name}/raw", tuple(f"{name}/raw/{part}-ubyte.gz" for part in IDX))
    for name in ("MNIST", "FashionMNIST", "KMNIST")
} | {
    "CIFAR10": ("cifar-10-batches-py", ("cifar-10-python.tar.gz",)),
    "CIFAR100": ("cifar-100-python", ("cifar-100-python.tar.gz",)),
}


def _read(kind: Callable[..., Any], root: Path) -> tuple[Any, Any] | None:
    """The training and the test part as torchvision reads them, or None where files are missing.

    CIFAR's files are pickles. torchvision's constructors compare every one of them with its published MD5 before they
    unpickle it, and so no code of a stranger runs; never read them without going through the constructor.
    """
    name = kind.__name__
    try:
        return kind(root, train=True), kind(root, train=False)
    except Exception as error:  # none of our code runs in here, and a damaged file raises whatever it likes
        if isinstance(error, RuntimeError) and "download=True" in str(error):
            return None
        folder = root / LAYOUTS[name][0]
        raise DataError(
            f"{name} in {folder} cannot be read: {error or type(error).__name__}",
            hint="a file is damaged; remove that folder to have it downloaded again",
        ) from error


def _download(kind: Callable[..., Any], root: Path) -> None:
    """Fetch a data set into `root`: whole files only, by one process at a time. Raises DataError.

    torchvision unpacks straight into the folder that it later reads without a checksum. A process killed there would
    leave half a file that passes for whole, so this happens in a folder beside it, and whole files are moved.
    """
    name = kind.__name__
    folder, archives = LAYOUTS[name]
    staging = root / f".downloading-{name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with lock(root / f".{name}.lock", waiting=lambda seconds: None):
            if _read(kind, root) is not None:  # another process was faster
                return
            log.info("downloading %s to %s", name, root)
            shutil.rmtree(staging, ignore_errors=True)
            try:
                _reuse_archives(root, staging, archives)
                with network_timeout(), contextlib.redirect_stdout(io.StringIO()):
                    for train in (True, False):
                        kind(staging, train=train, download=True)
                (root / folder).mkdir(parents=True, exist_ok=True)
                for file in sorted((staging / folder).iterdir()):
                    if file.suffix != ".gz":
                        os.replace(file, root / folder / file.name)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except DataError:
        raise
    except Exception as error:  # the network, the disk, an archive that is not what was published
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{name} is missing or incomplete in {root / folder}, and could not be downloaded: {reason}",
            hint="dataset=digits needs no download; data_dir=DIR or KD_DATA names a folder that has it",
        ) from error


def _reuse_archives(root: Path, staging: Path, archives: tuple[str, ...]) -> None:
    """Copy archives that somebody has put into `root`; torchvision takes them if their MD5 is as published."""
    for archive in archives:
        if (root / archive).is_file():
            (staging / archive).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / archive, staging / archive)


def _image_tensors(part: Any) -> tuple[Tensor, Tensor]:
    """torchvision's [N,H,W] tensor or [N,H,W,C] array, and its labels -> [N,C,H,W] uint8 and [N] int64."""
    images = torch.as_tensor(part.data)
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(part.targets, dtype=torch.int64)


# ---------------------------------------------------------------- pictures in folders

PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


# By a file's content, not its name. PIL knows many more; that of EPS starts Ghostscript, which runs programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def _picture_root(root: str, data_dir: Path) -> Path:
    asked = Path(root).expanduser()
    for folder in (asked, data_dir / asked):
        if folder.is_dir():
            return folder.resolve()
    places = f"{asked}" if asked.is_absolute() else f"{asked.absolute()} nor {data_dir / asked}"
    raise DataError(
        f"root is {root}, and there is no folder {places}", hint="give the folder that holds one folder per class"
    )


def _pictures_by_class(folder: Path) -> dict[str, list[Path]]:
    """The classes in `folder`, sorted, and their pictures, sorted: the same on every machine."""
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if "train" in classes and set(classes) <= {"train", "val", "valid", "validation"}:
        raise DataError(
            f"{folder} has a folder train and no folder test", hint="call the held-out pictures' folder test"
        )
    if len(classes) < 2:
        raise DataError(
            f"{folder} has {len(classes)} class folders; it must have two or more",
            hint="put each class's pictures into a folder of its own: cat/1.jpg, dog/1.jpg",
        )
    pictures = {name: sorted(_pictures(folder / name)) for name in classes}
    for name, found in pictures.items():
        if not found:
            raise DataError(
                f"{folder / name} has no pictures, and so the class {name} has no examples",
                hint=f"pictures end in {_listed(sorted(PICTURES))}; remove the folder if it is no class",
            )
    return pictures


def _pictures(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        if file.suffix.lower() in PICTURES and not file.name.startswith(".") and file.is_file():
            yield file


def _decode_all(pictures: dict[str, list[Path]], size: int, channels: int) -> tuple[Tensor, Tensor]:
    """Decode all pictures -> [N, channels, size, size] uint8 and their labels [N], class by class."""
    from PIL import Image

    files = [file for found in pictures.values() for file in found]
    counts = torch.tensor([len(found) for found in pictures.values()])
    images = torch.empty(len(files), channels, size, size, dtype=torch.uint8)

    def decode(i: int) -> None:
        images[i] = _decode(files[i], size, channels)

    workers = min(8, os.cpu_count() or 1)  # PIL decodes and scales without holding the interpreter
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("ignore", UserWarning)  # PIL's remarks on odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for _ in pool.map(decode, range(len(files))):
            pass
    return images, torch.repeat_interleave(torch.arange(len(pictures)), counts)


def _decode(file: Path, size: int, channels: int) -> Tensor:
    """One picture -> [channels, size, size]. Raises DataError that names the file."""
    from PIL import Image

    try:
        with Image.open(file, formats=FORMATS) as opened:
            if opened.mode.startswith(("I", "F")):
                raise ValueError("it has more than 8 bits per channel, which a conversion would cut off")
            picture = opened.convert("RGB" if channels == 3 else "L")
        width, height = picture.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        # the centre first and then the scale: the same picture, and a very long one needs no more memory
        square = picture.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    except Exception as error:  # a damaged file raises whatever its decoder likes
        raise DataError(
            f"the picture {file} cannot be used: {error or type(error).__name__}", hint="repair it or take it away"
        ) from error
    pixels = torch.from_numpy(np.array(square))
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1)


def _listed(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
