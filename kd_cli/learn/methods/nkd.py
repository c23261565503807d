"""Normalised knowledge distillation: the target class by its own probability, the others among themselves."""

from __future__ import annotations

from torch import Tensor

from kd_cli import losses
from kd_cli.learn.methods.base import Published, Terms, Weights
from kd_cli.learn.methods.logit_method import TargetMethod, without_target


class NKD(TargetMethod):
    """`alpha * (L_target + gamma * T^2 * L_others) + beta * L_hard`; Yang et al. 2023 (normalised KD).

    `L_target` is `-q_t log p_t` of the target class at T = 1, with the teacher's probability q; `L_others` the cross
    entropy of the other classes' distributions among themselves, at T. Published weights: the authors' for ImageNet
    (1.5) and CIFAR-100 (3.5).
    """

    stackable = ("gamma",)
    published = (Published("gamma", 1.5, 3.5),)

    def __init__(self, gamma: float = 1.5, target: str = "label", standardise: bool = False) -> None:
        super().__init__(target, standardise)
        self.gamma: Tensor
        self.number("gamma", gamma)

    def soft(self, student: Tensor, teacher: Tensor, labels: Tensor, weights: Weights) -> tuple[Tensor, Terms]:
        target = self.targets(teacher, labels)
        teacher = teacher.expand(student.shape)
        log_p, log_q = (losses.log_soften(x).gather(-1, target[..., None])[..., 0] for x in (student, teacher))
        on_target = -(log_q.exp() * log_p).mean(-1)
        log_p, log_q = (
            without_target(losses.at_temperature(x, weights.T), target).log_softmax(-1) for x in (student, teacher)
        )
        others = -(log_q.exp() * log_p).sum(-1).mean(-1)
        return on_target + self.gamma.to(others) * weights.T**2 * others, {"target": on_target, "others": others}
