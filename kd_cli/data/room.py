"""How much room a machine has: memory that is available to this process, free bytes of a disk."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def available_memory() -> int | None:
    """Bytes of memory that this process can still take: the machine's and its control group's; None if not known."""
    found = [bytes_ for bytes_ in (_of_machine(), _of_group()) if bytes_ is not None]
    return min(found, default=None)


def free_disk(folder: Path) -> int:
    """Free bytes of the disk that a folder is on, or will be when it is made; 0 where that cannot be seen."""
    try:
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def cores() -> int:
    """The processor cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # macOS and Windows
        return os.cpu_count() or 1


def gigabytes(n: int) -> str:
    """A number of bytes in words: 2.5 GB, 49 MB."""
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB" if n >= 1e6 else f"{n / 1e3:.0f} kB"


def _of_machine() -> int | None:
    try:
        text = Path("/proc/meminfo").read_text()
        return 1024 * int(text.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, OSError, ValueError):
        return None


def _of_group() -> int | None:
    """What the control group of this process (version 2), as containers set it, leaves of its limit."""
    try:
        line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
        group = Path("/sys/fs/cgroup") / line[3:].lstrip("/")
        return min(
            (int(limit) - int((folder / "memory.current").read_text()) + _cache(folder))
            for folder in (group, *group.parents)
            if (folder / "memory.max").is_file() and (limit := (folder / "memory.max").read_text().strip()) != "max"
        )
    except (OSError, StopIteration, ValueError):
        return None


def _cache(folder: Path) -> int:
    """Bytes of files in memory that the system gives back when they are needed."""
    stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    return int(stat.get("inactive_file", 0))
