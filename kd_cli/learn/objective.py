"""What S students minimise: a method with its temperature and loss weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kd_cli.learn.batches import Batch, repeat_groups
from kd_cli.learn.methods.base import Method, Terms, Weights
from kd_cli.learn.outputs import Outputs


@dataclass(frozen=True)
class Objective:
    """A method and the weights [S] that it is called with."""

    method: Method
    weights: Weights

    @property
    def size(self) -> int:
        return len(self.weights.T)

    def __call__(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Terms:
        """The loss of each student, [S], and the terms that are logged beside it."""
        return self.method(student, teacher, self._repeated(batch), self.weights)

    def weighted_terms(self, student: Outputs, teacher: Outputs | None, batch: Batch) -> Terms:
        """The terms of the loss times their weights, [S] each, whose sum is the loss."""
        return self.method.weighted_terms(student, teacher, self._repeated(batch), self.weights)

    def _repeated(self, batch: Batch) -> Batch:
        """The batch with `index` and `labels` of each student."""
        if len(batch.labels) == self.size:
            return batch
        index, labels = (repeat_groups(x, self.size) for x in (batch.index, batch.labels))
        return replace(batch, index=index, labels=labels)


@dataclass(frozen=True)
class SideBySide(Objective):
    """The objectives of a cohort's learners, one for each; `method` is the first one's, `weights` are all of theirs."""

    each: tuple[Objective, ...]

    @classmethod
    def of(cls, objectives: Sequence[Objective]) -> SideBySide:
        weights = [
            torch.cat(column) for column in zip(*(vars(one.weights).values() for one in objectives), strict=True)
        ]
        return cls(objectives[0].method, Weights(*weights), tuple(objectives))
