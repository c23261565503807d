"""Methods without a teacher: the true labels, and label smoothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_cli import losses
from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Method, Terms, Weights
from kd_cli.learn.outputs import Outputs


class Hard(Method):
    """`beta * L_hard`: the cross entropy with the true labels and nothing else."""

    needs_teacher = False
    has_T = False
    has_alpha = False
    min_classes = 1
    recordable = True

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        hard = self.hard_loss(student.logits, batch.labels)
        return {"loss": weights.beta * hard, "hard": hard}


class LabelSmoothing(Method):
    """`beta * ((1 - smoothing) * L_hard + smoothing * L_uniform)`: soft targets without a teacher.

    Szegedy et al. 2016, section 7. The term `soft` is the cross entropy with the uniform distribution.
    """

    needs_teacher = False
    has_T = False
    has_alpha = False
    stackable = ("smoothing",)
    recordable = True

    def __init__(self, smoothing: float = 0.1) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ConfigError(f"method.smoothing is {smoothing}; it must be at least 0 and below 1")
        self.smoothing: Tensor
        # float64 holds the configured number exactly; it is no part of a training's state
        self.register_buffer("smoothing", torch.tensor([smoothing], dtype=torch.float64), persistent=False)

    @classmethod
    def stack(cls, methods: Sequence[LabelSmoothing]) -> LabelSmoothing:
        stacked = cls()
        stacked.smoothing = torch.cat([method.smoothing for method in methods])
        return stacked

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        hard = self.hard_loss(student.logits, batch.labels)
        uniform = losses.uniform_cross_entropy(student.logits)
        share = self.smoothing.to(hard)
        return {"loss": weights.beta * ((1 - share) * hard + share * uniform), "soft": uniform, "hard": hard}
