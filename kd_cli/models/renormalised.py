"""A network whose inputs are normalised in another way than the data of the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of torchvision's weights


class Renormalised(nn.Module):
    """A network that receives images under the data's normalisation and sees them under its own."""

    factor: Tensor
    offset: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        data_mean: Sequence[float],
        data_std: Sequence[float],
        mean: Sequence[float],
        std: Sequence[float],
        dims: int = 3,
    ) -> None:
        """Means and deviations per channel, of values from 0 to 1; `dims` are those of one example."""
        super().__init__()
        self.network = network
        shape = (-1, 1, 1) if dims == 3 else (-1,)
        old_mean, old_std, new_mean, new_std = (
            torch.tensor(list(values), dtype=torch.float64, device="cpu") for values in (data_mean, data_std, mean, std)
        )
        # (x * data_std + data_mean - mean) / std
        factor, offset = old_std / new_std, (old_mean - new_mean) / new_std
        self.register_buffer("factor", factor.reshape(shape), persistent=False)
        self.register_buffer("offset", offset.reshape(shape), persistent=False)

    def forward(self, images: Tensor) -> Any:
        return self.network(images * self.factor.to(images) + self.offset.to(images))


def normalisation_of(
    value: Any, *, data_mean: Sequence[float], data_std: Sequence[float]
) -> tuple[list[float], list[float]] | None:
    """Mean and deviation that `data`, `imagenet`, `none` or `{mean, std}` stands for; None for the data's own.

    One number serves every channel. ValueError for another number of channels.
    """
    if value is None or value == "data":
        return None
    channels = len(data_mean)
    if value == "none":
        return [0.0] * channels, [1.0] * channels
    if value == "imagenet":
        if channels == 1:  # grey images that are repeated to three channels: the mean of the three
            return [sum(IMAGENET["mean"]) / 3], [sum(IMAGENET["std"]) / 3]
        value = IMAGENET
    mean, std = (_per_channel(value[key], channels, key) for key in ("mean", "std"))
    return mean, std


def _per_channel(value: Any, channels: int, key: str) -> list[float]:
    values = [float(v) for v in value] if isinstance(value, list | tuple) else [float(value)] * channels
    if len(values) != channels:
        raise ValueError(f"normalize.{key} has {len(values)} numbers, and the data has {channels} channels")
    return values
