"""A method, a model and a data set of the user's own: a Python file and a YAML file each, in the working directory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY
from process import Ran

from kd_cli import load_student

METHOD = """
from kd_cli.learn.methods import Method
from kd_cli.losses import hard_cross_entropy

class SquaredProbabilities(Method):
    def __init__(self, scale=1.0):
        super().__init__()
        self.scale = scale

    def forward(self, student, teacher, batch, weights):
        T = weights.T[:, None, None]
        difference = (student.logits / T).softmax(-1) - (teacher.logits / T).softmax(-1)
        soft = self.scale * difference.square().sum(-1).mean(-1)
        hard = hard_cross_entropy(student.logits, batch.labels)
        return {"loss": weights.alpha * soft + weights.beta * hard, "soft": soft, "hard": hard}
"""
MODEL = """
import math
from torch import nn

class Residual(nn.Module):
    def __init__(self, input_shape, num_classes, width=16):
        super().__init__()
        self.first = nn.Linear(math.prod(input_shape), width)
        self.block = nn.Sequential(nn.Linear(width, width), nn.ReLU())
        self.last = nn.Linear(width, num_classes)

    def forward(self, images):
        x = self.first(images.flatten(1)).relu()
        return self.last(x + self.block(x))
"""
DATA = """
import torch
from kd_cli.data.source import Source

def stripes(data_dir, examples=300, noise=0.3):
    # pictures of 2 channels, 5x5: one of three rows is bright
    own = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (examples,), generator=own)
    images = noise * torch.randn(examples, 2, 5, 5, generator=own)
    images[torch.arange(examples), :, labels] += 1
    cut = examples // 3
    return Source("stripes", images[cut:], labels[cut:], images[:cut], labels[:cut], ("top", "middle", "bottom"))
"""
FILES = {
    "my_method.py": METHOD,
    "my_model.py": MODEL,
    "my_data.py": DATA,
    "method/squared": "# squared differences\n_target_: my_method.SquaredProbabilities\nscale: 1.0 # more\n",
    "model/residual": "# one residual block\n_target_: my_model.Residual\nwidth: 16 # units\n",
    "dataset/stripes": "# bright rows\n_target_: my_data.stripes\nnoise: 0.3 # harder\nval_fraction: 0.1\n",
}
ARGUMENTS = ["teacher=residual", "student=residual", "student.width=4", "dataset=stripes"]
ARGUMENTS += ["method=squared", "method.scale=2", "optimizer.lr=0.02", "teacher_optimizer.lr=0.02", "device=cpu"]
ARGUMENTS += ["training.epochs=20", "teacher_training.epochs=20", "training.batch_size=32"]


@pytest.mark.slow
def test_a_method_a_model_and_a_data_set_are_a_python_file_and_a_yaml_file_each(
    own_code: Callable[..., list[str]], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "kd_cli", *own_code(FILES)]
    ran = subprocess.run([*command, *ARGUMENTS], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    (path,) = tmp_path.rglob("summary.json")
    summary = json.loads(path.read_text())
    assert (summary["dataset"]["name"], summary["dataset"]["classes"], summary["method"]) == ("stripes", 3, "squared")
    assert summary["teacher"]["name"] == summary["student"]["name"] == "residual"
    assert summary["student"]["parameters"] == 50 * 4 + 4 + 4 * 4 + 4 + 4 * 3 + 3
    assert summary["student"]["test"]["accuracy"] > 0.9
    last = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()][-1]
    assert abs(last["loss"] - (last["soft_loss"] + 0.5 * last["hard_loss"])) < 1e-5
    help_page = subprocess.run([*command, "--help"], cwd=tmp_path, capture_output=True)
    for words in (b"squared differences", b"one residual block", b"bright rows"):
        assert words in help_page.stdout

    sys.path.insert(0, str(tmp_path))
    try:
        student = load_student(path.parent, trust=True)
    finally:
        sys.path.remove(str(tmp_path))
    image = torch.zeros(1, 2, 5, 5)
    image[:, :, 1] = 1
    assert student.classes[int(student(image).argmax())] == "middle"


OPTIMIZER = """
import torch


class SignSGD(torch.optim.Optimizer):
    # each weight moves by the learning rate against the sign of its gradient
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * p.grad.sign())


def halves(progress):
    return 1.0 if progress < 0.5 else 0.5
"""
EXPORT = """
import sys

import torch

import kd_cli

student = kd_cli.load_student(sys.argv[1])
batch = torch.export.Dim("batch", min=1)
program = torch.export.export(student, (torch.zeros(2, *student.input_shape, dtype=torch.uint8),),
                              dynamic_shapes=({0: batch},))
torch.export.save(program, "student.pt2")
"""


@pytest.mark.slow
def test_an_optimiser_a_schedule_and_an_export_are_added_from_outside(
    own_code: Callable[..., list[str]], kd_run: Callable[..., Ran], tmp_path: Path
) -> None:
    files = {
        "my_optimizer.py": OPTIMIZER,
        "my_export.py": EXPORT,
        "optimizer/sign": "# sign descent\n_target_: my_optimizer.SignSGD\nlr: 0.002 # a weight's step\n",
        "schedule/halves": "# half the rate in the second half\n_target_: my_optimizer.halves\n_partial_: true\n",
    }
    arguments = [*own_code(files), *TINY, "optimizer=sign", "schedule=halves", "training.epochs=4"]
    ran = kd_run(*arguments)
    assert ran.code == 0, ran.err
    rows = [row for row in ran.metrics if row["role"] == "student"]
    assert [row["lr"] for row in rows] == [0.002, 0.002, 0.001, 0.001]
    assert rows[-1]["loss"] < rows[0]["loss"]
    command = [sys.executable, "my_export.py", str(ran.run_dir)]
    exported = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert exported.returncode == 0, exported.stderr
    program = torch.export.load(tmp_path / "student.pt2").module()
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    assert torch.allclose(program(images), load_student(ran.run_dir)(images), atol=1e-5)
