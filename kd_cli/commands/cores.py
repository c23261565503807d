"""How a process uses the machine: its threads, where a container gives it few of the cores; and its memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from kd_cli.locks import fcntl, try_lock

__all__ = ["allowance", "keep_memory", "others", "share", "threads"]

SPIN = 3000  # rounds
_held: list[int] = []  # open as long as the process lives
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_memory() -> None:
    """Have GNU's malloc keep what is freed, at the end of its heap up to half a gigabyte, for what is asked for next,
    instead of giving large blocks back to the system.

    It asks for them anew in the next step, page by page: a third of the step of 16 stacked `tinymlp`. Who has set
    malloc's own variables is left alone.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None and any(mallopt(M_MMAP_THRESHOLD, n << 20) for n in (256, 32)):  # 32 is most where it is old
        mallopt(M_TRIM_THRESHOLD, 512 << 20)


def share(environment: MutableMapping[str, str], *, several: bool = False) -> None:
    """Have the numerical libraries of a process with this environment leave other processes their share of the cores,
    and round a product alike wherever it lies in memory, which for a model in a stack depends on its company.

    A thread that has nothing to do spins for a while before it sleeps. GNU's OpenMP lets it spin so long that two busy
    processes on one machine slow each other down many times over. SPIN is enough between two layers; where others are
    at work, or `several` processes come from this one, a third of that is better for all. Who has set the time is not
    asked, and not found by others.
    """
    if "GOMP_SPINCOUNT" not in environment:
        environment["GOMP_SPINCOUNT"] = str(SPIN // 3 if others() or several else SPIN)
    environment.setdefault("MKL_CBWR", "AUTO")
    if (count := threads(environment)) is not None:
        environment["OMP_NUM_THREADS"] = str(count)


def others(folder: Path | None = None) -> bool:
    """Whether commands of this user are at work on this machine; from now on, to its end, they find this process.

    By a file in the folder for temporary files, which all lock together; who can lock it alone is alone. False where
    that cannot be told.
    """
    if fcntl is None:
        return False
    import tempfile  # not before: it takes as long as all else that a page of help needs

    try:
        path = Path(folder or tempfile.gettempdir()) / f"kd-cli-{os.getuid()}.busy"
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:
        return False
    _held.append(handle)
    try:
        found = not try_lock(handle)
    except OSError:  # a file system without locks
        return False
    for _ in range(50):  # another one that begins at this moment holds it alone, or takes it before ours has changed
        with contextlib.suppress(OSError):
            if try_lock(handle, shared=True):
                break
        time.sleep(0.001)
    return found


def allowance(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of processor time that a control group grants, by its version 2 or 1; None without a limit."""
    try:
        if (root / "cpu.max").is_file():
            quota, period = (root / "cpu.max").read_text().split()[:2]
        else:
            quota, period = ((root / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        granted = float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):  # no groups here, or "max"
        return None
    return granted if granted > 0 else None


def threads(environment: Mapping[str, str], root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The number of threads to ask for where the libraries' own choice, one for each core they see, is too large.

    A group that has used up its time stands still until its next period, and a step with more threads than cores waits
    for the one that stands. None where the choice is right, or the person's own.
    """
    granted = allowance(root)
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if granted is None or granted >= seen or "OMP_NUM_THREADS" in environment:
        return None
    return max(1, int(granted))
