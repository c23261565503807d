"""The model card: its five lines of Python run as they stand, and its numbers are those of run and export."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kd_cli.export.card import MARK, card, use, write_card
from kd_cli.export.cost import int8_against_floats
from kd_cli.export.forms import onnx_bytes, pt2_bytes
from kd_cli.export.student import Student

pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")
CLASSES = ("cat", "dog", "owl")


def record_of(form: str, multilabel: bool = False) -> dict[str, Any]:
    """The record of an export of one form."""
    row = {"file": f"student.{form}", "errors": 3, "total": 50, "nll": 0.25, "ece": 0.04, "agreement": 0.98}
    record = {"role": "student", "fingerprint": "f00d", "versions": {"kd-cli": "0.1.0"}, "classes": list(CLASSES)}
    record |= {"input": "images", "output": "logits", "input_shape": ["batch", 2, 3], "input_type": "float32"}
    record |= {"values": "floats", "range": [0.0, 1.0], "forms": {form: row}, "refused": {}}
    return record | ({"multilabel": True} if multilabel else {})


def summary_of() -> dict[str, Any]:
    """The summary of a run with a teacher."""
    test = {"errors": 4, "total": 50, "nll": 0.5, "ece": 0.1, "agreement": 0.9}
    test["worst_class"] = {"name": "owl", "recall": 0.75, "examples": 16}
    model = {"name": "tinymlp", "epochs": 2, "test": test, "parameters": 1234, "flops": 2_500_000}
    data = {"name": "animals", "train": 100, "val": 10, "test": 50, "classes": 3, "class_names": list(CLASSES)}
    found = {"dataset": {**data, "multilabel": False, "fingerprint": "beef"}}
    found |= {"teacher": {**model, "name": "bigmlp"}, "student_alone": model, "student": model, "method": "dkd"}
    found |= {"T": 3.0, "alpha": 1.0, "beta": 0.5, "seed": 7, "precision": "float32", "device": "cpu"}
    return found | {"transfer": {"examples": 100, "labels": True}, "notes": ["one", "two"]}


@pytest.mark.parametrize("multilabel", [False, True], ids=["classes", "labels"])
@pytest.mark.parametrize("form", ["pt2", "onnx"])
def test_the_five_lines_print_what_the_student_predicts(
    form: str, multilabel: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(6, 3)).requires_grad_(False)
    sizes = {"classes": CLASSES, "input_shape": (2, 3), "dtype": torch.float32}
    student = Student(network, mean=[0.5] * 3, std=[0.25] * 3, **sizes, values="floats").eval()
    record = record_of(form, multilabel)
    if form == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
        content = onnx_bytes(student, {"classes": list(CLASSES)})
    else:
        content = pt2_bytes(student)
    (tmp_path / f"student.{form}").write_bytes(content)
    (tmp_path / "export.json").write_text(json.dumps(record))
    found = re.search(r"```python\n(.*)\n```", "\n".join(use(record)), re.DOTALL)
    assert found is not None
    lines = found[1].splitlines()
    assert len(lines) == 5
    monkeypatch.chdir(tmp_path)
    seen = []
    for images in (torch.zeros(1, 2, 3), torch.rand(4, 2, 3)):
        if len(images) > 1:
            start = lines[3].partition(" = ")[0]
            torch.save(images, "images.pt")
            lines[3] = f"{start} = __import__('torch').load('images.pt')" + (".numpy()" if form == "onnx" else "")
        logits = student(images)
        wanted = [(row > 0).nonzero()[:, 0].tolist() if multilabel else [int(row.argmax())] for row in logits]
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec("\n".join(lines), {})
        assert said.getvalue() == f"{[[CLASSES[c] for c in row] for row in wanted]}\n"
        seen.append(wanted)
    assert len({str(row) for wanted in seen for row in wanted}) > 1  # not one answer for all


def test_the_card_has_data_method_weights_results_and_limits() -> None:
    text = card(summary_of(), record_of("pt2"))
    for part in (
        "100 training, 10 validation and 50 test examples of 2x3; 3 classes: cat, dog, owl",
        "distilled from bigmlp by dkd",
        "method dkd, T = 3, alpha = 1 (soft term), beta = 0.5 (hard term)",
        "2 epochs, seed 7, float32 on cpu; 1,234 parameters, 2.50 MFLOPs for one example\n",
        "| student alone (tinymlp) | 4 of 50 (8.00%) | 0.5000 | 0.1000 | the teacher: 90.00% |",
        "| student.pt2 | 3 of 50 (6.00%) | 0.2500 | 0.0400 | the student: 98.00% |",
        "n = 1 training",
        "its worst class is owl: 75.0% of 16 test examples",
        "notes: 2",
    ):
        assert part in text
    assert "## Cost" not in text
    for how, said in (("static", "after training, static"), ("in training", "in training")):
        record = record_of("int8")
        record["forms"]["int8"]["quantisation"] = how
        assert f"student.int8 (int8, quantised {said})" in card(summary_of(), record)
    extended = summary_of()
    extended["student"] = extended["student"] | {"parameters": 2000}
    assert "2,000 parameters, 2.50 MFLOPs for one example; with the parts that dkd added, without them 1,234" in card(
        extended, record_of("pt2")
    )


def test_int8_is_called_faster_only_where_it_was() -> None:
    def cost(single: float, int8: float) -> dict[str, Any]:
        return {"rows": {"onnx": {"latency": [{"median_ms": single}]}, "int8": {"latency": [{"median_ms": int8}]}}}

    assert str(int8_against_floats(cost(2.0, 1.0))).startswith("int8 took 0.50 of the time")
    for int8 in (2.0, 3.0):
        sentence = int8_against_floats(cost(2.0, int8))
        assert sentence is not None
        assert "not faster" in sentence
    assert int8_against_floats({"rows": {"int8": {}}}) is None
    assert int8_against_floats(None) is None


def test_a_readme_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# My project\n")
    assert "no model card was written" in str(write_card(tmp_path, summary_of(), record_of("pt2")))
    assert (tmp_path / "README.md").read_text() == "# My project\n"
    (tmp_path / "README.md").write_text(f"{MARK}\nan earlier card\n")
    assert write_card(tmp_path, summary_of(), record_of("pt2")) is None
    assert "animals" in (tmp_path / "README.md").read_text()
    assert write_card(tmp_path, summary_of(), record_of("pt2") | {"forms": {}}) is None
    assert not (tmp_path / "README.md").exists()  # the form that it described was refused
