"""How fast and how small exported students are, beside PyTorch eager: what `bench.py --export` measures.

Weights and images are random: neither speed nor size depends on them. All forms of a model take turns within a round,
with a pause between them, because idle threads of one library spin for a while and would take the cores of the next. A
ratio is taken within its round; its median and range over the rounds are printed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from kd_cli.config.build import build
from kd_cli.config.options import conf_dir
from kd_cli.export.cost import in_file, in_torch
from kd_cli.export.forms import onnx_bytes
from kd_cli.export.int8 import int8_bytes
from kd_cli.export.latency import Call, timed
from kd_cli.export.student import Student

FASTER, SMALLER = 1.5, 3.5  # the goals: ONNX Runtime against PyTorch at batch 1, int8 bytes of an MLP against floats
PAUSE = 0.1  # seconds between two forms
TURN, CALLS = 0.15, 300  # seconds of a turn, and calls at most
EXAMPLES = 64  # to calibrate with


@dataclass(frozen=True)
class Case:
    """A model of conf/model with keys, and the images and classes that it is for."""

    name: str
    node: Mapping[str, Any]
    shape: tuple[int, int, int]
    classes: int

    @property
    def is_mlp(self) -> bool:
        return str(self.node["_target_"]).endswith("mlp.mlp")


def cases() -> list[Case]:
    digit, photo = (1, 28, 28), (3, 224, 224)
    small = [Case(name, option(name), digit, 10) for name in ("tinymlp", "smallmlp", "cnn")]
    torchvision = {**option("torchvision"), "name": "mobilenet_v3_small", "pretrained": False}
    return [*small, Case("mobilenet_v3_small", torchvision, photo, 1000)]


def option(name: str) -> dict[str, Any]:
    node: dict[str, Any] = yaml.safe_load((conf_dir() / "model" / f"{name}.yaml").read_text(encoding="utf-8"))
    return node


def compare_exports(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Latencies at batch 1 and bytes of every form of every case."""
    print(
        f"\none image at a time, {args.threads} threads, {args.rounds} rounds; milliseconds are medians, ratios are "
        f"within a round\n\n{'':20}{'PyTorch':>9}{'ONNX':>9}{'int8':>9}  {'ONNX is faster by':28}"
        f"{'int8 takes, of ONNX':25}int8 is smaller by"
    )
    return [compare(case, args) for case in cases()]


def compare(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """One model in all its forms."""
    torch.manual_seed(0)
    student = student_of(case)
    images = torch.randint(0, 256, (EXAMPLES, *case.shape), dtype=torch.uint8)
    with tempfile.TemporaryDirectory(prefix="kd-bench-") as scratch:
        paths = forms(student, images, Path(scratch))
        calls = {"torch": in_torch(student, images[:1])}
        calls |= {name: in_file(name, path, images[:1]) for name, path in paths.items()}
        with torch.inference_mode():
            seconds = in_turns(calls, args.rounds)
        sizes = {name: path.stat().st_size for name, path in paths.items()}
    say(case, seconds, sizes)
    return {"model": case.name, "seconds": seconds, "bytes": sizes}


def student_of(case: Case) -> Student:
    network = build(dict(case.node), input_shape=case.shape, num_classes=case.classes).requires_grad_(False)
    channels = case.shape[0]
    return Student(
        network,
        mean=[0.45] * channels,
        std=[0.25] * channels,
        classes=tuple(map(str, range(case.classes))),
        input_shape=case.shape,
        dtype=torch.float32,
        values="bytes",
    ).eval()


def forms(student: Student, images: Tensor, folder: Path) -> dict[str, Path]:
    """The exported files of a student."""
    paths = {"onnx": folder / "student.onnx", "int8": folder / "student.int8.onnx"}
    content = onnx_bytes(student, {})
    paths["onnx"].write_bytes(content)
    paths["int8"].write_bytes(int8_bytes(content, images)[0])
    return paths


def in_turns(calls: Mapping[str, Call], rounds: int) -> dict[str, list[float]]:
    """The median seconds of a call of each, by round."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            time.sleep(PAUSE)
            call()
            call()
            found[name].append(statistics.median(timed(call, TURN, fewest=5, most=CALLS)))
    return found


def say(case: Case, seconds: Mapping[str, list[float]], sizes: Mapping[str, int]) -> None:
    """A line of the table; int8 is said to be slower where it is."""
    times = "".join(f"{1000 * statistics.median(seconds[name]):>9.3f}" for name in ("torch", "onnx", "int8"))
    gain = [a / b for a, b in zip(seconds["torch"], seconds["onnx"], strict=True)]
    takes = [a / b for a, b in zip(seconds["int8"], seconds["onnx"], strict=True)]
    smaller = sizes["onnx"] / sizes["int8"]
    goals = f"  goal {FASTER}" if case.name != "smallmlp" else ""
    verdict = "" if statistics.median(takes) < 1 else ", slower"
    print(
        f"{case.name:20}{times}  {spread(gain) + goals:28}{spread(takes) + verdict:25}{smaller:.2f}"
        + (f"  goal {SMALLER}" if case.name == "smallmlp" else ""),
        flush=True,
    )


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f})"
