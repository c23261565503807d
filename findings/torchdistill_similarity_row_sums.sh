#!/usr/bin/env bash
# torchdistill 1.1.5: SPKDLoss divides the rows of its similarity matrices by their sum, not by their length.
#
# Similarity-preserving distillation (Tung & Mori 2019) divides each row of F F^T by its L2 norm. The loss calls
# torch.nn.functional.normalize(G, 1), whose second argument is p, the order of the norm, and not the dimension.
# Expected: the loss of rows of length 1. Seen: exactly the loss of rows whose absolute values sum to 1, which is
# 64 times smaller for these 64 examples, so that published weights do not carry over.
#
# Exit status 0 while that is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 torchdistill==1.1.5
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
from importlib.metadata import version

import torch
from torch.nn.functional import normalize
from torchdistill.losses.mid_level import SPKDLoss

torch.manual_seed(0)
B = 64
student, teacher = (torch.rand(B, width, 4, 4, dtype=torch.float64) for width in (8, 12))
found = float(SPKDLoss(".", ".", "batchmean")({".": {"output": student}}, {".": {"output": teacher}}))


def similarity(p: int) -> float:
    """The squared distance of the matrices, rows divided by their norm of order p; torchdistill divides it by B^2."""
    ours, theirs = (normalize(x.flatten(1) @ x.flatten(1).T, p=p, dim=1) for x in (student, teacher))
    return float((ours - theirs).square().sum() / B**2)


of_length, of_sum = similarity(2), similarity(1)
print(f"torchdistill {version('torchdistill')}, torch {version('torch')}, {B} examples")
print(f"SPKDLoss {found:.6g}, rows of length 1 {of_length:.6g}, rows of sum 1 {of_sum:.6g}")
print(f"rows of length 1 give {of_length / found:.0f} times as much")
raise SystemExit(not (abs(found / of_sum - 1) < 1e-9 and of_length / found > 30))
PYTHON
