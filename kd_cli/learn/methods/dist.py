"""DIST: the student's probabilities are to correlate with the teacher's, within each example and within each class."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd_cli import losses
from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Published, Setting, Terms, Weights
from kd_cli.learn.methods.logit_method import LogitMethod
from kd_cli.learn.outputs import Outputs

FLATTEST = 0.1  # a student's variation counts as this where it is less and the teacher varies more
ROUNDING = 1000  # a variation of so many units of rounding is none


class DIST(LogitMethod):
    """`alpha * (inter * L_inter + intra * L_intra) + beta * L_hard`; Huang et al. 2022.

    `L_inter` is 1 less the Pearson correlation of student and teacher over the classes of an example, `L_intra` the
    same over the examples of the batch for a class, both of probabilities at T. `square_T` multiplies both by T^2, as
    the authors' code does and the paper does not. Published weights: the authors' 2, which their code's T^2 makes 32
    at T = 4 on CIFAR-100.
    """

    needs_labels = False
    stackable = ("inter", "intra")
    published = (Published("inter", 2, 32), Published("intra", 2, 32))

    def __init__(
        self, inter: float = 1.0, intra: float = 1.0, square_T: bool = False, standardise: bool = False
    ) -> None:
        super().__init__(standardise)
        if inter == 0 and intra == 0:
            raise ConfigError("method.inter and method.intra are both 0; one of them must be above 0")
        self.inter: Tensor
        self.intra: Tensor
        self.number("inter", inter)
        self.number("intra", intra)
        self.square_T = square_T
        if square_T and not standardise:
            self.published = (Published("inter", 2, 2), Published("intra", 2, 2))
        self.couples_examples = intra > 0
        self.min_batch = 2 if intra > 0 else 1

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        if setting.classes < 3 and bool((self.inter > 0).any()):
            raise ConfigError(
                "DIST's term between classes needs 3 classes or more: the correlation of two numbers with two others "
                "is 1 or -1 and has no gradient",
                hint="method.inter=0, or method=soft_targets",
            )

    def of_teacher_alone(self, teacher: Outputs, batch: Batch, weights: Weights) -> Tensor:
        return torch.zeros_like(weights.T)  # a correlation with itself is 1

    def soft(self, student: Tensor, teacher: Tensor, labels: Tensor, weights: Weights) -> tuple[Tensor, Terms]:
        log_p, log_q = (losses.log_soften(logits, T=weights.T) for logits in (student, teacher))
        inter = 1 - correlation(log_p, log_q, dim=-1).mean(-1)
        intra = 1 - correlation(log_p, log_q, dim=-2).mean(-1)
        soft = self.inter.to(inter) * inter + self.intra.to(intra) * intra
        return (weights.T**2 * soft if self.square_T else soft), {"inter": inter, "intra": intra}


def correlation(log_p: Tensor, log_q: Tensor, *, dim: int) -> Tensor:
    """Pearson's correlation of p and q along `dim`, of their logs.

    p and q are divided by their means first, in logs, so that probabilities that underflow still correlate. Where the
    student p hardly varies (coefficient of variation below 0.1, and below the teacher's), its variation counts as the
    lesser of 0.1 and the teacher's: equal logits would otherwise have an infinite gradient. There the correlation
    comes out smaller than it is; everywhere else it is exact. It is 0 where the teacher does not vary.
    """
    p, q = deviations(log_p, dim), deviations(log_q, dim)
    of_p, of_q = p.square().mean(dim), q.square().mean(dim)
    floor = of_q.clamp(max=FLATTEST**2)
    tiny = (ROUNDING * torch.finfo(of_p.dtype).eps) ** 2
    return (p * q).mean(dim) / (torch.maximum(of_p, floor.clamp(min=tiny)) * of_q.clamp(min=tiny)).sqrt()


def deviations(log_p: Tensor, dim: int) -> Tensor:
    """p over its mean along `dim`, less 1."""
    log_p = log_p.clamp(min=torch.finfo(log_p.dtype).min / 2)
    log_mean = log_p.logsumexp(dim, keepdim=True) - math.log(log_p.shape[dim])
    return (log_p - log_mean).expm1()
