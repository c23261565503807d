"""A network that sees less of an example than the data set has: a smaller image, or some of a table's columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_cli.errors import ConfigError


class InputView(nn.Module):
    """A network that receives whole examples and sees a view of them: images averaged to `size`, or `columns`."""

    columns: Tensor | None

    def __init__(self, network: nn.Module, *, size: int | None = None, columns: list[int] | None = None) -> None:
        super().__init__()
        self.network, self.size = network, size
        numbers = None if columns is None else torch.tensor(columns, device="cpu")
        self.register_buffer("columns", numbers, persistent=False)

    def forward(self, images: Tensor) -> Any:
        if self.columns is not None:
            images = images[:, self.columns]
        if self.size is not None:
            images = F.adaptive_avg_pool2d(images, self.size)
        return self.network(images)


def seen_shape(view: Mapping[str, Any] | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an example as a network with this view sees it. Raises ConfigError where the view has none of it."""
    if view is None:
        return shape
    size, columns = view.get("size"), view.get("columns", ":")
    if size is not None:
        if len(shape) != 3:
            raise ConfigError(f"input.size is {size}, and examples of the shape {list(shape)} are no images")
        if size > min(shape[1:]):
            raise ConfigError(f"input.size is {size}, and the images have {shape[1]}x{shape[2]} pixels")
        return (shape[0], size, size)
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
    columns = view.get("columns")
    wrapped = InputView(module, size=view.get("size"), columns=None if columns is None else chosen(columns, shape[0]))
    if bounds := getattr(module, "max_norm", None):
        wrapped.max_norm = {f"network.{name}": bound for name, bound in bounds.items()}  # type: ignore[assignment]
    return wrapped
