"""Which examples are set aside: one recorded rule, the same on every machine, in every version and for every seed.

All rules draw from one recorded permutation: of the positions alone (`set_aside`), class by class so that a rare class
keeps examples to train on (`set_aside_by_class`), or of whole groups, such as everything that one writer has written
(`set_aside_groups`).
"""

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


def set_aside_by_class(labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """As `set_aside`, in every class the same share: of labels [N], `count` positions and the others, both ascending.

    A class's share of `count` is rounded by largest remainders, and never takes the last example of a class. So fewer
    than `count` are set aside if there are hardly more examples than classes.
    """
    ordered = labels.numpy()[rule_order(len(labels))]
    sizes = np.bincount(ordered)
    exact = sizes * (count / len(labels))
    quota = np.floor(exact).astype(int)
    for c in np.argsort(quota - exact, kind="stable"):  # the largest remainders first
        if quota.sum() < count and quota[c] < exact[c]:
            quota[c] += 1
    quota = np.minimum(quota, np.maximum(sizes - 1, 0))
    rank = np.empty(len(labels), dtype=int)  # 0 for the first of its class in the permutation
    for c in range(len(sizes)):
        rank[ordered == c] = np.arange(sizes[c])
    return _parts(rule_order(len(labels)), rank < quota[ordered])


def set_aside_groups(groups: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Whole groups, about `count` examples: of group numbers [N], the positions set aside and the others, ascending.

    Takes groups in the order of the recorded permutation while that brings the number of examples nearer to `count`,
    at least one if `count` is above 0, and never all of them.
    """
    numbers, sizes = np.unique(groups.numpy(), return_counts=True)
    order = rule_order(len(numbers))
    totals = np.concatenate([[0], np.cumsum(sizes[order])])
    allowed = np.arange(1 if count else 0, max(len(numbers), 1))
    taken = allowed[np.argmin(np.abs(totals[allowed] - count))] if len(allowed) else 0
    mine = np.isin(groups.numpy(), numbers[order[:taken]])
    return _parts(np.arange(len(groups)), mine)


def _parts(order: np.ndarray, first: np.ndarray) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(np.sort(order[first])), torch.from_numpy(np.sort(order[~first]))
