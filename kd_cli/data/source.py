"""What a data set function returns, and what training and testing use.

A data set function returns a `Source`: images and labels as they were published, in two or three parts.
`kd_cli.data.prepare` makes a `Dataset` of it. A user's own function does what those here do: it takes `data_dir` and
its own keys, by name, and returns a `Source`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kd_cli.data.columns import Column, Encoding
from kd_cli.data.stored import Images, StoredImages
from kd_cli.errors import DataError


@dataclass(frozen=True, eq=False)
class Source:
    """A data set as published: images [N, *shape], uint8 or float, and labels [N], int64, from 0.

    Independent labels are [N,L], int64, 0 or 1, and `class_names` are then the names of the L labels.

    Images with channels are [N,C,H,W] (`channels_first=False` for [N,H,W,C]; None refuses sizes that look like it),
    tables are [N,F]. Everything after `class_names` may be left out. `val_images` and `val_labels` are a published
    validation part; without them, `prepare` sets one aside: whole groups if `groups` [N] numbers the training examples
    (by writer, by patient), else class by class, or without regard to classes if `by_class` is False. `*_names` are
    the examples' file names. `notes` are plain sentences, one for each thing that was left out, turned, filled in or
    guessed while reading; they reach the log and the report. No `class_names` and no test part: unlabelled images, for
    `transfer.data` only. `columns` makes the images rows of a table as it was read, [N, columns], which `prepare`
    encodes as fitted on the training part; `*_rows` [N] are then their numbers in the file, which has `rows` of them.
    Pictures that do not fit in memory are `StoredImages`, channels first.
    """

    name: str
    train_images: Images
    train_labels: Tensor
    test_images: Images
    test_labels: Tensor
    class_names: tuple[str, ...]
    val_images: Images | None = None
    val_labels: Tensor | None = None
    groups: Tensor | None = None
    by_class: bool = True
    channels_first: bool | None = None
    train_names: tuple[str, ...] = ()
    val_names: tuple[str, ...] = ()
    test_names: tuple[str, ...] = ()
    columns: tuple[Column, ...] | None = None
    train_rows: Tensor | None = None
    test_rows: Tensor | None = None
    rows: int | None = None
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Split:
    """Images [N, *shape], their labels [N] or [N,L], and their file names if they have any.

    `rows` [N] are their numbers in the published part, or in the file that holds all parts.
    """

    images: Images
    labels: Tensor
    names: tuple[str, ...] = ()
    rows: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, eq=False)
class Dataset:
    """What training and testing use.

    `mean` and `std` are the training part's: per channel of [N,C,H,W], per feature of a table [N,F], over everything
    for other shapes; uint8 counts as 0..1. `notes` are plain sentences for the log, the summary and the report.
    """

    name: str
    train: Split
    val: Split
    test: Split
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: str
    split_rule: str
    notes: tuple[str, ...] = ()
    encoding: Encoding | None = None  # of a table's columns
    published: int = 0  # examples of the published training part, before a validation part was set aside
    rows: int | None = None  # of the one file that holds all parts

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def multilabel(self) -> bool:
        """Whether examples have independent labels [N,L], whose names are `class_names`, and not one class each."""
        return self.train.labels.dim() == 2

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one example, e.g. (1, 28, 28)."""
        return tuple(self.train.images.shape[1:])

    def class_counts(self) -> dict[str, list[int]]:
        """How many examples each class or label has, for the parts `train`, `val` and `test`: lists of [classes]."""
        parts = {"train": self.train, "val": self.val, "test": self.test}
        if self.multilabel:
            return {name: part.labels.sum(0).tolist() for name, part in parts.items()}
        return {name: torch.bincount(part.labels, minlength=self.classes).tolist() for name, part in parts.items()}


def parts_of(source: Source) -> dict[str, Split]:
    """The parts that a source has: `train`, `test`, and `val` if it was published."""

    def rows(given: Tensor | None, labels: Tensor) -> Tensor | None:
        return torch.arange(len(labels)) if given is None and isinstance(labels, Tensor) else given

    train_rows, test_rows = rows(source.train_rows, source.train_labels), rows(source.test_rows, source.test_labels)
    parts = {"train": Split(source.train_images, source.train_labels, source.train_names, train_rows)}
    if source.val_images is not None and source.val_labels is not None:
        parts["val"] = Split(source.val_images, source.val_labels, source.val_names)
    return parts | {"test": Split(source.test_images, source.test_labels, source.test_names, test_rows)}


def check(source: Source) -> None:
    """Raise DataError, which names the part and what it must be, if a labelled data set cannot be used."""
    if not isinstance(source, Source):
        raise DataError(
            f"a data set function must return a kd_cli.data.source.Source, and this one returned "
            f"a {type(source).__name__}"
        )
    where = f"data set {source.name}"
    names = source.class_names
    if not names and isinstance(source.test_images, Tensor | StoredImages) and len(source.test_images) == 0:
        raise DataError(
            f"{where} has pictures without labels",
            hint="put each class's pictures into a folder of its own (cat/1.jpg, dog/1.jpg), or give it as "
            "transfer.data, where labels are not needed",
        )
    labels = source.train_labels
    least = 1 if isinstance(labels, Tensor) and labels.dim() == 2 else 2
    if len(names) < least or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where}: class_names is {names!r}; it must hold the names of two or more classes")
    if (source.val_images is None) != (source.val_labels is None):
        raise DataError(f"{where}: val_images and val_labels must be given together")
    parts = parts_of(source)
    for part, split in parts.items():
        check_images(f"{where}: {part}", split.images, missing=source.columns is not None)
        _check_labels(f"{where}: {part}", split, len(names))
    if len({split.labels.dim() for split in parts.values()}) > 1:
        raise DataError(f"{where}: some parts have one class for each example, and others independent labels [N,L]")
    train = source.train_images
    for part, split in parts.items():
        if train.shape[1:] != split.images.shape[1:] or train.dtype != split.images.dtype:
            raise DataError(
                f"{where}: train_images are {train.dtype} of shape {tuple(train.shape[1:])}, and {part}_images are "
                f"{split.images.dtype} of shape {tuple(split.images.shape[1:])}; they must be alike"
            )
    groups = source.groups
    if groups is not None and (groups.dtype != torch.int64 or groups.shape != source.train_labels.shape[:1]):
        raise DataError(
            f"{where}: groups are {groups.dtype} of shape {tuple(groups.shape)}; they must be torch.int64 "
            f"[{len(train)}], one number for each training example"
        )
    check_layout(where, train, source.channels_first)


def check_images(what: str, images: Any, *, missing: bool = False) -> None:
    """Raise DataError if these are no images that a model can be trained on; with `missing`, NaN is a missing value."""
    if isinstance(images, StoredImages):
        if not len(images):
            raise DataError(f"{what}_images are empty; there must be at least one example")
        return
    if not isinstance(images, Tensor) or images.device.type != "cpu":
        raise DataError(f"{what}_images must be a tensor on the CPU, and is {_kind(images)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise DataError(f"{what}_images are {images.dtype}; they must be torch.uint8 or floating point")
    if images.dim() < 2:
        raise DataError(f"{what}_images have the shape {tuple(images.shape)}; it must be [N, *shape of one example]")
    if images.numel() == 0:
        raise DataError(f"{what}_images are empty, of shape {tuple(images.shape)}; there must be at least one example")
    if missing:
        images = images.nan_to_num(0.0, math.inf, -math.inf)
    if images.is_floating_point() and not all(math.isfinite(float(end)) for end in torch.aminmax(images)):
        raise DataError(f"{what}_images hold values that are infinite or not numbers")  # aminmax passes a NaN on


def check_layout(where: str, images: Images, channels_first: bool | None) -> None:
    """Raise DataError if images [N,a,b,c] look like [N,H,W,C] and the source does not say what they are."""
    if images.dim() != 4 or channels_first is not None:
        return
    a, b, c = images.shape[1:]
    if c in (1, 3, 4) and min(a, b) > 4:
        raise DataError(
            f"{where}: images are [N, {a}, {b}, {c}]: are they {a} channels of {b}x{c} pixels, or {a}x{b} pixels of "
            f"{c} channel{'s' if c > 1 else ''}?",
            hint="images.permute(0, 3, 1, 2) makes [N,C,H,W] of [N,H,W,C]; or say which: "
            "Source(..., channels_first=False) for [N,H,W,C], channels_first=True for [N,C,H,W]",
        )


def _check_labels(what: str, split: Split, classes: int) -> None:
    labels = split.labels
    if not isinstance(labels, Tensor) or labels.device.type != "cpu":
        raise DataError(f"{what}_labels must be a tensor on the CPU, and is {_kind(labels)}")
    if labels.dtype != torch.int64 or labels.dim() not in (1, 2):
        raise DataError(
            f"{what}_labels are {labels.dtype} of shape {tuple(labels.shape)}; they must be torch.int64 [N], or [N,L] "
            "for independent labels"
        )
    part = what.split(": ")[-1]
    if len(split.images) != len(labels):
        raise DataError(f"{what}_images are {len(split.images)} and {part}_labels {len(labels)}; one each")
    if split.names and len(split.names) != len(labels):
        raise DataError(f"{what}_names are {len(split.names)} and {part}_labels {len(labels)}; one each, or none")
    low, high = int(labels.min()), int(labels.max())
    if labels.dim() == 2:
        if labels.shape[1] != classes or low < 0 or high > 1:
            raise DataError(
                f"{what}_labels are [N,{labels.shape[1]}], from {low} to {high}; with {classes} labels they must be "
                f"[N,{classes}] of 0 and 1",
                hint="numbers of classes, one for each example, are [N]",
            )
        return
    if low < 0 or high >= classes:
        raise DataError(
            f"{what}_labels go from {low} to {high}; with {classes} classes they must lie in 0..{classes - 1}"
        )


def _kind(value: Any) -> str:
    return f"on {value.device}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
