"""The parameters of S models in one stretch of memory, and their gradients in another.

An optimiser passes over one tensor instead of many, and a backward pass writes into gradients that are always there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# A model's part of a parameter starts at a multiple of so many numbers. So it fills whole vector registers, and what a
# kernel rounds does not depend on how many models lie before or behind.
ALIGNED = 16


class Flat:
    """Copies of the parameters of S models, `[S, ...]` by name, and gradients of the same shapes.

    Parameter after parameter lies in memory, and within one, model after model.
    """

    def __init__(self, models: Sequence[Mapping[str, Tensor]]) -> None:
        self.size, first = len(models), models[0]
        widths = {name: -(-p.numel() // ALIGNED) * ALIGNED for name, p in first.items()}
        some = next(iter(first.values()))
        self.values = torch.zeros(self.size * sum(widths.values()), dtype=some.dtype, device=some.device)
        self.slopes = torch.zeros_like(self.values)
        cuts = [self.size * width for width in widths.values()]
        self.blocks = [
            (values.view(self.size, -1), slopes.view(self.size, -1))
            for values, slopes in zip(self.values.split(cuts), self.slopes.split(cuts), strict=True)
        ]
        self.parameters: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        for (name, p), (values, slopes) in zip(first.items(), self.blocks, strict=True):
            self.parameters[name] = values[:, : p.numel()].view(self.size, *p.shape)
            self.gradients[name] = slopes[:, : p.numel()].view(self.size, *p.shape)
            for s, model in enumerate(models):
                self.parameters[name][s].copy_(model[name].detach())

    def groups(self, hyper: Sequence[dict[str, float]]) -> Iterator[tuple[slice, dict[str, Any]]]:
        """Parameter groups for an optimiser, and which models they are of: neighbours with equal `hyper` share one."""
        runs = list(_runs(hyper))
        for run, values in runs:
            if len(runs) == 1:
                pieces = [(self.values, self.slopes)]
            else:
                pieces = [(value[run], slope[run]) for value, slope in self.blocks]
            params = []
            for piece, slope in pieces:
                param = piece.detach().requires_grad_()
                param.grad = slope
                params.append(param)
            yield run, {"params": params, **values}


def _runs(hyper: Sequence[dict[str, float]]) -> Iterator[tuple[slice, dict[str, float]]]:
    """Neighbours with equal hyperparameters, as slices."""
    start = 0
    for s in range(1, len(hyper) + 1):
        if s == len(hyper) or hyper[s] != hyper[start]:
            yield slice(start, s), hyper[start]
            start = s
