"""Locks between processes, by files that are gone afterwards."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Held(Exception):
    """Another process holds the lock."""


@contextlib.contextmanager
def lock(path: Path, *, waiting: Callable[[float], None] | None = None) -> Iterator[None]:
    """Hold a lock that no other process or thread holds, by a file that is gone afterwards.

    `waiting` is called again and again with the seconds waited, and may raise; without it a lock that is held elsewhere
    raises Held at once.
    """
    if fcntl is None:
        from filelock import FileLock, Timeout

        try:
            with FileLock(path, timeout=0 if waiting is None else -1):
                yield
        except Timeout as error:
            raise Held(str(path)) from error
        return
    started, pause = time.monotonic(), 0.002
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if try_lock(handle) and is_at(handle, path):
                break
        except BaseException:
            os.close(handle)
            raise
        taken = is_at(handle, path)  # else its holder has removed it just now
        os.close(handle)
        if taken:
            if waiting is None:
                raise Held(str(path))
            waiting(time.monotonic() - started)
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
    try:
        yield
    finally:
        # While it is held: whoever has opened this very file finds that the name is no longer its, and tries again.
        path.unlink(missing_ok=True)
        os.close(handle)


def tidy_locks(folder: Path) -> None:
    """Remove the files of locks that killed processes held."""
    for path in folder.glob("*.lock"):
        with contextlib.suppress(Held, OSError), lock(path):
            pass


def try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def is_at(handle: int, path: Path) -> bool:
    """Whether the open file is the one that the path names."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def room_for_files(count: int) -> None:
    """Let this process open so many files more than it may by default, as far as the machine allows."""
    if fcntl is None or count < 200:
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
