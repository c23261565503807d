"""Distillation methods of the user's own, in the working directory, in under 40 lines each: no file of the package is
touched."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY
from process import Ran, Running
from safetensors.torch import load_file

# Decoupled knowledge distillation (Zhao et al. 2022): two soft terms, logged apart, and a warm-up.
DKD = """
import torch
from torch.nn import functional as F

from kd_cli.learn.methods import PerModelMethod


class DKD(PerModelMethod):
    def __init__(self, beta_nckd=8.0, warmup=0.2):
        super().__init__()
        self.beta_nckd, self.warmup = beta_nckd, warmup

    def loss(self, student, teacher, batch, weights):
        T, hit = weights.T, F.one_hot(batch.labels, student.logits.shape[-1]).bool()
        p, q = ((x.logits / T).log_softmax(-1) for x in (student, teacher))

        def split(log_p):  # the target against all others, and the others among themselves
            others = log_p[~hit].view(len(log_p), -1)
            mass = others.logsumexp(-1, keepdim=True)
            return torch.cat([log_p[hit][:, None], mass], -1), others - mass

        (p_target, p_others), (q_target, q_others) = split(p), split(q)
        tckd = T**2 * F.kl_div(p_target, q_target, reduction="batchmean", log_target=True)
        nckd = T**2 * F.kl_div(p_others, q_others, reduction="batchmean", log_target=True)
        hard = F.cross_entropy(student.logits, batch.labels)
        ramp = min(1.0, batch.progress / self.warmup)
        loss = weights.beta * hard + ramp * weights.alpha * (tckd + self.beta_nckd * nckd)
        return {"loss": loss, "tckd": tckd, "nckd": nckd, "hard": hard}
"""
# Hints (Romero et al. 2015) in one stage: the student's map, projected, learns the teacher's map.
HINTS = """
from torch import nn
from torch.nn import functional as F

from kd_cli.learn.methods import PerModelMethod


class Hints(PerModelMethod):
    has_T = False

    def __init__(self, student_layer, teacher_layer):
        super().__init__()
        self.student_features, self.teacher_features = [student_layer], [teacher_layer]

    def setup(self, setting):
        super().setup(setting)
        (ours,), (theirs,) = (outputs.features.values() for outputs in (setting.student, setting.teacher))
        self.project = nn.Conv2d(ours.shape[2], theirs.shape[2], 1)

    def loss(self, student, teacher, batch, weights):
        (ours,), (theirs,) = (outputs.features.values() for outputs in (student, teacher))
        hint = F.mse_loss(self.project(ours), theirs)
        hard = F.cross_entropy(student.logits, batch.labels)
        return {"loss": weights.alpha * hint + weights.beta * hard, "hint": hint, "hard": hard}
"""
FUNCTION = """
from torch.nn import functional as F

def distil(student, teacher, labels, T, alpha, beta, scale=1.0):
    p, q = (student / T).log_softmax(1), (teacher / T).softmax(1)
    return scale * alpha * T * T * -(q * p).sum(1).mean() + beta * F.cross_entropy(student, labels)
"""
FILES = {
    "dkd.py": DKD,
    "hints.py": HINTS,
    "plain.py": FUNCTION,
    "method/my_dkd": "# decoupled\n_target_: dkd.DKD\nbeta_nckd: 8.0 # weight\nwarmup: 0.2 # share of steps\n",
    "method/my_hints": "# one\n_target_: hints.Hints\nstudent_layer: ??? # path\nteacher_layer: ??? # path\n",
    "method/plain": "# a function\n_target_: plain.distil\nscale: 1.0 # of the soft term\n",
}
CNNS = [
    *("student=cnn", "student.channels=[4,6]", "student.hidden=8", "teacher=cnn", "teacher.channels=[6,8]"),
    *("teacher.hidden=12", "training.epochs=3", "teacher_training.epochs=2", "training.batch_size=250", "device=cpu"),
]
HINTED = ["method=my_hints", "method.student_layer=1", "method.teacher_layer=1"]
# Kills the process when it has opened metrics.jsonl so many times to append a row.
KILLED = """
import os, signal, sys
rows = 0
def audited(event, args):
    global rows
    if event == "open" and str(args[0]).endswith("metrics.jsonl") and args[1] and "a" in str(args[1]):
        rows += 1
        if rows == {at}:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(audited)
"""


@pytest.fixture
def own(tmp_path: Path, start: Callable[..., Running], own_code: Callable[..., list[str]]) -> Callable[..., Running]:
    """Start `kd-run` in a folder with the methods above."""

    def started(*argv: str, name: str = "work", prelude: str = "") -> Running:
        folder = tmp_path / name
        flags = [*own_code(FILES, folder), "store_dir=store"]
        if any(word.startswith("resume=") for word in argv):
            flags = []
        return start(*flags, *argv, folder=folder, prelude=prelude)

    return started


def rows(ran: Ran, role: str = "student") -> list[dict[str, Any]]:
    return [row for row in ran.metrics if row["role"] == role]


def test_each_is_written_in_under_40_lines() -> None:
    assert all(len(text.strip().splitlines()) < 40 for text in (DKD, HINTS, FUNCTION))


def test_a_logit_method_logs_its_terms_and_warms_up(own: Callable[..., Running]) -> None:
    small = ["teacher=tinymlp", "student=tinymlp", "training.epochs=10", "teacher_training.epochs=2", "device=cpu"]
    ran = own("method=my_dkd", "T=4", "method.warmup=0.5", *small).wait()
    assert ran.code == 0, ran.err
    history = rows(ran)
    assert all({"loss", "tckd_loss", "nckd_loss", "hard_loss"} <= row.keys() for row in history)
    steps = len(history) * 8  # of 125 examples: 1,000 in batches of 128

    def expected(row: dict[str, Any]) -> tuple[float, float]:
        """The loss of an epoch's terms with the warm-up at its first and its last step."""
        first = (row["epoch"] - 1) * 8
        soft = row["tckd_loss"] + 8 * row["nckd_loss"]
        low, high = (min(1.0, step / steps / 0.5) for step in (first, first + 7))
        return tuple(0.5 * row["hard_loss"] + ramp * soft for ramp in (low, high))  # type: ignore[return-value]

    for row in history:
        low, high = expected(row)
        assert low - 1e-3 <= row["loss"] <= high + 1e-3
    assert expected(history[-1])[0] == pytest.approx(history[-1]["loss"], rel=1e-4)


def test_students_of_ones_own_logit_method_are_trained_together_and_equal_the_runs_by_themselves(
    own: Callable[..., Running],
) -> None:
    small = ["teacher=tinymlp", "student=tinymlp", "training.epochs=2", "teacher_training.epochs=1", "device=cpu"]
    swept = own("-m", "method=plain", "T=1,3", "seed=0,1", *small, name="sweep").wait()
    assert swept.code == 0, swept.err
    for folder in swept.run_dirs[1:3]:
        summary = json.loads((folder / "summary.json").read_text())
        by_itself = own("method=plain", f"T={summary['T']:g}", f"seed={summary['seed']}", *small, name="sweep").wait()
        assert by_itself.code == 0, by_itself.err
        ours, theirs = (load_file(path / "student.safetensors") for path in (folder, by_itself.run_dir))
        for name, weights in ours.items():
            assert (weights - theirs[name]).abs().max() < 1e-5


def test_a_plain_function_gives_what_the_shipped_method_gives(own: Callable[..., Running]) -> None:
    small = ["teacher=tinymlp", "student=tinymlp", "training.epochs=2", "teacher_training.epochs=1", "device=cpu"]
    plain, shipped = (own(f"method={name}", "T=3", *small).wait() for name in ("plain", "soft_targets"))
    assert plain.code == shipped.code == 0, plain.err + shipped.err
    assert rows(plain)[-1]["loss"] == pytest.approx(rows(shipped)[-1]["loss"], rel=1e-4)


def test_a_feature_method_resumes_after_a_kill_to_the_same_bytes_and_ships_no_projection(
    own: Callable[..., Running], tmp_path: Path
) -> None:
    argv = [*CNNS, *HINTED, "checkpoint.every=1", "hydra.run.dir=out"]
    whole = own(*argv).wait()
    assert whole.code == 0, whole.err
    history = rows(whole)
    assert history[0]["hint_loss"] > history[-1]["hint_loss"] > 0
    weights = (tmp_path / "work/out/student.safetensors").read_bytes()
    shipped = load_file(tmp_path / "work/out/student.safetensors")
    assert not [name for name in shipped if "project" in name]
    assert sum(t.numel() for t in shipped.values()) == whole.summary["student"]["parameters"]

    shutil.rmtree(tmp_path / "work")
    at = 2 + 3 + 2  # the teacher's two epochs, the student alone's three, the student's second
    killed = own(*argv, prelude=KILLED.format(at=at)).wait()
    assert killed.code == -9
    assert not (tmp_path / "work/out/summary.json").exists()
    assert own("resume=out").wait().code == 0
    assert (tmp_path / "work/out/student.safetensors").read_bytes() == weights
    again = [json.loads(line) for line in (tmp_path / "work/out/metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in row.items() if k != "examples_per_second"} for row in again]
    assert timeless == [{k: v for k, v in row.items() if k != "examples_per_second"} for row in whole.metrics]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([*CNNS, *HINTED, "method.student_layer=9.x"], "the student has no module '9.x'"),
        ([*CNNS, *HINTED, "method.teacher_layer=conv"], "the teacher has no module 'conv'"),
        ([*CNNS, *HINTED, "teacher.members=2"], "teacher.members is 2"),
        (["method=my_hints", "method.student_layer=1", "T=auto"], "method.teacher_layer"),
    ],
)
def test_what_a_feature_method_cannot_do_is_said_before_anything_is_trained(
    own: Callable[..., Running], argv: list[str], said: str
) -> None:
    ran = own(*argv).wait()
    assert ran.code == 1
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert not any((path / "metrics.jsonl").exists() for path in ran.run_dirs)


FAULTY = {
    "over the batch": ("return {'loss': (student.logits.softmax(1) - teacher.logits).square().sum((1, 2))}", "[S,B,C]"),
    "a mean over students": ("return {'loss': (student.logits - teacher.logits).square().mean()}", "shape [2]"),
    "no loss": ("return {'soft': student.logits.sum((1, 2))}", "'loss' among them"),
    "nothing": ("pass", "'loss' among them"),
    "detached": ("return {'loss': student.logits.detach().sum((1, 2))}", "does not depend on the student"),
    "not finite": ("return {'loss': (student.logits - student.logits).sum((1, 2)).log()}", "must be finite"),
    "in place": ("return {'loss': (student.logits - teacher.logits.mul_(2)).square().sum((1, 2))}", "in place"),
    "coupled": ("return {'loss': student.logits.sum((1, 2))}\n    couples_models = True", "couples the students"),
}


@pytest.mark.parametrize("fault", FAULTY)
def test_a_faulty_method_is_refused_before_anything_is_trained(
    own: Callable[..., Running], own_code: Callable[..., list[str]], tmp_path: Path, fault: str
) -> None:
    body, said = FAULTY[fault]
    code = (
        "from kd_cli.learn.methods import Method\n\n\nclass Faulty(Method):\n"
        f"    def forward(self, student, teacher, batch, weights):\n        {body}\n"
    )
    own_code({"faulty.py": code, "method/faulty": "# faulty\n_target_: faulty.Faulty\n"}, tmp_path / "work")
    ran = own("method=faulty", "teacher=tinymlp", "student=tinymlp", "device=cpu").wait()
    assert ran.code == 1
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert not any((path / "metrics.jsonl").exists() for path in ran.run_dirs)


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        ("3.0", "own: 'loss' of one student is a float"),
        ("None", "own: 'loss' of one student is a NoneType"),
        ("(student - teacher).square().mean(1)", "own: 'loss' of one student is of shape [6]"),
        ("{'loss': student.mean(), 'soft': 1.0}", "own: 'soft' of one student is a float"),
        ("student.mean().item()", "own: 'loss' of one student is a float"),
    ],
)
def test_a_loss_function_that_returns_no_scalar_tensor_is_refused(
    kd_run: Callable[..., Ran], own_code: Callable[..., list[str]], returned: str, said: str
) -> None:
    code = f"def own(student, teacher):\n    return {returned}\n"
    ran = kd_run(*own_code({"losses.py": code, "method/own": "_target_: losses.own\n"}), *TINY, "method=own")
    assert ran.code == 1
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert not ran.run_dirs


@pytest.mark.parametrize(
    ("file", "words"),
    [("method/dkd", ["method=dkd"]), ("method/dkd", ["-m", "method=hard,dkd"]), ("dataset/digits", [])],
    ids=["a run", "a sweep", "a default"],
)
def test_an_own_file_that_a_shipped_one_hides_is_refused(
    kd_run: Callable[..., Ran], own_code: Callable[..., list[str]], file: str, words: list[str]
) -> None:
    ran = kd_run(*own_code({file: "_target_: losses.own\n"}), *words)
    group, name = file.split("/")
    assert ran.code == 1
    assert f"{file}.yaml would not be read: kd-run has a {group} called {name} itself" in ran.err
    assert f"hint: give the file another name, e.g. {group}/my_{name}.yaml" in ran.err


def test_an_own_file_that_is_hidden_and_not_chosen_does_not_matter(
    kd_run: Callable[..., Ran], own_code: Callable[..., list[str]]
) -> None:
    ran = kd_run(*own_code({"method/dkd": "_target_: losses.own\n"}), *TINY, "dry_run=true")
    assert ran.code == 0, ran.err
