"""Text for terminals and files that cannot show every character, such as ASCII."""

from __future__ import annotations

import codecs
import io
import sys

HANDLER = "kd_cli.plain"
PLAIN = {"±": "+-", "×": "x", "–": "-", "—": "-", "…": "...", "→": "->", "≤": "<=", "≥": ">=", "²": "^2", "·": "."}


def plain(error: UnicodeError) -> tuple[str, int]:
    """Replace characters that cannot be encoded: by what is written for them in ASCII, else by a backslash escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    characters = error.object[error.start : error.end]
    escaped = (PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in characters)
    return "".join(escaped), error.end


def printable(text: str) -> str:
    """The text with its line breaks, and with every other character that cannot be printed as Python writes it."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def allow_any_text() -> None:
    """Let standard output and standard error accept every character, whatever their encoding."""
    codecs.register_error(HANDLER, plain)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=HANDLER)
