#!/usr/bin/env bash
# torchdistill 1.1.5: a DistillationBox leaves its teacher in training mode, a frozen one (requires_grad: False) too.
#
# pre_epoch_process calls train() for the student and nothing for the teacher; a torch.nn.Module that was just made and
# loaded is in training mode. Expected: a frozen teacher stays as it is and answers as in inference. Seen: its BatchNorm
# takes over the statistics of the student's batches, epoch after epoch, its dropout is on, and the same images get other
# soft targets each time. The parameters are the same afterwards; the buffers, and with them the teacher's answers, are not.
#
# Exit status 0 while that is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 torchvision==0.28.0 torchdistill==1.1.5
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging
from copy import deepcopy
from importlib.metadata import version

import torch
from torch import nn
from torch.utils.data import SequentialSampler, TensorDataset

try:
    import torchvision  # which torchdistill imports
except RuntimeError:  # a torchvision built for CUDA beside a torch that is not: these operators are not used here
    operators = torch.library.Library("torchvision", "DEF")
    operators.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    operators.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from torchdistill.core.distillation import get_distillation_box

logging.disable(logging.WARNING)
torch.manual_seed(0)
images, labels = torch.randn(64, 4) + 2, torch.randint(3, (64,))
given = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 3))
path = {"student_module_path": ".", "student_module_io": "output", "teacher_module_path": ".", "teacher_module_io": "output"}
loss = {"criterion": {"key": "KDLoss", "kwargs": {**path, "temperature": 4.0, "alpha": 0.5}}, "weight": 1.0}


def distilled(teacher: nn.Module) -> list[float]:
    """The loss of each of three epochs, of one batch and with a learning rate of 0, so that only a teacher can change it."""
    loader = {"dataset_id": "all", "kwargs": {"batch_size": 64}, "sampler": {"class_or_func": SequentialSampler, "kwargs": {}}}
    config = {
        "num_epochs": 3,
        "train_data_loader": loader,
        "teacher": {"requires_grad": False, "forward_proc": "forward_batch_only"},
        "student": {"forward_proc": "forward_batch_only"},
        "optimizer": {"key": "SGD", "kwargs": {"lr": 0.0}},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": {"kd": loss}}},
    }
    torch.manual_seed(0)
    data = {"all": TensorDataset(images, labels)}
    box = get_distillation_box(teacher, nn.Linear(4, 3), data, config, torch.device("cpu"), None, False, 1.0)
    losses = []
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for batch, targets, more in box.train_data_loader:
            value = box.forward_process(batch, targets=targets, supp_dict=more)
            box.post_forward_process(loss=value)
            losses.append(float(value))
        box.post_epoch_process()
    return losses


print(f"torchdistill {version('torchdistill')}, torch {version('torch')}; three epochs at a learning rate of 0")
before, moved = given.eval()(images).detach(), {}
for name in ("in training mode", "after eval()"):
    teacher = deepcopy(given).train(name == "in training mode")
    losses = distilled(teacher)
    moved[name] = float((teacher.eval()(images) - before).abs().max())
    print(f"frozen teacher given {name}: losses {', '.join(f'{x:.4f}' for x in losses)}; its logits moved by {moved[name]:.3g}")
raise SystemExit(not (moved["in training mode"] > 0.1 and moved["after eval()"] == 0))
PYTHON
