"""Soft targets and logit matching: the student learns from the teacher's logits."""

from __future__ import annotations

from torch import Tensor

from kd_cli import losses
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Method, Published, Terms, Weights
from kd_cli.learn.methods.logit_method import LogitMethod, standardised
from kd_cli.learn.outputs import Outputs


class SoftTargets(LogitMethod):
    """`alpha * T^2 * L_soft + beta * L_hard`; Hinton, Vinyals & Dean 2015, section 2.

    `L_soft` is the cross entropy with the teacher's probabilities, both at T; `L_hard` that with the labels at T = 1.
    `square_T=False` leaves the factor T^2 out, to show what it is for. With `standardise`, `L_soft` sees standardised
    logits (Sun et al. 2024). Published weights: from 0.33 (PyTorch's tutorial) to 9 (RepDistiller, Tian et al.
    2020); 90 standardised (Sun et al. 2024).
    """

    needs_labels = False
    published = (Published("alpha", 1 / 3, 9),)

    def __init__(self, square_T: bool = True, standardise: bool = False) -> None:
        super().__init__(standardise)
        self.square_T = square_T
        if standardise:
            self.published = (Published("alpha", 90, 90),)

    def soft(self, student: Tensor, teacher: Tensor, labels: Tensor, weights: Weights) -> tuple[Tensor, Terms]:
        soft = losses.soft_cross_entropy(student, teacher, T=weights.T)
        return weights.T**2 * soft if self.square_T else soft, {"soft": soft}

    def of_teacher_alone(self, teacher: Outputs, batch: Batch, weights: Weights) -> Tensor:
        """The teacher's entropy at T, weighted as the cross entropy is."""
        theirs = standardised(teacher.logits, teacher.logits)[1] if self.standardise else teacher.logits
        entropy = self.soft(theirs, theirs, batch.labels, weights)[0]
        return weights.alpha * entropy


class Logits(Method):
    """`alpha * 1/2 * sum (z - v)^2 + beta * L_hard`: matching logits (Bucilua et al. 2006, Ba & Caruana 2014).

    It has no temperature. With `center`, each example's mean logit is subtracted first: the softmax does not see it,
    and the result is the exact high-temperature limit of the soft targets' gradient, times the number of classes.
    """

    needs_labels = False
    has_T = False
    recordable = True

    def __init__(self, center: bool = True) -> None:
        super().__init__()
        self.center = center

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        assert teacher is not None
        soft = losses.logit_matching(student.logits, teacher.logits, center=self.center)
        hard = self.hard_loss(student.logits, batch.labels)
        return {"loss": weights.alpha * soft + weights.beta * hard, "soft": soft, "hard": hard}
