"""Wrong input and odd input: whatever is asked for either runs or is refused in words for a person.

The command runs in this process, hundreds of times: KD_FUZZ says how often.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from kd_cli.commands.kd_report import arguments, report
from kd_cli.commands.kd_run import main
from kd_cli.errors import KdError

EXAMPLES = int(os.environ.get("KD_FUZZ", "100"))
SEED = int(os.environ.get("KD_FUZZ_SEED", "20150309"))
LIMIT = 60.0  # seconds: no run here takes a hundredth of it on a quiet machine
counts = {"ran": 0, "refused": 0, "diverged": 0, "damaged": 0}

OWN = """
import torch
from torch import nn
from kd_cli.data.source import Source

def made(*, data_dir, classes=2, shape=(1, 3, 3), n=40, tests=20, kind="float", used=None, constant=False):
    own = torch.Generator().manual_seed(0)
    def part(n):
        labels = torch.randint(0, used or classes, (n,), generator=own)
        images = torch.zeros(n, *shape) if constant else torch.rand(n, *shape, generator=own)
        return (images * 255).to(torch.uint8) if kind == "uint8" else images.to(getattr(torch, kind)), labels
    return Source("made", *part(n), *part(tests), class_names=tuple(str(c) for c in range(classes)))

def normed(*, input_shape, num_classes):
    width = torch.Size(input_shape).numel()
    return nn.Sequential(nn.Flatten(), nn.Linear(width, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, num_classes))
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of the user's own."""
    (tmp_path / "kd_own_of_fuzz.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("kd_own_of_fuzz", None)
    return tmp_path


def command(*argv: str) -> tuple[int, str]:
    """Run the command in this process: its exit status and all that it said."""
    said = io.StringIO()
    before, path, environ = sys.argv, sys.path[:], dict(os.environ)
    sys.argv = ["kd-run", *argv]
    status: Any = 0
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                main()
            except SystemExit as end:
                status = end.code or 0
    finally:
        sys.argv, sys.path[:] = before, path
        os.environ.clear()
        os.environ.update(environ)
        torch.set_float32_matmul_precision("highest")
    if isinstance(status, str):
        said.write(status)
        status = 1
    return status, said.getvalue()


def judge(out: Path, status: int, said: str, *, dry: bool = False) -> None:
    """What must hold after any command that was to write to `out`."""
    assert "Traceback" not in said
    assert "Error(" not in said
    summaries = [json.loads(path.read_text()) for path in out.rglob("summary.json")] if out.exists() else []
    left = [path for path in out.rglob("*") if path.name.endswith((".tmp", ".lock"))] if out.exists() else []
    assert not left
    if status == 0:
        counts["ran"] += 1
        assert dry or summaries
        assert all(summary["status"] == "completed" for summary in summaries)
        return
    told = [line for line in said.splitlines() if "error: " in line]
    assert told, said
    assert all(len(line) > len("error: ") + 8 for line in told)
    diverged = [summary for summary in summaries if summary["status"] == "diverged"]
    counts["diverged" if diverged else "refused"] += 1
    if "-m" not in sys.argv:
        assert summaries == diverged  # nothing that looks finished


NUMBERS = ["0", "1", "2", "-1", "0.5", "1e-3", "1e4", "1e-30", "1e30", "1e400", "nan", "inf", "-inf", "null", "true"]
ODD = ["''", "x", "[]", "[1,2]", "{a:1}", "${seed}", "${nope}", "'0'", "auto", "00", "1_000", "0x10", "ä", "???"]
KEYS = {
    "T": NUMBERS + ODD,
    "alpha": NUMBERS + ODD,
    "beta": NUMBERS + ODD,
    "seed": [*NUMBERS, *ODD, "99999999999999999999"],
    "device": ["cpu", "cuda", "cuda:7", "mps", "meta", "gpu", "''", "null", "1"],
    "precision": ["float32", "float64", "bfloat16", "tf32", "float16", "''", "null"],
    "diagnostics": ["true", "false", "1", "x"],
    "latency": ["true", "false", "x"],
    "cuda_graphs": ["true", "false", "x"],
    "training.rotate": ["15", "-1", "x"],
    "training.scale": ["0.1", "1", "nan"],
    "dry_run": ["true", "x"],
    "training.epochs": ["0", "1", "2", "-3", "1.5", "x", "null"],
    "training.batch_size": ["0", "1", "7", "100000000000", "-1", "x"],
    "training.jitter": ["0", "1", "9", "100", "-1", "1.5"],
    "training.crop": ["0", "1", "9", "100", "-1"],
    "training.flip": ["true", "0", "x"],
    "training.keep": ["best", "last", "first", "null"],
    "teacher_training.seed": ["1", "-1", "x"],
    "teacher_training.keep": ["best", "x"],
    "optimizer": ["sgd", "adamw", "adam", "{}", "null", "''"],
    "optimizer.lr": NUMBERS + ODD,
    "optimizer.weight_decay": NUMBERS + ODD,
    "+optimizer.momentum": NUMBERS,
    "+optimizer.betas": ["[0.9,0.99]", "[2,3]", "1", "[x]"],
    "optimizer._target_": ["torch.optim.SGD", "torch.optim.LBFGS", "torch.optim.Nope", "torch", "1", "os.getcwd", "''"],
    "schedule": ["cosine", "constant", "linear", "step", "nope"],
    "schedule.warmup": NUMBERS,
    "schedule._target_": ["kd_cli.learn.schedules.Constant", "kd_cli.learn.schedules", "x.y"],
    "method": ["soft_targets", "logits", "hard", "label_smoothing", "soft", "''"],
    "method.smoothing": NUMBERS,
    "+method.center": ["true", "x"],
    "student": ["smallmlp", "tinymlp", "cnn", "nope", "null"],
    "student.hidden": ["[]", "[3]", "[0]", "[-1]", "[1.5]", "[x]", "3", "null", "[1000000000000]", "[[3]]"],
    "student.dropout": NUMBERS,
    "student.max_norm": NUMBERS,
    "+student.nope": ["1"],
    "+student._partial_": ["true", "false", "x", "1", "null"],
    "+student._args_": ["[]", "[3]", "[[3],0.1]", "x", "{}"],
    "+student._convert_": ["all", "none", "object", "x", "[1]"],
    "+student._recursive_": ["false", "x"],
    "+method._partial_": ["true", "x"],
    "+schedule._args_": ["[0.5]", "[2]", "[1,2,3,4]"],
    "+schedule._convert_": ["none", "null"],
    "+optimizer._partial_": ["true"],
    "+optimizer._args_": ["[1]", "[]"],
    "+optimizer.inner": ["{_target_: torch.nn.ReLU}", "{_target_: nope}", "{_target_: {}}"],
    "+student.max_norm": ["{_target_: math.sqrt, _args_: [4]}", "{_target_: math.sqrt, _args_: [-4]}"],
    "student._target_": [
        "kd_cli.models.cnn.cnn",
        "kd_own_of_fuzz.normed",
        "kd_cli.models.layers.Dropout",
        "len",
        "''",
        "1",
    ],
    "teacher.hidden": ["[5]", "[0]", "x"],
    "teacher.members": ["1", "2", "0", "-1", "x", "1.5", "true"],
    "teacher.combine": ["arithmetic", "geometric", "median", "1"],
    "teacher.checkpoint": ["nope.pt", ".", "''", "damaged.pt", "empty.safetensors"],
    "dataset": ["digits", "mnist", "imagefolder", "nope", "{}"],
    "dataset.val_fraction": ["0", "0.5", "0.999", "1", "-0.1", "x", "nan", "null"],
    "+dataset.nope": ["1"],
    "transfer.omit": ["[3]", "[0,1,2,3,4,5,6,7,8,9]", "[10]", "[x]", "x", "[1.5]", "[true]", "['3']"],
    "transfer.only": ["[3]", "[3,4]", "[-1]", "3"],
    "transfer.fraction": NUMBERS,
    "transfer.labels": ["false", "true", "x"],
    "transfer.data": ["digits", "nope", "{name: digits}", "{}", "[1]", "{_target_: os.getcwd}"],
    "transfer.correct_bias": ["false", "x"],
    "checkpoint.every": ["1", "0", "0s", "-1s", "nans", "infs", "x", "null", "1.5"],
    "data_dir": ["''", "/dev/null", "/proc/nope"],
    "store_dir": ["''", "store", "/dev/null", "/proc/nope", "kd_own_of_fuzz.py"],
    "resume": ["nope", ".", "''"],
    "fail_fast": ["true", "x"],
    "experiment": ["nope", "''"],
    "preset": ["soft_only", "hard_only", "without_T2", "nope", "''", "null"],
    "loss": ["soft_only", "nope", "[1]", "{a: 1}", "null"],
    "hydra.verbose": ["true", "x", "3"],
    "hydra.output_subdir": ["null", "x"],
    "nope": ["1"],
    "+nope": ["1"],
    "training.nope": ["1"],
    "~student": [""],
    "~T": [""],
}
WORDS = ["", "=", "T", "T=", "=1", "a=b=c", "T=1 T=2", "--nope", "T=[", "T=\u2028", "\x00x=1", "@=1", "+=1", "~", "//"]
overrides = st.one_of(
    st.sampled_from(sorted(KEYS)).flatmap(lambda key: st.sampled_from([f"{key}={v}" for v in KEYS[key]])),
    st.sampled_from(sorted(KEYS)).flatmap(lambda key: st.sampled_from([f"{key}={v}" for v in KEYS[key]])),
    st.tuples(st.sampled_from(sorted(KEYS)), st.text(max_size=6)).map(lambda pair: f"{pair[0]}={pair[1]}"),
    st.sampled_from(WORDS),
)
made_data = st.fixed_dictionaries(
    {
        "classes": st.sampled_from([1, 2, 3, 10, 1000]),
        "shape": st.sampled_from(["[1,1,1]", "[3]", "[1,3,3]", "[3,8,8]", "[2,5]", "[0]", "[]"]),
        "n": st.sampled_from([0, 1, 2, 9, 33, 40]),
        "tests": st.sampled_from([0, 1, 5]),
        "kind": st.sampled_from(["float32", "uint8", "float64", "float16", "int64", "bool"]),
        "used": st.sampled_from(["null", "1", "2"]),
        "constant": st.sampled_from(["false", "true"]),
    }
).map(
    lambda keys: [
        "dataset._target_=kd_own_of_fuzz.made",
        "~dataset.split",
        *(f"+dataset.{key}={value}" for key, value in keys.items()),
    ]
)


@pytest.mark.slow
@seed(SEED)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    words=st.one_of(st.lists(overrides, max_size=1), st.lists(overrides, min_size=1, max_size=4)),
    data=st.one_of(st.just([]), st.just([]), made_data),
    batch=st.sampled_from(["128", "2", "8"]),
    sweep=st.sampled_from([False, False, False, True]),
)
def test_any_configuration_runs_or_is_refused(
    folder: Path, words: list[str], data: list[str], batch: str, sweep: bool
) -> None:
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    (folder / "damaged.pt").write_bytes(b"PK\x03\x04")
    (folder / "empty.safetensors").touch()
    where = f"hydra.{'sweep' if sweep else 'run'}.dir=out"
    # where it writes comes last, so that no word of chance can name another folder
    argv = [*(["-m"] if sweep else []), *TINY, f"training.batch_size={batch}", *data, *words, where]
    began = time.monotonic()
    status, said = command(*argv)
    assert time.monotonic() - began < LIMIT
    judge(out, status, said, dry=any(word.startswith(("dry_run", "-")) for word in words))


DAMAGES = st.tuples(st.sampled_from(["cut", "empty", "flip", "foreign", "gone"]), st.floats(0, 0.999))


def damage(path: Path, how: str, where: float) -> None:
    content = bytearray(path.read_bytes())
    if how == "flip" and content:
        content[int(where * len(content))] ^= 0x10
    changed = {"cut": content[: int(where * len(content))], "empty": b"", "flip": content, "foreign": b"{}\n"}
    path.unlink() if how == "gone" else path.write_bytes(changed[how])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    status, said = command(*TINY, f"store_dir={folder / 'store'}", f"hydra.run.dir={folder / 'out'}")
    assert status == 0, said
    return folder


@pytest.mark.slow
@seed(SEED)
@settings(max_examples=max(40, EXAMPLES // 5), deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(file=st.integers(0, 100), how=DAMAGES)
def test_any_damaged_file_is_noticed_or_does_not_matter(
    folder: Path, finished: Path, file: int, how: tuple[str, float]
) -> None:
    """A file of a finished run or of the store is damaged, and the run is resumed and made again from the store."""

    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(finished, work)
    files = sorted(path for path in work.rglob("*") if path.is_file())
    damage(files[file % len(files)], *how)
    counts["damaged"] += 1
    expected = (finished / "out" / "student.safetensors").read_bytes()
    status, said = command(*TINY, f"store_dir={work / 'store'}", "hydra.run.dir=again")
    judge(Path("again"), status, said)
    assert status == 0
    assert Path("again/student.safetensors").read_bytes() == expected
    shutil.rmtree("again")
    told_by_report = io.StringIO()
    quiet = contextlib.redirect_stdout(told_by_report), contextlib.redirect_stderr(told_by_report)
    with quiet[0], quiet[1], contextlib.suppress(KdError):  # that nothing there can be read
        report(arguments([str(work / "out"), "--out", str(folder / "report")]))
    assert "Traceback" not in told_by_report.getvalue()


VALID: dict[str, list[str]] = {
    "2 classes": ["+dataset.classes=2"],
    "1,000 classes": ["+dataset.classes=1000"],
    "a class with no examples": ["+dataset.classes=3", "+dataset.used=2"],
    "1-pixel images": ["+dataset.shape=[1,1,1]"],
    "bytes": ["+dataset.kind=uint8"],
    "float64 images": ["+dataset.kind=float64"],
    "float16 images": ["+dataset.kind=float16"],
    "vectors": ["+dataset.shape=[7]"],
    "constant images": ["+dataset.constant=true"],
    "a last batch of one": ["+dataset.n=40", "dataset.val_fraction=0.1", "training.batch_size=5"],
    "a last batch of one and BatchNorm": [
        *("+dataset.n=40", "dataset.val_fraction=0.175", "training.batch_size=8", "teacher_training.batch_size=16"),
        "~student",
        "+student._target_=kd_own_of_fuzz.normed",
    ],
    "an empty validation part": ["dataset.val_fraction=0"],
    "one test example": ["+dataset.tests=1"],
    "two training examples": ["+dataset.n=2", "dataset.val_fraction=0"],
    "a batch larger than the data": ["training.batch_size=1000"],
    "shifts larger than the image": ["training.jitter=5", "teacher_training.jitter=7"],
}


@pytest.mark.parametrize("case", VALID)
@pytest.mark.parametrize("sweep", [False, True], ids=["a run", "a sweep"])
@pytest.mark.slow
def test_odd_but_valid_data_works(folder: Path, case: str, sweep: bool) -> None:
    where = f"hydra.{'sweep' if sweep else 'run'}.dir=out"
    tiny = [w for w in TINY if not (w.startswith("student") and "~student" in VALID[case])]
    argv = [*tiny, "dataset._target_=kd_own_of_fuzz.made", "~dataset.split", *VALID[case], where]
    status, said = command(*(["-m", "seed=0,1"] if sweep else []), *argv)
    assert status == 0, said
    judge(folder / "out", status, said)


@pytest.fixture(scope="module", autouse=True)
def told() -> Iterator[None]:
    yield
    print(f"\nfuzzed: {counts} (seed {SEED})")
