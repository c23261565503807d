"""Compare kd-cli's feature losses with torchdistill's on the same features: python scripts/check_feature_methods.py

Prints a Markdown table, the one in docs/METHODS_FEATURES.md, and exits with 1 when a ratio is not the one that is
explained. torchdistill 1.1.5 is installed into a virtual environment in a temporary folder, which sees the PyTorch at
hand. Not part of the tests, as it needs a package index.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from beside_torchdistill import Loss, Row, measured, print_rows, run_beside_torchdistill
from torch import Tensor, nn

TOLERANCE = 1e-4  # relative; torchdistill adds 1e-7 and 1e-12 where we bound
B = 64  # examples


def rows() -> list[Row]:
    """The comparisons: 64 examples in float64, maps [B,8,4,4] and vectors [B,8] of the student."""
    from torchdistill.losses import mid_level

    from kd_cli.learn.methods.attention import attention_map, mean_of_lengths, mean_of_squares
    from kd_cli.learn.methods.feature import srd_distance
    from kd_cli.learn.methods.pkt import pkt_loss
    from kd_cli.learn.methods.relational import angle_loss, distance_loss
    from kd_cli.learn.methods.review import hierarchical_loss
    from kd_cli.learn.methods.similarity import similarity_loss

    s_map, t_map, s_vector, t_vector = made(B, 8, 4, 4), made(B, 12, 4, 4), made(B, 8), made(B, 12)
    s_same, t_same = made(B, 8), made(B, 8, seed=1)  # of one width

    def io(x: Tensor) -> dict[str, dict[str, Tensor]]:
        return {".": {"output": x}}

    def theirs(loss: nn.Module, teacher: Tensor) -> Loss:
        return lambda x: loss(io(x), io(teacher))

    def attention(mode: str) -> Loss:
        side = {"io": "output", "path": "."}
        return theirs(mid_level.ATLoss({"one": {"student": side, "teacher": side}}, mode=mode), t_map)

    def relational(distance: float, angle: float) -> Loss:
        return theirs(mid_level.RKDLoss(".", ".", distance, angle, "mean"), t_vector)

    def sums(x: Tensor) -> Tensor:
        products = x.flatten(1) @ x.flatten(1).mT
        return products / products.sum(1, keepdim=True)

    def srd(x: Tensor) -> Tensor:  # torchdistill's modules standardise before the loss
        norm = nn.BatchNorm1d(8, affine=False).double()
        return 2 * (norm(x) - norm(t_same)).abs().pow(4).sum().log()

    return [
        Row(
            *("`attention` (code)", "`ATLoss(mode='code')`"),
            (lambda x: mean_of_squares(attention_map(x), attention_map(t_map)), attention("code")),
            *(s_map, 1, "equal"),
        ),
        Row(
            *("`attention method.norm=paper`", "`ATLoss(mode='paper')`"),
            (lambda x: mean_of_lengths(attention_map(x), attention_map(t_map)), attention("paper")),
            *(s_map, 1, "equal"),
        ),
        Row(
            *("`similarity`", "`SPKDLoss(reduction='batchmean')`"),
            (lambda x: similarity_loss(x, t_map), theirs(mid_level.SPKDLoss(".", ".", "batchmean"), t_map)),
            *(s_map, None, "torchdistill's `normalize(G, 1)` takes 1 for p: rows have the sum 1, not the length 1"),
        ),
        Row(
            *("the same with rows of sum 1, over B^2", "`SPKDLoss(reduction='batchmean')`"),
            (
                lambda x: (sums(x) - sums(t_map)).square().sum() / B**2,
                theirs(mid_level.SPKDLoss(".", ".", "batchmean"), t_map),
            ),
            *(s_map, 1, "equal"),
        ),
        Row(
            *("`relational`, distances", "`RKDLoss(dist_factor=1, angle_factor=0)`"),
            (lambda x: distance_loss(x, t_vector), relational(1, 0)),
            *(s_vector, B / (B - 1), "torchdistill's mean has the pairs of an example with itself"),
        ),
        Row(
            *("`relational`, angles", "`RKDLoss(dist_factor=0, angle_factor=1)`"),
            (lambda x: angle_loss(x, t_vector), relational(0, 1)),
            *(s_vector, B**2 / ((B - 1) * (B - 2)), "as above, for triplets"),
        ),
        Row(
            *("`pkt`", "`PKTLoss()`"),
            (lambda x: pkt_loss(x, t_vector), theirs(mid_level.PKTLoss(".", "output", ".", "output"), t_vector)),
            *(s_vector, B, "torchdistill takes the mean over i and j, as the code does; we over i"),
        ),
        Row(
            *("`feature method.distance=srd`", "`SRDLoss(exponent=4)`, its feature term"),
            (lambda x: srd_distance(x[:, None], t_same[:, None]), srd),
            *(s_same, 1, "the gradients are equal; the values differ by the logarithm of a count"),
        ),
        Row(
            *("`review`, one pair", "`HierarchicalContextLoss()`"),
            (
                lambda x: hierarchical_loss(x, t_map[:, :8]),
                lambda x: mid_level.HierarchicalContextLoss(".", "output", ".", "output")(
                    {".": {"output": (x, None)}}, io(t_map[:, :8])
                ),
            ),
            *(s_map, 1, "equal"),
        ),
    ]


def made(*shape: int, seed: int = 0) -> Tensor:
    """Features like those behind a ReLU, different for each shape."""
    generator = torch.Generator().manual_seed(100 * sum(shape) + seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).relu() + 0.01


def compared() -> Iterator[tuple[Row, str, str, bool]]:
    """Each row with its ratios, and whether that of the gradients is the expected one."""
    for row in rows():
        (value, slope), (other, other_slope) = (measured(loss, row.student) for loss in row.losses)
        ratio = float(slope.norm() / other_slope.norm())
        least = TOLERANCE * float(slope.abs().max())
        close = row.ratio is None or torch.allclose(slope, row.ratio * other_slope, rtol=0, atol=least)
        yield row, f"{value / other:.5g}", f"{ratio:.5g}", close


if __name__ == "__main__":
    sys.exit(run_beside_torchdistill(__file__, lambda: print_rows(compared())))
