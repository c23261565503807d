"""Any of torchvision's data sets of pictures with one class each, by its name and its constructor's keys."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_cli.data.folders import as_reading
from kd_cli.data.pictures import Reading, square_of
from kd_cli.data.room import available_memory, gigabytes
from kd_cli.data.source import Source
from kd_cli.data.splits import set_aside_by_class
from kd_cli.data.torchvision import LAYOUTS, torchvision_dataset
from kd_cli.errors import ConfigError, DataError, first_line
from kd_cli.locks import lock
from kd_cli.nearest import did_you_mean
from kd_cli.numeric import is_number
from kd_cli.vision import import_torchvision, network_timeout

log = logging.getLogger(__name__)

Keys = dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """The constructor's keys that choose each part; without `test`, it is drawn class by class."""

    train: Keys
    test: Keys | None = None
    val: Keys | None = None
    note: str = ""


def by_split(train: str = "train", test: str = "test", val: str | None = None, note: str = "") -> Parts:
    return Parts({"split": train}, {"split": test}, None if val is None else {"split": val}, note)


BY_TRAIN = Parts({"train": True}, {"train": False})
UNSPLIT = Parts({})
VAL_TESTS = "its part val has the published labels to test on, and is the test part"
KNOWN = {
    **dict.fromkeys(("MNIST", "FashionMNIST", "KMNIST", "CIFAR10", "CIFAR100", "EMNIST", "USPS"), BY_TRAIN),
    "QMNIST": Parts({"what": "train"}, {"what": "test"}),
    "SVHN": by_split(note="its part extra, of easier pictures, is not used"),
    "STL10": by_split(note="its unlabelled pictures are not used; options.split makes them transfer.data"),
    **dict.fromkeys(("Food101", "GTSRB", "StanfordCars", "FER2013"), by_split()),
    **dict.fromkeys(("DTD", "Flowers102", "PCAM", "FGVCAircraft", "RenderedSST2"), by_split(val="val")),
    "Country211": by_split(val="valid"),
    "OxfordIIITPet": by_split(train="trainval"),
    **dict.fromkeys(("Imagenette", "CLEVRClassification"), by_split(test="val", note=VAL_TESTS)),
    **dict.fromkeys(("EuroSAT", "Caltech101", "Caltech256", "SEMEION", "SUN397"), UNSPLIT),
}
REFUSED = {
    "Omniglot": "its two parts have different classes, and no example of a test class to train on",
    "LFWPeople": "most people have one picture, and the parts have different people",
    "CelebA": "its pictures have 40 attributes and no class; imagelist reads a list of labels",
    "ImageNet": "it does not fit in memory; imagefolder reads a part of its folders",
    "Places365": "it does not fit in memory; imagefolder reads a part of its folders",
    "INaturalist": "it does not fit in memory; imagefolder reads a part of its folders",
    "ImageFolder": "dataset=imagefolder reads folders",
    "DatasetFolder": "dataset=imagefolder reads folders",
    "FakeData": "it is noise",
}
CHANNELS_FIRST = ("SVHN", "STL10")  # whose arrays are [N,C,H,W]; the others' are [N,H,W] and [N,H,W,C]
OURS = ("root", "train", "transform", "target_transform", "transforms", "download", "loader", "what")


def any_dataset(
    *,
    data_dir: str | Path,
    name: str,
    options: Mapping[str, Any] | None = None,
    image_size: int | None = None,
    channels: int = 3,
    background: str | Sequence[int] = "white",
    test_fraction: float = 0.2,
    keep: str = "memory",
) -> Source:
    """A data set of torchvision by its name, read from `data_dir` in torchvision's layout, or downloaded to there.

    `options` are further keys of its constructor. Pictures of unequal size are scaled and cropped to `image_size`. What
    a data set has otherwise than its pictures suggest is mended, and said: EMNIST's are turned, its letters counted
    from 0. `keep` is memory: no other place is supported. Raises ConfigError for one that has not one class for each
    picture, DataError if it cannot be read or does not fit.
    """
    if keep not in ("memory", "auto"):
        raise ConfigError(
            f"dataset.keep is {keep!r}, and torchvision's data sets are held in memory",
            hint="dataset=imagefolder with dataset.keep=disk, on a folder of their pictures",
        )
    options = dict(options or {})
    if name in LAYOUTS and not options and image_size is None:
        return torchvision_dataset(data_dir=data_dir, name=name)
    if not is_number(test_fraction) or not 0 < test_fraction < 1:
        raise ConfigError(f"test_fraction is {test_fraction!r}; it must be a number above 0 and below 1")
    kind, parts = _known(name, options)
    reading = None if image_size is None else as_reading(image_size, channels, background)
    root = Path(data_dir).expanduser()
    unlabelled = name == "STL10" and options.get("split") == "unlabeled"
    if unlabelled:
        images, _, _ = _read(kind, root, options, "unlabeled", reading)
        return Source(name.lower(), images, torch.zeros(len(images), dtype=torch.int64), images[:0], torch.zeros(0), ())
    read = {
        part: _read(kind, root, {**options, **keys}, part, reading)
        for part, keys in (("train", parts.train), ("val", parts.val), ("test", parts.test))
        if keys is not None
    }
    notes = [f"{name}: {parts.note}"] if parts.note else []
    read, names, said = _mended(name, options, read)
    if "test" not in read:
        images, labels, _ = read["train"]
        held, kept = set_aside_by_class(labels, round(len(labels) * test_fraction))
        read |= {"train": (images[kept], labels[kept], ()), "test": (images[held], labels[held], ())}
        said.append(
            f"{name} has no test part: {len(held):,} of its {len(labels):,} pictures test, the same share of each class"
        )
    val_images, val_labels, _ = read.get("val", (None, None, ()))
    train, test = read["train"], read["test"]
    return Source(
        name.lower(), *train[:2], *test[:2], names, val_images, val_labels, channels_first=True, notes=[*notes, *said]
    )


def _known(name: str, options: Keys) -> tuple[Any, Parts]:
    """The class of a data set and its parts. Raises ConfigError for one that cannot be used, and for wrong options."""
    if name in REFUSED:
        raise ConfigError(f"dataset.name is {name}: {REFUSED[name]}")
    datasets = import_torchvision().datasets
    if name not in KNOWN:
        if hasattr(datasets, name):
            raise ConfigError(f"dataset.name is {name}, which is no data set of pictures with one class each")
        hint = did_you_mean(name, KNOWN) or f"it can be {', '.join(sorted(KNOWN))}"
        raise ConfigError(f"dataset.name is {name!r}, which torchvision does not have", hint=hint)
    kind, parts = getattr(datasets, name), KNOWN[name]
    keys = [key for key in inspect.signature(kind.__init__).parameters if key not in ("self", "kwargs", *OURS)]
    free = [key for key in keys if key not in parts.train or name == "STL10"]
    for key in options:
        if key not in free:
            hint = did_you_mean(str(key), free) or (f"it takes {', '.join(free)}" if free else "it takes none")
            raise ConfigError(f"dataset.options has {key!r}, which is no key of {name} to choose", hint=hint)
    if name == "EMNIST" and options.get("split") not in kind.splits:
        raise ConfigError(
            "EMNIST is six data sets, and dataset.options says not which",
            hint=f"'dataset.options={{split: letters}}', or {', '.join(kind.splits)}",
        )
    if name == "STL10" and options.get("split", "unlabeled") != "unlabeled":
        raise ConfigError(
            f"dataset.options.split is {options['split']!r}: kd-run takes STL10's train and test itself",
            hint="'dataset.options={split: unlabeled}' as transfer.data",
        )
    return kind, parts


Part = tuple[Tensor, Tensor, Sequence[str]]  # images [N,C,H,W], labels [N], class names as torchvision has them


def _read(kind: Any, root: Path, keys: Keys, part: str, reading: Reading | None) -> Part:
    """A part as tensors; it is downloaded if it is not there. Raises DataError."""
    name = kind.__name__
    found = _opened(kind, root, keys, reading)
    if found is None:
        _download(kind, root, keys)
        found = _opened(kind, root, keys, reading)
    if found is None:
        raise DataError(
            f"{name} is not in {root}, nor was it downloaded to there", hint=f"see torchvision.datasets.{name}"
        )
    names = tuple(map(str, getattr(found, "classes", ())))
    data = getattr(found, "data", None)
    if data is not None and reading is None:
        images = torch.as_tensor(data)
        images = images.unsqueeze(1) if images.dim() == 3 else images
        images = images if name in CHANNELS_FIRST or images.shape[1] == 1 else images.permute(0, 3, 1, 2)
        labels = torch.as_tensor(found.targets if hasattr(found, "targets") else found.labels).long()
        return images.contiguous(), labels[:, 0] if labels.dim() == 2 else labels, names
    if reading is None:
        raise ConfigError(f"the pictures of {name} are of unequal size", hint="dataset.image_size=64")
    size = len(found) * reading.channels * reading.size**2
    if (memory := available_memory()) is not None and size > memory:
        raise DataError(
            f"the part {part} of {name} takes {gigabytes(size)} with image_size={reading.size}, and "
            f"{gigabytes(memory)} of memory are available: torchvision's data sets are held in memory",
            hint="a smaller dataset.image_size; or dataset=imagefolder with dataset.keep=disk, on its folder",
        )
    images = torch.empty(len(found), reading.channels, reading.size, reading.size, dtype=torch.uint8)
    labels = torch.empty(len(found), dtype=torch.int64)
    for i in range(len(found)):
        images[i], label = found[i]
        if label is None:
            raise DataError(f"the part {part} of {name} in {root} has no labels")
        labels[i] = int(label)
        if (i + 1) % 10_000 == 0:
            log.info("%s: %s of %s pictures decoded", name, f"{i + 1:,}", f"{len(found):,}")
    return images, labels, names


def _opened(kind: Any, root: Path, keys: Keys, reading: Reading | None) -> Any:
    """torchvision's own object; None if its files are not there. Raises DataError if they cannot be read."""
    if "download" in inspect.signature(kind.__init__).parameters and kind.__name__ == "SEMEION":
        keys = {**keys, "download": False}  # which downloads unasked
    transform = None if reading is None else (lambda picture: square_of(picture, reading))
    try:
        return kind(root, transform=transform, **keys)
    except Exception as error:  # none of our code runs in here, and a damaged file can raise anything
        words = str(error)
        if "pip install" in words:  # a package that it needs
            raise DataError(f"{kind.__name__} cannot be read: {first_line(error)}") from error
        if isinstance(error, FileNotFoundError) or (isinstance(error, RuntimeError) and "not found" in words.lower()):
            return None
        if isinstance(error, ValueError | TypeError):
            raise ConfigError(f"dataset.options do not suit {kind.__name__}: {first_line(error)}") from error
        raise DataError(f"{kind.__name__} in {root} cannot be read: {first_line(error)}") from error


def _download(kind: Any, root: Path, keys: Keys) -> None:
    """Download a data set: to a folder beside its place, from which whole files are moved. Raises DataError."""
    name = kind.__name__
    staging = root / f".downloading-{name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with lock(root / f".{name}.lock", waiting=lambda seconds: None):
            log.info("downloading %s to %s", name, root)
            shutil.rmtree(staging, ignore_errors=True)
            try:
                with network_timeout(), contextlib.redirect_stdout(io.StringIO()):
                    kind(staging, download=True, **keys)
                for path in sorted(staging.iterdir()):
                    if path.is_dir():
                        shutil.copytree(path, root / path.name, dirs_exist_ok=True)
                    else:
                        os.replace(path, root / path.name)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except Exception as error:  # the network, the disk, a constructor without downloads
        reason = "it must be downloaded by hand" if isinstance(error, TypeError) else first_line(error)
        raise DataError(
            f"{name} is missing or incomplete in {root}, and could not be downloaded: {reason}",
            hint=f"data_dir=DIR or KD_DATA names a folder that has it as torchvision.datasets.{name} wants it",
        ) from error


def _mended(name: str, options: Keys, read: Mapping[str, Part]) -> tuple[dict[str, Part], tuple[str, ...], list[str]]:
    """The parts and the classes' names without torchvision's traps, and a sentence for each that was mended."""
    said = []
    names = tuple(read["train"][2])
    parts = dict(read)
    if name == "EMNIST":
        parts = {part: (images.mT.contiguous(), labels, own) for part, (images, labels, own) in parts.items()}
        said.append("EMNIST's pictures lie on their side in its files, and are turned")
        if options["split"] == "letters":
            parts = {part: (images, labels - 1, own) for part, (images, labels, own) in parts.items()}
            names = names[1:]
            said.append("EMNIST's letters are counted from 1, and 1 is subtracted")
    low = min(int(labels.min()) for _, labels, _ in parts.values())
    high = max(int(labels.max()) for _, labels, _ in parts.values())
    if low < 0:
        raise DataError(f"{name} has labels from {low}: some pictures have none")
    if len(names) <= high:
        names = tuple(str(c) for c in range(high + 1))
    return parts, names, said
