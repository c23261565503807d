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
from kd_cli.data.source import Dataset, prepare
from kd_cli.data.splits import first_positions
from kd_cli.errors import ConfigError, DataError
from kd_cli.learn.batches import Examples
from kd_cli.nearest import did_you_mean
from kd_cli.runs.device_data import DeviceData


@dataclass(frozen=True)
class TransferSet:
    """The examples a student sees. `index` [n] into the training data, None for other images; `omitted` classes."""

    examples: Examples
    index: Tensor | None
    omitted: tuple[int, ...]
    labelled: bool
    facts: dict[str, Any]  # what a fingerprint says of it; empty for all of the training data
    notes: tuple[str, ...] = ()  # on another data set that the examples come from

    @property
    def whole(self) -> bool:
        return not self.facts


def transfer_set(config: RunConfig, data: DeviceData) -> TransferSet:
    """The transfer set of a run. ConfigError for classes that the data do not have, or when nothing is left."""
    spec = config.transfer
    if spec.data is not None:
        return _other_data(spec, config, data)
    labels = data.dataset.train.labels
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
    """All training images of another data set, prepared as the teacher's own images are."""
    assert spec.data is not None
    if spec.omit or spec.only:
        raise ConfigError("transfer.data has no labels, so transfer.omit and transfer.only cannot choose among it")
    other = prepare(build(spec.data, where="transfer.data", data_dir=config.data_dir), val_fraction=0.0)
    if other.shape != data.dataset.shape:
        raise DataError(
            f"transfer.data is {other.name} with images {tuple(other.shape)}, and {data.dataset.name} has "
            f"{tuple(data.dataset.shape)}: the student must see what the teacher can",
            hint="choose data of the same shape",
        )
    images = other.train.images
    if spec.fraction < 1:
        images = images[first_positions(len(images), max(1, round(spec.fraction * len(images))))]
    normalise = Normalisation(data.dataset.mean, data.dataset.std, data.dtype)
    labels = torch.zeros(len(images), dtype=torch.int64, device=data.device)  # never looked at: beta is 0
    facts = {**spec.examples(), "fingerprint": other.fingerprint}
    examples = Examples(images.to(data.device), labels, normalise=normalise)
    return TransferSet(examples, None, (), False, facts, tuple(f"transfer.data: {note}" for note in other.notes))


def key_of(config: RunConfig) -> str:
    """Runs with equal keys have the same transfer set."""
    return fingerprint([config.transfer.examples(), config.transfer.labels])
