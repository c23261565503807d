"""Teacher-free distillation: label smoothing with a temperature."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd_cli import losses
from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Terms, Weights
from kd_cli.learn.methods.logit_method import NumericKeys, divergence
from kd_cli.learn.outputs import Outputs


class TeacherFree(NumericKeys):
    """`alpha * T^2 * L_soft + beta * L_hard` with a teacher that is made up; Yuan et al. 2020, section 4.

    The made-up teacher gives the label the probability `correct`, and each other class the same. `L_soft` is the
    divergence of the student from it, both at T. At T = 1 it is label smoothing with
    `smoothing = (1 - correct) C / (C - 1) * alpha / (alpha + beta)`.
    """

    needs_teacher = False
    stackable = ("correct",)
    recordable = True

    def __init__(self, correct: float = 0.99) -> None:
        super().__init__()
        self.correct: Tensor
        self.number("correct", correct)
        if not 0 < correct < 1:
            raise ConfigError(f"method.correct is {correct}; it must be above 0 and below 1")

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        log_p = losses.log_soften(student.logits, T=weights.T)
        margin = self.margin(log_p) / weights.T.to(log_p)
        label = batch.labels[..., None]
        made = torch.zeros_like(log_p).scatter(-1, label, margin[:, None, None].expand(label.shape))
        soft = divergence(made.log_softmax(-1), log_p).mean(-1)
        hard = self.hard_loss(student.logits, batch.labels)
        return {"loss": weights.alpha * weights.T**2 * soft + weights.beta * hard, "soft": soft, "hard": hard}

    def margin(self, like: Tensor) -> Tensor:
        """The made-up teacher's logit of the label, [S], where those of the other classes are 0."""
        return torch.logit(self.correct).to(like) + math.log(like.shape[-1] - 1)
