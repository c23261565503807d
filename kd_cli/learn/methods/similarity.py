"""Similarity-preserving distillation: examples that are alike for the teacher are alike for the student (SP)."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Published, Terms, Weights
from kd_cli.learn.methods.features import AUTO, FeatureMethod, Layers, positive, unit_rows
from kd_cli.learn.outputs import Outputs

WEIGHT = 3000 / 64  # the paper's 3000 / B^2 at its batch size of 64, less one B


class Similarity(FeatureMethod):
    """`alpha * weight * L_similarity + beta * L_hard`; Tung & Mori 2019, section 3.

    G holds the products of the examples' flattened outputs, `F F^T`, each row brought to unit length. `L_similarity` is
    `|G_s - G_t|^2 / B`, the mean over the examples of a row's squared distance, summed over the pairs of layers. The
    paper divides by B^2, so that its weight means less the larger the batch is. Published weight: the paper's 3000
    over its batch size of 64.
    """

    couples_examples = True
    min_batch = 2
    published = (Published("weight", WEIGHT, WEIGHT),)

    def __init__(self, student_layers: Layers = AUTO, teacher_layers: Layers = AUTO, weight: float = WEIGHT) -> None:
        super().__init__(student_layers, teacher_layers)
        self.weight = positive("weight", weight)

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        pairs = self.pairs(student, teacher)
        similarity = torch.stack([similarity_loss(*pair) for pair in pairs]).sum()
        hard = self.hard_loss(student.logits, batch.labels)
        loss = weights.alpha * self.weight * similarity + weights.beta * hard
        return {"loss": loss, "similarity": similarity, "hard": hard}


def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over the examples of the squared distance of the rows of G: two outputs `[B,...]` of any shapes."""
    return (similarities(student) - similarities(teacher)).square().sum(1).mean()


def similarities(x: Tensor) -> Tensor:
    """The products of all pairs of flattened examples, in rows of unit length: `[B,...]` to `[B,B]`."""
    rows = x.flatten(1)
    # G does not depend on the scale of x, its squares would overflow for a large one
    rows = rows / rows.detach().square().mean().sqrt().clamp(min=torch.finfo(x.dtype).tiny ** 0.5)
    return unit_rows(rows @ rows.mT)
