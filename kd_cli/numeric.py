"""What counts as a number in a configuration: True and False do not. Nothing of this package is imported here."""

from __future__ import annotations

import math
from typing import Any


def is_whole(value: Any) -> bool:
    """Return whether a value is an integer, and no bool, which Python counts as one."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a value is a finite number that a float can hold, and no bool."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer of more than 308 digits
        return False
