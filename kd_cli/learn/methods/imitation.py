"""Generalised distillation: labels and a teacher's softened answers, in shares that add up to 1."""

from __future__ import annotations

from torch import Tensor

from kd_cli import losses
from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Terms, Weights
from kd_cli.learn.methods.logit_method import NumericKeys
from kd_cli.learn.outputs import Outputs

READINGS = ("paper", "code")


class Imitation(NumericKeys):
    """`beta * (1 - imitation) * L_hard + alpha * imitation * L_soft`; Lopez-Paz et al. 2016, equation 4.

    `L_soft` is the cross entropy of the student at T = 1 with the teacher's probabilities at T. `reading="paper"` stops
    there. `reading="code"` multiplies it by T^2, as the authors' code does, which softens the teacher alone too.
    """

    stackable = ("imitation",)
    needs_labels = False
    recordable = True

    def __init__(self, imitation: float = 0.5, reading: str = "paper") -> None:
        super().__init__()
        self.imitation: Tensor
        self.number("imitation", imitation, most=1.0)
        if reading not in READINGS:
            raise ConfigError(f"method.reading is {reading!r}; it must be {' or '.join(READINGS)}")
        self.reading = reading

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        assert teacher is not None
        log_p = losses.log_soften(student.logits)
        targets = losses.at_temperature(teacher.logits, weights.T).softmax(-1)
        soft = -(targets * log_p).sum(-1).mean(-1)
        hard = losses.hard_cross_entropy(student.logits, batch.labels)
        share = self.imitation.to(soft)
        scale = weights.T**2 if self.reading == "code" else 1.0
        loss = weights.alpha * share * scale * soft + weights.beta * (1 - share) * hard
        return {"loss": loss, "soft": soft, "hard": hard}
