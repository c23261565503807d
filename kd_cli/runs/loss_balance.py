"""Sentences on terms of the loss that hardly reach the student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LEAST = 0.01  # share of the gradient below which a term is named


def small_terms(balance: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each term whose share of the gradient is below 1 %; a term without a weight has no share."""
    found: dict[str, list[str]] = {}
    for row in balance:
        for term, share in row["shares"].items():
            if share is not None and 0 < share < LEAST:
                found.setdefault(term, []).append(f"{share:.2g} at the {row['when']}")
    return [
        f"the loss's term {term!r} is less than 1 % of the student's gradient ({', '.join(where)} of the training): "
        "other weights would make it count"
        for term, where in found.items()
    ]
