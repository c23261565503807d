"""How a command ends where it does not end well."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn

from kd_cli.errors import KdError


@contextlib.contextmanager
def short_endings() -> Iterator[None]:
    """Exit with 1 after a user's mistake or Ctrl-C, with a line and no traceback, and when nobody reads the output."""
    try:
        yield
    except KdError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\ninterrupted")
    except BrokenPipeError:
        exit_unread()


def exit_unread() -> NoReturn:
    """Exit with 1 when the reader of our output left, as `head` does; Python would write what is buffered."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)
