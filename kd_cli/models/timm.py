"""timm's classification models, an extra: `pip install 'kd-cli[timm]'`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.errors import ConfigError, first_line
from kd_cli.models.arguments import by, check_sizes, sizes
from kd_cli.models.torchvision import UNFIT, too_small, try_shapes
from kd_cli.vision import network_timeout, repair_torchvision

TARGET = "kd_cli.models.timm.timm_model"
RECORDED = "recorded"  # as pretrained=true, for a network whose weights are loaded afterwards: nothing is downloaded


class Resized(nn.Module):
    """A network that sees images in another size, (height, width), or as they are."""

    def __init__(self, network: nn.Module, image_size: tuple[int, int] | None) -> None:
        super().__init__()
        self.network, self.image_size = network, image_size

    def forward(self, images: Tensor) -> Tensor:
        return self.network(resized(images, self.image_size))


class Pretrained(Resized):
    """A network with pretrained weights, which sees images in the size and the normalisation of its configuration."""

    def __init__(self, network: nn.Module, *, image_size: tuple[int, int] | None, normalisation: Mapping[str, Any]):
        super().__init__(network, image_size)
        self.normalisation = dict(normalisation)  # mean and std, of values from 0 to 1: `kd_cli.models.building`


def resized(images: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Images in this (height, width), by bilinear interpolation."""
    if size is None or images.shape[2:] == size:
        return images
    return nn.functional.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def import_timm() -> ModuleType:
    """Import timm. Raises ConfigError where it is not installed."""
    repair_torchvision()  # which timm imports
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise ConfigError(
            f"timm cannot be imported: {error}", hint="pip install 'kd-cli[timm]'; student=torchvision needs no extra"
        ) from error


def timm_model(
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    name: str,
    pretrained: bool | str = False,
    image_size: int | None = None,
) -> nn.Module:
    """Any of timm's models as a classifier of images with any number of channels.

    `image_size` resizes the images for the network. `pretrained` starts from timm's weights, all but the last layer;
    images are then resized to the size that these were trained with, unless `image_size` says otherwise, and normalised
    as they were. Raises ConfigError: an unknown name, weights that cannot be downloaded, images that do not fit.
    """
    timm = import_timm()
    check_sizes(input_shape, num_classes)
    if pretrained not in (True, False, RECORDED):
        raise ConfigError(f"pretrained is {pretrained!r}; it must be true or false")
    if len(input_shape) != 3:
        raise ConfigError(f"{name} needs images [channels, height, width], and these have the shape {by(input_shape)}")
    if image_size is not None:
        (image_size,) = sizes("image_size", [image_size])
    known = configuration(timm, str(name), pretrained=bool(pretrained))
    size = (image_size, image_size) if image_size else tuple(known.input_size[1:]) if pretrained else None
    seen = (input_shape[0], *(size or input_shape[1:]))

    def try_at(side: int) -> None:
        shape = (input_shape[0], side, side)
        try_shapes(create(timm, str(name), shape, num_classes), shape, num_classes)

    try:
        network = create(timm, str(name), seen, num_classes, pretrained=pretrained is True)
        try_shapes(network, seen, num_classes)
    except UNFIT as error:
        raise too_small(error, str(name), input_shape, try_at) from error
    if pretrained:
        normalisation = {"mean": known.mean, "std": known.std}
        return Pretrained(network, image_size=size, normalisation=normalisation)
    return network if size is None else Resized(network, size)


def configuration(timm: ModuleType, name: str, *, pretrained: bool) -> Any:
    """timm's configuration of a model's weights. Raises ConfigError for an unknown name, or one without weights."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        close = get_close_matches(architecture, timm.list_models(), n=3, cutoff=0.4)
        raise ConfigError(
            f"name is {name!r}, and timm {timm.__version__} has no model of that name",
            hint=f"the nearest: {', '.join(close)}" if close else "timm.list_models() has them all",
        )
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
    tags = [one for one in tags if one] or [""]
    if tag and tag not in tags:
        raise ConfigError(
            f"name is {name!r}, and timm has no weights {tag!r} of {architecture}",
            hint=f"it has {', '.join(tags[:8])}" if tags != [""] else "it has none",
        )
    if pretrained and not timm.is_model_pretrained(name):
        raise ConfigError(f"timm has no pretrained weights for {name}", hint="pretrained=false trains from scratch")
    return timm.get_pretrained_cfg(name)


def create(
    timm: ModuleType, name: str, shape: tuple[int, ...], num_classes: int, *, pretrained: bool = False
) -> nn.Module:
    """The network for images of this shape; on the meta device without its weights. Raises ConfigError."""
    keys: dict[str, Any] = {"num_classes": num_classes, "in_chans": shape[0]}
    if timm.get_pretrained_cfg(name).fixed_input_size:
        keys["img_size"] = shape[1:]
    blank = torch.get_default_device().type == "meta"
    if not pretrained or blank:
        network: nn.Module = timm.create_model(name, **keys)
        return network
    try:
        with network_timeout():
            network = timm.create_model(name, pretrained=True, **keys)
    except Exception as error:  # of huggingface_hub, its clients and the file system: they share no class
        raise ConfigError(
            f"the pretrained weights for {name} could not be loaded: {first_line(error)}",
            hint="pretrained=false trains from scratch; teacher.checkpoint=FILE takes weights you have; a copy of "
            "another machine's folder of Hugging Face (HF_HOME) serves without a network",
        ) from error
    return network


def notes_on_timm(node: Mapping[str, Any], *, shape: tuple[int, ...], classes: int, normalize: Any) -> list[str]:
    """What `timm_model` fills in for these keys and data, as sentences without a subject."""
    if node.get("pretrained") is not True:
        return []
    known = configuration(import_timm(), str(node["name"]), pretrained=True)
    size = node.get("image_size") or known.input_size[1]
    notes = [f"starts from timm's weights, all but its last layer, which is new for {classes} classes"]
    if (size, size) != tuple(shape[1:]):
        notes.append(f"sees images of {size}x{size} pixels, which those of {by(shape[1:])} are resized to")
    if normalize == "data":
        notes.append(f"sees images normalised as its weights were trained, mean {known.mean} and std {known.std}")
    return notes
