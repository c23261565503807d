"""Decoded pictures kept on disk, so that a folder of pictures is decoded once and not in every run.

    <data_dir>/decoded/<key>.npy     the pixels [N, channels, size, size], memory-mapped by later runs
                       <key>.json    which files they come from, what was done to them, and the pixels' checksum

The key names the folder and how it is read, so a folder that has changed replaces its older entry.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd_cli.data.pictures import FACTS, Reading, decode_all, shown

log = logging.getLogger(__name__)

WORTH = 1.0  # seconds of decoding from which the pixels are kept
VERSION = 2  # raised when the same files must be decoded anew


def decoded(
    root: Path, files: Sequence[Path], reading: Reading, data_dir: Path
) -> tuple[Tensor, np.ndarray, list[str]]:
    """`decode_all` of files below `root`, and a note if they are taken from `data_dir`, where slow ones are kept."""
    import PIL

    key = _digest(repr((os.fsencode(root), reading, VERSION, PIL.__version__)).encode())
    stamp = _digest("\n".join(_stamp(file, root) for file in files).encode())
    pixels, about = data_dir / "decoded" / f"{key}.npy", data_dir / "decoded" / f"{key}.json"
    if (kept := _load(pixels, about, stamp)) is not None:
        return *kept, [f"{len(files):,} pictures of {shown(root)} were decoded by an earlier run: {shown(pixels)}"]
    begun = time.monotonic()
    images, facts = decode_all(files, reading)
    seconds = time.monotonic() - begun
    if seconds < WORTH:
        return images, facts, []
    try:
        pixels.parent.mkdir(parents=True, exist_ok=True)
        array = images.numpy()
        entry = {"root": shown(root), "files": stamp, "pixels": _digest(array.data), "facts": facts.tolist()}
        _replace(about, json.dumps(entry).encode())
        _replace(pixels, array)
        where = f"kept in {shown(pixels)} for later runs"
    except OSError as error:
        where = f"decoded again in every run: cannot write {shown(pixels.parent)}: {error.strerror or error}"
    log.info("%s pictures of %s decoded in %.0f s, %s", f"{len(files):,}", shown(root), seconds, where)
    return images, facts, []


def _stamp(file: Path, root: Path) -> str:
    """What changes when a file does, a copy that keeps the time of its last change included."""
    about = file.stat()
    return f"{os.fsencode(file.relative_to(root))!r} {about.st_size} {about.st_mtime_ns} {about.st_ctime_ns}"


def _load(pixels: Path, about: Path, stamp: str) -> tuple[Tensor, np.ndarray] | None:
    """What was kept of these files; None if there is nothing, or it is damaged or of other files."""
    try:
        entry = json.loads(about.read_text())
        if entry["files"] != stamp:
            return None
        array = np.load(pixels, mmap_mode="c")  # c: pages are read when they are used
        if array.dtype != np.uint8 or _digest(array.data) != entry["pixels"] or len(array) != len(entry["facts"]):
            return None
        return torch.from_numpy(array), np.array(entry["facts"], dtype=FACTS)
    except (OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _replace(path: Path, content: bytes | np.ndarray) -> None:
    """Write a whole file or none: under a temporary name, then renamed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".decoding-")
    try:
        with open(handle, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                np.save(file, content, allow_pickle=False)
        os.chmod(name, 0o644)  # mkstemp makes it private, and the folder may be shared
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _digest(content: bytes | memoryview) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
