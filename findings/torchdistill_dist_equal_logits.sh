#!/usr/bin/env bash
# torchdistill 1.1.5: DISTLoss has a gradient millions of times that of soft targets where a student's logits are equal.
#
# A correlation is divided by the norm of the student's centred probabilities, which is 0 for a last layer that is
# initialised with zeros (torchvision's VisionTransformer); only eps=1e-8 bounds it. The first step of SGD is then as
# large as the learning rate times a million.
# Expected: a gradient of the size of KLDivLoss's, about 1 over the whole batch. Seen: more than a million times that.
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
from torchdistill.losses.mid_level import DISTLoss

torch.manual_seed(0)
head = torch.nn.Linear(64, 10)  # as a VisionTransformer's: equal logits for every image
torch.nn.init.zeros_(head.weight)
torch.nn.init.zeros_(head.bias)
features, teacher = torch.randn(64, 64), 3 * torch.randn(64, 10)


def gradient(loss) -> float:
    logits = head(features)
    return float(torch.autograd.grad(loss(logits), logits)[0].norm())


found = DISTLoss(".", "output", ".", "output", tau=1.0)
dist = gradient(lambda x: found({".": {"output": x}}, {".": {"output": teacher}}))
soft = gradient(
    lambda x: torch.nn.functional.kl_div(x.log_softmax(1), teacher.softmax(1), reduction="batchmean")
)
print(f"torchdistill {version('torchdistill')}, torch {version('torch')}")
print(f"gradient on the logits of a zero-initialised layer: DISTLoss {dist:.3g}, KL divergence {soft:.3g}, ratio {dist / soft:.3g}")
assert dist / soft > 1e6, "this has changed"
PYTHON
