"""What the comparisons with torchdistill's losses share: its environment, a row of the table, a loss's gradient."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

VERSION = "1.1.5"
ROOT = Path(__file__).resolve().parent.parent

Loss = Callable[[Tensor], Tensor]  # of the student's logits or features


class Row(NamedTuple):
    """One comparison: the two losses, the student's tensor, and the expected ratio of ours to theirs."""

    ours: str
    theirs: str
    losses: tuple[Loss, Loss]
    student: Tensor
    ratio: float | None  # None: not proportional
    why: str


def run_beside_torchdistill(script: str, table: Callable[[], int]) -> int:
    """Return the status of `table`, run in a new virtual environment with torchdistill and the PyTorch at hand.

    The environment runs the script again, with the argument `inside`.
    """
    if sys.argv[1:] == ["inside"]:
        return table()
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        (site,) = Path(folder).glob("lib/python3*/site-packages")
        (site / "at_hand.pth").write_text(f"{Path(torch.__file__).parent.parent}\n")
        python = f"{folder}/bin/python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"torchdistill=={VERSION}"], check=True)
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run([python, script, "inside"], env=environment, check=False).returncode


def print_rows(rows: Iterable[tuple[Row, str, str, bool]]) -> int:
    """Print the table of (row, value, ratio of the gradients, whether it is the expected one); 1 when one is not."""
    print(f"| kd-cli | torchdistill {VERSION} | value, ours / theirs | gradient, ours / theirs | why |")
    print("|---|---|---|---|---|")
    wrong = 0
    for row, value, ratio, expected in rows:
        wrong += not expected
        mark = "" if expected else " **unexpected**"
        print(f"| {row.ours} | {row.theirs} | {value} | {ratio}{mark} | {row.why} |")
    return int(wrong > 0)


def measured(loss: Loss, student: Tensor) -> tuple[float, Tensor]:
    """A loss, and its gradient on the student's tensor."""
    leaf = student.clone().requires_grad_()
    found = loss(leaf)
    return float(found.detach()), torch.autograd.grad(found, leaf)[0]
