"""Compare kd-cli's losses with torchdistill's on the same logits: python scripts/check_methods.py

Prints a Markdown table, the one in docs/METHODS.md, and exits with 1 when a ratio is not the one that is explained.
torchdistill 1.1.5 is installed into a virtual environment in a temporary folder, which sees the PyTorch at hand. Not
part of the tests, as it needs a package index.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from beside_torchdistill import Loss, Row, measured, print_rows, run_beside_torchdistill
from torch import Tensor

TOLERANCE = 1e-5  # relative; torchdistill adds 1e-7 to deviations


def rows() -> list[Row]:
    """The comparisons: 64 examples of 10 classes in float64."""
    from torchdistill.losses import mid_level

    from kd_cli.learn.batches import Batch
    from kd_cli.learn.methods import DIST, Method, SoftTargets, Weights
    from kd_cli.learn.outputs import Outputs

    student, labels = made()[0], made()[2]
    flat = torch.full_like(student, 0.5)

    def ours(method: Method, T: float, alpha: float = 1.0, beta: float = 0.0) -> Loss:
        weights = Weights(*(torch.tensor([x], dtype=torch.float64) for x in (T, alpha, beta)))
        batch = Batch(labels[None], labels[None], labels[None])
        return lambda x: method(Outputs(x[None]), Outputs(made()[1][None]), batch, weights)["loss"][0]

    def theirs(kind: str, **keys: float) -> Loss:
        loss = getattr(mid_level, kind)(".", "output", ".", "output", **keys)
        return lambda x: loss({".": {"output": x}}, {".": {"output": made()[1]}}, labels)

    return [
        Row(
            "`soft_targets T=4 alpha=0.9 beta=0.1`",
            "`KDLoss(temperature=4, alpha=0.1)`",
            (ours(SoftTargets(), 4, 0.9, 0.1), theirs("KDLoss", temperature=4, alpha=0.1)),
            *(student, 1, "equal"),
        ),
        Row(
            "`soft_targets T=4 beta=0`",
            "`KDLoss(temperature=4, alpha=0)`",
            (ours(SoftTargets(), 4), theirs("KDLoss", temperature=4, alpha=0)),
            *(student, 16, "at alpha=0 torchdistill returns the divergence without T^2"),
        ),
        Row(
            "`dist T=1 beta=0`",
            "`DISTLoss(tau=1)`",
            (ours(DIST(), 1), theirs("DISTLoss", tau=1)),
            *(student, 1, "equal"),
        ),
        Row(
            "`dist T=4 beta=0`",
            "`DISTLoss(tau=4)`",
            (ours(DIST(), 4), theirs("DISTLoss", tau=4)),
            *(student, 1 / 16, "torchdistill multiplies by T^2, as the authors' code does and the paper does not"),
        ),
        Row(
            "`dist T=4 beta=0 method.square_T=true`",
            "`DISTLoss(tau=4)`",
            (ours(DIST(square_T=True), 4), theirs("DISTLoss", tau=4)),
            *(student, 1, "equal"),
        ),
        Row(
            "`dist T=1 beta=0`, student's logits all equal",
            "`DISTLoss(tau=1)`",
            (ours(DIST(), 1), theirs("DISTLoss", tau=1)),
            *(flat, 0, "only `eps=1e-8` bounds torchdistill's gradient; see DIST"),
        ),
        Row(
            "`soft_targets T=2 alpha=9 beta=0.1 method.standardise=true`",
            "`LogitStdKDLoss(temperature=2, alpha=0.1, beta=9)`",
            (
                ours(SoftTargets(standardise=True), 2, 9, 0.1),
                theirs("LogitStdKDLoss", temperature=2, alpha=0.1, beta=9),
            ),
            *(student, 1, "equal"),
        ),
    ]


def made() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher [B,C], and labels [B]."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(64, 10, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(10, (64,), generator=generator)


def compared() -> Iterator[tuple[Row, str, str, bool]]:
    """Each row with its ratios, and whether that of the gradients is the expected one.

    Values are compared less their value for a student that is the teacher: a cross entropy and a divergence differ by
    the teacher's entropy.
    """
    for row in rows():
        (value, slope), (other, other_slope) = (measured(loss, row.student) for loss in row.losses)
        value, other = (x - float(loss(made()[1])) for x, loss in zip((value, other), row.losses, strict=True))
        ratio = float(slope.norm() / other_slope.norm())
        same_direction = torch.allclose(slope, ratio * other_slope, rtol=0, atol=TOLERANCE * float(slope.abs().max()))
        assert row.ratio is not None
        expected = ratio < 1e-4 if row.ratio == 0 else abs(ratio / row.ratio - 1) < TOLERANCE and same_direction
        yield row, f"{value / other:.6g}", f"{ratio:.3g}", expected


if __name__ == "__main__":
    sys.exit(run_beside_torchdistill(__file__, lambda: print_rows(compared())))
