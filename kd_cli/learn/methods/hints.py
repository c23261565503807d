"""Hints: a middle map of the student, through a regressor, learns a middle map of the teacher (FitNets)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_cli import losses
from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.layers import Layer
from kd_cli.learn.methods.base import Published, Setting, Terms, Weights
from kd_cli.learn.methods.features import AUTO, Layers, Stages, by, one_of, positive, same_size, width
from kd_cli.learn.outputs import Outputs

CODE_WEIGHT = 100.0  # of the reference code, for one stage


class Hints(Stages):
    """FitNets, Romero et al. 2015: `L_hint` is the mean of `(r(s) - t)^2` over all elements of a pair of layers.

    With `stages=1`, as the published codes: `alpha * weight * L_hint + beta * L_hard` from the first step to the last.
    With `stages=2`, as the paper: `L_hint` alone for the share `first_stage` of all steps, which trains the layers up
    to the hint and the regressor r; then `lambda * alpha * T^2 * L_soft + beta * L_hard`, where lambda falls linearly
    from 4 to 1. The regressor is a linear map over the channels, with `regressor=conv_bn_relu` a 3x3 convolution,
    BatchNorm and ReLU. Published weight of one stage: 100 (RepDistiller, mdistiller).
    """

    def __init__(
        self,
        student_layers: Layers = AUTO,
        teacher_layers: Layers = AUTO,
        stages: int = 1,
        first_stage: float = 0.3,
        regressor: str = "linear",
        weight: float = CODE_WEIGHT,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        if stages not in (1, 2):
            raise ConfigError(f"method.stages is {stages!r}; it must be 1 or 2")
        if not 0 < first_stage < 1:
            raise ConfigError(
                f"method.first_stage is {first_stage!r}; it must be a share of the steps, above 0 and below 1"
            )
        self.stages, self.first_stage = stages, first_stage
        self.has_T = stages == 2
        if stages == 1:
            self.published = (Published("weight", CODE_WEIGHT, CODE_WEIGHT),)
        self.regressor = one_of("regressor", regressor, ("linear", "conv_bn_relu"))
        self.weight = positive("weight", weight)

    def chosen(self, pairs: list[tuple[Layer, Layer]]) -> list[tuple[Layer, Layer]]:
        middle = (len(pairs) - 1) // 2
        return pairs[middle : middle + 1]

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        self.regressors = nn.ModuleList()
        for ours, theirs in self.shapes:
            if len(ours) != len(theirs) or (len(ours) == 2 and ours[0] != theirs[0]):
                raise ConfigError(
                    f"Hints compares two maps or two vectors, and the student's layer gives {by(ours)}, the teacher's "
                    f"{by(theirs)}",
                    hint="other paths in method.student_layers and method.teacher_layers",
                )
            sizes = width(ours), width(theirs)
            if self.regressor == "linear":
                self.regressors.append(nn.Conv2d(*sizes, 1) if len(ours) == 3 else nn.Linear(*sizes))
            else:
                self.need_maps()
                convolution = nn.Conv2d(*sizes, 3, padding=1, bias=False)
                self.regressors.append(nn.Sequential(convolution, nn.BatchNorm2d(sizes[1]), nn.ReLU()))
                self.couples_examples = True

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        assert teacher is not None
        pairs = self.pairs(student, teacher)
        hint = torch.stack([hint_loss(r(s), t) for r, (s, t) in zip(self.regressors, pairs, strict=True)]).sum()
        hard = self.hard_loss(student.logits, batch.labels)
        if self.stages == 1:
            loss = weights.alpha * self.weight * hint + weights.beta * hard
            return {"loss": loss, "hint": hint, "hard": hard}
        soft = losses.soft_cross_entropy(student.logits, teacher.logits, T=weights.T)
        if batch.progress < self.first_stage:
            loss = self.weight * hint
        else:
            share = (batch.progress - self.first_stage) / (1 - self.first_stage)
            loss = (4 - 3 * share) * weights.alpha * weights.T**2 * soft + weights.beta * hard
        return {"loss": loss, "hint": hint, "soft": soft, "hard": hard}


def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean of the squared differences; of two maps `[B,C,H,W]` the larger is pooled to the size of the smaller."""
    if student.ndim == 4:
        student, teacher = same_size(student, teacher)
    return (student - teacher).square().mean()
