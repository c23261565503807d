"""Relational distillation: distances between examples and angles among them follow the teacher's (RKD)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Published, Terms, Weights
from kd_cli.learn.methods.features import AUTO, FeatureMethod, Layers, embed, positive
from kd_cli.learn.outputs import Outputs

AT_ONCE = 2**22  # cosines: all of a batch of 161 examples
NEAR = 1e-3  # of the mean distance: two examples nearer than this have no direction from one to the other


class Relational(FeatureMethod):
    """`alpha * (distance * L_distance + angle * L_angle) + beta * L_hard`; Park et al. 2019, section 3.2.

    `L_distance` is the mean, over pairs of different examples, of the Huber loss of the distances of their pooled
    outputs, in units of the batch's mean distance; `L_angle` is the mean, over triplets of different examples, of the
    Huber loss of the cosines of their angles. Both are summed over the pairs of layers.
    Published weights: 1 and 2 (the authors, metric learning) to 25 and 50 (RepDistiller).
    """

    couples_examples = True
    min_batch = 2
    published = (Published("distance", 1, 25), Published("angle", 2, 50))

    def __init__(
        self,
        student_layers: Layers = AUTO,
        teacher_layers: Layers = AUTO,
        distance: float = 25.0,
        angle: float = 50.0,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        self.distance = positive("distance", distance, zero=True)
        self.angle = positive("angle", angle, zero=True)
        if self.distance == self.angle == 0:
            raise ConfigError("method.distance and method.angle are both 0: there is nothing to learn")

    def own_weights(self) -> Mapping[str, float]:
        return {"distance": self.distance, "angle": self.angle}

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        pairs = [(embed(ours), few_columns(embed(theirs).detach())) for ours, theirs in self.pairs(student, teacher)]
        hard = self.hard_loss(student.logits, batch.labels)
        terms: dict[str, Tensor] = {}
        relations = torch.zeros_like(hard)
        for name, weight, relation in (
            ("distance", self.distance, distance_loss),
            ("angle", self.angle, angle_loss),
        ):
            if weight:
                terms[name] = torch.stack([relation(*pair) for pair in pairs]).sum()
                relations = relations + weight * terms[name]
        return {"loss": weights.alpha * relations + weights.beta * hard, **terms, "hard": hard}


def distance_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Huber loss of the distances between the rows of `[B,D]` in units of their mean, over pairs of different rows."""
    found = F.smooth_l1_loss(relative_distances(student), relative_distances(teacher), reduction="sum")
    n = len(student)
    return found / max(1, n * (n - 1))


def angle_loss(student: Tensor, teacher: Tensor, *, at_once: int = AT_ONCE) -> Tensor:
    """Huber loss of the cosines of the angles i-j-k among the rows of `[B,D]`, over triplets of different rows.

    It is 0 where there are fewer than three rows. About `at_once` of the B^3 cosines are in memory at a time: of larger
    batches they are computed in parts, and again for the gradient.
    """
    n = len(student)
    bounds = [NEAR * mean_distance(distances(x.detach())) for x in (student, teacher)]

    def part(ours: Tensor, theirs: Tensor, middle: Tensor) -> Tensor:
        found = cosines(ours, middle, bounds[0])
        return F.smooth_l1_loss(found, cosines(theirs, middle, bounds[1]), reduction="sum")

    parts = torch.arange(n, device=student.device).split(max(1, at_once // n**2))
    if len(parts) == 1:
        total = part(student, teacher, parts[0])
    else:
        total = torch.stack([checkpoint(part, student, teacher, middle, use_reentrant=False) for middle in parts]).sum()
    return total / max(1, n * (n - 1) * (n - 2))


def few_columns(x: Tensor) -> Tensor:
    """Rows with the same distances and angles as those of `[B,D]`, in no more than B columns; it has no gradient.

    The rows of B examples span B dimensions at most: the triangular factor of the transposed matrix holds their
    coordinates. A teacher's angles over 1,200 numbers then cost what those over 128 do.
    """
    if x.shape[1] <= x.shape[0]:
        return x
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x  # for which there is no factorisation
    return torch.linalg.qr((x - x.mean(0)).mT, mode="r").R.mT


def distances(x: Tensor) -> Tensor:
    """The distances of all pairs of rows of `[B,D]`; the gradient of a distance of 0 is 0."""
    return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")  # whose products lose digits of near rows


def relative_distances(x: Tensor) -> Tensor:
    """The distances of all pairs of rows, over the mean distance of different rows: `[B,D]` to `[B,B]`."""
    found = distances(x)
    return found / mean_distance(found)


def cosines(x: Tensor, middle: Tensor, least: Tensor) -> Tensor:
    """The cosines of the angles at the rows `middle` [M] of `[B,D]` between all pairs of rows: `[M,B,B]`.

    It is 0 where two of the three are the same row. A distance below `least` counts as `least`.
    """
    towards = x[None] - x[middle][:, None]
    unit = towards / torch.maximum(torch.linalg.vector_norm(towards, dim=-1, keepdim=True), least)
    return (unit @ unit.mT) * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))


def mean_distance(found: Tensor) -> Tensor:
    """The mean of the distances `[B,B]` over pairs of different rows, above 0."""
    n = len(found)
    return (found.sum() / max(1, n * (n - 1))).clamp(min=torch.finfo(found.dtype).tiny ** 0.5)
