"""Locks between processes: advisory locks of the operating system on files that are removed afterwards."""

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

WINDOWS_BYTE = 1 << 30  # the byte that is locked on Windows, beyond the end of any lock file


class Held(Exception):
    """Another process holds the lock."""


@contextlib.contextmanager
def lock(path: Path, *, waiting: Callable[[float], None] | None = None) -> Iterator[None]:
    """Hold an exclusive lock between processes and threads; the file at `path` is removed at the end.

    While another process holds the lock, `waiting` is called repeatedly with the seconds waited, and may raise. Raises
    Held at once without `waiting`.
    """
    started, pause = time.monotonic(), 0.002
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if try_lock(handle) and is_at(handle, path):
                break
        except BaseException:
            os.close(handle)
            raise
        held = is_at(handle, path)  # if not, its holder removed the file between our two calls
        os.close(handle)
        if held:
            if waiting is None:
                raise Held(str(path))
            waiting(time.monotonic() - started)
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
    try:
        yield
    finally:
        # Removed before it is unlocked: a process that has opened this file finds that the path no longer names it.
        with contextlib.suppress(PermissionError):  # Windows removes no open file
            path.unlink(missing_ok=True)
        os.close(handle)


def tidy_locks(folder: Path) -> None:
    """Remove lock files that killed processes left behind."""
    for path in folder.glob("*.lock"):
        with contextlib.suppress(Held, OSError), lock(path):
            pass


def try_lock(handle: int, *, shared: bool = False) -> bool:
    """Lock an open file and return whether it succeeded; the lock ends when the file is closed, or its process ends.

    A `shared` lock excludes exclusive ones only; Windows has none.
    """
    try:
        if fcntl is not None:
            fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        else:
            import msvcrt

            os.lseek(handle, WINDOWS_BYTE, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
    except (BlockingIOError, PermissionError):
        return False
    return True


def is_at(handle: int, path: Path) -> bool:
    """Whether `path` names the open file."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def allow_open_files(count: int) -> None:
    """Raise this process's limit of open files by `count`, as far as the machine allows."""
    if fcntl is None or count < 200:
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        wanted = soft + count if hard == resource.RLIM_INFINITY else min(soft + count, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
