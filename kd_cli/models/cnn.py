"""Convolutional networks without running statistics."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from kd_cli.errors import ConfigError
from kd_cli.models.arguments import by, check_sizes, share, sizes
from kd_cli.models.layers import Dropout


def cnn(
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    channels: Sequence[int] = (32, 64),
    hidden: int = 128,
    dropout: float = 0.0,
) -> nn.Sequential:
    """A convolutional network: a 3x3 convolution, ReLU and a halving per entry of `channels`, then one hidden layer.

    It has no BatchNorm, whose running statistics do not stack. Raises ConfigError, also where the image is too small.
    """
    dropout = share("dropout", dropout)
    counts, (width,) = sizes("channels", channels), sizes("hidden", [hidden])
    check_sizes(input_shape, num_classes)
    if len(input_shape) != 3:
        raise ConfigError(
            f"a cnn needs images [channels, height, width], and these have the shape {by(input_shape)}",
            hint="a model of kd_cli.models.mlp.mlp takes any shape",
        )
    depth, height, breadth = input_shape
    smallest = 2 ** len(counts)
    if min(height, breadth) < smallest:
        raise ConfigError(
            f"channels has {len(counts)} entries; each halves the image, which must be at least {smallest}x{smallest} "
            f"for that, and is {height}x{breadth}",
            hint=f"give at most {min(height, breadth).bit_length() - 1} entries",
        )

    layers: list[nn.Module] = []
    for count in counts:
        layers += [nn.Conv2d(depth, count, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        depth = count
    features = depth * (height // smallest) * (breadth // smallest)
    layers += [nn.Flatten(), nn.Linear(features, width), nn.ReLU(inplace=True)]
    if dropout:
        layers.append(Dropout(dropout))
    return nn.Sequential(*layers, nn.Linear(width, num_classes))
