"""Means and standard deviations of a data set, and the normalisation that uses them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 4096  # examples converted at a time, so that no float copy of a whole data set is made


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Images [N, *shape], uint8 or float -> (images - mean) / std in `dtype`, a new tensor; uint8 counts as 0..1."""
    scale = 255.0 if images.dtype == torch.uint8 else 1.0
    work = torch.promote_types(dtype, torch.float32)  # half precision would round the mean itself
    per_channel = (-1, 1, 1) if images.dim() == 4 else (-1,)
    shift, width = (
        torch.tensor([scale * value for value in values], dtype=work, device=images.device).reshape(per_channel)
        for values in (mean, std)
    )
    out = torch.empty(images.shape, dtype=dtype, device=images.device)
    for start in range(0, len(images), CHUNK):
        part = images[start : start + CHUNK].to(work, copy=True)
        out[start : start + CHUNK] = part.sub_(shift).div_(width)
    return out


def mean_and_std(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation per channel of [N,C,H,W], over everything for other shapes; a deviation of 0 becomes 1."""
    channels = images.unbind(1) if images.dim() == 4 else (images,)
    moments = _moments_of_bytes if images.dtype == torch.uint8 else _moments_of_floats
    pairs = [moments(channel) for channel in channels]
    # Rounding may leave a tiny deviation for constant images, and dividing by it would amplify the rounding error.
    return tuple(m for m, _ in pairs), tuple(s if s > 1e-7 * abs(m) else 1.0 for m, s in pairs)


def _moments_of_bytes(values: Tensor) -> tuple[float, float]:
    """Computed from the histogram: exact, and without a float copy four times as large."""
    counts = torch.zeros(256, dtype=torch.int64)
    for part in values.split(CHUNK):
        counts += torch.bincount(part.flatten(), minlength=256)
    share = counts.double() / values.numel()
    levels = torch.arange(256, dtype=torch.float64) / 255
    mean = (share * levels).sum()
    return float(mean), float((share * (levels - mean) ** 2).sum().sqrt())


def _moments_of_floats(values: Tensor) -> tuple[float, float]:
    mean = sum(float(part.double().sum()) for part in values.split(CHUNK)) / values.numel()
    square = sum(float((part.double() - mean).square_().sum()) for part in values.split(CHUNK)) / values.numel()
    return mean, math.sqrt(square)
