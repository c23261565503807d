"""The model card's five lines run in an environment that has ONNX Runtime and no torch."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from test_export_card import CLASSES, record_of
from torch import nn

from kd_cli.export.card import use
from kd_cli.export.forms import onnx_bytes
from kd_cli.export.student import Student

pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")


def packages_of(name: str, seen: set[str] | None = None) -> set[Path]:
    """The folders and modules of an installed distribution and of all that it requires."""
    seen = set() if seen is None else seen
    seen.add(name)
    found = importlib.metadata.distribution(name)
    tops = {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}
    paths = {Path(str(found.locate_file(top))) for top in tops}
    for requirement in found.requires or ():
        other = re.split(r"[\s;<>=!~\[(]", requirement)[0]
        if other not in seen and "extra ==" not in requirement:
            paths |= packages_of(other, seen)
    return paths


def without_torch(folder: Path) -> Path:
    """The interpreter of a new environment that has ONNX Runtime and what it requires, as they are installed here."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")  # lib64 is a link to it
    for path in packages_of("onnxruntime"):
        (site / path.name).symlink_to(path)
    return folder / "bin" / "python"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="symbolic links need rights there")
def test_the_five_lines_of_the_card_run_where_there_is_no_torch(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).requires_grad_(False)
    sizes = {"classes": CLASSES, "input_shape": (2, 3), "dtype": torch.float32}
    student = Student(network, mean=[0.5] * 3, std=[0.25] * 3, **sizes, values="floats").eval()
    (tmp_path / "student.onnx").write_bytes(onnx_bytes(student, {"classes": list(CLASSES)}))
    record = record_of("onnx")
    (tmp_path / "export.json").write_text(json.dumps(record))
    found = re.search(r"```python\n(.*)\n```", "\n".join(use(record)), re.DOTALL)
    assert found is not None
    python = without_torch(tmp_path / "environment")

    def run(code: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)

    assert "No module named 'torch'" in run("import torch").stderr
    ran = run(found[1])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"{[[CLASSES[int(student(torch.zeros(1, 2, 3)).argmax())]]]}\n"
