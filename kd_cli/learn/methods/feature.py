"""Projected features: the student's last map, through a linear map, learns the teacher's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Published, Setting, Terms, Weights
from kd_cli.learn.methods.features import (
    AUTO,
    FeatureMethod,
    Layers,
    Pair,
    by,
    embed,
    one_of,
    positive,
    same_size,
    width,
)
from kd_cli.learn.outputs import Outputs

STANDARD = 1e-5  # added to a variance, as BatchNorm does
SMALLEST = 1e-6  # of the mean fourth power whose logarithm is taken: 0 has none
SHORTEST = 1e-4  # a vector shorter than this has no direction


class Feature(FeatureMethod):
    """`alpha * weight * L_feature + beta * L_hard`, with `L_feature` summed over the pairs of layers.

    `form` compares one vector per example (`pooled`, the mean over positions) or the vectors at all positions (`map`,
    the larger map pooled to the size of the smaller). A linear map P takes the student's vector s to the width of the
    teacher's t; `projection` is `auto` (where the widths differ), `always` or `never`. `distance`:

    - `mse`: the mean of `(P s - t)^2` over all elements;
    - `cosine`: the mean of `1 - cos(P s, t)`;
    - `srd`: `2 log mean |d|^4` with `d = norm(P s) - norm(t)`, each element standardised over the batch
      (Miles & Mikolajczyk 2024).

    Published weights of `mse`: 0.33 (PyTorch's tutorial) to 5 (timm's example).
    """

    def __init__(
        self,
        student_layers: Layers = AUTO,
        teacher_layers: Layers = AUTO,
        form: str = "pooled",
        distance: str = "mse",
        projection: str = AUTO,
        weight: float = 1.0,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        self.form = one_of("form", form, ("pooled", "map"))
        self.distance = one_of("distance", distance, ("mse", "cosine", "srd"))
        self.projection = one_of("projection", projection, (AUTO, "always", "never"))
        self.weight = positive("weight", weight)
        if self.distance == "mse":
            self.published = (Published("weight", 1 / 3, 5),)
        if self.distance == "srd":
            self.couples_examples, self.min_batch = True, 2

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        projections: list[nn.Module] = []
        for ours, theirs in self.shapes:
            if self.form == "map" and (len(ours) != len(theirs) or (len(ours) == 2 and ours[0] != theirs[0])):
                raise ConfigError(
                    f"method.form=map compares positions, and the student's are {by(ours)}, the teacher's {by(theirs)}",
                    hint="method.form=pooled",
                )
            sizes = width(ours), width(theirs)
            if self.projection == "never" and sizes[0] != sizes[1]:
                raise ConfigError(
                    f"method.projection=never, and the student's layer has {sizes[0]} channels, the teacher's "
                    f"{sizes[1]}",
                    hint="method.projection=auto",
                )
            projected = self.projection == "always" or sizes[0] != sizes[1]
            # standardising takes a bias out again
            projections.append(nn.Linear(*sizes, bias=self.distance != "srd") if projected else nn.Identity())
        self.projections = nn.ModuleList(projections)

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        terms = []
        for (ours, theirs), project in zip(self.pairs(student, teacher), self.projections, strict=True):
            ours, theirs = self.vectors(ours, theirs)
            terms.append(DISTANCES[self.distance](project(ours), theirs))
        feature = torch.stack(terms).sum()
        hard = self.hard_loss(student.logits, batch.labels)
        return {"loss": weights.alpha * self.weight * feature + weights.beta * hard, "feature": feature, "hard": hard}

    def vectors(self, ours: Tensor, theirs: Tensor) -> Pair:
        """The outputs of a pair of layers as vectors at P positions, `[B,P,D]`."""
        if self.form == "pooled":
            return embed(ours)[:, None], embed(theirs)[:, None]
        if ours.ndim == 4:
            ours, theirs = (x.flatten(2).mT for x in same_size(ours, theirs))
        return (ours, theirs) if ours.ndim == 3 else (ours[:, None], theirs[:, None])


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean of `(s - t)^2` over all elements of `[B,P,D]`."""
    return (student - teacher).square().mean()


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean of `1 - cos(s, t)` over the vectors `[B,P,D]`; 1 for a vector of zeros."""

    def unit(x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=SHORTEST)

    return 1 - (unit(student) * unit(teacher)).sum(-1).mean()


def srd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """`2 log(mean |d|^4 + 1e-6)`, d the difference of `[B,P,D]` standardised over examples and positions.

    The reference takes the sum in place of the mean, which adds a constant: the gradient is the same.
    """

    def standard(x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, (0, 1), correction=0)
        return (x - mean) / (variance + STANDARD).sqrt()

    return 2 * ((standard(student) - standard(teacher)) ** 4).mean().add(SMALLEST).log()


DISTANCES = {"mse": squared_error, "cosine": cosine_distance, "srd": srd_distance}
