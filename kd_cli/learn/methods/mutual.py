"""Deep mutual learning: peers that train together, each on the labels and on what the others say.

Shapes: S peers, B examples, C classes.
"""

from __future__ import annotations

import torch

from kd_cli import losses
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Method, Terms, Weights
from kd_cli.learn.outputs import Outputs


class Mutual(Method):
    """`alpha * T^2 * L_mutual + beta * L_hard`; Zhang, Xiang, Hospedales & Lu 2018, deep mutual learning.

    `L_mutual` of peer i is the mean over the other peers j of `KL(p_j || p_i)`, their sum over S - 1, at temperature
    T. The others' answers to the same batch are constants: peer i learns from its own loss alone. The paper has T = 1,
    alpha = 1 and beta = 1; its published code leaves out the division by S - 1 and gives each peer a batch of its own.
    """

    needs_teacher = False
    couples_models = True

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        log_p = losses.log_soften(student.logits, T=weights.T)  # [S,B,C]
        others = log_p.detach()
        size = len(log_p)
        # Row i has the weight of each peer in what peer i learns from: 0 for itself, 1 / (S - 1) for the others.
        share = (1 - torch.eye(size, dtype=log_p.dtype, device=log_p.device)) / max(size - 1, 1)
        targets = torch.einsum("ij,jbc->ibc", share, others.exp())
        entropy = -(others.exp() * others).sum(-1).mean(-1)  # [S], of each peer's answers
        mutual = -(targets * log_p).sum(-1).mean(-1) - share @ entropy
        hard = self.hard_loss(student.logits, batch.labels)
        return {"loss": weights.alpha * weights.T**2 * mutual + weights.beta * hard, "mutual": mutual, "hard": hard}
