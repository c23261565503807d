"""Decoded pictures kept on disk, so that a folder of pictures is decoded once and not in every run.

    <data_dir>/decoded/<key>.npy     the pixels [N, channels, size, size], read by later runs
                       <key>.json    which files they come from, what was done to them, and the pixels' checksum

The key names the folder and how it is read, so a folder that has changed replaces its older entry.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor

from kd_cli.data.duplicates import hashes
from kd_cli.data.pictures import FACTS, Reading, decode_all, shown
from kd_cli.data.reading_progress import ReadingProgress
from kd_cli.data.room import free_disk, gigabytes
from kd_cli.data.stored import PIECE, KeptFile
from kd_cli.data.streamed import PictureFiles
from kd_cli.errors import DataError
from kd_cli.locks import lock, try_lock

log = logging.getLogger(__name__)

WORTH = 1.0  # seconds of decoding from which the pixels are kept
VERSION = 3  # raised when the same files must be decoded anew
TEMPORARY = ".decoding-"
SOON = 1.0  # seconds of waiting for another process after which the log says so
ABANDONED = 60.0  # seconds after which a temporary file that no process holds is another's that was killed


class Decoded:
    """The place of a folder's decoded pictures, whether they are there or not."""

    def __init__(self, root: Path, files: PictureFiles, data_dir: Path) -> None:
        import PIL

        self.root, self.files = root, files
        key = _digest(repr((os.fsencode(root), files.reading, VERSION, PIL.__version__)).encode())
        self.folder = data_dir / "decoded"
        self.pixels, self.about = self.folder / f"{key}.npy", self.folder / f"{key}.json"
        self.stamp = files.stamp(root)

    @property
    def note(self) -> str:
        return (
            f"{len(self.files):,} pictures of {shown(self.root)} were decoded by an earlier run: {shown(self.pixels)}"
        )

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """A context that one process at a time is in; others wait, and may then `load` what it has kept.

        Where nothing can be locked, as in a folder that may only be read, there is no waiting.
        """
        said = False

        def waiting(seconds: float) -> None:
            nonlocal said
            if seconds > SOON and not said:
                log.info("waiting for another process that decodes the pictures of %s", shown(self.root))
                said = True

        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(lock(self.pixels.with_suffix(".lock"), waiting=waiting))
            yield

    def load(self) -> tuple[KeptFile, np.ndarray] | None:
        """The file of pixels and the hashes of its pictures; None if there is none, or it is damaged or of other files.

        The facts are then those of `files`.
        """
        try:
            entry = json.loads(self.about.read_text())
            if entry["files"] != self.stamp:
                return None
            file = KeptFile(self.pixels)
            if file.shape != (len(self.files), *self.files.shape):
                return None
            found = _hashes_of(file)
            if _digest(found.data) != entry["pixels"] or len(entry["facts"]) != len(self.files):
                return None
            self.files.facts[:] = np.array(entry["facts"], dtype=FACTS)
            return file, found
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            return None

    def save(self, images: Tensor) -> None:
        """Keep pixels that are in memory. Raises OSError."""
        with self._writing() as file:
            np.save(file, images.numpy(), allow_pickle=False)
            self._describe(hashes(images))

    def write(self) -> tuple[KeptFile, np.ndarray]:
        """Decode all pictures into the file, a few megabytes at a time; return it as `load` does.

        Raises DataError where it cannot be written.
        """
        n, one = len(self.files), int(np.prod(self.files.shape))
        try:
            if (free := free_disk(self.folder)) < n * one:
                raise DataError(
                    f"{n:,} decoded pictures take {gigabytes(n * one)}, and {gigabytes(free)} are free on the disk of "
                    f"{shown(self.folder)}",
                    hint="data_dir=DIR or KD_DATA names a folder on another disk; dataset.keep=none needs no disk",
                )
            with self._writing() as file, ReadingProgress("decoded", "pictures", n) as progress:
                np.lib.format.write_array_header_1_0(
                    file, {"descr": "|u1", "fortran_order": False, "shape": (n, *self.files.shape)}
                )
                _reserve(file, n * one)
                size, found = max(1, PIECE // one), []
                for images in self.files.decoded(np.arange(k, min(k + size, n)) for k in range(0, n, size)):
                    file.write(images.numpy().data)
                    found.append(hashes(images))
                    progress.add(len(images))
                joined = np.concatenate(found)
                self._describe(joined)
            return KeptFile(self.pixels), joined
        except OSError as error:
            raise DataError(
                f"the decoded pictures cannot be written to {shown(self.folder)}: {error.strerror or error}",
                hint="data_dir=DIR or KD_DATA names another folder; dataset.keep=none needs no disk",
            ) from error

    @contextlib.contextmanager
    def _writing(self) -> Iterator[IO[bytes]]:
        """A file that takes the place of the pixels when it is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _tidy(self.folder)
        with _replacing(self.pixels) as file:
            _lock(file)
            yield file

    def _describe(self, found: np.ndarray) -> None:
        """Write what the pixels with these hashes are, before they take their place."""
        facts = self.files.facts.tolist()
        entry = {"root": shown(self.root), "files": self.stamp, "pixels": _digest(found.data), "facts": facts}
        with _replacing(self.about) as file:
            file.write(json.dumps(entry).encode())


def decoded(
    root: Path, files: Sequence[Path], reading: Reading, data_dir: Path
) -> tuple[Tensor, np.ndarray, list[str]]:
    """`decode_all` of files below `root`, and a note if they are taken from `data_dir`, where slow ones are kept."""
    return in_memory(Decoded(root, PictureFiles(files, reading), data_dir), files)


def in_memory(place: Decoded, files: Sequence[Path]) -> tuple[Tensor, np.ndarray, list[str]]:
    """As `decoded`, for a place whose files are given by their paths too."""
    if place.load() is not None:
        return _mapped(place)
    with place.alone():
        return _mapped(place) if place.load() is not None else _decoded_now(place, files)


def _mapped(place: Decoded) -> tuple[Tensor, np.ndarray, list[str]]:
    array = np.load(place.pixels, mmap_mode="c")  # c: pages are read when they are used
    return torch.from_numpy(array), place.files.facts, [place.note]


def _decoded_now(place: Decoded, files: Sequence[Path]) -> tuple[Tensor, np.ndarray, list[str]]:
    """Decode pictures into memory, and keep them for later runs where that has taken a while."""
    begun = time.monotonic()
    images, place.files.facts[:] = decode_all(files, place.files.reading)
    seconds = time.monotonic() - begun
    if seconds < WORTH:
        return images, place.files.facts, []
    try:
        place.save(images)
        where = f"kept in {shown(place.pixels)} for later runs"
    except OSError as error:
        where = f"decoded again in every run: cannot write {shown(place.folder)}: {error.strerror or error}"
    log.info("%s pictures of %s decoded in %.0f s, %s", f"{len(files):,}", shown(place.root), seconds, where)
    return images, place.files.facts, []


def _hashes_of(file: KeptFile) -> np.ndarray:
    """The hash of each picture of a file of pixels."""
    n = file.shape[0]
    size = max(1, PIECE // int(np.prod(file.shape[1:])))
    parts = (range(k, min(k + size, n)) for k in range(0, n, size))
    return np.concatenate([hashes(torch.from_numpy(file.rows(part))) for part in parts])


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write a whole file or none: under a temporary name, then renamed."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=TEMPORARY)
    try:
        with open(handle, "wb") as file:
            yield file
        os.chmod(name, 0o644)  # mkstemp makes it private, and the folder may be shared
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def _reserve(file: IO[bytes], size: int) -> None:
    """Take the disk's space for so many more bytes now, and not in the middle of decoding. Raises OSError."""
    file.flush()
    if hasattr(os, "posix_fallocate"):  # not on macOS and Windows
        os.posix_fallocate(file.fileno(), file.tell(), size)


def _lock(file: IO[bytes]) -> None:
    """Hold a file as long as this process lives, where the file system has locks."""
    with contextlib.suppress(OSError):
        try_lock(file.fileno())


def _tidy(folder: Path) -> None:
    """Remove what processes that were killed while they decoded left behind."""
    for path in folder.glob(f"{TEMPORARY}*"):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            if try_lock(file.fileno()) and time.time() - path.stat().st_mtime > ABANDONED:
                path.unlink()


def _digest(content: bytes | memoryview) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
