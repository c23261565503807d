"""How far reading, decoding or downloading is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType

from tqdm import tqdm

log = logging.getLogger(__name__)

EVERY = 10.0  # seconds between two lines of progress
QUIET = 2.0  # seconds before a bar is shown: most folders are read sooner


class ReadingProgress:
    """Counts what was read of a known total."""

    def __init__(self, verb: str, things: str, total: int) -> None:
        """`verb` is what was done to the `things`: decoded pictures."""
        self.verb, self.things, self.total, self.done = verb, things, total, 0
        self.begun = self.said = time.monotonic()
        self.bar = tqdm(
            total=total,
            desc=f"{verb} {things}",
            unit=things.removesuffix("s"),
            leave=False,
            delay=QUIET,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {remaining} left, {rate_fmt}",
        )

    def add(self, n: int) -> None:
        """So many more are done."""
        self.done += n
        self.bar.update(n)
        now = time.monotonic()
        if self.bar.disable and now - self.said >= EVERY:
            self.said = now
            left = (now - self.begun) * (self.total - self.done) / max(self.done, 1)
            log.info("%s %s of %s %s, %.0f s left", self.verb, f"{self.done:,}", f"{self.total:,}", self.things, left)

    def __enter__(self) -> ReadingProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bar.close()
