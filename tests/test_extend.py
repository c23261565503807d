"""A method, a model and a data set of the user's own: a Python file and a YAML file each, in the working directory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

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
        student, teacher = student.logits, teacher.logits
        soft = self.scale * ((student / T).softmax(-1) - (teacher / T).softmax(-1)).square().sum(-1).mean(-1)
        hard = hard_cross_entropy(student, batch.labels)
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
    "conf/method/squared.yaml": "# squared differences\n_target_: my_method.SquaredProbabilities\nscale: 1.0 # more\n",
    "conf/model/residual.yaml": "# one residual block\n_target_: my_model.Residual\nwidth: 16 # units\n",
    "conf/dataset/stripes.yaml": "# bright rows\n_target_: my_data.stripes\nnoise: 0.3 # harder\nval_fraction: 0.1\n",
}
ARGUMENTS = ["--config-dir", "conf", "teacher=residual", "student=residual", "student.width=4", "dataset=stripes"]
ARGUMENTS += ["method=squared", "method.scale=2", "optimizer.lr=0.02", "teacher_optimizer.lr=0.02", "device=cpu"]
ARGUMENTS += ["training.epochs=20", "teacher_training.epochs=20", "training.batch_size=32"]


def test_a_method_a_model_and_a_data_set_are_a_python_file_and_a_yaml_file_each(tmp_path: Path) -> None:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-m", "kd_cli", *ARGUMENTS]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    (path,) = tmp_path.rglob("summary.json")
    summary = json.loads(path.read_text())
    assert (summary["dataset"]["name"], summary["dataset"]["classes"], summary["method"]) == ("stripes", 3, "squared")
    assert summary["teacher"]["name"] == summary["student"]["name"] == "residual"
    assert summary["student"]["parameters"] == 50 * 4 + 4 + 4 * 4 + 4 + 4 * 3 + 3
    assert summary["student"]["test"]["accuracy"] > 0.9
    last = [json.loads(line) for line in (path.parent / "metrics.jsonl").read_text().splitlines()][-1]
    assert abs(last["loss"] - (last["soft_loss"] + 0.5 * last["hard_loss"])) < 1e-5
    help_page = subprocess.run([*command[:3], "--config-dir", "conf", "--help"], cwd=tmp_path, capture_output=True)
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
