"""Ctrl-C once, or a scheduler's SIGTERM, ends training after the epoch; a second Ctrl-C ends it at once."""

from __future__ import annotations

import signal
import sys
from types import FrameType


class Stop:
    """Whether this process has been asked to stop."""

    asked = False

    @classmethod
    def listen(cls) -> None:
        """Handle SIGINT and SIGTERM from now on; call it in the main thread."""
        cls.asked = False
        signal.signal(signal.SIGINT, cls._handle)
        signal.signal(signal.SIGTERM, cls._handle)

    @classmethod
    def _handle(cls, number: int, frame: FrameType | None) -> None:
        if cls.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        cls.asked = True
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        sys.stderr.write(f"\nstopping at the end of this epoch{again}\n")


def stopping() -> bool:
    """Whether training should stop at the end of this epoch."""
    return Stop.asked
