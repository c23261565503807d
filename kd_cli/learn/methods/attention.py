"""Attention transfer: where the student's maps are active follows where the teacher's are (AT)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.layers import Layer
from kd_cli.learn.methods.base import Published, Setting, Terms, Weights
from kd_cli.learn.methods.features import AUTO, Layers, Stages, by, one_of, positive, same_size
from kd_cli.learn.outputs import Outputs

SMALLEST = 1e-6  # a map of attention shorter than this, of features around 1e-3, is not brought to unit length
CODE_WEIGHT = 1000.0  # of the reference code
PAPER_WEIGHT = 0.05  # the paper's beta / 2, with the beta of about 0.1 that it names


class Attention(Stages):
    """`alpha * weight * L_attention + beta * L_hard`; Zagoruyko & Komodakis 2017, section 3.1.

    The attention of a map f is `Q = A / |A|` with `A = mean_c |f_c|^power`, over the H*W positions. `L_attention` is
    the mean over the examples, summed over the pairs of layers, of the distance that `norm` chooses: `code` is the mean
    over the positions of `(Q_s - Q_t)^2`, as in the authors' code; `paper` is the length `|Q_s - Q_t|`, not squared.
    Published weights: 1000 (RepDistiller, mdistiller), and half of 0.1 in the paper's form.
    """

    def __init__(
        self,
        student_layers: Layers = AUTO,
        teacher_layers: Layers = AUTO,
        norm: str = "code",
        power: float = 2.0,
        weight: float | None = None,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        self.norm = one_of("norm", norm, ("code", "paper"))
        self.power = positive("power", power)
        if self.power < 1:
            raise ConfigError(
                f"method.power is {power}; it must be at least 1, or the gradient is infinite where a map is 0"
            )
        standard = CODE_WEIGHT if norm == "code" else PAPER_WEIGHT
        self.published = (Published("weight", standard, standard),)
        self.weight = standard if weight is None else positive("weight", weight)

    def chosen(self, pairs: list[tuple[Layer, Layer]]) -> list[tuple[Layer, Layer]]:
        pairs = [pair for pair in pairs if min(layer.positions for layer in pair) > 1]
        if not pairs:
            raise ConfigError(
                "Attention finds no pair of maps with several positions: there is nothing to attend to",
                hint="networks whose maps are larger, for instance by student.image_size and teacher.image_size",
            )
        return pairs

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        self.need_maps()
        for i, (ours, theirs) in enumerate(self.shapes):
            size = [min(a, b) for a, b in zip(ours[1:], theirs[1:], strict=True)]
            positions = torch.Size(size).numel()
            if positions == 1:
                raise ConfigError(
                    f"Attention compares positions, and the student's {self.student_features[i]} ({by(ours)}) and the "
                    f"teacher's {self.teacher_features[i]} ({by(theirs)}) have one in common: attention is always 1",
                    hint="method.student_layers and method.teacher_layers with larger maps",
                )
            if self.norm == "code":
                self.notes[i] += f"; at {by(size)} positions the weight {self.weight:g} of a mean over them is "
                self.notes[i] += f"{self.weight / positions:.3g} of their sum"

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        distance = DISTANCES[self.norm]
        attention = torch.stack(
            [
                distance(*(attention_map(x, power=self.power) for x in same_size(*pair)))
                for pair in self.pairs(student, teacher)
            ]
        ).sum()
        hard = self.hard_loss(student.logits, batch.labels)
        loss = weights.alpha * self.weight * attention + weights.beta * hard
        return {"loss": loss, "attention": attention, "hard": hard}


def attention_map(x: Tensor, *, power: float = 2.0) -> Tensor:
    """`A / |A|` with `A = mean_c |x_c|^power`: `[B,C,H,W]` to `[B,H*W]`. A map of zeros stays zero."""
    strength = x.abs().pow(power).mean(1).flatten(1)
    return F.normalize(strength, dim=1, eps=SMALLEST)


def mean_of_squares(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean of the squared differences of `[B,P]` over examples and positions."""
    return (student - teacher).square().mean()


def mean_of_lengths(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over the examples of the length of the difference, `[B,P]`; its gradient at 0 is 0."""
    return torch.linalg.vector_norm(student - teacher, dim=1).mean()


DISTANCES = {"code": mean_of_squares, "paper": mean_of_lengths}
