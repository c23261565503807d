"""Files that other processes read: written under a temporary name in the same folder, flushed, then renamed.

The writer holds a lock on its temporary file, so `tidy` removes the files that killed processes left behind and spares
those that running processes are writing.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kd_cli.errors import StorageError
from kd_cli.locks import fcntl, is_at, try_lock

TEMPORARY, MAKING = ".tmp", ".making-"  # the end of a temporary file's name, the beginning of a temporary folder's
DIGEST = 16  # bytes of a checksum


@contextlib.contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn an OSError from writing under `path` into a StorageError that says what to do."""
    try:
        yield
    except OSError as error:
        hints = {
            errno.ENOSPC: "free some space, or choose another disk",
            errno.EDQUOT: "free some of your quota, or choose another disk",
            errno.EROFS: "the file system is read-only; choose another folder",
            errno.EACCES: "you may not write there; choose another folder",
            errno.EPERM: "you may not write there; choose another folder",
        }
        where = "hydra.run.dir= moves the run directory, store_dir= (KD_STORE) the store, data_dir= (KD_DATA) the data"
        hint = "; ".join(part for part in (hints.get(error.errno or 0), where) if part)
        raise StorageError(f"cannot write {path}: {error.strerror or error}", hint=hint) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder, renamed to `path` when the block succeeds, removed when it raises."""

    def make() -> tuple[int, Path]:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        return handle, Path(name)

    with storage(path):
        handle, temporary = _owned(make)
        try:
            yield temporary
            os.fsync(handle)
            os.chmod(temporary, 0o666 & ~_umask())
            if fcntl is None:
                os.close(handle)
                handle = -1
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
            if handle >= 0:
                os.close(handle)


@contextlib.contextmanager
def making(folder: Path) -> Iterator[Path]:
    """A temporary folder in `folder`, removed at the end of the block unless the block renamed it."""

    def make() -> tuple[int, Path]:
        path = Path(tempfile.mkdtemp(dir=folder, prefix=MAKING))
        return (os.open(path, os.O_RDONLY) if fcntl is not None else -1), path

    handle, path = _owned(make)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if handle >= 0:
            os.close(handle)


def _owned(make: Callable[[], tuple[int, Path]]) -> tuple[int, Path]:
    """A temporary file or folder and its open handle, whose lock keeps `tidy` from removing it while we run."""
    while True:
        handle, path = make()
        if fcntl is None or (try_lock(handle) and is_at(handle, path)):
            return handle, path
        os.close(handle)  # `tidy` removed it before it was locked


def tidy(folder: Path) -> None:
    """Remove temporary files and folders that killed processes left in `folder`."""
    if fcntl is None:
        return
    with contextlib.suppress(OSError):  # the folder is missing, or we may not write there
        left = [p for p in folder.iterdir() if p.name.startswith(".") and p.name.endswith(TEMPORARY)]
        for path in [*left, *folder.glob(f"{MAKING}*")]:
            with contextlib.suppress(OSError):
                handle = os.open(path, os.O_RDONLY)
                try:
                    if try_lock(handle):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
                finally:
                    os.close(handle)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write tensors as safetensors; tensors that share memory are written one by one."""
    from safetensors.torch import save

    # Not save_file: it replaces the temporary file by another one, which is not locked.
    content = save({name: t.contiguous() for name, t in tensors.items()})
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def checksum(path: Path) -> str:
    """The checksum of a file's bytes: 16 bytes of BLAKE2b, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST)).hexdigest()


def checksum_of(content: bytes | str) -> str:
    """The checksum of a file with this content; text is encoded as UTF-8."""
    return digest(content.encode() if isinstance(content, str) else content).hex()


def digest(content: bytes) -> bytes:
    """The checksum as bytes."""
    return hashlib.blake2b(content, digest_size=DIGEST).digest()


def new_folder(path: str | Path) -> Path:
    """Make a folder that did not exist: `path`, else `path-2`, `path-3`, ...; two callers never get the same one."""
    path = Path(path)
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        for k in range(1, 1_000_000):
            candidate = path if k == 1 else path.with_name(f"{path.name}-{k}")
            try:
                candidate.mkdir()
            except FileExistsError:
                continue
            return candidate
    raise StorageError(f"no free name for {path}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
