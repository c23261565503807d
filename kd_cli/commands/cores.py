"""How a process shares the machine: threads, their idle time, and freed memory. Set before torch is imported."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from kd_cli.cpus import GROUPS, allowance, seen, usable
from kd_cli.locks import fcntl, try_lock

SPIN, SHORT_SPIN = 3_000, 1000  # GNU OpenMP's spin counts: see share
_held: list[int] = []  # file handles that stay open, and with them their locks, until the process ends
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_memory() -> None:
    """Let GNU's malloc keep up to half a gigabyte of freed memory for the next allocations.

    By default malloc returns large blocks to the system, and each training step then pays for the same pages again: a
    third of the step of 16 stacked `tinymlp`. Does nothing where the user has set malloc's own variables.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None and any(
        mallopt(M_MMAP_THRESHOLD, n << 20) for n in (256, 32)
    ):  # older versions allow 32 MB at most
        mallopt(M_TRIM_THRESHOLD, 512 << 20)


def share(environment: MutableMapping[str, str], *, several: bool = False) -> None:
    """Set the environment variables by which numerical libraries leave other processes their share of the cores.

    An idle OpenMP thread spins for a while before it sleeps. With GNU's default, two busy processes on one machine slow
    each other down many times over. SPIN rounds bridge the time between two layers; a third of it is better where other
    processes are busy or this one will start `several`. If the user set GOMP_SPINCOUNT, it stays, and this process does
    not register as busy. MKL_CBWR makes matrix products independent of their alignment in memory, so a model rounds
    alike by itself and in a stack.
    """
    if "GOMP_SPINCOUNT" not in environment:
        environment["GOMP_SPINCOUNT"] = str(SHORT_SPIN if others() or several else SPIN)
    environment.setdefault("MKL_CBWR", "AUTO")
    if (count := threads(environment)) is not None:
        environment["OMP_NUM_THREADS"] = str(count)


def others(folder: Path | None = None) -> bool:
    """Return whether this user runs other commands on this machine, and register this process until it ends.

    All commands hold a shared lock on one file in the folder for temporary files; a process that can lock the file
    exclusively is alone. False on systems without such locks.
    """
    if fcntl is None:
        return False
    import tempfile  # imported late: it takes as long as everything else on the help page

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
    for _ in range(50):  # a command that starts at the same moment may hold the exclusive lock
        with contextlib.suppress(OSError):
            if try_lock(handle, shared=True):
                break
        time.sleep(0.001)
    return found


def threads(environment: Mapping[str, str], root: Path = GROUPS) -> int | None:
    """Return the number of threads to set where the libraries' default, one per visible core, is too large.

    A control group that has used up its time stands still until its next period, and a step that uses more threads than
    the group has cores waits for the thread that stands still. None where the default fits or OMP_NUM_THREADS is set.
    """
    granted = allowance(root)
    if granted is None or granted >= seen() or "OMP_NUM_THREADS" in environment:
        return None
    return usable(root)
