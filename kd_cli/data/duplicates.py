"""Examples that occur in two parts, and examples that show nothing."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from kd_cli.data.stored import Images

CHUNK = 4 << 20  # bytes hashed at a time


def known(images: Images, others: Images) -> Tensor:
    """Which of the images [N, *shape] occur, in every value, among `others` [M, *shape]: [N], bool."""
    if not len(images) or not len(others):
        return torch.zeros(len(images), dtype=torch.bool)
    return same(images, others, hashes(images), hashes(others))


def same(images: Images, others: Images, ours: np.ndarray, theirs: np.ndarray) -> Tensor:
    """As `known`, for images whose hashes are given."""
    order = np.argsort(theirs, kind="stable")
    place = np.searchsorted(theirs[order], ours)
    found = np.zeros(len(images), dtype=bool)
    for i in np.flatnonzero(np.isin(ours, theirs)):
        for k in order[place[i] :]:
            if theirs[k] != ours[i]:
                break
            if torch.equal(images[i : i + 1], others[int(k) : int(k) + 1]):
                found[i] = True
                break
    return torch.from_numpy(found)


def constant(images: Tensor) -> Tensor:
    """Which of the images [N,C,H,W] or [N, *shape] have the same value in every pixel (of each channel): [N], bool."""
    flat = images.flatten(2) if images.dim() == 4 else images.flatten(1)
    if flat.shape[-1] < 2:
        return torch.zeros(len(flat), dtype=torch.bool)
    few = flat[..., :: max(1, flat.shape[-1] // 16)]  # enough to rule out almost all pictures at little cost
    found = (few == few[..., :1]).flatten(1).all(1)
    for i in found.nonzero()[:, 0].tolist():
        found[i] = bool((flat[i] == flat[i, ..., :1]).all())
    return found


def hashes(images: Images) -> np.ndarray:
    """A 64-bit number for each image, equal for equal images: its words times fixed odd numbers, added modulo 2^64."""
    width = images[:1].numel() * images.element_size()
    weights = np.random.RandomState(0).randint(1, 2**62, (width + 7) // 8).astype(np.uint64) * 2 + 1
    out = [np.empty(0, dtype=np.uint64)]
    for part in images.split(max(1, CHUNK // max(width, 1))):
        content = part.contiguous().reshape(len(part), -1).view(torch.uint8).numpy()
        if width % 8:  # else the pages of a copy take longer than the products
            content = np.pad(content, ((0, 0), (0, -width % 8)))
        out.append(content.view(np.uint64) @ weights)
    return np.concatenate(out)
