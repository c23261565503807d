"""A student whose features are brought to a teacher's by a projector, and classified by the teacher's classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ExtendedStudent(nn.Module):
    """`classifier(mean over positions of projector(map))`, where the map is that of the backbone's `layer`.

    The backbone is a network without what follows that layer: an `nn.Sequential` ends there, of others the modules
    `dropped` are replaced by the identity. The classifier is not trained; its weights are copied from a teacher.
    """

    def __init__(
        self, backbone: nn.Module, layer: str, dropped: Sequence[str], projector: nn.Module, classifier: nn.Linear
    ) -> None:
        super().__init__()
        self.map: Tensor | None = None
        names = [name for name, _ in backbone.named_children()]
        if isinstance(backbone, nn.Sequential) and layer in names:
            self.backbone: nn.Module = backbone[: names.index(layer) + 1]
            self.inside = None
        else:
            for path in dropped:
                backbone.set_submodule(path, nn.Identity())
            self.backbone, self.inside = backbone, layer
            backbone.get_submodule(layer).register_forward_hook(self._keep)
        self.projector, self.classifier = projector, classifier.requires_grad_(False)

    def _keep(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.map = output

    def forward(self, images: Tensor) -> Tensor:
        found = self.backbone(images)
        if self.inside is not None:  # the backbone returns what is left of its last layers
            assert self.map is not None
            found, self.map = self.map, None
        logits: Tensor = self.classifier(self.projector(found).mean((2, 3)))
        return logits


def extended_student(
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    student: Callable[..., nn.Module],
    layer: str,
    dropped: Sequence[str],
    channels: int,
    width: int,
    hidden: int,
    bias: bool,
) -> ExtendedStudent:
    """The network that `student` builds, up to `layer` with `channels`, a projector to `width`, a linear classifier.

    The projector is the one of Chen et al. 2022 (SimKD): convolutions of 1x1, 3x3 and 1x1 positions with `hidden`
    channels between them, each with BatchNorm and ReLU.
    """
    backbone = student(input_shape=input_shape, num_classes=num_classes)  # first: its weights are those of it alone
    sizes = [(channels, hidden, 1), (hidden, hidden, 3), (hidden, width, 1)]
    parts: list[nn.Module] = []
    for before, after, size in sizes:
        convolution = nn.Conv2d(before, after, size, padding=size // 2, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        parts += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
    with torch.no_grad():
        return ExtendedStudent(
            backbone, layer, dropped, nn.Sequential(*parts), nn.Linear(width, num_classes, bias=bias)
        )
