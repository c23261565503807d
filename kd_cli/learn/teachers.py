"""The teacher while it teaches: frozen, in eval mode, without gradients.

A teacher answers with logits for a batch. Cached, they are looked up by the example's index; live, the network runs on
the very images the student sees, which is needed once these are augmented.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

EVAL_BATCH = 1000  # examples in one forward pass without gradients


class Teacher(Protocol):
    """Logits of the teacher for a batch."""

    def __call__(self, index: Tensor, images: Tensor) -> Tensor:
        """`index` [S,B] or [B] into the training examples, `images` [S,B,...] -> logits [S,B,C] or [B,C]."""
        ...


class CachedTeacher:
    """The teacher's logits on all training examples, `[N, C]`, looked up by index."""

    def __init__(self, logits_NC: Tensor) -> None:
        self.logits_NC = logits_NC

    def __call__(self, index: Tensor, images: Tensor) -> Tensor:
        return self.logits_NC[index]


class LiveTeacher:
    """The teacher's network on the student's own batch."""

    def __init__(self, module: nn.Module) -> None:
        self.module = freeze(module)

    @torch.no_grad()
    def __call__(self, index: Tensor, images: Tensor) -> Tensor:
        stack, batch = images.shape[:2]
        return self.module(images.flatten(0, 1)).unflatten(0, (stack, batch))


def freeze(module: nn.Module) -> nn.Module:
    """Eval mode and no gradients; the module itself is returned."""
    return module.eval().requires_grad_(False)


def batches(images: Tensor, size: int = EVAL_BATCH) -> Iterator[Tensor]:
    """Slices of at most `size` examples, in order."""
    for start in range(0, len(images), size):
        yield images[start : start + size]
