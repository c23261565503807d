"""The parameters of S models in one stretch of memory, and their gradients in another.

An optimiser passes over one tensor instead of many, and a backward pass writes into gradients that stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# A model's part of a parameter starts at a multiple of so many numbers. It then fills whole vector registers, and what
# a kernel rounds does not depend on the number of models before or behind it. An elementwise optimiser carries nothing
# over from the padding between the parts.
ALIGNED = 16


class Flat:
    """Copies of the parameters of S models, `[S, ...]` by name, and gradients of the same shapes.

    Parameter after parameter lies in memory, and within one, model after model.
    """

    def __init__(self, models: Sequence[Mapping[str, Tensor]]) -> None:
        self.size, first = len(models), models[0]
        widths = [self.size * -(-p.numel() // ALIGNED) * ALIGNED for p in first.values()]
        some = next(iter(first.values()))
        self.values = torch.zeros(sum(widths), dtype=some.dtype, device=some.device)
        self.slopes = torch.zeros_like(self.values)
        self.widths = widths
        self.blocks: list[tuple[Tensor, Tensor]] = list(
            zip(self.by_parameter(self.values), self.by_parameter(self.slopes), strict=True)
        )
        self.parameters: dict[str, Tensor] = {}
        self.gradients: dict[str, Tensor] = {}
        for (name, p), (values, slopes) in zip(first.items(), self.blocks, strict=True):
            self.parameters[name] = values[:, : p.numel()].view(self.size, *p.shape)
            self.gradients[name] = slopes[:, : p.numel()].view(self.size, *p.shape)
            for s, model in enumerate(models):
                self.parameters[name][s].copy_(model[name].detach())

    def by_parameter(self, values: Tensor) -> list[Tensor]:
        """A stretch of memory like that of the parameters as a view for each parameter, [S, its numbers]."""
        return [part.view(self.size, -1) for part in values.split(self.widths)]

    def groups(self, hyper: Sequence[dict[str, float]]) -> Iterator[tuple[slice, dict[str, Any]]]:
        """Parameter groups for an optimiser, and which models they are of: neighbours with equal `hyper` share one."""
        runs = list(equal_runs(hyper))
        for run, hyperparameters in runs:
            whole = [(self.values, self.slopes)]
            parts = whole if len(runs) == 1 else [(values[run], slopes[run]) for values, slopes in self.blocks]
            params = []
            for values, slopes in parts:
                param = values.detach().requires_grad_()
                param.grad = slopes
                params.append(param)
            yield run, {"params": params, **hyperparameters}


def equal_runs(hyper: Sequence[dict[str, float]]) -> Iterator[tuple[slice, dict[str, float]]]:
    """Neighbours with equal hyperparameters, as slices."""
    start = 0
    for s in range(1, len(hyper) + 1):
        if s == len(hyper) or hyper[s] != hyper[start]:
            yield slice(start, s), hyper[start]
            start = s
