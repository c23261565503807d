"""Pictures that are not held in memory: read from a file of bytes, or decoded from their own files, when asked for."""

from __future__ import annotations

import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from kd_cli.errors import DataError

PIECE = 2 << 20  # bytes read at a time where all are read


class StoredImages(ABC):
    """Pictures [N,C,H,W] of bytes that are read when they are indexed; a stand-in for a tensor that does not fit.

    Indexing by a slice or by positions [n] and `split` give tensors on the CPU; `select` gives stored pictures again
    and reads nothing.
    """

    dtype = torch.uint8
    kept: str  # where the pictures are, as a dry run says it

    def __init__(self, shape: Sequence[int], positions: np.ndarray) -> None:
        """`shape` is that of one picture; `positions` [N] are those of these pictures among all that are stored."""
        self.positions = positions
        self.shape = (len(positions), *shape)

    def __len__(self) -> int:
        return len(self.positions)

    def dim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def element_size(self) -> int:
        return 1

    @property
    def one(self) -> int:
        """Bytes of one picture."""
        return int(np.prod(self.shape[1:], dtype=np.int64))

    def __getitem__(self, index: slice | Tensor) -> Tensor:
        """The pictures of a slice or of positions [n], read now: [n,C,H,W]."""
        return self.read(self.positions[index if isinstance(index, slice) else index.cpu().numpy()])

    def split(self, size: int) -> Iterator[Tensor]:
        """All pictures in their order, read `size` at a time: [size,C,H,W], the last one what is left."""
        return self.parts(np.arange(first, min(first + size, len(self))) for first in range(0, len(self), size))

    def pieces(self) -> Iterator[Tensor]:
        """All pictures in their order, read a few megabytes at a time."""
        return self.split(max(1, PIECE // self.one))

    def parts(self, parts: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """For each part, its pictures by their positions [n] among these: [n,C,H,W]. May read ahead."""
        for part in parts:
            yield self.read(self.positions[part])

    @abstractmethod
    def select(self, positions: slice | Tensor) -> StoredImages:
        """The pictures of a slice or of positions [n], which are not read."""

    @abstractmethod
    def read(self, positions: np.ndarray) -> Tensor:
        """The pictures of these positions [n] among all that are stored: [n,C,H,W]."""

    def hashes(self) -> np.ndarray | None:
        """A number for each picture, [N] uint64, equal for equal pictures, where they are known already."""
        return None

    def notes(self) -> list[str]:
        """Sentences on what was done to the pictures that are known only once all of them were read."""
        return []


Images: TypeAlias = Tensor | StoredImages


class KeptImages(StoredImages):
    """Pictures in a .npy file of bytes."""

    def __init__(self, file: KeptFile, positions: np.ndarray, hashes: np.ndarray) -> None:
        """`hashes` are those of all pictures of the file."""
        super().__init__(file.shape[1:], positions)
        self.file, self._hashes = file, hashes
        self.kept = "on disk"

    def select(self, positions: slice | Tensor) -> KeptImages:
        index = positions if isinstance(positions, slice) else positions.numpy()
        return KeptImages(self.file, self.positions[index], self._hashes)

    def read(self, positions: np.ndarray) -> Tensor:
        return torch.from_numpy(self.file.rows(positions))

    def hashes(self) -> np.ndarray:
        return self._hashes[self.positions]


class KeptFile:
    """A .npy file of bytes whose rows are read when they are asked for.

    The system keeps the file in its cache as long as it has room, so that reading a row again costs no access to the
    disk. It is not mapped into memory: rows in random order map up to a hundred times as much as they are, which counts
    as this process's memory, and a file that becomes shorter would end the process.
    """

    def __init__(self, path: Path) -> None:
        """Raises OSError or ValueError for a file that is not there or is no .npy file of bytes."""
        self.path = path
        described = np.load(path, mmap_mode="r")  # for its header; nothing of it is read
        if described.dtype != np.uint8 or not described.flags.c_contiguous:
            raise ValueError(f"{path} holds {described.dtype}, and not bytes row by row")
        self.shape, self.start = described.shape, described.offset
        self.handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self.handle)
        self.alone = threading.Lock()

    def rows(self, positions: np.ndarray | range) -> np.ndarray:
        """Rows by position [n]. Raises DataError where the file has become shorter."""
        found = np.empty((len(positions), *self.shape[1:]), dtype=np.uint8)
        one = found[:1].nbytes
        if isinstance(positions, range):
            self._read(found.reshape(-1), positions.start * one)
            return found
        for row, position in zip(found.reshape(len(found), -1), positions.tolist(), strict=True):
            self._read(row, position * one)
        return found

    def _read(self, into: np.ndarray, start: int) -> None:
        """Fill an array with the bytes from `start` on."""
        if hasattr(os, "preadv"):  # Linux: with no position of the file that processes and threads share
            n = os.preadv(self.handle, [into.data], self.start + start)
        else:
            with self.alone:
                os.lseek(self.handle, self.start + start, os.SEEK_SET)
                content = os.read(self.handle, into.nbytes)
            n = len(content)
            into[:n] = np.frombuffer(content, dtype=np.uint8)
        if n != into.nbytes:
            raise DataError(f"the decoded pictures in {self.path} were changed while this run used them")


def selected(images: Images, positions: slice | Tensor) -> Images:
    """The images of a slice or of positions [n]: of a tensor a view or a copy, of stored ones no reading."""
    return images.select(positions) if isinstance(images, StoredImages) else images[positions]


def pieces(images: Images) -> Iterable[Tensor]:
    """All images in their order: a tensor as a whole, stored ones a few megabytes at a time."""
    return images.pieces() if isinstance(images, StoredImages) else [images]


def value_range(images: Images) -> tuple[float, float]:
    """The least and the largest value of images; those of bytes, which count as 0..1, are not looked up."""
    if isinstance(images, StoredImages) or images.dtype == torch.uint8:
        return 0.0, 1.0
    low, high = torch.aminmax(images)
    return float(low), float(high)
