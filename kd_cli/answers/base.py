"""Teachers that are answers and no module of PyTorch: what any system says of the training examples.

They answer for the data as they are stored. So they teach where the student's input is not augmented and the method
reads no features; `kd_cli.runs.answering` refuses the rest before anything is trained.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd_cli.data.normalisation import normalise
from kd_cli.data.source import Dataset, Split
from kd_cli.data.stored import pieces
from kd_cli.errors import ConfigError, DataError
from kd_cli.nearest import did_you_mean

KINDS = ("auto", "probabilities", "logits")
LEAST = 1e-6  # a probability below it counts as this, since 0 has no logarithm
NEAR_ONE = 1e-2  # how far the sum of an example's probabilities may lie from 1: they may be rounded to two digits


@dataclass(frozen=True)
class Given:
    """Logits of the training examples [N,C], of the test examples [M,C] if they are known, and notes."""

    train: Tensor
    test: Tensor | None = None
    notes: tuple[str, ...] = ()


class Answers(ABC):
    """A teacher that is known by its answers alone."""

    title: str  # its name in tables and logs
    pending = "to answer"  # what a dry run says of one whose answers are not in the store

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What the answers depend on beside the data, plain values, for a fingerprint."""

    @abstractmethod
    def check(self, dataset: Dataset) -> None:
        """Raise DataError or ConfigError, before anything is trained, if this teacher cannot answer for the data."""

    @abstractmethod
    def answer(self, dataset: Dataset, *, seed: int, normalize: Any) -> Given:
        """The answers. `seed` is that of the teacher's training, `normalize` how its input was normalised."""


def check_kind(kind: str) -> None:
    """ConfigError for a kind of answers that is none of KINDS."""
    if kind not in KINDS:
        raise ConfigError(
            f"teacher.kind is {kind!r}; it must be one of {', '.join(KINDS)}", hint=did_you_mean(str(kind), KINDS)
        )


def as_logits(values: Tensor, *, kind: str, multilabel: bool, where: str) -> tuple[Tensor, list[str]]:
    """Probabilities or logits [N,C] as logits in float32, and notes on how they were read.

    The softmax of log p at T = 1 is p again; of independent labels, the sigmoid of log p - log (1 - p) is. `auto` takes
    for probabilities what lies from 0 to 1 and, unless the labels are independent, sums to 1. Raises DataError.
    """
    values = values.double()
    if not bool(values.isfinite().all()):
        row = int((~values.isfinite()).any(1).nonzero()[0])
        raise DataError(f"{where}: the answers to example {row} hold values that are infinite or not numbers")
    shares = bool(((values >= 0) & (values <= 1 + 1e-6)).all())
    sums = values.sum(1)
    sound = multilabel or bool(((sums - 1).abs() <= NEAR_ONE).all())
    notes = []
    if kind == "auto":
        if shares and not sound:
            row = int((sums - 1).abs().argmax())
            raise DataError(
                f"{where}: all answers lie from 0 to 1, and those to example {row} sum to {float(sums[row]):.4g}",
                hint="teacher.kind=logits if they are logits; probabilities of an example must sum to 1",
            )
        kind = "probabilities" if shares else "logits"
        notes.append(f"{where}: the answers are taken for {kind}, {_range(values)}")
    if kind == "logits":
        return values.float(), notes
    if not shares or not sound:
        found = _range(values) if not shares else f"those to example {int((sums - 1).abs().argmax())} do not sum to 1"
        raise DataError(f"{where}: teacher.kind is probabilities, and {found}", hint="teacher.kind=logits")
    low = int((values < LEAST).sum())
    if low:
        notes.append(f"{where}: {low:,} of {values.numel():,} probabilities are below {LEAST:g} and count as {LEAST:g}")
    if multilabel:
        return values.clamp(LEAST, 1 - LEAST).logit().float(), notes
    return values.clamp(min=LEAST).log().float(), notes


def _range(values: Tensor) -> str:
    return f"from {float(values.min()):.4g} to {float(values.max()):.4g}"


def network_input(split: Split, dataset: Dataset) -> Tensor:
    """A part's images as networks receive them, normalised with the training part's mean and deviation, float32."""
    return torch.cat([normalise(piece, dataset.mean, dataset.std, torch.float32) for piece in pieces(split.images)])
