"""Deep mutual learning: peers that train together, each on the labels and on what the others say.

Shapes: S peers, B examples, C classes.
"""

from __future__ import annotations

import torch

from kd_cli import losses
from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Method, Terms, Weights
from kd_cli.learn.outputs import Outputs
from kd_cli.numeric import is_number, is_whole


class Mutual(Method):
    """`alpha * T^2 * L_mutual + beta * L_hard`; Zhang, Xiang, Hospedales & Lu 2018, deep mutual learning.

    `L_mutual` of peer i is the mean over the other peers j of `KL(p_j || p_i)`, their sum over S - 1, at temperature
    T. The others' answers to the same batch are constants: peer i learns from its own loss alone. The paper has T = 1,
    alpha = 1 and beta = 1; its published code leaves out the division by S - 1 and gives each peer a batch of its own.

    Co-distillation (Anil et al. 2018) is the same with two numbers: the mutual term is absent before the share
    `burn_in` of the training, and the others answer with weights that are renewed every `refresh_every` steps, in eval
    mode; 1 are their present answers. `with_teacher` makes the trained teacher one more peer, which learns on.
    """

    needs_teacher = False
    couples_models = True

    def __init__(self, burn_in: float = 0.0, refresh_every: int = 1, with_teacher: bool = False) -> None:
        super().__init__()
        if not isinstance(with_teacher, bool):
            raise ConfigError(f"method.with_teacher is {with_teacher!r}; it must be true or false")
        self.needs_teacher = self.teacher_joins = with_teacher
        if not is_number(burn_in) or not 0 <= burn_in < 1:
            raise ConfigError(
                f"method.burn_in is {burn_in!r}; it must be a share of the training, from 0 to below 1",
                hint="method.burn_in=0.1",
            )
        if not is_whole(refresh_every) or refresh_every < 1:
            raise ConfigError(
                f"method.refresh_every is {refresh_every!r}; it must be a number of steps, 1 or more",
                hint="method.refresh_every=50",
            )
        self.burn_in, self.refresh_every = burn_in, refresh_every

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        log_p = losses.log_soften(student.logits, T=weights.T)  # [S,B,C]
        others = log_p.detach() if student.shown is None else losses.log_soften(student.shown, T=weights.T)
        size = len(log_p)
        # Row i has the weight of each peer in what peer i learns from: 0 for itself, 1 / (S - 1) for the others.
        share = (1 - torch.eye(size, dtype=log_p.dtype, device=log_p.device)) / max(size - 1, 1)
        targets = torch.einsum("ij,jbc->ibc", share, others.exp())
        entropy = -(others.exp() * others).sum(-1).mean(-1)  # [S], of each peer's answers
        mutual = -(targets * log_p).sum(-1).mean(-1) - share @ entropy
        hard = self.hard_loss(student.logits, batch.labels)
        alpha = weights.alpha if batch.progress >= self.burn_in else torch.zeros_like(weights.alpha)
        return {"loss": alpha * weights.T**2 * mutual + weights.beta * hard, "mutual": mutual, "hard": hard}
