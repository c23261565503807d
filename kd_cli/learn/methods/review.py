"""Knowledge review: each of the student's sizes, fused with the smaller ones, learns the teacher's (ReviewKD)."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Published, Setting, Terms, Weights
from kd_cli.learn.methods.features import AUTO, Layers, Stages, by, positive
from kd_cli.learn.outputs import Outputs

SIZES = (4, 2, 1)  # to which both maps are pooled; a size as large as the map is passed over


class Review(Stages):
    """`alpha * ramp * weight * L_review + beta * L_hard`; Chen et al. 2021.

    From the student's last layer to its first, each map is brought to `channels` (at most) by a 1x1 convolution, fused
    with the enlarged result of the layer behind it by two learned masks, and brought to the teacher's width by a 3x3
    convolution. `L_review` sums `hierarchical_loss` of these and of the teacher's maps over the pairs of layers. `ramp`
    grows linearly from 0 to 1 in the share `warmup` of all steps. Published weights: the authors' per pair of networks.
    """

    couples_examples = True  # the convolutions have BatchNorm
    published = (Published("weight", 0.6, 8),)

    def __init__(
        self,
        student_layers: Layers = AUTO,
        teacher_layers: Layers = AUTO,
        channels: int = 512,
        warmup: float = 1 / 12,
        weight: float = 5.0,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        if not isinstance(channels, int) or channels < 1:
            raise ConfigError(f"method.channels is {channels!r}; it must be a whole number of at least 1")
        if not 0 <= warmup <= 1:
            raise ConfigError(f"method.warmup is {warmup!r}; it must be a share of the steps, from 0 to 1")
        self.channels, self.warmup = channels, warmup
        self.weight = positive("weight", weight)

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        self.need_maps()
        sizes = [ours[1:] for ours, _ in self.shapes]
        if any(after[i] > before[i] for before, after in itertools.pairwise(sizes) for i in (0, 1)):
            raise ConfigError(
                f"Review takes the student's layers from the largest map to the smallest, and they are "
                f"{', '.join(by(ours) for ours, _ in self.shapes)}",
                hint="method.student_layers in the order of the forward pass",
            )
        single = any(shape[1:].numel() == 1 for pair in self.shapes for shape in pair)
        if setting.smallest_batch == 1 and single:
            raise ConfigError(
                "Review standardises over examples and positions, and a batch of one example at a map of one position "
                "has one of each",
                hint="a larger training.batch_size",
            )
        channels = min(self.channels, self.shapes[-1][0][0])
        self.fusions = nn.ModuleList(
            Fusion(ours[0], channels, theirs[0], last=i == len(self.shapes) - 1)
            for i, (ours, theirs) in enumerate(self.shapes)
        )

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        behind: Tensor | None = None
        terms = []
        for (ours, theirs), fusion in zip(self.pairs(student, teacher)[::-1], list(self.fusions)[::-1], strict=True):
            found, behind = fusion(ours, behind, theirs.shape[2:])
            terms.append(hierarchical_loss(found, theirs))
        review = torch.stack(terms).sum()
        hard = self.hard_loss(student.logits, batch.labels)
        ramp = min(1.0, batch.progress / self.warmup) if self.warmup else 1.0
        loss = weights.alpha * ramp * self.weight * review + weights.beta * hard
        return {"loss": loss, "review": review, "hard": hard}


class Fusion(nn.Module):
    """A map of the student, fused with the result of the layer behind it, as a map of the teacher's width and size."""

    def __init__(self, ours: int, channels: int, theirs: int, *, last: bool) -> None:
        super().__init__()
        narrow = nn.Conv2d(ours, channels, 1, bias=False)
        widen = nn.Conv2d(channels, theirs, 3, padding=1, bias=False)
        for convolution in (narrow, widen):
            nn.init.kaiming_uniform_(convolution.weight, a=1)
        self.narrow = nn.Sequential(narrow, nn.BatchNorm2d(channels))
        self.widen = nn.Sequential(widen, nn.BatchNorm2d(theirs))
        self.masks = None if last else nn.Sequential(nn.Conv2d(2 * channels, 2, 1), nn.Sigmoid())

    def forward(self, x: Tensor, behind: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """The map for the teacher, `[B,theirs,*size]`, and the fused map that the layer in front takes."""
        x = self.narrow(x)
        if self.masks is not None and behind is not None:
            behind = F.interpolate(behind, x.shape[2:], mode="nearest")
            masks = self.masks(torch.cat([x, behind], 1))
            x = x * masks[:, :1] + behind * masks[:, 1:]
        if x.shape[2:] != size:
            x = F.interpolate(x, tuple(size), mode="nearest")
        return self.widen(x), x


def hierarchical_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean squared errors of two maps `[B,C,H,W]`, at their size and pooled to 4, 2 and 1 in height and width.

    The weights are 1, 1/2, 1/4 and 1/8, divided by their sum; sizes that are not smaller than H are passed over.
    """
    found, total = F.mse_loss(student, teacher), 1.0
    weight = 1.0
    for size in SIZES:
        if size < student.shape[2]:
            weight /= 2
            total += weight
            ours, theirs = (F.adaptive_avg_pool2d(x, size) for x in (student, teacher))
            found = found + weight * F.mse_loss(ours, theirs)
    return found / total
