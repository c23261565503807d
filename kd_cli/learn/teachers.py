"""The teacher while it teaches: frozen, in eval mode, without gradients.

A teacher, one network or an ensemble, answers with logits for a batch. Cached, they are looked up by the example's
index; live, the network runs on the very images the student sees, which is needed once these are augmented.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

EVAL_BATCH = 1000  # examples in one forward pass without gradients


class Teacher(Protocol):
    """Logits of the teacher for a batch."""

    remembers: bool  # whether it answers without looking at the images
    has_T: bool  # whether they depend on the temperature, as the arithmetic mean of an ensemble does

    def __call__(self, index: Tensor, images: Tensor | None, T: Tensor) -> Tensor:
        """`index` [U,B] into the transfer set, `images` [U,B,...], `T` [S] -> logits [U,B,C].

        With `has_T`, U is 1 or S, and the logits are [S,B,C]. Who `remembers` may be given no images.
        """
        ...


class CachedTeacher:
    """The logits of one or more members on the transfer set, `[M, N, C]` or `[N, C]`, looked up by index."""

    remembers = True

    def __init__(self, logits_MNC: Tensor, *, combine: str = "geometric") -> None:
        if logits_MNC.ndim == 2:
            logits_MNC = logits_MNC[None]
        if combine == "geometric":  # does not depend on T: one mean for all
            logits_MNC = combine_logits(logits_MNC, combine=combine, T=torch.ones(()))[None]
        self.logits_MNC, self.combine = logits_MNC, combine
        self.has_T = len(logits_MNC) > 1

    def __call__(self, index: Tensor, images: Tensor | None, T: Tensor) -> Tensor:
        if len(self.logits_MNC) == 1:
            return self.logits_MNC[0].index_select(0, index.flatten()).unflatten(0, index.shape)
        return combine_logits(self.logits_MNC[:, index], combine=self.combine, T=T[:, None, None])


class LiveTeacher:
    """The networks of one or more members on the student's own batch."""

    remembers = False

    def __init__(self, modules: Sequence[nn.Module], *, combine: str = "geometric") -> None:
        self.modules, self.combine = [freeze(module) for module in modules], combine
        self.has_T = len(modules) > 1 and combine != "geometric"

    @torch.no_grad()
    def __call__(self, index: Tensor, images: Tensor | None, T: Tensor) -> Tensor:
        assert images is not None
        flat = images.flatten(0, 1)
        members = torch.stack([module(flat).unflatten(0, images.shape[:2]) for module in self.modules])
        return combine_logits(members, combine=self.combine, T=T[:, None, None])


def combine_logits(logits_MxC: Tensor, *, combine: str, T: Tensor) -> Tensor:
    """Logits `[..., C]` whose softmax at T is the mean of M members' distributions at T, `[M, ..., C]`.

    `geometric`: the mean of the logits, whatever T is. `arithmetic`: `T log mean softmax(z / T)`. Hinton 2015,
    section 1.
    """
    if len(logits_MxC) == 1:
        return logits_MxC[0]
    if combine == "geometric":
        return logits_MxC.mean(0)  # T may have any shape
    log_p = (logits_MxC / T).log_softmax(-1)
    return T * (log_p.logsumexp(0) - math.log(len(logits_MxC)))


def freeze(module: nn.Module) -> nn.Module:
    """Eval mode and no gradients; the module itself is returned."""
    return module.eval().requires_grad_(False)


def batches(images: Tensor, size: int = EVAL_BATCH) -> Iterator[Tensor]:
    """Slices of at most `size` examples, in order."""
    for start in range(0, len(images), size):
        yield images[start : start + size]
