"""How many cores this process may use: those that it sees, and a Linux control group's share. Light: no imports."""

from __future__ import annotations

import os
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")


def seen() -> int:
    """The number of cores that the system lets this process run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def allowance(root: Path = GROUPS) -> float | None:
    """Return the cores, possibly a fraction, that a Linux control group (v1 or v2) allows; None if unlimited."""
    try:
        if (root / "cpu.max").is_file():
            quota, period = (root / "cpu.max").read_text().split()[:2]
        else:
            quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        granted = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # no control groups, or "max"
        return None
    return granted if granted > 0 else None


def usable(root: Path = GROUPS) -> int:
    """The number of threads that can run at once: whole cores that are seen and allowed, at least 1."""
    granted = allowance(root)
    return seen() if granted is None or granted >= seen() else max(1, int(granted))
