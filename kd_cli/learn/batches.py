"""Examples that lie on a device, and the batches that they are handed out in.

Shapes: S models, U distinct batches (neighbouring models with the same seed share one), N examples, B examples in a
batch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kd_cli.learn.augment import Augment
from kd_cli.learn.randomness import generator

EVAL_BATCH = 1000  # examples in one forward pass without gradients
KEEP_FLOATS = 256 * 2**20  # bytes of normalised images up to which they are kept; larger data stay as they are stored
NO_AUGMENTATION = Augment()


@dataclass(frozen=True)
class Batch:
    """The examples of one step.

    `index` [U,B] counts them in their data set, `images` [U,B,...] are normalised and augmented, `labels` are [U,B],
    or [U,B,L] of independent labels.
    `progress` is the share of all steps already made, `epoch` counts from 1. Where several batches make one step,
    `share` is this one's part of their examples, and the last one `ends_step`. A method gets `index` and `labels` as
    [S,B].
    """

    index: Tensor
    images: Tensor
    labels: Tensor
    progress: float = 0.0
    epoch: int = 1
    share: float = 1.0
    ends_step: bool = True


class Examples:
    """Images `[N,...]` and labels `[N]`, or independent labels `[N,L]`, on a device.

    `normalise` maps stored images to what a network takes; bytes stay bytes and are normalised batch by batch, which
    takes a quarter of the memory. Where the normalised images fit in `keep_floats` bytes they are kept instead: the
    steps of small networks are shorter then. Without `normalise`, images are used as they are.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        normalise: Callable[[Tensor], Tensor] | None = None,
        keep_floats: int = KEEP_FLOATS,
    ) -> None:
        if normalise is not None:
            one = normalise(images[:1])
            if images.numel() * one.element_size() <= keep_floats:
                images = torch.cat([normalise(part) for part in images.split(4096)]) if len(images) else one[:0]
                normalise = None
        self._images, self.labels, self.normalise = images, labels, normalise

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def device(self) -> torch.device:
        return self._images.device

    @property
    def nbytes(self) -> int:
        """Bytes of the images as they are stored."""
        return self._images.numel() * self._images.element_size()

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return tuple(self._images.shape[1:])

    def images(self, index: Tensor) -> Tensor:
        """Images by index [U,B]: normalised, [U,B,...]."""
        # index_select is faster than indexing
        found = torch.index_select(self._images, 0, index.reshape(-1))
        return self._normalised(found).view(*index.shape, *self.shape)

    def first(self, n: int) -> Tensor:
        """The first n images, normalised: [n,...]."""
        return self._normalised(self._images[:n])

    def in_order(self, size: int = EVAL_BATCH) -> Iterator[Tensor]:
        """All images in batches of at most `size`, normalised: [B,...] each."""
        for part in self._images.split(size):
            if len(part):
                yield self._normalised(part)

    def subset(self, index: Tensor) -> Examples:
        """The examples of these numbers [n], copied."""
        index = index.to(self.device)
        found = Examples(self._images[index], self.labels[index])
        found.normalise = self.normalise
        return found

    def expect(self, order: Tensor, sizes: Sequence[int]) -> None:
        """The examples are asked for in this order [U,n] from now on, in batches of these sizes: some read ahead."""

    def blocks(self, order: Tensor, sizes: Sequence[int], augmented: Augmented | None = None) -> Block:
        """The examples in this order [U,n] as consecutive batches of these sizes."""
        return Block(self, order, tuple(sizes), augmented)

    def _normalised(self, images: Tensor) -> Tensor:
        return images if self.normalise is None else self.normalise(images)


@dataclass(frozen=True)
class Augmented:
    """An augmentation with the numbers `draws` [U,n,k] drawn for each example, in the order of a block.

    `fill` moves in at the edge of a shifted image: a black pixel, normalised.
    """

    augment: Augment
    draws: Tensor
    fill: Tensor | float = 0.0

    def __call__(self, images: Tensor, start: int) -> Tensor:
        """Augment the images [U,B,C,H,W] that begin at position `start` of the block."""
        draws = self.draws[:, start : start + images.shape[1]]
        changed = self.augment.apply(images.flatten(0, 1), draws.flatten(0, 1), fill=self.fill)
        return changed.unflatten(0, images.shape[:2])


@dataclass(frozen=True)
class Block:
    """Consecutive batches: `index` [U,n] holds their examples, one batch after another, `sizes` the batches' lengths.

    Iterating yields a `Batch` for each.
    """

    examples: Examples
    index: Tensor
    sizes: tuple[int, ...]
    augmented: Augmented | None = None
    progress: tuple[float, ...] = ()
    epoch: int = 1
    steps: tuple[tuple[float, bool], ...] = ()  # of each batch, its share of a step and whether it ends one

    @functools.cached_property
    def labels(self) -> Tensor:
        """The labels of all batches, [U,n]."""
        return self.examples.labels[self.index]

    def lookup(self) -> Batch:
        """All examples of the block as one batch without images, for a teacher that needs none."""
        return Batch(self.index, self.index[:0], self.labels)

    def shared(self, n: int) -> list[SharedBlock]:
        """This block for n consumers in step with each other: each batch is fetched and augmented once for all."""
        batches = InStep(iter(self))
        own = (self.examples, self.index, self.sizes, self.augmented, self.progress, self.epoch, self.steps)
        return [SharedBlock(*own, batches=batches) for _ in range(n)]

    def __iter__(self) -> Iterator[Batch]:
        start = 0
        parts = zip(self.index.split(self.sizes, 1), self.labels.split(self.sizes, 1), strict=True)
        for i, (index, labels) in enumerate(parts):
            images = self.examples.images(index)
            if self.augmented is not None:
                images = self.augmented(images, start)
            start += self.sizes[i]
            step = self.steps[i] if self.steps else (1.0, True)
            yield Batch(index, images, labels, self.progress[i] if self.progress else 0.0, self.epoch, *step)


class InStep:
    """Batches for several consumers that are never more than one batch ahead of each other; one is kept at a time."""

    def __init__(self, source: Iterator[Batch]) -> None:
        self.source = source
        self.number = -1  # of the batch that is kept
        self.ahead: list[Batch] = []  # fetched before their time

    def fetch(self) -> Batch:
        """Fetch the batch after those that are fetched."""
        self.ahead.append(batch := next(self.source))
        return batch

    def at(self, number: int) -> Batch:
        """The batch of this number: the one that is kept, or the next."""
        if number == self.number + 1:
            self.batch, self.number = self.ahead.pop(0) if self.ahead else next(self.source), number
        if number != self.number:
            raise ValueError(f"batch {number} is asked for while batch {self.number} is at hand")
        return self.batch


@dataclass(frozen=True, kw_only=True)
class SharedBlock(Block):
    """A block whose batches other consumers use too."""

    batches: InStep

    def __iter__(self) -> Iterator[Batch]:
        return (self.batches.at(number) for number in range(len(self.sizes)))


def batch_sizes(n: int, size: int) -> list[int]:
    """The lengths of an epoch's batches. A last one of a single example joins the one before, for BatchNorm's sake."""
    sizes = [min(size, n - start) for start in range(0, n, size)]
    if size > 1 and len(sizes) > 1 and sizes[-1] == 1:
        sizes[-2:] = [size + 1]
    return sizes


def shares_of_steps(sizes: Sequence[int], accumulate: int) -> list[tuple[float, bool]]:
    """For each batch of an epoch, its share of the examples of its step, and whether it ends that step.

    A step takes `accumulate` batches, the last of an epoch what is left.
    """
    found = []
    for first in range(0, len(sizes), accumulate):
        some = sizes[first : first + accumulate]
        found += [(size / sum(some), k == len(some) - 1) for k, size in enumerate(some)]
    return found


def distinct(seeds: Sequence[int]) -> Sequence[int]:
    """The seeds [U] of the distinct batches of S models with these seeds: neighbours with one seed share their batches
    where all such groups are of one size; else each model has its own."""
    groups = [(seed, len(list(group))) for seed, group in itertools.groupby(seeds)]
    return [seed for seed, _ in groups] if len({n for _, n in groups}) == 1 else seeds


def draw_order(n: int, seeds: Sequence[int], role: str, epoch: int) -> Tensor:
    """The order of the n examples in this epoch, one for each distinct seed: [U,n]."""
    drawn = {seed: torch.randperm(n, generator=generator(seed, role, "order", epoch)) for seed in dict.fromkeys(seeds)}
    return torch.stack([drawn[seed] for seed in distinct(seeds)])


def draw_balanced(labels: Tensor, seeds: Sequence[int], role: str, epoch: int) -> Tensor:
    """As many examples as there are labels [n], drawn with replacement so that each class is as likely: [U,n]."""
    labels = labels.cpu()
    by_class = labels.argsort(stable=True)
    counts = labels.bincount()
    present = counts.nonzero()[:, 0]
    starts = counts.cumsum(0) - counts

    def drawn(seed: int) -> Tensor:
        own = generator(seed, role, "balanced", epoch)
        classes = present[torch.randint(len(present), (len(labels),), generator=own)]
        places = (torch.rand(len(labels), generator=own, dtype=torch.float64) * counts[classes]).long()
        return by_class[starts[classes] + places.clamp(max=counts[classes] - 1)]

    each = {seed: drawn(seed) for seed in dict.fromkeys(seeds)}
    return torch.stack([each[seed] for seed in distinct(seeds)])


def draw_augmentation(augment: Augment, n: int, seeds: Sequence[int], role: str, epoch: int) -> Tensor | None:
    """The numbers that augment each example of this epoch, in the order of the batches, for each distinct seed:
    [U,n,k]; None where nothing is augmented."""
    if not augment.enabled:
        return None
    drawn = {seed: augment.draw(n, generator(seed, role, "augment", epoch)) for seed in dict.fromkeys(seeds)}
    return torch.stack([drawn[seed] for seed in distinct(seeds)])


def repeat_groups(x: Any, size: int) -> Any:
    """[U,...] -> [S,...]: the batch of each group of S/U models is repeated for its models."""
    if len(x) == 1:
        return x.expand(size, *x.shape[1:])
    return x if len(x) == size else x.repeat_interleave(size // len(x), 0)


def gathered(parts: Iterable[Tensor], n: int, *, dim: int = 0) -> Tensor:
    """Tensors one after the other along a dimension, of n in all, as `torch.cat` joins them.

    Each is copied into its place at once. Kept in a list, small tensors lie between the batches' large ones, and the
    memory that a batch has freed no longer holds the next one: it grew by 20 MB a batch.
    """
    found, start = None, 0
    for part in parts:
        if found is None:
            found = part.new_empty(*part.shape[:dim], n, *part.shape[dim + 1 :])
        found.narrow(dim, start, part.shape[dim]).copy_(part)
        start += part.shape[dim]
    assert found is not None
    return found
