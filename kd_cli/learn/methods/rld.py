"""Refined logit distillation: what a teacher that is wrong still knows."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_cli import losses
from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Published, Terms, Weights
from kd_cli.learn.methods.logit_method import LogitMethod, binary_divergence, target_margin
from kd_cli.learn.outputs import Outputs


class RLD(LogitMethod):
    """`alpha * (scd_weight * T_a^2 * L_scd + mcd_weight * T^2 * L_mcd) + beta * L_hard`; Sun et al. 2024.

    `L_scd`, at T_a, is the divergence of (labelled class, all others), where the teacher's largest probability stands
    for its probability of the label: its confidence without its mistake. `L_mcd`, at T, is the divergence among the
    classes that the teacher finds less likely than the label. `scd_T` is T_a; None takes T. Published weights: the
    authors' for CIFAR-100.
    """

    min_classes = 3
    stackable = ("scd_weight", "mcd_weight")
    published = (Published("scd_weight", 1, 1), Published("mcd_weight", 8, 8))

    def __init__(
        self,
        scd_weight: float = 1.0,
        mcd_weight: float = 8.0,
        scd_T: float | None = None,
        standardise: bool = False,
    ) -> None:
        super().__init__(standardise)
        if scd_T is not None and not scd_T > 0:
            raise ConfigError(f"method.scd_T is {scd_T}; it must be above 0, or null for T")
        self.scd_weight: Tensor
        self.mcd_weight: Tensor
        self.number("scd_weight", scd_weight)
        self.number("mcd_weight", mcd_weight)
        self.scd_T = scd_T

    def of_teacher_alone(self, teacher: Outputs, batch: Batch, weights: Weights) -> Tensor:
        return torch.zeros_like(weights.T)  # a divergence

    def soft(self, student: Tensor, teacher: Tensor, labels: Tensor, weights: Weights) -> tuple[Tensor, Terms]:
        teacher = teacher.expand(student.shape)
        T = weights.T if self.scd_T is None else weights.T.new_full(weights.T.shape, self.scd_T)
        ours, theirs = (losses.at_temperature(x, T) for x in (student, teacher))
        scd = binary_divergence(target_margin(theirs, teacher.argmax(-1)), target_margin(ours, labels)).mean(-1)
        ours, theirs = (losses.at_temperature(x, weights.T) for x in (student, teacher))
        mcd = divergence_below(theirs, ours, theirs.gather(-1, labels[..., None])).mean(-1)
        soft = self.scd_weight.to(scd) * T**2 * scd + self.mcd_weight.to(mcd) * weights.T**2 * mcd
        return soft, {"scd": scd, "mcd": mcd}


def divergence_below(teacher: Tensor, student: Tensor, bound: Tensor) -> Tensor:
    """KL among the classes whose teacher's logit is below `bound`, [...,B] of [...,B,C]; 0 where there are none."""
    left_out = teacher >= bound
    empty = left_out.all(-1, keepdim=True)
    left_out = left_out & ~empty  # logsumexp of an empty group has a nan gradient
    log_q, log_p = (x.masked_fill(left_out, -torch.inf).log_softmax(-1) for x in (teacher, student))
    log_q = log_q.clamp(min=torch.finfo(log_q.dtype).min)
    gap = (log_q - log_p).masked_fill(left_out | empty, 0.0)
    return (log_q.exp() * gap).sum(-1)
