"""scikit-learn's handwritten digits, which need no download."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import torch

from kd_cli.data.source import Source
from kd_cli.data.splits import set_aside


def digits(*, data_dir: str | Path) -> Source:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels: 1,200 to train on, 597 to test on.

    They have no published split; the test part is the first 597 of the recorded permutation.
    """
    table = torch.from_numpy(_digits_table())
    images = table[:, :64].to(torch.float32).div_(16).view(-1, 1, 8, 8)
    labels = table[:, 64].to(torch.int64)
    test, train = set_aside(len(labels), len(labels) - 1200)
    return Source("digits", images[train], labels[train], images[test], labels[test], tuple("0123456789"))


def _digits_table() -> np.ndarray:
    """One row per digit, 64 pixels from 0 to 16 and the label: [1797,65].

    Reads scikit-learn's file, as `sklearn.datasets.load_digits` does; importing scikit-learn would take a second, half
    of the time before the first training step.
    """
    spec = importlib.util.find_spec("sklearn")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        file = Path(folder, "datasets", "data", "digits.csv.gz")
        if file.is_file():
            return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits  # this version keeps the file elsewhere

    bunch = load_digits()
    return np.column_stack([bunch.data, bunch.target])
