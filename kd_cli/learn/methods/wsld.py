"""Weighted soft labels: soft targets count more where the student is worse than the teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_cli import losses
from kd_cli.learn.methods.base import Published, Terms, Weights
from kd_cli.learn.methods.logit_method import LogitMethod

LEAST = 1e-7  # nats that are added to the teacher's cross entropy, as in the authors' code


class WSLD(LogitMethod):
    """`alpha * T^2 * mean(w * L_soft) + beta * L_hard`, with `w = 1 - exp(-L_hard(student) / L_hard(teacher))`.

    Zhou et al. 2021 (weighted soft labels). `L_soft` is the cross entropy with the teacher's probabilities at T; the
    weights w of the examples are computed at T = 1 from the logits that `L_soft` sees, and have no gradient.
    Published weights: the authors' for ImageNet (2.5), cls_KD's for CIFAR-100 (2.25).
    """

    published = (Published("alpha", 2.25, 2.5),)

    def soft(self, student: Tensor, teacher: Tensor, labels: Tensor, weights: Weights) -> tuple[Tensor, Terms]:
        teacher = teacher.expand(student.shape)
        found = -(losses.soften(teacher, T=weights.T) * losses.log_soften(student, T=weights.T)).sum(-1)
        weighted = (student_share(student, teacher, labels) * found).mean(-1)
        return weights.T**2 * weighted, {"soft": weighted}


@torch.no_grad()
def student_share(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The weight of each example, [S,B], between 0 (the student is certain of the label) and 1."""
    ours, theirs = (-losses.log_soften(x).gather(-1, labels[..., None])[..., 0] for x in (student, teacher))
    return -torch.expm1(-ours / (theirs + LEAST))
