"""The models that ship with the tool: builders that map images [B, *input_shape] to logits [B, num_classes].

A builder draws the initial weights from torch's global generator; who calls it seeds that. A user's own builder has the
same two arguments and any keys of its own.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.errors import ConfigError, first_line
from kd_cli.vision import import_torchvision, network_timeout


class Dropout(nn.Module):
    """Inverted dropout whose mask depends on its own generator alone.

    `nn.Dropout` draws from torch's global generator: there a mask depends on everything that drew before it. With no
    global state, S stacked models draw what each would draw alone, and a resumed run draws what it would have drawn.
    Without a generator it falls back on the global one.
    """

    def __init__(self, p: float, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.p = _share("p", p)
        self.generator = generator

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        mask = torch.empty_like(x, memory_format=torch.contiguous_format)
        return x * draw_dropout(mask, self.p, generator=self.generator)

    def extra_repr(self) -> str:
        return f"p={self.p}"


def draw_dropout(mask: Tensor, p: float, *, generator: torch.Generator | None) -> Tensor:
    """Fill a contiguous tensor with the factors of inverted dropout: 0 with probability p, else 1 / (1 - p).

    A number takes 16 of the 64 bits that a generator gives at once, five times as fast on a CPU as `bernoulli_`, and p
    is rounded to a 65,536th, in the factor too.
    """
    if mask.device.type == "mps":  # which has no 64 random bits
        return mask.bernoulli_(1 - p, generator=generator).div_(1 - p)
    bits = torch.empty(-(-mask.numel() // 4), dtype=torch.int64, device=mask.device)
    bits.random_(-(2**63), None, generator=generator)
    dropped = min(round(p * 2**16), 2**16 - 1)
    kept = bits.view(torch.int16)[: mask.numel()].view(mask.shape) >= dropped - 2**15
    return mask.copy_(kept).mul_(2**16 / (2**16 - dropped))


def mlp(
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    hidden: Sequence[int],
    dropout: float = 0.0,
    input_dropout: float = 0.0,
    max_norm: float | None = None,
) -> nn.Sequential:
    """A multilayer perceptron with ReLU; `hidden` holds the layers' widths, `dropout` follows each of them.

    With `max_norm` the network has an attribute `max_norm`: the bounds that `constrain_max_norm` keeps after each step,
    by parameter name, for the weights that feed hidden units (Hinton et al. 2012, appendix A). Raises ConfigError.
    """
    dropout, input_dropout = _share("dropout", dropout), _share("input_dropout", input_dropout)
    widths = _sizes("hidden", hidden)
    if max_norm is not None and not (_is_number(max_norm) and max_norm > 0):
        raise ConfigError(f"max_norm is {max_norm!r}; it must be null or a number above 0")
    _checked_shape(input_shape, num_classes)

    layers: list[nn.Module] = [nn.Flatten()]
    bounds: dict[str, float] = {}
    fan_in = torch.Size(input_shape).numel()
    if input_dropout:
        layers.append(Dropout(input_dropout))
    for width in widths:
        if max_norm is not None:
            bounds[f"{len(layers)}.weight"] = float(max_norm)
        # in place: the gradient of neither a linear layer nor ReLU needs what ReLU overwrites
        layers += [nn.Linear(fan_in, width), nn.ReLU(inplace=True)]
        if dropout:
            layers.append(Dropout(dropout))
        fan_in = width
    network = nn.Sequential(*layers, nn.Linear(fan_in, num_classes))
    if max_norm is not None:
        network.max_norm = bounds  # type: ignore[assignment]  # plain values are welcome on a module
    return network


@torch.no_grad()
def constrain_max_norm(parameters: Mapping[str, Tensor], bounds: Mapping[str, float]) -> None:
    """Scale each unit's incoming weights down, in place, to at most the bound in L2 norm (Hinton et al. 2012).

    A unit's incoming weights are the last dimension: of [out, in], and of S stacked models' [S, out, in].
    """
    for name, bound in bounds.items():
        weight = parameters[name]
        norm = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
        weight.mul_((bound / norm).clamp_(max=1))  # a norm of 0 gives inf, which the clamp makes 1


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
    dropout = _share("dropout", dropout)
    counts, (width,) = _sizes("channels", channels), _sizes("hidden", [hidden])
    _checked_shape(input_shape, num_classes)
    if len(input_shape) != 3:
        raise ConfigError(
            f"a cnn needs images [channels, height, width], and these have the shape {_by(input_shape)}",
            hint="a model of kd_cli.models.networks.mlp takes any shape",
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


# ---------------------------------------------------------------- torchvision's classification models


class Adapted(nn.Module):
    """A network for RGB images, given images of another size or with one channel."""

    def __init__(self, network: nn.Module, *, repeat: bool, image_size: int | None) -> None:
        super().__init__()
        self.network = network
        self.repeat = repeat
        self.image_size = image_size

    def forward(self, images: Tensor) -> Tensor:
        if self.image_size is not None:
            size = (self.image_size, self.image_size)
            images = nn.functional.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
        if self.repeat:
            images = images.expand(-1, 3, -1, -1)
        return self.network(images)


def torchvision_model(
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    name: str,
    pretrained: bool = False,
    image_size: int | None = None,
) -> nn.Module:
    """Any of torchvision's classification models, with one output tensor; one channel is repeated to three.

    `pretrained` starts from the ImageNet weights that torchvision recommends, all but a head of another number of
    classes; `image_size` resizes the images for the network. Raises ConfigError: an unknown name, weights that cannot
    be downloaded or do not fit, images that the network cannot take.
    """
    models = import_torchvision().models
    _checked_shape(input_shape, num_classes)
    names = models.list_models(module=models)
    if name not in names:
        close = get_close_matches(str(name), names, n=3, cutoff=0.4)
        raise ConfigError(
            f"name is {name!r}, and torchvision has no classification model of that name",
            hint=f"the nearest: {', '.join(close)}" if close else f"it has {', '.join(names)}",
        )
    if not isinstance(pretrained, bool):
        raise ConfigError(f"pretrained is {pretrained!r}; it must be true or false")
    if len(input_shape) != 3 or input_shape[0] not in (1, 3):
        raise ConfigError(f"{name} needs images [1 or 3, height, width], and these have the shape {_by(input_shape)}")
    if image_size is not None:
        (image_size,) = _sizes("image_size", [image_size])

    options = _options(name, (image_size, image_size) if image_size else input_shape[1:], pretrained)
    network = models.get_model(name, weights=None, num_classes=num_classes, **options)
    if pretrained:
        _load_pretrained(network, name, models.get_model_weights(name).DEFAULT, num_classes)
    if input_shape[0] == 1 or image_size is not None:
        network = Adapted(network, repeat=input_shape[0] == 1, image_size=image_size)
    _try_shapes(network, name, input_shape, num_classes)
    return network


def _options(name: str, size: tuple[int, ...], pretrained: bool) -> dict[str, Any]:
    """What single architectures must be told, for images of (height, width)."""
    if name in ("googlenet", "inception_v3"):
        # init_weights=True is the default, but left unsaid it warns; these weights expect inputs scaled otherwise
        return {"aux_logits": False, "init_weights": True, "transform_input": pretrained}
    if name.startswith("vit_") and size[0] == size[1]:
        return {"image_size": size[0]}
    if name.startswith("maxvit"):
        return {"input_size": size}
    return {}


def _load_pretrained(network: nn.Module, name: str, weights: Any, num_classes: int) -> None:
    """Load torchvision's weights, all but those of a head for another number of classes and of auxiliary heads."""
    try:
        with network_timeout():
            state = weights.get_state_dict(map_location="cpu", progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ConfigError(
            f"the pretrained weights for {name} could not be downloaded from {weights.url}: {error}",
            hint="pretrained=false trains from scratch; teacher.checkpoint=FILE takes weights you have",
        ) from error

    # The state is changed in place: it carries the layers' format versions, which a new dictionary would lack.
    own = network.state_dict()
    head = set()
    for key in list(state):
        value = state.pop(key)
        key = re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)", r"\1\2", key)  # DenseNet's files are that old
        if key not in own:  # an auxiliary head
            continue
        if value.shape == own[key].shape:
            state[key] = value
        elif value.shape[1:] == own[key].shape[1:] and len(own[key]) == num_classes:
            head.add(key)
        else:
            raise ConfigError(
                f"the pretrained weights for {name} do not fit: {key} is {_by(value.shape)}, and the model's "
                f"is {_by(own[key].shape)}",
                hint=f"image_size={weights.meta['min_size'][0]} is what they were trained for",
            )
    missing = set(network.load_state_dict(state, strict=False).missing_keys) - head
    if missing:
        raise ConfigError(
            f"the pretrained weights for {name} lack {', '.join(sorted(missing))}", hint="pretrained=false"
        )


def _try_shapes(network: nn.Module, name: str, input_shape: tuple[int, ...], num_classes: int) -> None:
    """Send one image without data through the network: a wrong size is found now, not after a teacher's training."""
    tensors = {key: value.to("meta") for key, value in network.state_dict(keep_vars=True).items()}
    tensors |= {key: value.to("meta") for key, value in network.named_buffers()}  # those that are not saved
    training = network.training
    network.eval()
    try:
        with torch.device("meta"), torch.no_grad():
            logits = torch.func.functional_call(network, tensors, (torch.empty(1, *input_shape),))
    except (RuntimeError, ValueError, AssertionError, ZeroDivisionError) as error:
        raise ConfigError(
            f"{name} cannot take images of the shape {_by(input_shape)}: {first_line(error)}",
            hint="image_size=64 resizes them for the network; most of these were made for 224",
        ) from error
    finally:
        network.train(training)
    assert logits.shape == (1, num_classes), f"{name} gives {tuple(logits.shape)}"


# ---------------------------------------------------------------- checks


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _share(key: str, value: float) -> float:
    if not _is_number(value) or not 0 <= value < 1:
        raise ConfigError(f"{key} is {value!r}; it must be a number, at least 0 and below 1")
    return float(value)


def _sizes(key: str, values: Sequence[int]) -> list[int]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ConfigError(
            f"{key} is {values!r}; it must be a list of whole numbers", hint=f"for example {key}=[300,100]"
        )
    for value in values:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{key} has {value!r}; it must be a whole number, 1 or more")
    return list(values)


def _checked_shape(input_shape: tuple[int, ...], num_classes: int) -> None:
    _sizes("input_shape", input_shape)
    _sizes("num_classes", [num_classes])


def _by(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)
