"""Which examples are set aside: one recorded rule, the same on every machine, in every version and for every seed."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

RULE_SEED = 20150309  # part of the recorded rule: another number gives another split


def rule_order(total: int) -> np.ndarray:
    """The recorded permutation of `total` positions, from which every part is drawn.

    It is numpy's `RandomState(RULE_SEED).permutation(total)`: numpy promises that this stream never changes, and torch
    makes no such promise for its own generators.
    """
    return np.random.RandomState(RULE_SEED).permutation(total)


def first_positions(total: int, count: int) -> Tensor:
    """The first `count` positions of the recorded permutation, in ascending order: [count]."""
    return torch.from_numpy(np.sort(rule_order(total)[:count]))


def set_aside(total: int, count: int) -> tuple[Tensor, Tensor]:
    """Positions as two ascending parts: the first `count` of the recorded permutation of `total`, and the others."""
    order = rule_order(total)
    return torch.from_numpy(np.sort(order[:count])), torch.from_numpy(np.sort(order[count:]))
