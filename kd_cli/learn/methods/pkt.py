"""Probabilistic knowledge transfer: how likely examples are each other's neighbours follows the teacher (PKT)."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Published, Terms, Weights
from kd_cli.learn.methods.features import AUTO, FeatureMethod, Layers, embed, positive, unit_rows
from kd_cli.learn.outputs import Outputs

WEIGHT = 30000 / 64  # RepDistiller's 30000 / B^2 at its batch size of 64, less one B
SMALLEST = 1e-7  # of the probabilities in the logarithm, as in the authors' code


class PKT(FeatureMethod):
    """`alpha * weight * L_pkt + beta * L_hard`; Passalis & Tefas 2018, section 3.

    For the pooled outputs of a batch, example i has the neighbour j with the probability
    `p_ij = k_ij / sum_j k_ij`, `k_ij = (1 + cos(x_i, x_j)) / 2`. `L_pkt` is `KL(p_teacher || p_student)`, the mean over
    the examples, summed over the pairs of layers. The authors' code takes the mean over i and j, so that its weight
    means less the larger the batch is. It counts an example among its own neighbours; `diagonal=false` does not.
    Published weight: RepDistiller's 30000 over its batch size of 64.
    """

    couples_examples = True
    published = (Published("weight", WEIGHT, WEIGHT),)

    def __init__(
        self,
        student_layers: Layers = AUTO,
        teacher_layers: Layers = AUTO,
        diagonal: bool = True,
        weight: float = WEIGHT,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        self.diagonal = diagonal
        self.min_batch = 2 if diagonal else 3  # with fewer, the only neighbour has the probability 1
        self.weight = positive("weight", weight)

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        pairs = [(embed(ours), embed(theirs)) for ours, theirs in self.pairs(student, teacher)]
        pkt = torch.stack([pkt_loss(*pair, diagonal=self.diagonal) for pair in pairs]).sum()
        hard = self.hard_loss(student.logits, batch.labels)
        return {"loss": weights.alpha * self.weight * pkt + weights.beta * hard, "pkt": pkt, "hard": hard}


def pkt_loss(student: Tensor, teacher: Tensor, *, diagonal: bool = True) -> Tensor:
    """The mean over the rows of `[B,D]` of the divergence of the student's neighbours from the teacher's."""
    p, q = (neighbours(x, diagonal=diagonal) for x in (student, teacher))
    return (q * ((q + SMALLEST).log() - (p + SMALLEST).log())).sum(1).mean()


def neighbours(x: Tensor, *, diagonal: bool = True) -> Tensor:
    """The probabilities `[B,B]` that row j is the neighbour of row i, from the cosines of the rows of `[B,D]`."""
    unit = unit_rows(x)
    nearness = ((1 + unit @ unit.mT) / 2).clamp(min=0)  # rounding makes a cosine of -1 less than that
    if not diagonal:
        nearness = nearness * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))
    return nearness / nearness.sum(1, keepdim=True).clamp(min=SMALLEST)
