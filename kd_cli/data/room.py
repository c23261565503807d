"""How much room a machine has: memory that is available to this process, free bytes of a disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kd_cli.cpus import GROUPS


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


@dataclass(frozen=True)
class _Version:
    """Where a version of Linux's control groups says what memory a group may take and has taken."""

    limit: str
    used: str
    cache: str  # the line of memory.stat with the bytes of files that the system gives back when they are needed


SECOND = _Version("memory.max", "memory.current", "inactive_file")
FIRST = _Version("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
UNLIMITED = 1 << 60  # version 1 writes a number above this where there is no limit, version 2 the word max


def _of_group(root: Path = GROUPS, own: Path = Path("/proc/self/cgroup")) -> int | None:
    """What the control groups of this process, as containers set them, leave of their limits: of either version."""
    try:
        groups = [found for line in own.read_text().splitlines() for found in _groups(line, root)]
        left = [_left(group, version) for group, version in groups]
    except (OSError, ValueError):
        return None
    return min((one for one in left if one is not None), default=None)


def _groups(line: str, root: Path) -> Iterator[tuple[Path, _Version]]:
    """The folders of a line of /proc/self/cgroup and of those around it, where it is of memory."""
    number, controllers, name = line.split(":", 2)
    if number == "0":
        top, version = root, SECOND
    elif "memory" in controllers.split(","):
        top, version = root / "memory", FIRST
    else:
        return
    for group in (top / name.lstrip("/"), *(top / name.lstrip("/")).parents):
        yield group, version


def _left(group: Path, version: _Version) -> int | None:
    """What one group leaves of its limit; None where it has none."""
    if not (group / version.limit).is_file():
        return None
    limit = (group / version.limit).read_text().strip()
    if limit == "max" or int(limit) >= UNLIMITED:
        return None
    stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(limit) - int((group / version.used).read_text()) + int(stat.get(version.cache, 0))
