"""The data sets that ship with the tool, and what every data set is made into.

A data set function returns a `Source`: the images and labels that somebody published, in two parts. `prepare` checks
it, sets a validation part aside and measures what normalises it. A user's own function does as those here do: it takes
`data_dir` and its own keys, by name, and returns a `Source`.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd_cli.data.normalisation import mean_and_std
from kd_cli.data.splits import RULE_SEED, set_aside
from kd_cli.errors import DataError
from kd_cli.numeric import is_number


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
    if not is_number(val_fraction) or not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction is {val_fraction!r}; it must be a number, at least 0 and below 1")
    total = len(source.train_labels)
    count = round(total * val_fraction)
    if count == total or (count == 0 and val_fraction > 0):
        raise DataError(
            f"val_fraction is {val_fraction}: of the {total} training examples of {source.name} it leaves "
            f"{total - count} to train on and {count} to validate on",
            hint="val_fraction=0 does without a validation part",
        )
    val, train = set_aside(total, count)
    images = source.train_images[train]
    mean, std = mean_and_std(images)
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


def _check(source: Source) -> None:
    if not isinstance(source, Source):
        raise DataError(
            f"a data set function must return a kd_cli.data.source.Source, and this one returned "
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


def _fingerprint(source: Source, val_fraction: float) -> str:
    """16 bytes of BLAKE2b over all that decides what is trained and tested on, in hexadecimal."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in (source.train_images, source.train_labels, source.test_images, source.test_labels):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    digest.update(repr((tuple(source.class_names), float(val_fraction))).encode())
    return digest.hexdigest()
