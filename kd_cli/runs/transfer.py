"""The transfer set: what the student is taught with, a part of the training data or other images without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd_cli.config.build import build
from kd_cli.config.fingerprint import fingerprint
from kd_cli.config.schema import Transfer
from kd_cli.config.values import RunConfig
from kd_cli.data.normalisation import Normalisation
from kd_cli.data.prepare import unlabelled
from kd_cli.data.source import Dataset
from kd_cli.data.splits import first_positions
from kd_cli.data.stored import Images, selected
from kd_cli.errors import ConfigError, DataError
from kd_cli.learn.batches import Examples
from kd_cli.nearest import did_you_mean
from kd_cli.runs.device_data import DeviceData, examples_of


@dataclass(frozen=True)
class TransferSet:
    """The examples a student sees. `index` [n] into the training data, None for other images; `omitted` classes."""

    examples: Examples
    index: Tensor | None
    omitted: tuple[int, ...]
    labelled: bool
    facts: dict[str, Any]  # what a fingerprint says of it; empty for all of the training data
    notes: tuple[str, ...] = ()  # what was left out, turned or filled in while reading other images: sentences

    @property
    def whole(self) -> bool:
        return not self.facts


def transfer_set(config: RunConfig, data: DeviceData) -> TransferSet:
    """The transfer set of a run. ConfigError for classes that the data do not have, or when nothing is left."""
    spec = config.transfer
    if spec.data is not None:
        return _other_data(spec, config, data)
    labels = data.dataset.train.labels
    if data.dataset.multilabel and (spec.omit or spec.only):
        raise ConfigError("transfer.omit and transfer.only leave out classes, and the data have independent labels")
    omitted = omitted_classes(spec, data.dataset)
    keep = torch.ones(len(labels), dtype=torch.bool)
    for c in omitted:
        keep &= labels != c
    if spec.fraction < 1:
        part = torch.zeros_like(keep)
        part[first_positions(len(labels), max(1, round(spec.fraction * len(labels))))] = True
        keep &= part
    if not keep.any():
        raise ConfigError("the transfer set is empty", hint="omit fewer classes, or raise transfer.fraction")
    index = keep.nonzero()[:, 0]
    examples = data.train
    if len(index) < len(labels):
        examples = data.train.subset(index)
    return TransferSet(examples, index, omitted, spec.labels, spec.examples())


def omitted_classes(spec: Transfer, dataset: Dataset) -> tuple[int, ...]:
    """The numbers of the classes that are left out."""

    def number(key: str, given: int | str) -> int:
        names = list(dataset.class_names)
        if isinstance(given, int) and 0 <= given < dataset.classes:
            return given
        if given in names:
            return names.index(str(given))
        allowed = did_you_mean(str(given), names) or f"classes are 0 to {dataset.classes - 1}, or their names"
        raise ConfigError(f"transfer.{key} names the class {given!r}, which {dataset.name} does not have", hint=allowed)

    if spec.only:
        kept = {number("only", c) for c in spec.only}
        return tuple(c for c in range(dataset.classes) if c not in kept)
    return tuple(sorted({number("omit", c) for c in spec.omit}))


def _other_data(spec: Transfer, config: RunConfig, data: DeviceData) -> TransferSet:
    """All training images of another data set, normalised with the mean and deviation of the teacher's data."""
    assert spec.data is not None
    if spec.omit or spec.only:
        raise ConfigError("transfer.data has no labels, so transfer.omit and transfer.only cannot choose among it")
    node, notes = _of_the_same_size(spec.data, data.dataset)
    source = build(node, where="transfer.data", data_dir=config.data_dir)
    images, content, read = unlabelled(source)
    if images.shape[1:] != data.dataset.shape:
        raise DataError(
            f"transfer.data is {source.name} with images {tuple(images.shape[1:])}, and {data.dataset.name} has "
            f"{tuple(data.dataset.shape)}: teacher and student must take the same images",
            hint="choose data of the same shape",
        )
    if not _same_scale(images, data.dataset.train.images):
        raise DataError(
            f"transfer.data is {source.name} with {images.dtype} images{_range(images)}, and "
            f"{data.dataset.name} has {data.dataset.train.images.dtype}: their scales cannot be compared",
            hint="give both as torch.uint8, or both as floating point",
        )
    if spec.fraction < 1:
        images = selected(images, first_positions(len(images), max(1, round(spec.fraction * len(images)))))
    normalise = Normalisation(data.dataset.mean, data.dataset.std, data.dtype)
    labels = data.train.labels.new_zeros(len(images), *data.train.labels.shape[1:])  # never read: beta is 0
    examples = examples_of(images, labels, normalise)
    named = {key: value for key, value in node.items() if key != "keep"}  # where pictures are kept changes nothing
    facts = {**spec.examples(), "data": named, "fingerprint": content}
    said = tuple(f"transfer.data: {note}" for note in [*notes, *read])
    return TransferSet(examples, None, (), False, facts, said)


def _of_the_same_size(node: dict[str, Any], dataset: Dataset) -> tuple[dict[str, Any], list[str]]:
    """The node of another data set with the sizes of the data set's images, if it has keys for them."""
    shape = dataset.shape
    if len(shape) != 3 or shape[1] != shape[2]:
        return node, []
    sizes = {key: value for key, value in (("image_size", shape[1]), ("channels", shape[0])) if key in node}
    said = " and ".join(f"{key} is {value}" for key, value in sizes.items())
    return {**node, **sizes}, [f"{said}, as in {dataset.name}"] if said else []


def _range(images: Images) -> str:
    return f" from {float(images.min()):g} to {float(images.max()):g}" if isinstance(images, Tensor) else ""


def _same_scale(images: Images, others: Images) -> bool:
    """False if one of them are bytes, which count as 0..1, and the other are floats beyond that range."""
    floats = [one for one in (images, others) if isinstance(one, Tensor) and one.is_floating_point()]
    return len(floats) != 1 or (float(floats[0].min()) >= 0 and float(floats[0].max()) <= 1)


def key_of(config: RunConfig) -> str:
    """Runs with equal keys have the same transfer set."""
    return fingerprint([config.transfer.examples(), config.transfer.labels])
