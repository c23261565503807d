"""Files that others read: written under a temporary name in the same folder, flushed, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kd_cli.errors import StorageError


@contextlib.contextmanager
def storage(path: Path) -> Iterator[None]:
    """Turn the machine's refusal to write under `path` into a StorageError that says what to do."""
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
    """A temporary name in the same folder, renamed to `path` when the block ends well, removed when it does not."""
    with storage(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tensors(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with replacing(path) as temporary:
        try:
            save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata=metadata)
        except SafetensorError as error:  # it hides the operating system's error in its text
            for code in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EFBIG, errno.EDQUOT):
                if os.strerror(code) in str(error):
                    raise OSError(code, os.strerror(code)) from error
            raise


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def checksum(path: Path) -> str:
    """BLAKE2b of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def new_folder(path: str | Path) -> Path:
    """Make a folder that did not exist before: `path`, else `path-2`, `path-3`, ...; two callers never get the same."""
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
