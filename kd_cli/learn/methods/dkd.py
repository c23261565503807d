"""Decoupled knowledge distillation: the target class against the others, and the others among themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_cli import losses
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Published, Terms, Weights
from kd_cli.learn.methods.logit_method import (
    TargetMethod,
    binary_divergence,
    divergence,
    target_margin,
    without_target,
)
from kd_cli.learn.outputs import Outputs


class DKD(TargetMethod):
    """`alpha * T^2 * (tckd_weight * L_tckd + nckd_weight * L_nckd) + beta * L_hard`; Zhao et al. 2022.

    At T, `L_tckd` is the divergence of (target, all others), `L_nckd` that of the others' distribution among
    themselves. Soft targets weigh the second by the teacher's probability of the others, example by example; here it
    has a weight of its own. Published weights: the authors' for CIFAR-100 (2 to 8) and ImageNet (0.5 and 2).
    """

    stackable = ("tckd_weight", "nckd_weight")
    published = (Published("tckd_weight", 1, 1), Published("nckd_weight", 0.5, 8))

    def __init__(
        self, tckd_weight: float = 1.0, nckd_weight: float = 8.0, target: str = "label", standardise: bool = False
    ) -> None:
        super().__init__(target, standardise)
        self.tckd_weight: Tensor
        self.nckd_weight: Tensor
        self.number("tckd_weight", tckd_weight)
        self.number("nckd_weight", nckd_weight)

    def of_teacher_alone(self, teacher: Outputs, batch: Batch, weights: Weights) -> Tensor:
        return torch.zeros_like(weights.T)  # a divergence

    def soft(self, student: Tensor, teacher: Tensor, labels: Tensor, weights: Weights) -> tuple[Tensor, Terms]:
        ours, theirs = (losses.at_temperature(logits, weights.T) for logits in (student, teacher))
        target = self.targets(teacher, labels)
        tckd = binary_divergence(*(target_margin(x.expand(ours.shape), target) for x in (theirs, ours))).mean(-1)
        log_q, log_p = (without_target(x.expand(ours.shape), target).log_softmax(-1) for x in (theirs, ours))
        nckd = divergence(log_q, log_p).mean(-1)
        soft = self.tckd_weight.to(tckd) * tckd + self.nckd_weight.to(nckd) * nckd
        return weights.T**2 * soft, {"tckd": tckd, "nckd": nckd}
