#!/usr/bin/env bash
# torchvision 0.28.0: create_feature_extractor gives the output of a batch norm as it is after the next ReLU.
#
# Features before ReLU are asked of a ResNet by the node's name, "layer1.0.bn1", for a method that compares these (overhaul
# of feature distillation, activation boundaries). Expected: the output of that node, with its negative half. Seen: the
# extractor hands out the node's tensor after the whole graph has run, and the in-place ReLU behind it has overwritten it:
# "layer1.0.bn1" and "layer1.0.relu" are one tensor, with no warning. A forward hook on bn2 is worse off: the block's
# shortcut is added in place as well, while the extractor's node "layer1.0.bn2" is as it should be.
#
# Exit status 0 while that is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 torchvision==0.28.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import torch
from torch import nn

try:
    import torchvision
except RuntimeError:  # a torchvision built for CUDA beside a torch that is not: these operators are not used here
    operators = torch.library.Library("torchvision", "DEF")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from torchvision.models import resnet18
from torchvision.models.feature_extraction import create_feature_extractor

torch.manual_seed(0)
network, images = resnet18(num_classes=10), torch.randn(4, 3, 64, 64)
before = ["layer1.0.bn1", "layer1.0.bn2"]


def named(which: nn.Module) -> dict[str, torch.Tensor]:
    """What the extractor gives for the two batch norms and the first ReLU."""
    return create_feature_extractor(which, [*before, "layer1.0.relu"])(images)


def hooked(which: nn.Module) -> dict[str, torch.Tensor]:
    """What forward hooks on the two batch norms keep."""
    kept: dict[str, torch.Tensor] = {}
    for name in before:
        which.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: kept.update({name: output}))
    which(images)
    return kept


def negative(found: dict[str, torch.Tensor]) -> dict[str, float]:
    return {name: float((found[name] < 0).float().mean()) for name in before}


of_extractor = named(network)
same = of_extractor["layer1.0.bn1"].data_ptr() == of_extractor["layer1.0.relu"].data_ptr()
extractor, hooks = negative(of_extractor), negative(hooked(network))
for module in network.modules():
    if isinstance(module, nn.ReLU):
        module.inplace = False
truth = negative(named(network))
print(f"torchvision {version('torchvision')}, torch {version('torch')}; values below 0 of layer1.0 of a ResNet-18")
for name in before:
    print(f"{name}: extractor {extractor[name]:.1%}, forward hook {hooks[name]:.1%}, with no ReLU in place {truth[name]:.1%}")
print(f"the extractor's bn1 and relu are {'one tensor' if same else 'two tensors'}")
wrong = extractor["layer1.0.bn1"] == hooks["layer1.0.bn1"] == hooks["layer1.0.bn2"] == 0
raise SystemExit(not (same and wrong and min(truth.values()) > 0.3 and extractor["layer1.0.bn2"] > 0.3))
PYTHON
