"""What a mistyped word was probably meant to be. Nothing of this package is imported here."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

LIKE = 0.6  # difflib's own threshold: below it a suggestion is noise


def nearest(word: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Return up to `n` candidates that resemble `word`, the most alike first."""
    scores = {candidate: _likeness(word, candidate) for candidate in candidates}
    alike = [candidate for candidate in scores if scores[candidate] >= LIKE]
    return sorted(alike, key=lambda candidate: (-scores[candidate], len(candidate)))[:n]


def did_you_mean(word: str, candidates: Iterable[str]) -> str | None:
    """Return "did you mean X?" for the candidate most like `word`, or None where none is."""
    best = nearest(word, candidates, n=1)
    return f"did you mean {best[0]}?" if best else None


def _likeness(word: str, candidate: str) -> float:
    """Compare whole dotted keys, and their last parts: `epoch` is found in `training.epochs`."""
    word, candidate = word.lower(), candidate.lower()
    whole = SequenceMatcher(None, word, candidate).ratio()
    if "." not in word + candidate:
        return whole
    last = SequenceMatcher(None, word.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
    return max(whole, 0.95 * last)  # a key in the section that was asked for comes before its namesake elsewhere
