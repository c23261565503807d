"""The light networks that papers on distillation train on CIFAR: MobileNetV2, ShuffleNet and ShuffleNetV2.

As in `kd_cli.models.cifar`, they are those of Tian, Krishnan and Isola (2020), with other names of parameters.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_cli.errors import ConfigError
from kd_cli.models.arguments import sizes
from kd_cli.models.cifar import HEAD_STD, check_images, head, initialised
from kd_cli.numeric import is_number

MOBILENET = ((1, 16, 1, 1), (0, 24, 2, 1), (0, 32, 3, 2), (0, 64, 4, 2), (0, 96, 3, 1), (0, 160, 3, 2), (0, 320, 1, 1))
STEM = 24  # channels of a ShuffleNet's first convolution


def mobilenetv2(
    *, input_shape: tuple[int, ...], num_classes: int, width: float = 0.5, expansion: int = 6
) -> nn.Sequential:
    """MobileNetV2 (Sandler et al. 2018), whose channels are multiplied by `width`, for small images.

    It halves the image four times, the paper's five. The last convolution has 1,280 channels for a `width` up to 1.
    Raises ConfigError.
    """
    check_images(input_shape, num_classes)
    (expansion,) = sizes("expansion", [expansion])
    if not is_number(width) or width < 1 / 16:
        raise ConfigError(f"width is {width!r}; it must be a number, 1/16 or more")
    channels = int(32 * width)
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv1=_unit(input_shape[0], channels, 3, 2))
    for i, (factor, count, repeats, stride) in enumerate(MOBILENET):
        chain: list[nn.Module] = []
        for k in range(repeats):
            after = int(count * width)
            chain.append(InvertedResidual(channels, after, stride if k == 0 else 1, factor or expansion))
            channels = after
        layers[f"stage{i}"] = nn.Sequential(*chain)
    last = int(1280 * max(width, 1))
    layers["conv2"] = _unit(channels, last, 1)
    return initialised(nn.Sequential(layers | head(last, num_classes)), head_std=HEAD_STD)


def shufflenetv1(
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    widths: Sequence[int] = (240, 480, 960),
    blocks: Sequence[int] = (4, 8, 4),
    groups: int = 3,
) -> nn.Sequential:
    """ShuffleNet (Zhang et al. 2018) for small images: a 1x1 convolution, no pooling, three stages that halve.

    Raises ConfigError.
    """
    check_images(input_shape, num_classes)
    (groups,) = sizes("groups", [groups])
    stages = _stages(widths, blocks)
    counts = (stages[0][0] - STEM, *(width for width, _ in stages))  # of the channels that units make
    if any(count < 1 or count % (4 * groups) for count in counts):
        raise ConfigError(
            f"widths is {list(widths)}; its entries, and the first less {STEM}, must be multiples of 4 * groups, "
            f"which is {4 * groups}"
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=_unit(input_shape[0], STEM, 1))
    channels = STEM
    for i, (width, repeats) in enumerate(stages):
        chain = [ShuffleUnit(channels if k == 0 else width, width, groups, halves=k == 0) for k in range(repeats)]
        layers[f"stage{i + 1}"] = nn.Sequential(*chain)
        channels = width
    return nn.Sequential(layers | head(channels, num_classes))


def shufflenetv2(
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    widths: Sequence[int] = (116, 232, 464),
    blocks: Sequence[int] = (4, 8, 4),
    last: int = 1024,
) -> nn.Sequential:
    """ShuffleNetV2 (Ma et al. 2018) for small images: a 1x1 convolution, no pooling, three stages that halve.

    `last` is the number of channels of the convolution before the classifier. Raises ConfigError.
    """
    check_images(input_shape, num_classes)
    (last,) = sizes("last", [last])
    stages = _stages(widths, blocks)
    if any(width % 2 for width, _ in stages):
        raise ConfigError(f"widths is {list(widths)}; its entries must be even numbers")
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=_unit(input_shape[0], STEM, 1))
    channels = STEM
    for i, (width, repeats) in enumerate(stages):
        layers[f"stage{i + 1}"] = nn.Sequential(
            HalvingUnit(channels, width), *(SplitUnit(width) for _ in range(repeats - 1))
        )
        channels = width
    layers["conv2"] = _unit(channels, last, 1)
    return nn.Sequential(layers | head(last, num_classes))


class InvertedResidual(nn.Module):
    """A depthwise convolution between two 1x1 convolutions, the last without ReLU, beside a shortcut where it fits."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.adds = stride == 1 and channels == width
        self.layers = nn.Sequential(
            _unit(channels, inner, 1), _unit(inner, inner, 3, stride, groups=inner), *_linear(inner, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.adds else self.layers(x)


class ShuffleUnit(nn.Module):
    """A bottleneck of grouped convolutions with shuffled channels; where it halves, the input joins as channels."""

    def __init__(self, channels: int, width: int, groups: int, *, halves: bool) -> None:
        super().__init__()
        made = width - channels if halves else width
        inner = made // 4
        first = 1 if channels == STEM else groups
        self.halves = halves
        self.reduce = _unit(channels, inner, 1, groups=first)
        self.shuffle = nn.ChannelShuffle(first)
        self.depthwise = _unit(inner, inner, 3, 2 if halves else 1, groups=inner)
        self.expand = nn.Sequential(*_linear(inner, made, 1, groups=groups))
        self.shortcut = nn.AvgPool2d(3, 2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.expand(self.depthwise(self.shuffle(self.reduce(x))))
        return F.relu(torch.cat([y, self.shortcut(x)], 1) if self.halves else y + x)


class SplitUnit(nn.Module):
    """Half of the channels pass through, half through three convolutions; then the channels are shuffled."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(_unit(half, half, 1), *_linear(half, half, 3, groups=half), _unit(half, half, 1))
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = x.chunk(2, dim=1)
        return self.shuffle(torch.cat([kept, self.branch(changed)], 1))


class HalvingUnit(nn.Module):
    """Two branches of depthwise convolutions that halve the image, side by side; then the channels are shuffled."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        half = width // 2
        self.left = nn.Sequential(*_linear(channels, channels, 3, 2, groups=channels), _unit(channels, half, 1))
        self.right = nn.Sequential(
            _unit(channels, half, 1), *_linear(half, half, 3, 2, groups=half), _unit(half, half, 1)
        )
        self.shuffle = nn.ChannelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.shuffle(torch.cat([self.left(x), self.right(x)], 1))


def _linear(channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution without bias, and BatchNorm."""
    convolution = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [convolution, nn.BatchNorm2d(width)]


def _unit(channels: int, width: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias, BatchNorm and ReLU."""
    return nn.Sequential(*_linear(channels, width, kernel, stride, groups), nn.ReLU(inplace=True))


def _stages(widths: Sequence[int], blocks: Sequence[int]) -> list[tuple[int, int]]:
    """The width and the number of units of each of three stages."""
    found = list(zip(sizes("widths", widths), sizes("blocks", blocks), strict=False))
    if not len(widths) == len(blocks) == len(found) == 3:
        raise ConfigError(f"widths is {list(widths)} and blocks {list(blocks)}; each must have three entries")
    return found
