#!/usr/bin/env bash
# timm 1.0.31: LogitDistillationTask shows a teacher of one's own other pixels than it shows the student.
#
# A teacher may be any torch.nn.Module. One without timm's pretrained_cfg is taken for a network of ImageNet's mean and
# standard deviation, and the batch is converted to these from the student's pretrained_cfg, whatever the loader did.
# Expected: a teacher that was trained on the same loader sees the batch as it is. Seen: beside a student whose
# pretrained_cfg says 0.5 (timm's ViT, and many others) its input is scaled by 2.2, and it is wrong on images that it
# classifies correctly by itself; nothing is logged. FeatureDistillationTask and TokenDistillationTask share the conversion.
#
# Exit status 0 while that is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 torchvision==0.28.0 timm==1.0.31
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from torch import nn

try:
    import torchvision  # which timm imports
except RuntimeError:  # a torchvision built for CUDA beside a torch that is not: these operators are not used here
    operators = torch.library.Library("torchvision", "DEF")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
import timm
from timm.task import LogitDistillationTask

torch.manual_seed(0)
brightness = torch.rand(1000)
labels = (5 * brightness).long().clamp(max=4)  # five classes, from dark to bright
images = (brightness[:, None, None, None] + 0.1 * torch.randn(1000, 3, 32, 32) - 0.5) / 0.5  # as the loader gives them
teacher = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 64), nn.ReLU(), nn.Linear(64, 5))
optimizer = torch.optim.Adam(teacher.parameters(), 1e-2)
for _ in range(300):
    optimizer.zero_grad()
    nn.functional.cross_entropy(teacher(images), labels).backward()
    optimizer.step()


def right(logits: torch.Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())


alone = right(teacher(images))
student = timm.create_model("test_vit", num_classes=5, img_size=32)
task = LogitDistillationTask(student, teacher, nn.CrossEntropyLoss(), temperature=4.0)
seen = {}
teacher.register_forward_hook(lambda _, inputs, output: seen.update(pixels=inputs[0], logits=output))
task(images, labels)
within = right(seen["logits"])
keys = student.pretrained_cfg
print(f"timm {version('timm')}, torch {version('torch')}; student's mean {keys['mean']}, std {keys['std']}")
for name, pixels in (("the batch", images), ("what the teacher sees", seen["pixels"])):
    print(f"{name}: mean {pixels.mean():.3f}, std {pixels.std():.3f}")
print(f"teacher right on {alone:.1%} by itself, on {within:.1%} within the task")
raise SystemExit(not (alone > 0.95 and within < 0.8))
PYTHON
