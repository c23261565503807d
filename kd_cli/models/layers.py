"""Layers and weight constraints that the shipped models share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kd_cli.models.arguments import share


class Dropout(nn.Module):
    """Inverted dropout whose mask depends on its own generator alone.

    `nn.Dropout` draws from torch's global generator: there a mask depends on everything that drew before it. With no
    global state, S stacked models draw what each would draw alone, and a resumed run draws what it would have drawn.
    Without a generator it falls back on the global one.
    """

    def __init__(self, p: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.p = share("p", p)
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        mask = torch.empty_like(x, memory_format=torch.contiguous_format)
        return x * draw_dropout(mask, self.p, generator=self.generator)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def draw_dropout(mask: Tensor, p: float, *, generator: torch.Generator | None) -> Tensor:
    """Fill a contiguous tensor with the factors of inverted dropout: 0 with probability p, else 1 / (1 - p).

    A number takes 16 of the 64 bits that a generator gives at once, five times as fast on a CPU as `bernoulli_`, and p
    is rounded to a 65,536th, in the factor too.
    """
    if mask.device.type == "mps":  # which has no 64 random bits
        return mask.bernoulli_(1 - p, generator=generator).div_(1 - p)
    bits = torch.empty(-(-mask.numel() // 4), dtype=torch.int64, device=mask.device)
    bits.random_(-(2**63), None, generator=generator)
    dropped = min(round(p * 2**16), 2**16 - 1)
    kept = bits.view(torch.int16)[: mask.numel()].view(mask.shape) >= dropped - 2**15
    return mask.copy_(kept).mul_(2**16 / (2**16 - dropped))


@torch.no_grad()
def constrain_max_norm(parameters: Mapping[str, Tensor], bounds: Mapping[str, float]) -> None:
    """Scale each unit's incoming weights down, in place, to at most the bound in L2 norm (Hinton et al. 2012).

    A unit's incoming weights are the last dimension: of [out, in], and of S stacked models' [S, out, in].
    """
    for name, bound in bounds.items():
        weight = parameters[name]
        norm = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
        weight.mul_((bound / norm).clamp_(max=1))  # a norm of 0 gives inf, which the clamp makes 1
