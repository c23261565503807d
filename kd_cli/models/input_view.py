"""A network that sees less of an example than the data set has: fewer pixels or channels, some of a table's columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_cli.errors import ConfigError

GREY = "grey"  # in place of numbers of channels: their mean


class InputView(nn.Module):
    """A network that receives whole examples and sees a view of them: images averaged to `size`, or `columns`.

    Of images it may see some channels, or their mean: what is at these `columns` of the first axis, or with `grey`.
    """

    columns: Tensor | None

    def __init__(
        self, network: nn.Module, *, size: int | None = None, columns: list[int] | None = None, grey: bool = False
    ) -> None:
        super().__init__()
        self.network, self.size, self.grey = network, size, grey
        numbers = None if columns is None else torch.tensor(columns, device="cpu")
        self.register_buffer("columns", numbers, persistent=False)

    def forward(self, images: Tensor) -> Any:
        if self.columns is not None:
            images = images[:, self.columns]
        if self.grey:
            images = images.mean(1, keepdim=True)
        if self.size is not None:
            images = F.adaptive_avg_pool2d(images, self.size)
        return self.network(images)


def seen_shape(view: Mapping[str, Any] | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an example as a network with this view sees it. Raises ConfigError where the view has none of it."""
    if view is None:
        return shape
    size, channels, columns = view.get("size"), view.get("channels"), view.get("columns", ":")
    for key, value in (("size", size), ("channels", channels)):
        if value is not None and len(shape) != 3:
            raise ConfigError(f"input.{key} is {value}, and examples of the shape {list(shape)} are no images")
    if size is not None and size > min(shape[1:]):
        raise ConfigError(f"input.size is {size}, and the images have {shape[1]}x{shape[2]} pixels")
    if channels not in (None, GREY) and max(channels) >= shape[0]:
        raise ConfigError(f"input.channels is {channels}, and the images have {shape[0]} channels, counted from 0")
    if size is not None or channels is not None:
        seen = shape[0] if channels is None else 1 if channels == GREY else len(channels)
        return (seen, size or shape[1], size or shape[2])
    if len(shape) != 1:
        raise ConfigError(f"input.columns chooses features of a table, and examples have the shape {list(shape)}")
    return (len(chosen(columns, shape[0])),)


def chosen(columns: list[int] | str, features: int) -> list[int]:
    """The numbers of chosen features, of a list or of a part such as "0:50" or "50:". Raises ConfigError."""
    if isinstance(columns, str):
        first, _, last = columns.partition(":")
        found = list(range(features))[slice(int(first or 0), int(last) if last else None)]
    else:
        found = columns
    if not found or max(found) >= features:
        raise ConfigError(f"input.columns is {columns}, and the examples have {features} features, counted from 0")
    return found


def viewed(module: nn.Module, view: Mapping[str, Any] | None, shape: tuple[int, ...]) -> nn.Module:
    """The module behind its view of examples of this shape; itself without one."""
    if view is None:
        return module
    columns, channels = view.get("columns"), view.get("channels")
    if columns is not None:
        columns = chosen(columns, shape[0])
    elif channels != GREY:
        columns = channels
    wrapped = InputView(module, size=view.get("size"), columns=columns, grey=channels == GREY)
    if bounds := getattr(module, "max_norm", None):
        wrapped.max_norm = {f"network.{name}": bound for name, bound in bounds.items()}  # type: ignore[assignment]
    return wrapped
