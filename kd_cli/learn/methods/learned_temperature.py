"""A temperature that is learned during the training, against the student (curriculum temperature, CTKD)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Setting, Terms, Weights
from kd_cli.learn.methods.compose import Composite
from kd_cli.learn.methods.features import positive
from kd_cli.learn.methods.ramps import Factors, Ramp
from kd_cli.learn.outputs import Outputs

# The authors' 10 of 240 epochs, in which the reversal grows from 0 to 1.
GROWING = Ramp(0.0, 1.0, 0.0, 10 / 240, "cosine")
EDGE = 1e-6  # share of the range between a bound and the temperature, at least: at the bound T has no gradient


class LearnedTemperature(Composite):
    """The method `of` at a temperature `T = least + (most - least) * sigmoid(theta)`; Li et al. 2023 (CTKD).

    theta is learned with the student's weights and by the same optimiser, without weight decay, but its gradient is
    multiplied by `-reversal`: T goes where student and teacher disagree most. theta starts where T is the run's T.
    Its gradient is that of the divergence: what depends on the teacher alone is left out of it (`of_teacher_alone`).
    The loss, and the student's gradient, are those of `of` at T.
    """

    learns_T = changes_T = True

    def __init__(self, of: Any, least: float = 1.0, most: float = 21.0, reversal: float | Ramp = GROWING) -> None:
        super().__init__({"of": of}, [Factors.of(reversal, "reversal")])
        self.least, self.most = positive("least", least), positive("most", most)
        if not self.least < self.most:
            raise ConfigError(f"method.least is {least:g} and method.most {most:g}; the first must be less")
        if not self.has_T or self.methods[0].learns_T:
            has = "learns a temperature itself" if self.methods[0].learns_T else "has no temperature"
            raise ConfigError(f"method.of={self.methods[0].title} {has}", hint="method@method.of=soft_targets")
        self.offset = nn.Parameter(torch.zeros(()))  # theta less its first value, which belongs to the run's T
        self.recordable = False  # the reversal is evaluated in Python in every step

    def undecayed(self) -> list[nn.Parameter]:
        """The method's and theta: weight decay would pull T to the middle of its range."""
        return [*super().undecayed(), self.offset]

    def check_temperature(self, T: float) -> None:
        if not self.least < T < self.most:
            raise ConfigError(
                f"the learned temperature starts at T = {T:g}, which must be above method.least = {self.least:g} and "
                f"below method.most = {self.most:g}",
                hint=f"method.least={T / 2:g}" if self.least >= T else f"method.most={2 * T:g}",
            )

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        if setting.teacher is None:
            return
        device = setting.teacher.logits.device
        index = torch.zeros(setting.teacher.logits.shape[:2], dtype=torch.int64, device=device)
        one = torch.ones(1, device=device)
        if (
            self.methods[0].of_teacher_alone(setting.teacher, Batch(index, index, index), Weights(one, one, one))
            is None
        ):
            raise ConfigError(
                f"{self.methods[0].title} does not say which part of its loss depends on the teacher alone, and a "
                "learned temperature would follow that part",
                hint="method@method.of=soft_targets, dkd, dist or rld",
            )

    def temperature(self, T: Tensor, reversal: Tensor) -> Tensor:
        """The temperature, of the shape of the run's T [S]; its gradient on theta is multiplied by `-reversal`."""
        share = ((T - self.least) / (self.most - self.least)).clamp(EDGE, 1 - EDGE)
        theta = torch.logit(share) + reversed_gradient(self.offset, reversal).to(T)
        return self.least + (self.most - self.least) * theta.sigmoid()

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        learned = self.learned(weights, batch)
        found = self.methods[0](student, teacher, batch, learned)
        alone = None if teacher is None else self.methods[0].of_teacher_alone(teacher, batch, learned)
        loss = found["loss"]
        if alone is not None:
            loss = loss - (alone - alone.detach())  # a difference of 0 that has a gradient
        return {**found, "loss": loss, "T": learned.T.detach()}

    def weighted_terms(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        return self.methods[0].weighted_terms(student, teacher, batch, self.learned(weights, batch))

    def unusual_weights(self, *, alpha: float, beta: float) -> list[str]:
        return self.methods[0].unusual_weights(alpha=alpha, beta=beta)

    def learned(self, weights: Weights, batch: Batch) -> Weights:
        """The weights with the temperature as it is now."""
        (reversal,) = self.factors_at(batch.progress)
        return replace(weights, T=self.temperature(weights.T, reversal))


def reversed_gradient(x: Tensor, factor: Tensor) -> Tensor:
    """`x`, whose gradient is multiplied by `-factor`."""
    found: Tensor = ReversedGradient.apply(x, factor)
    return found


class ReversedGradient(torch.autograd.Function):
    """The identity, backward times `-factor`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
        (slope,) = slopes
        return -(ctx.factor.to(slope) * slope).sum(), None
