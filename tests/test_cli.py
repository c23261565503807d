"""What the command says: to wrong input, to a run that goes wrong, and to one that goes well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import TINY
from process import Ran

from kd_cli.commands.help import page
from kd_cli.config.options import conf_dir, groups
from kd_cli.config.schema import Schema
from kd_cli.config.yaml_comments import keys

GROUPS = {"teacher", "student", "model", "dataset", "method", "optimizer", "schedule", "training", "teacher_training"}
GROUPS |= {"teacher_optimizer", "teacher_schedule"}
KEYS = {
    *("teacher", "student", "dataset", "method", "T", "alpha", "beta", "seed", "device", "precision", "data_dir"),
    *("store_dir", "training", "optimizer", "schedule", "teacher_training", "teacher_optimizer", "teacher_schedule"),
    *("experiment", "preset"),
}


def refused(ran: Ran) -> str:
    """The message on a mistake: one error, no traceback, and no result that looks like one."""
    assert ran.code == 1, (ran.out, ran.err)
    assert "Traceback" not in ran.err
    assert ran.err.count("error: ") == 1
    assert not list(ran.folder.rglob("student.safetensors"))
    for path in ran.folder.rglob("summary.json"):
        assert json.loads(path.read_text())["status"] != "completed"
    return ran.err[ran.err.index("error: ") :].strip()


# ---------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("aplha=0.5", "there is no key 'aplha'\n\nhint: did you mean alpha"),
        ("training.epoch=3", "there is no key 'training.epoch'\n\nhint: did you mean training.epochs"),
        ("student.hiden=[3]", "there is no key 'student.hiden'\n\nhint: did you mean student.hidden"),
        ("optimizer.momentum=0.5", "there is no key 'optimizer.momentum'"),
        ("+foo=1", "there is no key 'foo'"),
        ("++training.foo=1", "there is no key"),
        ("+student.foo=1", "student.foo"),
        ("student=smalmlp", "there is no option student=smalmlp\n\nhint: did you mean smallmlp"),
        ("dataset=digit", "there is no option dataset=digit\n\nhint: did you mean digits"),
        ("method=soft_target", "there is no option method=soft_target\n\nhint: did you mean soft_targets"),
        ("training=nope", "there is no option training=nope"),
        ("teacher_training=nope", "there is no option teacher_training=nope"),
        ("experiment=nope", "there is no option experiment=nope"),
        ("loss=hard", "loss=hard is now preset=hard_only\n\nhint: write preset=hard_only"),
        ("loss=nope", "there is no option loss=nope\n\nhint: the group is called preset: preset=soft_and_hard"),
        ("preset=soft_onl", "there is no option preset=soft_onl\n\nhint: did you mean soft_only"),
        ("T=0", "T is 0; it must be above 0"),
        ("T=-1", "T is -1; it must be above 0"),
        ("T=hot", "T is 'hot'; it must be a number above 0"),
        ("T=nan", "T is nan; it must be a number above 0"),
        ("T=inf", "T is inf; it must be a number above 0"),
        ("T=true", "T is True; it must be a number above 0"),
        ("T=[1,2]", "T is [1, 2]; it must be a number above 0"),
        ("alpha=-0.1", "alpha is -0.1; it must be 0 or more"),
        ("beta=-1", "beta is -1; it must be 0 or more"),
        ("beta=null", "beta is None; it must be a number, 0 or more"),
        ("seed=1.5", "seed"),
        ("seed=-1", "seed is -1; it must be at least 0"),
        ("training.epochs=0", "training.epochs is 0; it must be at least 1"),
        ("training.epochs=many", "training.epochs"),
        ("training.batch_size=0", "training.batch_size is 0; it must be at least 1"),
        ("training.flip=maybe", "training.flip"),
        ("training.rotate=-5", "training.rotate is -5.0; it must be an angle in degrees, from 0 to 180"),
        ("teacher_training.scale=2", "teacher_training.scale is 2.0; it must be a share of the size"),
        ("optimizer.lr=0", "optimizer.lr is 0; it must be above 0"),
        ("optimizer.lr=fast", "optimizer.lr is 'fast'"),
        ("dataset.val_fraction=1", "dataset.val_fraction is 1"),
        ("precision=float16", "precision is 'float16'; it must be one of float32"),
        ("device=gpu", "device is 'gpu'"),
        ("schedule.warmup=1", "schedule.warmup is 1"),
        ("optimizer.weight_decay=-1", "optimizer: torch.optim.AdamW: Invalid weight_decay value: -1"),
        ("teacher_optimizer.betas=[2,3]", "teacher_optimizer: torch.optim.AdamW: Invalid beta parameter"),
        ("+teacher_optimizer.foo=1", "teacher_optimizer.foo"),
        ("student.hidden=[0]", "hidden has 0; it must be a whole number, 1 or more"),
        ("student.dropout=1", "dropout is 1; it must be a number, at least 0 and below 1"),
        ("teacher.checkpoint=nowhere.pt", "teacher.checkpoint is nowhere.pt, and there is no such file"),
        ("student._target_=nowhere.Net", "_target_ is nowhere.Net, and no module of that name can be imported"),
        ("student._target_=kd_cli.models.mlp.mpl", "has no mpl\n\nhint: did you mean mlp"),
        ("T=", "T"),
        ("T", "T"),
        ("=", "="),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(kd_run: Callable[..., Ran], override: str, message: str) -> None:
    ran = kd_run("device=cpu", override)
    said = refused(ran)
    assert message in said
    assert not list(ran.folder.rglob("metrics.jsonl"))  # nothing was trained


def test_weights_that_are_both_0_are_refused(kd_run: Callable[..., Ran]) -> None:
    assert "alpha and beta are both 0: there is nothing to learn from" in refused(kd_run("alpha=0", "beta=0"))


def test_a_missing_gpu_is_told(kd_run: Callable[..., Ran]) -> None:
    said = refused(kd_run(*TINY, "device=cuda", prelude="import torch; torch.cuda.is_available = lambda: False"))
    assert said == "error: device is cuda, and torch sees no GPU here\n\nhint: device=auto or device=cpu"


NO_NETWORK = """
import socket

def refuse(*args, **kwargs):
    raise OSError(101, "Network is unreachable")

socket.socket.connect = socket.create_connection = refuse
"""


def test_missing_data_without_a_network_names_what_works_without_one(kd_run: Callable[..., Ran]) -> None:
    said = refused(kd_run(*TINY, "dataset=mnist", prelude=NO_NETWORK))
    assert "mnist" in said.lower()
    assert "dataset=digits" in said
    assert "data_dir" in said


OWN = """
import torch
from kd_cli.learn.methods import PerModelMethod

class Fixed(torch.nn.Module):
    def __init__(self, input_shape, num_classes, inputs=64, outputs=10):
        super().__init__()
        self.layer = torch.nn.Linear(inputs, outputs)

    def forward(self, images):
        return self.layer(images.flatten(1))

class Nan(PerModelMethod):
    def loss(self, student, teacher, batch, weights):
        # finite for the few made examples on which a method is tried
        return student.logits.sum() * (float("nan") if len(batch.labels) > 20 else 1)

class Buggy(PerModelMethod):
    def loss(self, student, teacher, batch, weights):
        return student.no_such_attribute

def nothing(input_shape, num_classes):
    return None
"""


@pytest.fixture
def own(own_code: Callable[..., list[str]]) -> list[str]:
    """Models and methods of the user's own, and the arguments of a short run that finds them."""
    flags = own_code(
        {
            "own.py": OWN,
            "model/fixed": "_target_: own.Fixed\ninputs: 64\noutputs: 10\n",
            "model/nothing": "_target_: own.nothing\n",
            "method/broken": "_target_: own.Nan\n",
            "method/buggy": "_target_: own.Buggy\n",
        }
    )
    return [*flags, "device=cpu", "training.epochs=2", "teacher_training.epochs=1", "teacher=tinymlp"]


@pytest.mark.parametrize(
    ("overrides", "messages"),
    [
        (["student=fixed", "student.inputs=65"], ["student=fixed does not take the data of digits", "(1, 8, 8)"]),
        (["student=fixed", "student.outputs=11"], ["student=fixed gives (2, 11)", "it must be (2, 10)"]),
        (["student=tinymlp", "teacher=fixed", "teacher.inputs=65"], ["teacher=fixed does not take the data"]),
        (["student=fixed", "student.inpu=3"], ["there is no key 'student.inpu'"]),
        (["student=nothing"], ["own.nothing gave a NoneType, not a torch.nn.Module"]),
    ],
)
def test_a_model_that_does_not_fit_the_data_is_named(
    kd_run: Callable[..., Ran], own: list[str], overrides: list[str], messages: list[str]
) -> None:
    said = refused(kd_run(*own, *overrides))
    for message in messages:
        assert message in said


# ---------------------------------------------------------------- runs that go wrong


def diverged(ran: Ran) -> dict:
    said = refused(ran)
    assert ran.summary["status"] == "diverged"
    assert "the loss is not a finite number in epoch" in said
    assert "hint: try a smaller" in said
    assert ran.summary["cause"] in said
    return ran.summary


def test_a_loss_that_is_not_a_number_ends_the_run_and_names_role_and_epoch(
    kd_run: Callable[..., Ran], own: list[str]
) -> None:
    ran = kd_run(*own, "student=tinymlp", "method=broken")
    assert diverged(ran)["cause"].startswith("student: the loss is not a finite number in epoch 1")
    assert [row["loss"] for row in ran.metrics if row["role"] == "student"] == [None]


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_rate_that_is_too_large_ends_the_run(kd_run: Callable[..., Ran], role: str) -> None:
    prefix = "teacher_" if role == "teacher" else ""
    ran = kd_run(*TINY, f"{prefix}optimizer=sgd", f"{prefix}optimizer.lr=1e30", f"{prefix}training.epochs=3")
    cause = diverged(ran)["cause"]
    assert cause.startswith("teacher:" if role == "teacher" else "student alone:")
    assert f"{prefix}optimizer.lr" in ran.err


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_weights_that_are_lost_in_the_last_step_are_noticed(kd_run: Callable[..., Ran], role: str) -> None:
    prefix = "teacher_" if role == "teacher" else ""
    one_step = [f"{prefix}optimizer=sgd", f"{prefix}optimizer.lr=1e38", f"{prefix}training.batch_size=1000"]
    diverged(kd_run(*TINY, *one_step, f"{role}.hidden=[8,8]"))


def test_a_bug_keeps_its_traceback(kd_run: Callable[..., Ran], own: list[str]) -> None:
    ran = kd_run(*own, "student=tinymlp", "method=buggy")
    assert ran.code == 1
    assert "Traceback" in ran.err
    assert "own.py" in ran.err
    assert "AttributeError" in ran.err
    assert not list(ran.run_dir.glob("summary.json"))


# ---------------------------------------------------------------- runs that go well


def test_a_run_prints_its_results_and_where_they_are(tiny: Callable[..., Ran]) -> None:
    ran = tiny("T=3")
    for words in ("teacher (tinymlp)", "student alone", "soft_targets", "T = 3", "errors", "written to outputs/"):
        assert words in ran.out
    for role in ("teacher", "student_alone", "student"):
        assert f" {ran.summary[role]['test']['errors']} " in ran.out
    assert str(ran.run_dir.relative_to(ran.folder)) in ran.out
    assert "\r" not in ran.out + ran.err
    assert "\x1b" not in ran.out + ran.err
    log = (ran.run_dir / "run.log").read_text()
    assert "student tinymlp by soft_targets" in log


def test_a_sweep_runs_every_combination(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run(*TINY, "-m", "T=1,4", "seed=range(2)")
    assert ran.code == 0, ran.err
    summaries = [json.loads((path / "summary.json").read_text()) for path in ran.run_dirs]
    assert sorted((s["T"], s["seed"]) for s in summaries) == [(1, 0), (1, 1), (4, 0), (4, 1)]
    assert sum(not s["teacher"]["from_store"] for s in summaries) == 1
    assert sum(not s["student_alone"]["from_store"] for s in summaries) == 2
    assert "written to multirun/" in ran.out
    assert "\r" not in ran.out + ran.err


def test_a_job_of_a_sweep_that_fails_fails_no_other(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run(*TINY, "-m", "T=0,2", "optimizer=sgd", "optimizer.lr=0.1,1e30", "training.epochs=3")
    assert ran.code == 1
    assert "Traceback" not in ran.err
    assert "T is 0; it must be above 0" in ran.err
    assert "the loss is not a finite number" in ran.err
    found = {path.parent.name: json.loads(path.read_text())["status"] for path in ran.folder.rglob("summary.json")}
    assert sorted(found.values()) == ["completed", "diverged"]


def rounded(value: Any) -> Any:
    """The value with every number in it rounded to eight digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return round(value, 8) if isinstance(value, float) else value


def test_a_sweep_and_single_runs_have_the_same_results(kd_run: Callable[..., Ran], tiny: Callable[..., Ran]) -> None:
    sweep = kd_run(*TINY, "-m", "T=1,4", "seed=0,1", "precision=float64", "training.epochs=2")
    assert sweep.code == 0, sweep.err
    single = tiny("T=4", "seed=1", "precision=float64", "training.epochs=2").summary
    summaries = [json.loads((path / "summary.json").read_text()) for path in sweep.run_dirs]
    (same,) = [s for s in summaries if (s["T"], s["seed"]) == (4, 1)]
    assert rounded(same["student"]["test"]) == rounded(single["student"]["test"])
    assert same["student"]["fingerprint"] == single["student"]["fingerprint"]


def test_flags_may_stand_anywhere(kd_run: Callable[..., Ran], own: list[str]) -> None:
    flag, folder, *rest = own
    ran = kd_run("student=fixed", flag, folder, *rest, "--cfg", "job", "T=3")
    assert ran.code == 0, ran.err
    assert yaml.safe_load(ran.out)["T"] == 3


def test_equal_runs_of_the_command_write_equal_metrics(tiny: Callable[..., Ran], tmp_path: Path) -> None:
    extra = ["training.jitter=1", "training.epochs=2", "teacher=bigmlp", "teacher.hidden=[12]"]
    one, other = (tiny(f"store_dir={tmp_path / name}", *extra, folder=tmp_path / name) for name in "ab")

    def rows(ran: Ran) -> list[dict]:
        return [{key: value for key, value in row.items() if key != "examples_per_second"} for row in ran.metrics]

    assert len(rows(one)) == 5
    assert rows(one) == rows(other)
    for role in ("teacher", "student_alone", "student"):
        assert not other.summary[role]["from_store"]
        assert one.summary[role]["test"] == other.summary[role]["test"]


@pytest.mark.parametrize("augment", [[], ["training.jitter=1"]], ids=["cached", "live"])
def test_student_alone_and_distilled_student_share_weights_and_batches(
    tiny: Callable[..., Ran], augment: list[str]
) -> None:
    ran = tiny("alpha=0", "beta=1", "training.epochs=2", "student.dropout=0.3", *augment)
    alone, distilled = (
        [(row["hard_loss"], row["loss"], row["train_accuracy"], row["val_nll"]) for row in ran.metrics if is_of(row)]
        for is_of in (lambda row: row["role"] == "student_alone", lambda row: row["role"] == "student")
    )
    assert len(alone) == 2
    assert alone == distilled
    assert ran.summary["student_alone"]["test"] == ran.summary["student"]["test"]


OWN_TEACHER = """
import torch
from pathlib import Path

class Net(torch.nn.Module):
    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.layer = torch.nn.Linear(64, num_classes)

    def forward(self, images):
        if images.device.type != "meta":
            with Path("calls.txt").open("a") as file:
                print(len(images), self.training, torch.is_grad_enabled(), file=file)
        return self.layer(images.flatten(1))
"""


def test_the_teacher_runs_live_when_the_students_images_are_augmented_and_only_then(
    kd_run: Callable[..., Ran], own_code: Callable[..., list[str]], tmp_path: Path
) -> None:
    flags = own_code({"own_teacher.py": OWN_TEACHER, "model/own": "_target_: own_teacher.Net\n"})
    calls = tmp_path / "calls.txt"
    argv = [*flags, *TINY[1:2], *TINY[3:], "teacher=own", "training.batch_size=100", "teacher_training.batch_size=128"]
    argv.append("latency=false")  # which would call the teacher, too

    def called(*more: str) -> list[str]:
        calls.unlink(missing_ok=True)
        ran = kd_run(*argv, *more)
        assert ran.code == 0, ran.err
        assert "seed=1" not in more or ran.summary["teacher"]["from_store"]
        return calls.read_text().splitlines() if calls.exists() else []

    assert called().count("128 True True") == 7  # the teacher's own training
    assert not called("seed=1")
    live = called("seed=1", "training.jitter=1")
    assert live.count("100 False False") == 10 + 2  # batches of the epoch; the loss balance before and after it
    assert not any(" True " in f" {line} " for line in live)


# ---------------------------------------------------------------- help, and the surface


@pytest.mark.parametrize("method", ["soft_targets", "dkd"])  # in closed form, and by autograd
@pytest.mark.slow
def test_a_run_imports_nothing_slow_that_it_does_not_need(tmp_path: Path, method: str) -> None:
    argv = ["kd-run", *TINY, f"method={method}"]
    program = f"import sys; sys.argv = {argv!r}; from kd_cli.commands.kd_run import main; main(); "
    program += "print(sorted({'torch._dynamo', 'sympy', 'sklearn', 'scipy', 'torchvision'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "errors alone" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(("module", "frozen"), [("triton", False), ("torch", True)])
def test_python_ends_without_looking_through_torch_unless_triton_would_complain(module: str, frozen: bool) -> None:
    program = (
        f"import gc, sys; from kd_cli.commands.kd_run import end_without_collecting; sys.modules[{module!r}] = sys; "
    )
    program += "gc.freeze(); end_without_collecting(); print(gc.get_freeze_count() > 0)"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == f"{frozen}\n"


def test_help_imports_no_torch_and_names_every_group_and_key() -> None:
    program = "import sys; sys.argv = ['kd-run', '--help']; from kd_cli.commands.kd_run import main; main(); "
    program += "print(sorted({'torch', 'hydra', 'numpy', 'sklearn'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout.splitlines()[-1] == "[]"
    assert ran.stderr == ""
    for name in (GROUPS | KEYS) - {"model"}:
        assert f"{name}=" in ran.stdout or f"{name}." in ran.stdout
    for group in GROUPS - {"model"}:
        for option in groups([conf_dir()])[group]:
            assert option in ran.stdout


def test_the_module_is_the_command(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "kd_cli", *TINY], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert ran.returncode == 0, ran.stderr
    assert "written to outputs/" in ran.stdout
    assert len(list(tmp_path.rglob("summary.json"))) == 1


def test_a_mistake_ends_the_real_command_with_1(tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "kd_cli", "T=0"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert ran.returncode == 1
    assert "error: T is 0; it must be above 0" in ran.stderr
    assert "Traceback" not in ran.stderr


def test_the_surface_is_what_it_was() -> None:
    """Keys and groups are what users' commands are made of: none goes away or changes its name by accident."""
    assert {field.name for field in fields(Schema)} >= KEYS
    assert groups([conf_dir()]).keys() >= GROUPS
    top = {key.name for key in keys((conf_dir() / "config.yaml").read_text()) if "." not in key.name}
    assert top - {"hydra"} <= {field.name for field in fields(Schema)}
    assert "kd-run" in page([conf_dir()])


PRELOADED = """
import sys
from kd_cli.commands.preload import preload_torch
thread = preload_torch()
thread.join()
assert "torch" not in sys.modules
print(any("libtorch_cpu" in line for line in open("/proc/self/maps")))
import torch
print(torch.mm(torch.ones(300, 300), torch.ones(300, 300)).sum().item() == 300**3)
print(preload_torch())
"""


@pytest.mark.skipif(sys.platform != "linux" or (os.cpu_count() or 1) < 2, reason="preloads on Linux with two cores")
def test_torchs_libraries_are_loaded_before_its_import() -> None:
    ran = subprocess.run([sys.executable, "-W", "error", "-c", PRELOADED], capture_output=True, text=True)
    assert ran.stdout.split() == ["True", "True", "None"], ran.stderr
