"""Independent labels: each logit is that of one label, whose probability is its sigmoid."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_cli import losses
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Method, Terms, Weights
from kd_cli.learn.outputs import Outputs


class BinaryTargets(Method):
    """`alpha * T^2 * L_soft + beta * L_hard` for independent labels; soft targets, each label against its absence.

    `L_soft` is the divergence of `sigmoid(z / T)` from the teacher's `sigmoid(v / T)`, `L_hard` the binary cross
    entropy with the true labels at T = 1, both summed over the labels. For one label it is the divergence of two
    classes with the logits z and 0. The gradient on a logit is `(p - q) / T`, as of soft targets, hence T^2.
    """

    multilabel = True
    needs_labels = False
    min_classes = 1
    recordable = True

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        assert teacher is not None
        soft = losses.binary_divergence(student.logits, teacher.logits, T=weights.T)
        hard = losses.binary_cross_entropy(student.logits, batch.labels, self.class_weights)
        return {"loss": weights.alpha * weights.T**2 * soft + weights.beta * hard, "soft": soft, "hard": hard}

    def of_teacher_alone(self, teacher: Outputs, batch: Batch, weights: Weights) -> Tensor:
        return torch.zeros_like(weights.T)  # a divergence


class BinaryHard(Method):
    """`beta * L_hard` for independent labels: the binary cross entropy with the true labels, summed over them."""

    multilabel = True
    needs_teacher = False
    has_T = False
    has_alpha = False
    min_classes = 1
    recordable = True

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        hard = losses.binary_cross_entropy(student.logits, batch.labels, self.class_weights)
        return {"loss": weights.beta * hard, "hard": hard}
