"""The parameters of S models in one stretch of memory, and their gradients in another.

An optimiser passes over one tensor instead of many, and a backward pass writes into gradients that are always there.

Large models are advanced piece by piece, one or more layers at a time, and all pieces' gradients use the same memory.
What a step touches, weights, gradients and the optimiser's state, is then smaller by all gradients but one piece's, and
a gradient is still in the processor's cache when the optimiser reads it. For small models the calls cost more. What
lies between two parameters, to align them, then sees other pieces' gradients; nothing reads it, and an optimiser that
treats every number by itself carries nothing over.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# A model's part of a parameter starts at a multiple of so many numbers. So it fills whole vector registers, and what a
# kernel rounds does not depend on how many models lie before or behind.
ALIGNED = 16
LARGE = (
    1_000_000  # numbers from which on models are advanced piece by piece; of fewer, a cache holds four times as many
)
PIECE = 100_000  # numbers of a piece at least


class Flat:
    """Copies of the parameters of S models, `[S, ...]` by name, and gradients of the same shapes.

    Parameter after parameter lies in memory, and within one, model after model.
    """

    def __init__(self, models: Sequence[Mapping[str, Tensor]], layers: Sequence[int] = ()) -> None:
        """`layers` are the numbers of parameters of each layer, of models which can be advanced piece by piece."""
        self.size, first = len(models), models[0]
        widths = [self.size * -(-p.numel() // ALIGNED) * ALIGNED for p in first.values()]
        some = next(iter(first.values()))
        self.pieces = _pieces(widths, layers if some.device.type == "cpu" else [])
        lengths = [sum(widths[piece]) for piece in self.pieces]
        self.values = torch.zeros(sum(widths), dtype=some.dtype, device=some.device)
        self.slopes = self.values.new_zeros(max(lengths))
        self.stretches = [(values, self.slopes[: len(values)]) for values in self.values.split(lengths)]
        self.blocks: list[tuple[Tensor, Tensor]] = []
        for (values, slopes), piece in zip(self.stretches, self.pieces, strict=True):
            cut = widths[piece]
            for pair in zip(values.split(cut), slopes.split(cut), strict=True):
                self.blocks.append((pair[0].view(self.size, -1), pair[1].view(self.size, -1)))
        self.parameters: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        for (name, p), (block, slope) in zip(first.items(), self.blocks, strict=True):
            self.parameters[name] = block[:, : p.numel()].view(self.size, *p.shape)
            self.gradients[name] = slope[:, : p.numel()].view(self.size, *p.shape)
            for s, model in enumerate(models):
                self.parameters[name][s].copy_(model[name].detach())

    def groups(self, hyper: Sequence[dict[str, float]]) -> Iterator[tuple[slice, dict[str, Any]]]:
        """Parameter groups for an optimiser, and which models they are of: neighbours with equal `hyper` share one.

        Piece after piece, and as many of each.
        """
        runs = list(_runs(hyper))
        for piece, whole in zip(self.pieces, self.stretches, strict=True):
            for run, hyperparameters in runs:
                if len(runs) == 1:
                    stretches = [whole]
                else:
                    stretches = [(values[run], slopes[run]) for values, slopes in self.blocks[piece]]
                params = []
                for stretch, slope in stretches:
                    param = stretch.detach().requires_grad_()
                    param.grad = slope
                    params.append(param)
                yield run, {"params": params, **hyperparameters}


def _pieces(widths: Sequence[int], layers: Sequence[int]) -> list[slice]:
    """The parameters that are advanced at once: those of a layer and, after it, of layers too small for a piece."""
    edges = list(itertools.accumulate(layers, initial=0)) if sum(widths) >= LARGE else []
    pieces = [slice(0, len(widths))]
    for edge in reversed(edges[1:-1]):
        if sum(widths[edge : pieces[0].stop]) >= PIECE:
            pieces[:1] = [slice(0, edge), slice(edge, pieces[0].stop)]
    return pieces


def _runs(hyper: Sequence[dict[str, float]]) -> Iterator[tuple[slice, dict[str, float]]]:
    """Neighbours with equal hyperparameters, as slices."""
    start = 0
    for s in range(1, len(hyper) + 1):
        if s == len(hyper) or hyper[s] != hyper[start]:
            yield slice(start, s), hyper[start]
            start = s
