#!/usr/bin/env bash
# torchdistill 1.1.5: KDLoss drops the factor temperature^2, and beta, when alpha is 0.
#
# Its documentation gives alpha * L_CE + (1 - alpha) * tau^2 * L_KL. With alpha=0 (soft targets alone) it returns L_KL:
# at temperature 4 that is a sixteenth of what alpha=1e-12 gives, and beta has no effect. LogitStdKDLoss does the same.
# Expected: the loss is continuous in alpha. Seen: 16 and 9 * 16 times less at alpha=0.
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
from torchdistill.losses.mid_level import KDLoss

torch.manual_seed(0)
student, teacher = torch.randn(8, 10, dtype=torch.float64), torch.randn(8, 10, dtype=torch.float64)
labels = torch.arange(8)


def loss(**keys: float) -> float:
    found = KDLoss(".", "output", ".", "output", temperature=4.0, **keys)
    return float(found({".": {"output": student}}, {".": {"output": teacher}}, labels))


print(f"torchdistill {version('torchdistill')}, torch {version('torch')}")
one = loss(alpha=1e-12) / loss(alpha=0.0)
other = loss(alpha=1e-12, beta=9.0) / loss(alpha=0.0, beta=9.0)
print(f"KDLoss(temperature=4): loss at alpha=1e-12 over loss at alpha=0 is {one:.4f}, with beta=9 {other:.4f}")
assert abs(one - 16) < 1e-3 and abs(other - 9 * 16) < 1e-2, "this has changed"
PYTHON
