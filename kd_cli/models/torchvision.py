"""torchvision's classification models."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.errors import ConfigError, first_line
from kd_cli.models.arguments import by, check_sizes, sizes
from kd_cli.vision import import_torchvision, network_timeout

IMAGENET_CLASSES = 1000
USUAL_SIZES = (32, 48, 64, 75, 96, 112, 128, 160, 192, 224, 256, 299, 384)  # sides of images, in pixels
UNFIT = (RuntimeError, ValueError, AssertionError, ZeroDivisionError, IndexError, TypeError)  # torch's, for wrong sizes


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
    check_sizes(input_shape, num_classes)
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
        raise ConfigError(f"{name} needs images [1 or 3, height, width], and these have the shape {by(input_shape)}")
    if image_size is not None:
        (image_size,) = sizes("image_size", [image_size])

    def try_at(side: int) -> None:
        network = _build(name, input_shape, num_classes, pretrained=pretrained, image_size=side)
        try_shapes(network, input_shape, num_classes)

    try:
        network = _build(name, input_shape, num_classes, pretrained=pretrained, image_size=image_size)
    except UNFIT as error:
        raise too_small(error, name, input_shape, try_at) from error
    if pretrained:
        inner = network.network if isinstance(network, Adapted) else network
        _load_pretrained(inner, name, models.get_model_weights(name).DEFAULT, num_classes)
    try:
        try_shapes(network, input_shape, num_classes)
    except UNFIT as error:
        raise too_small(error, name, input_shape, try_at) from error
    return network


def notes_on_building(node: dict[str, Any], *, shape: tuple[int, ...], classes: int, normalize: Any) -> list[str]:
    """What `torchvision_model` fills in or leaves out for these keys and data, as sentences without a subject."""
    notes = []
    if shape[0] == 1:
        notes.append("takes colour pictures: the one channel of the data is repeated to three")
    if node.get("pretrained") is True:
        if classes != IMAGENET_CLASSES:
            notes.append(f"starts from ImageNet weights, all but its last layer, which is new for {classes} classes")
        if normalize == "data":
            notes.append(
                "starts from ImageNet weights, and its input is normalised by the data's own mean and deviation; "
                "normalize=imagenet is what the weights were trained with"
            )
    return notes


def _build(
    name: str, input_shape: tuple[int, ...], num_classes: int, *, pretrained: bool, image_size: int | None
) -> nn.Module:
    options = _options(name, (image_size, image_size) if image_size else input_shape[1:], pretrained)
    network = import_torchvision().models.get_model(name, weights=None, num_classes=num_classes, **options)
    if input_shape[0] == 1 or image_size is not None:
        return Adapted(network, repeat=input_shape[0] == 1, image_size=image_size)
    return network


def too_small(error: Exception, name: str, shape: tuple[int, ...], try_at: Callable[[int], None]) -> ConfigError:
    """The error for images that a network cannot take, with the smallest usual size that it can.

    `try_at(size)` builds the network for that size, without data, and raises one of UNFIT where images do not fit.
    """
    for size in USUAL_SIZES:
        try:
            with torch.device("meta"):
                try_at(size)
        except UNFIT:
            continue
        hint = f"image_size={size} resizes them for the network, and is the smallest of the usual sizes that it takes"
        break
    else:
        hint = f"none of the usual sizes fits, from {USUAL_SIZES[0]} to {USUAL_SIZES[-1]}; choose another name"
    return ConfigError(f"{name} cannot take images of the shape {by(shape)}: {first_line(error)}", hint=hint)


def _options(name: str, size: tuple[int, ...], pretrained: bool) -> dict[str, Any]:
    """The arguments that single architectures need, for images of (height, width)."""
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
                f"the pretrained weights for {name} do not fit: {key} is {by(value.shape)}, and the model's "
                f"is {by(own[key].shape)}",
                hint=f"image_size={weights.meta['min_size'][0]} is what they were trained for",
            )
    missing = set(network.load_state_dict(state, strict=False).missing_keys) - head
    if missing:
        raise ConfigError(
            f"the pretrained weights for {name} lack {', '.join(sorted(missing))}", hint="pretrained=false"
        )


def try_shapes(network: nn.Module, input_shape: tuple[int, ...], num_classes: int) -> None:
    """Send two images without data through the network: a wrong size is found now, not after a teacher's training."""
    tensors = {key: value.to("meta") for key, value in network.state_dict(keep_vars=True).items()}
    tensors |= {key: value.to("meta") for key, value in network.named_buffers()}  # those that are not saved
    training = network.training
    try:
        for mode in (False, True):  # in training BatchNorm needs more than one value per channel
            network.train(mode)
            with torch.device("meta"), torch.no_grad():
                logits = torch.func.functional_call(network, tensors, (torch.empty(2, *input_shape),))
    finally:
        network.train(training)
    assert logits.shape == (2, num_classes), f"it gives {tuple(logits.shape)}"
