"""Small data sets of random numbers in MNIST's own file format."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

RAW = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")


def idx(array: np.ndarray) -> bytes:
    """The file's bytes: magic number, sizes, values."""
    sizes = struct.pack(f">{array.ndim}I", *array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


def write_mnist(root: Path, name: str = "MNIST", train: int = 30, test: int = 10) -> list[Path]:
    """Write the four files of a data set where torchvision looks for them; return their paths."""
    random = np.random.RandomState(0)
    files = []
    (root / name / "raw").mkdir(parents=True)
    for file, shape in zip(RAW, [(train, 28, 28), (train,), (test, 28, 28), (test,)], strict=True):
        files.append(root / name / "raw" / file)
        files[-1].write_bytes(idx(random.randint(0, 10, shape)))
    return files
