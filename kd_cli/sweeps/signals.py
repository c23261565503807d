"""Ctrl-C once ends training after the epoch, twice at once; a scheduler's SIGTERM is as the first."""

from __future__ import annotations

import signal
import sys
from types import FrameType


class Stop:
    """Whether this process has been asked to stop."""

    asked = False

    @classmethod
    def listen(cls) -> None:
        """Take over SIGINT and SIGTERM; call it in the main thread."""
        cls.asked = False
        signal.signal(signal.SIGINT, cls._hear)
        signal.signal(signal.SIGTERM, cls._hear)

    @classmethod
    def _hear(cls, number: int, frame: FrameType | None) -> None:
        if cls.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        cls.asked = True
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        sys.stderr.write(f"\nstopping at the end of this epoch{again}\n")


def stopping() -> bool:
    return Stop.asked
