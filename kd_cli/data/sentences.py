"""Words of the notes on a data set: numbers with their nouns, and long lists cut short."""

from __future__ import annotations

from collections.abc import Iterable

NOUNS = ("picture", "recording", "file", "link", "example", "feature", "column", "row", "value")
PLURAL = {"is": "are", "has": "have", "uses": "use", "its": "their"}


def sentence(text: str, n: int, **values: object) -> str:
    """The text with {n} and values filled in; {pictures}, {is}, {has} and their like agree in number with n.

    >>> sentence("{n} {pictures} {is} blank", 1)
    '1 picture is blank'
    """
    nouns = {f"{noun}s": noun if n == 1 else f"{noun}s" for noun in NOUNS}
    verbs = {word: word if n == 1 else plural for word, plural in PLURAL.items()}
    return text.format(n=f"{n:,}", **nouns, **verbs, **values)


def listed(names: Iterable[str], most: int = 10) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
