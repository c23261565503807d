"""scikit-learn's handwritten digits, which are part of this package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from kd_cli.data.source import Source
from kd_cli.data.splits import set_aside
from kd_cli.errors import ConfigError

# digits.LICENSE, in this folder, says where digits.csv.gz is from and under which licence.
#
# The table is one form of 130 digits that was filled in 14 times, sheet after sheet: its labels repeat the form's, with
# 23 digits missing and one label changed. A sheet begins at each of these rows.
SHEETS = (0, 130, 256, 386, 516, 646, 776, 906, 1029, 1157, 1287, 1415, 1545, 1667)
TEST_SHEETS = 4


def digits(*, data_dir: str | Path, split: str = "hand") -> Source:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels; they have no published split.

    `split="hand"` tests on hands that nobody trains on: the first 4 of the 14 sheets, 516 digits, are the test part,
    and whole sheets of the other 10, 1,281 digits, are set aside for validation. The publishers count 13 writers, so
    one of them filled in two sheets; nearest neighbours point to the first two, which both test. `split="random"` tests
    on 597 digits of the recorded permutation, of writers that the 1,200 others are from as well; errors are then less
    than half of those for a new writer. Raises ConfigError for another split.
    """
    if split not in ("hand", "random"):
        raise ConfigError(f"split is {split!r}; it must be hand or random")
    table = torch.from_numpy(digits_table())
    images = table[:, :64].to(torch.float32).div_(16).view(-1, 1, 8, 8)
    labels = table[:, 64].to(torch.int64)
    if split == "hand":
        rows = torch.arange(len(labels))
        test, train = rows[: SHEETS[TEST_SHEETS]], rows[SHEETS[TEST_SHEETS] :]
        groups = torch.bucketize(train, torch.tensor(SHEETS), right=True)
    else:
        test, train = set_aside(len(labels), len(labels) - 1200)
        groups = None
    return Source(
        "digits",
        images[train],
        labels[train],
        images[test],
        labels[test],
        tuple("0123456789"),
        groups=groups,
        by_class=False,
    )


def digits_at_random(*, data_dir: str | Path) -> Source:
    """`digits` with `split="random"`: what runs of earlier versions mean by the digits."""
    return digits(data_dir=data_dir, split="random")


def digits_table() -> np.ndarray:
    """One row per digit in scikit-learn's order, 64 pixels from 0 to 16 and the label: [1797,65]."""
    return np.loadtxt(Path(__file__).with_name("digits.csv.gz"), delimiter=",")
