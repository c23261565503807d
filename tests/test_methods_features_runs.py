"""Feature methods through the command: layers found and said, projections trained, kept and not shipped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from process import Ran, Running
from safetensors.torch import load_file
from test_own_methods import KILLED, rows

pytestmark = pytest.mark.slow

# Five convolutions' maps fit into 32 pixels; 48 of these pictures are seconds for a ResNet.
DOTS = """
import torch
from kd_cli.data.source import Source

def dots(data_dir):
    own = torch.Generator().manual_seed(1)
    labels = torch.arange(72) % 3
    images = torch.randn(72, 3, 32, 32, generator=own)
    images[torch.arange(72), labels] += 1
    return Source("dots", images[:48], labels[:48], images[48:], labels[48:], ("red", "green", "blue"))
"""
METHODS = ["feature", "attention", "hints", "similarity", "relational", "pkt", "crd", "review"]
CNNS = [
    *("student=cnn", "student.channels=[4,6]", "student.hidden=8", "teacher=cnn", "teacher.channels=[6,8]"),
    *("teacher.hidden=12", "teacher_training.epochs=1", "training.batch_size=250", "device=cpu"),
]
MLPS = ["student=tinymlp", "student.hidden=[32]", "teacher=tinymlp", "teacher.hidden=[20]"]
MLPS += ["teacher_training.epochs=1", "device=cpu"]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_finds_its_layers_says_so_and_ships_the_student_alone(kd_run: Callable[..., Ran], method: str) -> None:
    ran = kd_run(*CNNS, f"method={method}", "training.epochs=2", *(["method.K=64"] if method == "crd" else []))
    assert ran.code == 0, ran.err
    terms = {"distance_loss", "angle_loss"} if method == "relational" else {f"{method.removesuffix('s')}_loss"}
    assert all(terms <= row.keys() for row in rows(ran))
    notes = [note for note in ran.summary["notes"] if "learns from" in note]
    assert notes
    assert all(note.partition(": the student's ")[0].lower() == method and note in ran.err for note in notes)
    shipped = load_file(ran.run_dir / "student.safetensors")
    assert sum(t.numel() for t in shipped.values()) == ran.summary["student"]["parameters"]
    assert shipped.keys() == {f"{i}.{part}" for i in (0, 3, 7, 9) for part in ("weight", "bias")}


@pytest.mark.parametrize("argv", [["method=feature"], ["method=crd", "method.K=64"]])
def test_a_run_that_was_killed_goes_on_with_its_projections_and_memories_to_the_same_bytes(
    start: Callable[..., Running], tmp_path: Path, argv: list[str]
) -> None:
    argv = [*CNNS, *argv, "training.epochs=3", "checkpoint.every=1", "hydra.run.dir=out", "store_dir=store"]
    whole = start(*argv, folder=tmp_path / "work").wait()
    assert whole.code == 0, whole.err
    weights = (tmp_path / "work/out/student.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "work")
    at = 1 + 3 + 2  # the teacher's epoch, the student alone's three, the student's second
    killed = start(*argv, folder=tmp_path / "work", prelude=KILLED.format(at=at)).wait()
    assert killed.code == -9
    assert not (tmp_path / "work/out/summary.json").exists()
    assert start("resume=out", folder=tmp_path / "work").wait().code == 0
    assert (tmp_path / "work/out/student.safetensors").read_bytes() == weights


def test_a_resnet_teaches_a_shufflenet(
    kd_run: Callable[..., Ran], own_code: Callable[..., list[str]], tmp_path: Path
) -> None:
    flags = own_code({"dots.py": DOTS, "dataset/dots": "# bright channels\n_target_: dots.dots\nval_fraction: 0.1\n"})
    networks = [
        "teacher=torchvision",
        "teacher.name=resnet18",
        "student=torchvision",
        "student.name=shufflenet_v2_x0_5",
    ]
    short = ["training.epochs=1", "teacher_training.epochs=1", "training.batch_size=22", "device=cpu"]
    ran = kd_run(*flags, "-m", "method=attention,relational,review", "dataset=dots", *networks, *short)
    assert ran.code == 0, ran.err
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("multirun/**/summary.json")]
    notes = {summary["method"]: summary["notes"] for summary in summaries if summary["status"] == "completed"}
    assert [note.rpartition("weight 1000")[0] for note in notes["attention"]] == [
        "Attention: the student's conv1 (24x16x16) learns from the teacher's relu (64x16x16); at 16x16 positions the ",
        "Attention: the student's maxpool (24x8x8) learns from the teacher's layer1 (64x8x8); at 8x8 positions the ",
        "Attention: the student's stage2 (48x4x4) learns from the teacher's layer2 (128x4x4); at 4x4 positions the ",
        "Attention: the student's stage3 (96x2x2) learns from the teacher's layer3 (256x2x2); at 2x2 positions the ",
    ]
    last = "the student's conv5 (1024x1x1) learns from the teacher's layer4 (512x1x1)"
    assert notes["relational"] == [f"Relational: {last}"]
    assert len(notes["review"]) == 5
    assert notes["review"][-1] == f"Review: {last}"


def test_hints_in_two_stages_learn_the_hint_first_between_hidden_layers_too(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run(*MLPS, "method=hints", "method.stages=2", "method.first_stage=0.5", "training.epochs=4")
    assert ran.code == 0, ran.err
    assert ran.summary["notes"][0] == "Hints: the student's 2 (32) learns from the teacher's 2 (20)"
    found = rows(ran)
    for row in found[:2]:
        assert row["loss"] == pytest.approx(100 * row["hint_loss"], rel=1e-5)
    for row in found[2:]:  # lambda falls from 4 to 1, T = 2, beta = 0.5
        factor = (row["loss"] - 0.5 * row["hard_loss"]) / (4 * row["soft_loss"])
        assert (2.5 <= factor <= 4) if row["epoch"] == 3 else (1 <= factor <= 2.5)


@pytest.mark.parametrize(
    "argv",
    [
        ["method=attention", "precision=bfloat16"],
        ["method=feature", "method.distance=srd", "precision=bfloat16"],
        ["method=crd", "method.K=64", "precision=float64", "diagnostics=true"],
        ["method=hints", "method.regressor=conv_bn_relu", "beta=0", "transfer.labels=false"],
        ["method=similarity", "training.jitter=1"],
        ["method=attention", "method.student_layers=[1,4]", "method.teacher_layers=[0,4]"],
        ["method=sum", "method@method.second=attention", "method.weights.second=0.1"],
        ["method=scheduled", "method@method.of=feature", "method.of.distance=cosine"],
    ],
)
def test_other_precisions_data_and_compositions(kd_run: Callable[..., Ran], argv: list[str]) -> None:
    ran = kd_run(*CNNS, *argv, "training.epochs=1")
    assert ran.code == 0, ran.err
    (row,) = rows(ran)
    assert all(value is None or abs(value) < 1e6 for key, value in row.items() if key.endswith(("loss", "logits")))
    assert ran.summary["notes"]


def test_students_of_a_sweep_are_trained_one_by_one_and_the_reason_is_said(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run("-m", *MLPS, "method=feature", "seed=0,1", "training.epochs=1")
    assert ran.code == 0, ran.err
    assert "run one by one: Feature reads features" in ran.err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([*CNNS, "method=feature", "teacher.members=2"], "reads the teacher's features, and teacher.members is 2"),
        ([*CNNS, "method=feature", "method.student_layers=conv"], "the student has no module 'conv'"),
        ([*CNNS, "method=relational", "training.batch_size=1"], "needs batches of 2 examples or more"),
        ([*MLPS, "method=attention"], "Attention finds no pair of maps with several positions"),
        ([*CNNS, "method=crd", "transfer.labels=false"], "learns from labels, and the transfer set has none"),
        ([*CNNS, "method=pkt", "T=auto"], "method=pkt has no T to choose"),
    ],
)
def test_what_a_method_cannot_do_is_said_before_anything_is_trained(
    kd_run: Callable[..., Ran], argv: list[str], said: str
) -> None:
    ran = kd_run(*argv)
    assert ran.code == 1
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert not any((path / "metrics.jsonl").exists() for path in ran.run_dirs)
