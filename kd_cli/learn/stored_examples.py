"""Examples whose images are not held in memory: read for each batch, ahead of their use where workers decode them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from kd_cli.data.stored import StoredImages
from kd_cli.learn.batches import EVAL_BATCH, Examples


class StoredExamples(Examples):
    """Stored images `[N,...]` and labels `[N]` or `[N,L]`; batches, normalised, are those of `Examples`."""

    def __init__(self, images: StoredImages, labels: Tensor, *, normalise: Callable[[Tensor], Tensor]) -> None:
        self.stored, self.labels, self.normalise = images, labels, normalise
        self._expected: deque[Tensor] = deque()
        self._ahead: Iterator[Tensor] = iter(())

    @property
    def device(self) -> torch.device:
        return self.labels.device

    @property
    def nbytes(self) -> int:
        return self.stored.numel()

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored.shape[1:])

    def images(self, index: Tensor) -> Tensor:
        wanted = index.reshape(-1).cpu()
        if self._expected and torch.equal(self._expected[0], wanted):
            self._expected.popleft()
            found = next(self._ahead)
        else:
            found = self.stored[wanted]
        return self._normalised(found.to(self.device)).view(*index.shape, *self.shape)

    def first(self, n: int) -> Tensor:
        return self._normalised(self.stored[:n].to(self.device))

    def in_order(self, size: int = EVAL_BATCH) -> Iterator[Tensor]:
        for part in self.stored.split(size):
            yield self._normalised(part.to(self.device))

    def subset(self, index: Tensor) -> Examples:
        index = index.cpu()
        assert self.normalise is not None
        return StoredExamples(self.stored.select(index), self.labels[index.to(self.device)], normalise=self.normalise)

    def expect(self, order: Tensor, sizes: Sequence[int]) -> None:
        parts = [part.reshape(-1) for part in order.cpu().split(list(sizes), 1)]
        self._expected = deque(parts)
        self._ahead = self.stored.parts(part.numpy() for part in parts)
