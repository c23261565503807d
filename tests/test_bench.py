"""`scripts/bench.py` measures and prints; how fast anything is, no test says."""

import argparse
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "scripts" / "bench.py"
TINY = ("--examples", "256", "--rounds", "1", "--threads", "1")


class Bench:
    """The scripts, called in this process: a new one would spend longer on importing torch than on measuring."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, printed: pytest.CaptureFixture[str]) -> None:
        self.patch, self.printed = monkeypatch, printed
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(str(BENCH.parent))

    def __call__(self, *arguments: str, script: str = "bench") -> str:
        self.patch.setattr(sys, "argv", [script, *arguments])
        importlib.import_module(script).main()
        return self.printed.readouterr().out


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Bench]:
    threads = torch.get_num_threads()
    yield Bench(tmp_path, monkeypatch, capsys)
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_prints_ratios_on_made_data_of_mnists_shape_and_writes_every_round(tmp_path: Path, bench: Bench) -> None:
    said = bench(*TINY, "--student", "tinymlp", "--teacher", "smallmlp", "--no-startup", "--json", "numbers.json")

    assert "256 examples of made data of MNIST's shape" in said
    assert re.search(r"^bare loop +[\d,]+ +\d+\.\d\d \(\d+\.\d\d–\d+\.\d\d\) +goal 2\.4", said, re.M), said
    assert re.search(r"^plain loop +[\d,]+ +\d+\.\d\d \(\d+\.\d\d–\d+\.\d\d\)$", said, re.M), said
    assert re.search(r"^torchdistill +(not installed|[\d,]+ )", said, re.M), said
    assert re.search(r"^share of the products' rate: \d+% \(\d+%–\d+%\) +goal 80%$", said, re.M), said

    epoch = json.loads((tmp_path / "numbers.json").read_text())["epoch"]
    assert {"kd-cli", "plain loop", "bare loop", "products"} <= set(epoch["seconds"])
    assert all(len(values) == 1 and min(values) > 0 for values in epoch["seconds"].values())
    assert epoch["once"]["teacher_logits"] > 0


@pytest.mark.slow
def test_refuses_a_number_of_rounds_that_measures_nothing(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(BENCH), "--rounds", "0"], cwd=tmp_path, capture_output=True, text=True)

    assert done.returncode == 2
    assert "--rounds is 0; it must be 1 or more" in done.stderr


@pytest.mark.slow
def test_the_sweep_mode_compares_stacks_with_single_students(bench: Bench) -> None:
    said = bench("--sweep", "--examples", "128", "--rounds", "1", "--threads", "1")

    for students in ("16 tinymlp", "64 tinymlp", "16 smallmlp"):
        assert re.search(rf"^ *{students} +stacked is faster by \d+\.\d\d .*, takes \d+\.\d .* times one", said, re.M)


@pytest.mark.slow
def test_students_side_by_side_are_measured_against_the_same_one_by_one(tmp_path: Path, bench: Bench) -> None:
    small = ("--examples", "32", "--batch", "16", "--students", "2", "--rounds", "1", "--threads", "1")
    said = bench(*small, "--teacher", "resnet18", "--json", "numbers.json", script="bench_cohort")
    assert "32 examples of made data of CIFAR-10's shape" in said
    assert re.search(r"^2 students one by one / side by side +\d+\.\d\d \(", said, re.M), said
    seconds = json.loads((tmp_path / "numbers.json").read_text())["seconds"]
    assert {"side by side", "in turn", "one by one", "alone", "plain PyTorch"} == set(seconds)


@pytest.mark.slow
def test_exported_students_are_measured_beside_pytorch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    monkeypatch.syspath_prepend(str(BENCH.parent))
    import bench_export

    names = [case.name for case in bench_export.cases()]
    assert names == ["tinymlp", "smallmlp", "cnn", "mobilenet_v3_small"]
    found = bench_export.compare(bench_export.cases()[1], argparse.Namespace(rounds=2))
    assert {name: len(values) for name, values in found["seconds"].items()} == {"torch": 2, "onnx": 2, "int8": 2}
    smaller = found["bytes"]["onnx"] / found["bytes"]["int8"]
    assert smaller > 3.5
    assert f"{smaller:.2f}  goal 3.5" in capsys.readouterr().out


def test_int8_is_said_to_be_slower_where_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    import bench_export

    case, sizes = bench_export.cases()[0], {"onnx": 400, "int8": 100}
    for int8, said in (([0.5, 3.0, 0.5], "0.25 (0.25–1.50)  "), ([4.0, 4.0, 1.0], "2.00 (0.50–2.00), slower")):
        bench_export.say(case, {"torch": [6.0, 6.0, 6.0], "onnx": [2.0, 2.0, 2.0], "int8": int8}, sizes)
        line = capsys.readouterr().out
        assert line.startswith("tinymlp")
        assert "3.00 (3.00–3.00)  goal 1.5" in line
        assert said in line
        assert line.endswith("4.00\n")


@pytest.mark.slow
def test_photos_from_the_decoded_file_are_measured_against_an_imagefolder(bench: Bench) -> None:
    said = bench("--data", *TINY)
    for student in ("tinymlp", "cnn"):
        assert re.search(rf"^{student}: \d+ training photos of 64x64, .*ImageFolder: (floats|bytes)", said, re.M), said
    for name in ("kd-cli", "first pass", "streamed", "ImageFolder"):
        rows = re.findall(rf"^{name} +[\d,]+ +\d+\.\d\d \(.+–.+\) .* \d+\.\d\d \(\d+\.\d\d–\d+\.\d\d\)$", said, re.M)
        assert len(rows) == 2, said
