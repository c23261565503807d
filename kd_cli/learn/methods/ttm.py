"""Transformed teacher matching: the teacher is softened, the student is not."""

from __future__ import annotations

from torch import Tensor

from kd_cli import losses
from kd_cli.learn.methods.base import Published, Terms, Weights
from kd_cli.learn.methods.logit_method import LogitMethod, divergence


class TTM(LogitMethod):
    """`alpha * L_ttm + beta * L_hard`; Zheng & Yang 2024 (transformed teacher matching), without a factor T^2.

    `L_ttm` is the divergence of the student's probabilities at T = 1 from the teacher's at T: the teacher's to the
    power 1/T, normalised. `weighted` (WTTM) multiplies each example's by the sum of the powers, `sum_c q_c^(1/T)`: 1
    for a teacher that is certain, C^(1 - 1/T) for one that has no preference. Published weights: those of the authors'
    commands, 45 for TTM and 4 for WTTM.
    """

    needs_labels = False

    def __init__(self, weighted: bool = False, standardise: bool = False) -> None:
        super().__init__(standardise)
        self.weighted = weighted
        if not standardise:
            self.published = (Published("alpha", 4, 4) if weighted else Published("alpha", 45, 45),)

    def soft(self, student: Tensor, teacher: Tensor, labels: Tensor, weights: Weights) -> tuple[Tensor, Terms]:
        found = divergence(losses.log_soften(teacher, T=weights.T), losses.log_soften(student))
        plain = found.mean(-1)
        if not self.weighted:
            return plain, {"ttm": plain}
        powers = losses.at_temperature(losses.log_soften(teacher), weights.T).logsumexp(-1).exp()
        weighted = (powers * found).mean(-1)
        return weighted, {"wttm": weighted}
