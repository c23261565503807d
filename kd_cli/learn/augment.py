"""Augmentation of a whole batch on its device: random numbers are drawn first and then applied to the images.

`draw` takes a generator and returns an epoch's numbers, one row for an example; `apply` is deterministic. What an
example looks like in an epoch does not depend on its batch or its device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_cli.errors import ConfigError

__all__ = ["Augment"]


@dataclass(frozen=True)
class Augment:
    """Shifts, flips and affine maps of images.

    `jitter` shifts each example by up to that many pixels in any direction, independently in x and y (Hinton et al.
    2015, section 3). `crop` pads by that many pixels and crops back at random, as in training on CIFAR: a shift too,
    added to the jitter's. `flip` mirrors left and right with probability 1/2, after the shift.

    Before these, about the centre and with bilinear interpolation: `rotate` turns by up to that many degrees, `shear`
    slants by up to that many, `scale` enlarges or shrinks by up to that share of the size (Simard et al. 2003,
    section 2); each is drawn evenly.
    """

    jitter: int = 0
    crop: int = 0
    flip: bool = False
    rotate: float = 0.0
    shear: float = 0.0
    scale: float = 0.0

    @property
    def bends(self) -> bool:
        """Whether pixels are computed, not only moved."""
        return bool(self.rotate or self.shear or self.scale)

    @property
    def enabled(self) -> bool:
        return bool(self.jitter or self.crop or self.flip or self.bends)

    def draw(self, n: int, generator: torch.Generator) -> Tensor:
        """The numbers for n examples, `[n, 6]` float32 on the generator's device: down, right (whole pixels), mirrored
        (0 or 1), turned, slanted (radians), enlarged (a factor).

        What is switched off draws too, so that switching it on leaves the other draws as they were.
        """

        def shifts(pixels: int) -> Tensor:
            return torch.randint(-pixels, pixels + 1, (n, 2), generator=generator, device=generator.device)

        jitter, crop = shifts(self.jitter), shifts(self.crop)
        coin = torch.randint(0, 2, (n, 1), generator=generator, device=generator.device)
        if not self.flip:
            coin.zero_()
        most = torch.tensor([math.radians(self.rotate), math.radians(self.shear), self.scale], device=coin.device)
        bent = (torch.rand(n, 3, generator=generator, device=generator.device) * 2 - 1) * most
        bent[:, 2] += 1
        return torch.cat([jitter + crop, coin, bent], 1)

    def apply(self, images: Tensor, draws: Tensor, *, fill: float | Tensor = 0.0) -> Tensor:
        """Images `[B, C, H, W]` changed by their rows of `draws` `[B, 6]`; shifts and flips copy pixels exactly.

        `fill` is what comes in from outside, a number or one for each channel `[C]`: black as the images have it, after
        normalisation. Returns the images themselves when nothing is enabled. Raises ConfigError for other shapes.
        """
        if not self.enabled:
            return images
        if images.ndim != 4:
            raise ConfigError(
                f"{self} moves pixels and needs images [B, C, H, W], but a batch has the shape {list(images.shape)}",
                hint="turn jitter, crop, flip, rotate, shear and scale off for data that are not images",
            )
        if draws.shape != (len(images), 6):
            raise ValueError(f"draws {list(draws.shape)} do not belong to {len(images)} images: expected [B, 6]")
        draws = draws.to(images.device)
        if self.bends:
            images = _bend(images, draws[:, 3:], fill=fill)
        down, right, mirrored = draws[:, :3].long().unbind(1)
        if self.jitter or self.crop:
            images = _shift(images, down, right, reach=self.jitter + self.crop, fill=fill)
        if self.flip:
            images = torch.where(mirrored.bool()[:, None, None, None], images.flip(-1), images)
        return images


def _bend(images: Tensor, draws: Tensor, *, fill: float | Tensor) -> Tensor:
    """Each image `[C, H, W]` turned, slanted and enlarged by its own row of `draws` `[B, 3]`, about its centre.

    A point of the result at p comes from `scale^-1 shear^-1 rotation^-1 p`. 0.3 ms for 128 x 1 x 28 x 28 on one core.
    """
    H, W = images.shape[-2:]
    dtype = images.dtype if images.dtype in (torch.float32, torch.float64) else torch.float32
    turned, slanted, enlarged = (column[:, None, None] for column in draws.to(dtype).unbind(1))
    y = (torch.arange(H, dtype=dtype, device=images.device) - (H - 1) / 2)[:, None]
    x = (torch.arange(W, dtype=dtype, device=images.device) - (W - 1) / 2)[None]
    cos, sin = turned.cos(), turned.sin()
    up, along = cos * y - sin * x, cos * x + sin * y  # rotated back
    along = along + slanted.tan() * up
    grid = torch.stack([along * (2 / W), up * (2 / H)], -1) / enlarged[..., None]
    black = torch.as_tensor(fill, dtype=dtype, device=images.device).reshape(-1, 1, 1)
    bent = F.grid_sample(images.to(dtype) - black, grid, align_corners=False) + black  # zeros come in from outside
    return bent.to(images.dtype)


def _shift(images: Tensor, down: Tensor, right: Tensor, *, reach: int, fill: float | Tensor) -> Tensor:
    """Each image shifted by its own (down, right), both within [-reach, reach].

    A shifted row of an image is W neighbours in the padded batch's memory, so the shift is a copy of B*C*H such runs:
    0.08 ms for 128 x 1 x 28 x 28 on two cores. A gather of single pixels takes 0.22 ms, indexing windows of the padded
    images 0.10 ms, a loop over the examples 0.9 ms.
    """
    B, C, H, W = images.shape
    height, width = H + 2 * reach, W + 2 * reach
    padded = images.new_empty(B, C, height, width)
    padded[:] = torch.as_tensor(fill, dtype=images.dtype, device=images.device).reshape(-1, 1, 1)
    padded[:, :, reach : reach + H, reach : reach + W] = images
    runs = padded.view(-1).unfold(0, W, 1)  # a view: run i is the W numbers from i on
    planes = torch.arange(B * C, device=images.device).view(B, C, 1) * (height * width)
    rows = torch.arange(H, device=images.device) * width
    corners = (reach - down) * width + (reach - right)
    starts = planes + rows + corners[:, None, None]
    return runs.index_select(0, starts.view(-1)).view(B, C, H, W)
