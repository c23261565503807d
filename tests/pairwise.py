"""Fewer cases than a product of parameters: every two values of two parameters meet in one case at least."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Choose combinations of one value of each axis, greedily, until every pair of values has occurred."""

    def pairs(case: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}

    product = {case: pairs(case) for case in itertools.product(*(range(len(axis)) for axis in axes))}
    missing, chosen = set().union(*product.values()), []
    while missing:
        best = max(product, key=lambda case: len(product[case] & missing))  # the first of equals
        chosen.append(tuple(axis[i] for axis, i in zip(axes, best, strict=True)))
        missing -= product[best]
    return chosen
