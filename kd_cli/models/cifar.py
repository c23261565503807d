"""The residual, wide residual and VGG networks that papers on distillation train on CIFAR.

They are those of Tian, Krishnan and Isola (2020), whose results most later papers compare with: the same layers,
initial distributions and names of parameters, so that `teacher.checkpoint` takes the teachers that they published.
`conf/model` has them by the names that papers use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from kd_cli.errors import ConfigError
from kd_cli.models.arguments import by, check_sizes, sizes
from kd_cli.numeric import is_whole

SMALLEST = 8  # pixels: every network here halves the image three times at most
HEAD_STD = 0.01  # of the initial weights of VGG's and MobileNet's classifiers


def resnet(
    *, input_shape: tuple[int, ...], num_classes: int, depth: int, widths: Sequence[int] = (16, 16, 32, 64)
) -> nn.Sequential:
    """The residual network for CIFAR (He et al. 2016, section 4.2) with `depth` = 6n + 2 layers.

    `widths` are the channels of the first convolution and of the three stages of n blocks. Where a stage changes the
    size, the shortcut is a 1x1 convolution, and not the paper's zeros. Raises ConfigError.
    """
    check_images(input_shape, num_classes)
    blocks = _blocks("depth", depth, 2)
    first, *stages = sizes("widths", widths)
    if len(stages) != 3:
        raise ConfigError(
            f"widths is {list(widths)}; it must have four entries: the first convolution's, three stages'"
        )
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=_conv3x3(input_shape[0], first), bn1=nn.BatchNorm2d(first), relu=nn.ReLU(inplace=True)
    )
    before = first
    for i, width in enumerate(stages):
        chain = [BasicBlock(before if k == 0 else width, width, 2 if i and k == 0 else 1) for k in range(blocks)]
        layers[f"layer{i + 1}"] = nn.Sequential(*chain)
        before = width
    return initialised(nn.Sequential(layers | head(before, num_classes)))


def wide_resnet(*, input_shape: tuple[int, ...], num_classes: int, depth: int, widen: int) -> nn.Sequential:
    """A wide residual network (Zagoruyko & Komodakis 2016) with `depth` = 6n + 4 layers, `widen` times as wide.

    Raises ConfigError.
    """
    check_images(input_shape, num_classes)
    blocks = _blocks("depth", depth, 4)
    (widen,) = sizes("widen", [widen])
    layers: OrderedDict[str, nn.Module] = OrderedDict(conv1=_conv3x3(input_shape[0], 16))
    before = 16
    for i, width in enumerate((16 * widen, 32 * widen, 64 * widen)):
        chain = [
            PreActivationBlock(before if k == 0 else width, width, 2 if i and k == 0 else 1) for k in range(blocks)
        ]
        layers[f"block{i + 1}"] = nn.Sequential(OrderedDict(layer=nn.Sequential(*chain)))
        before = width
    layers |= OrderedDict(bn1=nn.BatchNorm2d(before), relu=nn.ReLU(inplace=True))
    return initialised(nn.Sequential(layers | head(before, num_classes, zero_bias=True)))


def vgg(*, input_shape: tuple[int, ...], num_classes: int, blocks: Sequence[Sequence[int]]) -> nn.Sequential:
    """VGG (Simonyan & Zisserman 2015) with BatchNorm and one linear layer.

    `blocks` has the channels of the convolutions of five blocks. A maximum over 2x2 pixels follows each of the first
    three, and the fourth for images of 64 pixels and more. Raises ConfigError.
    """
    check_images(input_shape, num_classes)
    if not isinstance(blocks, Sequence) or len(blocks) != 5:
        raise ConfigError(f"blocks is {blocks!r}; it must be a list of five lists of whole numbers")
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = input_shape[0]
    for i, block in enumerate(blocks):
        chain: list[nn.Module] = []
        for width in sizes(f"blocks[{i}]", block):
            chain += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            channels = width
        layers[f"block{i}"] = nn.Sequential(*chain)
        if i < 3 or (i == 3 and min(input_shape[1:]) >= 64):
            layers[f"pool{i}"] = nn.MaxPool2d(2)
    layers |= head(channels, num_classes, name="classifier")
    return initialised(nn.Sequential(layers), head_std=HEAD_STD)


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut, and ReLU after their sum."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(channels, width, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = nn.Sequential()
        if stride != 1 or channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class PreActivationBlock(nn.Module):
    """BatchNorm and ReLU before each of two convolutions; a shortcut that changes the size begins after the first."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = _conv3x3(channels, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = _conv3x3(width, width)
        self.convShortcut = None if channels == width else nn.Conv2d(channels, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        skipped = x if self.convShortcut is None else self.convShortcut(y)
        return skipped + self.conv2(F.relu(self.bn2(self.conv1(y))))


# ---------------------------------------------------------------- of all networks for CIFAR


def check_images(input_shape: tuple[int, ...], num_classes: int) -> None:
    """Raise ConfigError unless the inputs are images of SMALLEST pixels a side or more."""
    check_sizes(input_shape, num_classes)
    if len(input_shape) != 3:
        raise ConfigError(
            f"this network needs images [channels, height, width], and these have the shape {by(input_shape)}",
            hint="a model of kd_cli.models.mlp.mlp takes any shape",
        )
    if min(input_shape[1:]) < SMALLEST:
        raise ConfigError(
            f"this network needs images of {SMALLEST}x{SMALLEST} pixels or more, and these are {by(input_shape[1:])}",
            hint="cnn, with one entry in channels for each halving, takes smaller ones",
        )


def head(channels: int, num_classes: int, *, name: str = "fc", zero_bias: bool = False) -> OrderedDict[str, nn.Module]:
    """The mean over all positions, and a linear layer of this name."""
    linear = nn.Linear(channels, num_classes)
    if zero_bias:
        nn.init.zeros_(linear.bias)
    return OrderedDict({"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), name: linear})


def initialised(network: nn.Sequential, *, head_std: float | None = None) -> nn.Sequential:
    """The network with He's initial weights (fan out) in its convolutions, and a linear layer of std `head_std`."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear) and head_std is not None:
            nn.init.normal_(module.weight, std=head_std)
            nn.init.zeros_(module.bias)
    return network


def _blocks(key: str, depth: int, others: int) -> int:
    """The blocks of a stage in a network of three stages, whose blocks have two layers, and `others` more layers."""
    if not is_whole(depth) or depth <= others or (depth - others) % 6:
        smallest = [6 * n + others for n in (1, 2, 3)]
        raise ConfigError(f"{key} is {depth!r}; it must be 6n + {others}: {', '.join(map(str, smallest))}, ...")
    return (depth - others) // 6


def _conv3x3(channels: int, width: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
