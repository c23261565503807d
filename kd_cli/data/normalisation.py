"""How stored images become a network's input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
