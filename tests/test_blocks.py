"""Networks cut into blocks that can take each other's place, and those that cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import made
import pytest
import torch
from torch import Tensor, nn

from kd_cli.errors import ConfigError
from kd_cli.learn.blocks import AUTO, Cut, cut_pair, logits_of
from kd_cli.learn.replacement import Replacement
from kd_cli.learn.teachers import freeze
from kd_cli.models.cifar import resnet, vgg, wide_resnet
from kd_cli.models.cnn import cnn
from kd_cli.models.mlp import mlp
from kd_cli.models.torchvision import torchvision_model

PICTURES: dict[str, Any] = {"input_shape": (3, 16, 16), "num_classes": 4}


def hidden(*widths: int, **keys: Any) -> nn.Module:
    return mlp(hidden=widths, **keys, **made.SIZES)


def pair(student: nn.Module, teacher: nn.Module, ours: Any = AUTO, theirs: Any = AUTO) -> tuple[Cut, Cut]:
    return cut_pair(student, teacher, made.images(2), ours, theirs)


def test_hidden_layers_are_paired_evenly() -> None:
    student, teacher = pair(hidden(8, 8).double(), hidden(8, 8, 8, 8, 8, dropout=0.3).double())
    assert student.blocks == (("0", "1", "2"), ("3", "4"))
    assert [block[-1] for block in teacher.blocks] == ["8", "14"]  # three of five layers, then two
    assert student.rest == ("5",)
    assert teacher.rest == ("15", "16")  # the dropout belongs to what follows


@pytest.mark.parametrize(
    ("student", "teacher", "ends"),
    [
        (
            lambda: resnet(depth=8, widths=[4, 4, 8, 8], **PICTURES),
            lambda: resnet(depth=14, widths=[4, 4, 8, 8], **PICTURES),
            ["layer1", "layer2", "layer3"],
        ),
        (
            lambda: wide_resnet(depth=10, widen=1, **PICTURES),
            lambda: wide_resnet(depth=16, widen=1, **PICTURES),
            ["block1", "block2", "relu"],
        ),
        (
            lambda: vgg(blocks=[[4]] * 5, **PICTURES),
            lambda: vgg(blocks=[[4, 4]] * 5, **PICTURES),
            ["block0", "block1", "block2", "block4"],
        ),
        (
            lambda: cnn(channels=[4, 6], hidden=8, **PICTURES),
            lambda: cnn(channels=[4, 6], hidden=8, **PICTURES),
            ["1", "4", "5"],
        ),
        (
            lambda: torchvision_model(name="resnet18", **PICTURES),
            lambda: torchvision_model(name="resnet34", **PICTURES),
            None,
        ),
    ],
)
def test_the_stages_of_shipped_networks_are_found_and_exchanged(
    student: Callable[[], nn.Module], teacher: Callable[[], nn.Module], ends: Sequence[str] | None
) -> None:
    torch.manual_seed(0)
    images = torch.randn(2, *PICTURES["input_shape"])
    networks = student(), freeze(teacher())
    ours, theirs = cut_pair(*networks, images, AUTO, AUTO)
    if ends is not None:
        assert [block[-1] for block in ours.blocks] == ends
    alone = logits_of(networks[0], images)
    replacement = Replacement(ours, theirs)
    with replacement.mixed([False] * len(replacement)):
        assert torch.allclose(logits_of(ours.network, images), logits_of(networks[1], images), atol=1e-5)
    with replacement.mixed([True] * len(replacement)):
        own = logits_of(ours.network, images)
    assert torch.equal(own, logits_of(ours.network, images))
    assert not torch.allclose(own, alone)  # its classifier is now the teacher's
    assert ours.network.state_dict().keys() == student().state_dict().keys()  # every module is in its place again


class Skips(nn.Module):
    """A network that does more with its modules than call them in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(36, 9), nn.Linear(9, 9), nn.Linear(9, made.CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        once = self.first(images.flatten(1)).relu()
        return self.last(once + self.second(once))


@pytest.mark.parametrize(
    ("student", "teacher", "ends", "message"),
    [
        (
            lambda: hidden(6),
            lambda: hidden(8),
            [AUTO, AUTO],
            "block 1 of 1 ends in 6 numbers in the student \\(at 2\\)",
        ),
        (lambda: hidden(8, 8), lambda: hidden(8), [AUTO, AUTO], "the student has 2 blocks, which end at 2, 4"),
        (lambda: hidden(8), lambda: hidden(8, 8), [["2"], ["2"]], "behind its last block the student has weights"),
        (lambda: hidden(8), lambda: hidden(8), [["7"], AUTO], "the student has no module '7'"),
        (lambda: hidden(8, 8), lambda: hidden(8, 8), [["4", "2"], AUTO], "calls them in another order"),
        (Skips, Skips, [["second"], ["second"]], "modules of the student up to second do not simply follow each other"),
        (lambda: nn.Sequential(nn.Flatten(), nn.Linear(36, 4)), lambda: hidden(8), [AUTO, AUTO], "neither maps nor"),
    ],
)
def test_networks_that_cannot_exchange_blocks_are_refused(
    student: Callable[[], nn.Module], teacher: Callable[[], nn.Module], ends: list[Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pair(made.model(student), made.model(teacher, 1), *ends)
