"""Suggestions for a mistyped word. Nothing of this package is imported here."""

from __future__ import annotations

import re
from collections.abc import Iterable

LIKE = 0.65  # the least likeness of a suggestion: two typing errors in six letters; below it, hints mislead
SECTION = 0.9  # of the same key in another section: a key in the section that was typed comes first


def nearest(word: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Return up to `n` candidates that resemble `word`, the most alike first; the word itself is none."""
    scores = {candidate: likeness(word, candidate) for candidate in candidates if candidate != word}
    alike = [candidate for candidate in scores if scores[candidate] >= LIKE]
    return sorted(alike, key=lambda candidate: (-scores[candidate], len(candidate)))[:n]


def did_you_mean(word: str, candidates: Iterable[str]) -> str | None:
    """Return "did you mean X?" for the candidate most like `word`, or None where none is."""
    best = nearest(word, candidates, n=1)
    return f"did you mean {best[0]}?" if best else None


def likeness(word: str, candidate: str) -> float:
    """Return how alike two names are, from 0 to 1: 1 minus the typing errors between them as a share of the longer.

    Dotted keys are compared as a whole and by their last parts: `epoch` is like `training.epochs`.
    """
    word, candidate = word.lower(), candidate.lower()
    whole = _likeness(re.sub(r"[.-]", "_", word), re.sub(r"[.-]", "_", candidate))
    if "." not in word + candidate:
        return whole
    if word.count(".") != candidate.count(".") and whole < SECTION:  # else learning_rate is like training.rotate
        whole = 0.0
    last = _likeness(word.rpartition(".")[2], candidate.rpartition(".")[2])
    if "." in word and "." in candidate and last < LIKE:  # else training.grad_clip is like training.flip
        whole = 0.0
    return max(whole, SECTION * last)


def _likeness(a: str, b: str) -> float:
    longer = max(len(a), len(b))
    if longer == 0 or min(len(a), len(b)) < LIKE * longer:  # too many letters are missing
        return 0.0
    return 1 - typing_errors(a, b) / longer


def typing_errors(a: str, b: str) -> int:
    """Return the least number of letters to insert, leave out, replace, or swap with the next, to make b of a."""
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            errors = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                errors = min(errors, before[j - 2] + 1)
            row.append(errors)
        before, last = last, row
    return last[-1]
