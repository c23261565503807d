"""Means and standard deviations of a data set, and the normalisation that uses them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 4096  # examples converted at a time, so that no float copy of a whole data set is made


class Normalisation:
    """`(images - mean) / std` in `dtype`, per channel for images [B,C,H,W], else per feature or by one number.

    `mean` and `std` count bytes as 0..1. The result does not depend on the batch that an image is in.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> None:
        self.mean, self.std, self.dtype = tuple(mean), tuple(std), dtype
        self._tensors: dict[tuple[torch.device, bool, int], tuple[Tensor, Tensor]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, *shape], uint8 or float -> a new tensor of the same shape."""
        key = (images.device, images.dtype == torch.uint8, images.dim())
        if key not in self._tensors:
            self._tensors[key] = self._constants(*key)
        shift, width = self._tensors[key]
        return images.to(shift.dtype, copy=True).sub_(shift).div_(width).to(self.dtype)

    def _constants(self, device: torch.device, is_bytes: bool, dim: int) -> tuple[Tensor, Tensor]:
        scale = 255.0 if is_bytes else 1.0
        work = torch.promote_types(self.dtype, torch.float32)  # half precision would round the mean itself
        shape = (-1, 1, 1) if dim == 4 else (-1,)
        shift, width = (
            torch.tensor([scale * value for value in values], dtype=work, device=device).reshape(shape)
            for values in (self.mean, self.std)
        )
        return shift, width


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Images [N, *shape], uint8 or float -> (images - mean) / std in `dtype`, a new tensor; uint8 counts as 0..1."""
    return Normalisation(mean, std, dtype)(images)


def mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of [N, *shape]; a deviation of 0 becomes 1.

    Per channel of [N,C,H,W]; per feature of floating-point tables [N,F], whose columns have units of their own; over
    everything for other shapes, and for bytes [N,F], which are flattened pictures of one unit.
    """
    if images.dim() == 2 and images.is_floating_point():
        pairs = _moments_of_columns(images)
    else:
        channels = images.unbind(1) if images.dim() == 4 else (images,)
        moments = _moments_of_bytes if images.dtype == torch.uint8 else _moments_of_floats
        pairs = [moments(channel) for channel in channels]
    return _as_constants(pairs)


def byte_counts(images: Tensor) -> Tensor:
    """How often each byte occurs in each channel of images [N,C,H,W]: [C,256]."""
    return torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)])


def mean_and_std_of_counts(counts: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """`mean_and_std` of images of bytes whose `byte_counts` [C,256] are given."""
    return _as_constants([_moments_of_counts(channel) for channel in counts])


def _as_constants(pairs: Sequence[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    # Rounding may leave a tiny deviation for constant images, and dividing by it would amplify the rounding error.
    return tuple(m for m, _ in pairs), tuple(s if s > 1e-7 * abs(m) else 1.0 for m, s in pairs)


def _moments_of_columns(table: Tensor) -> list[tuple[float, float]]:
    mean = torch.stack([part.double().sum(0) for part in table.split(CHUNK)]).sum(0) / len(table)
    square = torch.stack([(part.double() - mean).square_().sum(0) for part in table.split(CHUNK)]).sum(0) / len(table)
    return list(zip(mean.tolist(), square.sqrt().tolist(), strict=True))


def _moments_of_bytes(values: Tensor) -> tuple[float, float]:
    """Computed from the histogram: exact, and without a float copy four times as large."""
    counts = torch.zeros(256, dtype=torch.int64)
    for part in values.split(CHUNK):
        counts += torch.bincount(part.flatten(), minlength=256)
    return _moments_of_counts(counts)


def _moments_of_counts(counts: Tensor) -> tuple[float, float]:
    share = counts.double() / int(counts.sum())
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = (share * levels).sum()
    return float(mean), float((share * (levels - mean) ** 2).sum().sqrt())


def _moments_of_floats(values: Tensor) -> tuple[float, float]:
    mean = sum(float(part.double().sum()) for part in values.split(CHUNK)) / values.numel()
    square = sum(float((part.double() - mean).square_().sum()) for part in values.split(CHUNK)) / values.numel()
    return mean, math.sqrt(square)
