"""Students that learn from each other: the loss, its steps, what is refused, and what a run leaves."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import made
import pytest
import torch
from conftest import TINY
from process import Ran
from torch import Tensor
from torch.nn import functional as F

from kd_cli.data.digits import digits
from kd_cli.export.load import load_student
from kd_cli.learn.batches import Batch
from kd_cli.learn.engine import Outcome, Plan, Training, fit
from kd_cli.learn.learner import ModuleLearner
from kd_cli.learn.methods import Hard, Mutual, Weights
from kd_cli.learn.objective import Objective
from kd_cli.learn.outputs import Outputs
from kd_cli.learn.peers import Peers
from kd_cli.statistics import gap_closed

Run = Callable[..., Ran]

# ---------------------------------------------------------------- the loss


def divergence(teacher: Tensor, student: Tensor, T: float) -> Tensor:
    """KL(teacher || student) at temperature T, by PyTorch."""
    q, log_p = (teacher / T).softmax(-1), (student / T).log_softmax(-1)
    return F.kl_div(log_p, q, reduction="batchmean")


def weights_of(size: int, T: float, alpha: float, beta: float) -> Weights:
    return Weights(*(torch.full((size,), value, dtype=torch.float64) for value in (T, alpha, beta)))


def made_batch(size: int) -> tuple[Tensor, Tensor, Batch]:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(size, 7, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (7,), generator=generator)
    return logits.requires_grad_(), labels, Batch(labels.expand(size, -1), logits, labels.expand(size, -1))


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("T", [1.0, 4.0])
def test_a_peer_learns_from_the_mean_divergence_from_the_others_and_from_the_labels(size: int, T: float) -> None:
    logits, labels, batch = made_batch(size)
    logits = logits.detach()
    terms = Mutual()(Outputs(logits), None, batch, weights_of(size, T, 0.7, 0.3))
    for i in range(size):
        others = [divergence(logits[j], logits[i], T) for j in range(size) if j != i]
        mutual, hard = sum(others) / (size - 1), F.cross_entropy(logits[i], labels)
        assert float(terms["mutual"][i]) == pytest.approx(float(mutual), rel=1e-12)
        assert float(terms["hard"][i]) == pytest.approx(float(hard), rel=1e-12)
        assert float(terms["loss"][i]) == pytest.approx(float(0.7 * T**2 * mutual + 0.3 * hard), rel=1e-12)


def test_the_others_answers_are_constants() -> None:
    logits, labels, batch = made_batch(3)
    (found,) = torch.autograd.grad(
        Mutual()(Outputs(logits), None, batch, weights_of(3, 2.0, 1.0, 1.0))["loss"].sum(), logits
    )
    for i in range(3):
        own = logits[i].detach().requires_grad_()
        others = [divergence(logits[j].detach(), own, 2.0) for j in range(3) if j != i]
        (expected,) = torch.autograd.grad(4 * sum(others) / 2 + F.cross_entropy(own, labels), own)
        assert torch.allclose(found[i], expected, rtol=1e-12)


def test_peers_that_agree_have_nothing_to_learn_from_each_other() -> None:
    logits, _, batch = made_batch(1)
    alike = logits.detach().expand(3, -1, -1)
    assert Mutual()(Outputs(alike), None, batch, weights_of(3, 2.0, 1.0, 0.0))["loss"].abs().max() < 1e-12


# ---------------------------------------------------------------- the steps


def peers_of(builds: Sequence[made.Build]) -> Peers:
    learners = []
    for s, build in enumerate(builds):
        module = made.model(build, s)
        objective = Objective(Hard(), made.some_weights())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
        learners.append(ModuleLearner(module, optimizer, seed=s, objective=objective))
    return Peers(learners, torch.device("cpu"))


def train(builds: Sequence[made.Build], plan: Plan, **weights: float) -> list[Outcome]:
    objective = Objective(Mutual(), weights_of(len(builds), **weights))
    data = made.examples(75), made.examples(30, "val")
    return fit(peers_of(builds), Training(*data, "student", [0], plan, objective))


def test_steps_are_those_of_a_loop_written_by_hand() -> None:
    builds, plan = [made.small, made.Own, made.Own], made.a_plan(epochs=1)
    seen: list[Batch] = []

    class Seeing(Mutual):
        def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Any:
            seen.append(batch)
            return super().forward(student, teacher, batch, weights)

    objective = Objective(Seeing(), weights_of(3, 2.0, 1.0, 0.5))
    learner = peers_of(builds)
    data = made.examples(75), made.examples(30, "val")
    found = fit(learner, Training(*data, "student", [0], plan, objective))

    modules = [made.model(build, s).train() for s, build in enumerate(builds)]
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9) for module in modules]
    assert len(seen) == 5
    for batch in seen:
        images, labels = batch.images[0], batch.labels[0]
        answers = [module(images) for module in modules]
        for i, (answer, optimizer) in enumerate(zip(answers, optimizers, strict=True)):
            others = [divergence(answers[j].detach(), answer, 2.0) for j in range(3) if j != i]
            loss = 4 * sum(others) / 2 + 0.5 * F.cross_entropy(answer, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for module, outcome in zip(modules, found, strict=True):
        assert made.difference(module.state_dict(), outcome.state) < 1e-12


def test_without_the_mutual_term_peers_are_the_students_alone() -> None:
    builds, plan = [made.Moody, made.conv], made.a_plan(epochs=2)
    together = train(builds, plan, T=1.0, alpha=0.0, beta=1.0)
    for s, (build, outcome) in enumerate(zip(builds, together, strict=True)):
        module = made.model(build, s)
        method = Hard()
        objective = Objective(method, made.some_weights(alpha=[0.0], beta=[1.0]))
        learner = ModuleLearner(
            module, torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9), seed=s, objective=objective
        )
        data = made.examples(75), made.examples(30, "val")
        (alone,) = fit(
            learner, Training(*data, "student", [0], plan, objective)
        )  # the batches of the first peer's seed
        assert made.difference(alone.state, outcome.state) < 1e-12


def test_gradient_sizes_are_known_for_each_peer() -> None:
    plan = Plan(**{**vars(made.a_plan(epochs=1)), "diagnostics": True})
    outcomes = train([made.small, made.conv], plan, T=2.0, alpha=1.0, beta=1.0)
    for outcome in outcomes:
        (row,) = outcome.history
        assert row["mutual_gradient_logits"] > 0
        assert row["hard_gradient_parameters"] > 0
        assert row["soft_gradient_logits"] is None


# ---------------------------------------------------------------- runs

_, _, _, IMAGES, LABELS, *_ = vars(digits(data_dir="")).values()
PEERS = [
    *(word for word in TINY if not word.startswith("student")),
    "student=tinymlp",
    "method=mutual",
    "T=1",
    "beta=1",
]


def results(folder: Path) -> Any:
    told = json.loads((folder / "summary.json").read_text())["peers"]
    for one in told["peers"]:
        one["seconds"] = one["alone"]["seconds"] = 0
        del one["alone"]["from_store"]
    weights = [(folder / name / "student.safetensors").read_bytes() for name in (".", "peers/1")]
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        del row["examples_per_second"]
    return told, weights, rows


def test_a_run_reports_every_peer_with_its_student_alone(kd_run: Run) -> None:
    ran = kd_run(*PEERS, "peers=[tinymlp,cnn]", "training.epochs=2")
    assert ran.code == 0, ran.err
    told = ran.summary["peers"]
    assert [(one["name"], one["seed"]) for one in told["peers"]] == [("tinymlp", 0), ("cnn", 1)]
    errors = [one["test"]["errors"] for one in told["peers"]]
    assert told["mean_errors"] == sum(errors) / 2
    assert ran.summary["student"]["test"] == told["peers"][0]["test"]
    assert ran.summary["student_alone"]["test"]["errors"] == told["peers"][0]["alone"]["test"]["errors"]
    ranks = [(-one["val"]["accuracy"], one["val"]["nll"]) for one in told["peers"]]
    assert told["best"] == ranks.index(min(ranks))
    assert 0 < told["agreement"] < 1
    assert told["diversity"] == 1 - told["agreement"]
    said = [load_student(ran.run_dir / one["folder"])(IMAGES).detach() for one in told["peers"]]
    wrong = int((torch.stack(said).mean(0).argmax(-1) != LABELS).sum())
    assert told["together"]["test"]["errors"] == wrong
    assert "the 2 peers together, geometric mean" in ran.out
    assert "Agreement of the peers by epoch" in (ran.run_dir / "report.html").read_text()
    assert "peer 1 by mutual (cnn, seed 1)" in ran.out
    assert "peer 1 alone (cnn, seed 1)" in ran.out
    assert "is not used" not in ran.out
    assert "peer 1 by mutual (cnn, seed 1)" in (ran.run_dir / "report.html").read_text()
    rows = [row for row in ran.metrics if row["role"] == "student"]
    assert [(row["member"], row["epoch"]) for row in rows] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert all(row["mutual_loss"] > 0 for row in rows)
    for one in told["peers"]:
        images = torch.zeros(1, 1, 8, 8)
        assert load_student(ran.run_dir / one["folder"])(images).shape == (1, 10)


def test_a_number_of_peers_are_students_of_consecutive_seeds_on_one_order_of_batches(kd_run: Run) -> None:
    ran = kd_run(*PEERS, "peers=3", "seed=4", "training.crop=1", "student=cnn")
    assert ran.code == 0, ran.err
    assert [one["seed"] for one in ran.summary["peers"]["peers"]] == [4, 5, 6]
    assert len({one["test"]["nll"] for one in ran.summary["peers"]["peers"]}) == 3


def test_a_teacher_may_be_added_to_peers(kd_run: Run) -> None:
    terms = ["method=sum", "method@method.first=soft_targets", "method@method.second=mutual"]
    ran = kd_run(*(word for word in PEERS if word != "method=mutual"), *terms, "peers=2", "training.crop=1")
    assert ran.code == 0, ran.err
    assert ran.summary["teacher"] is not None
    (row, _) = [row for row in ran.metrics if row["role"] == "student"]
    assert row["mutual_loss" if "mutual_loss" in row else "second_mutual_loss"] > 0
    peer = ran.summary["peers"]["peers"][1]
    assert peer["test"]["agreement"] is not None
    counts = [ran.summary["teacher"]["test"], peer["alone"]["test"], peer["test"]]
    assert peer["gap_closed"] == gap_closed(*(one["errors"] for one in counts))


def test_sweeps_train_the_peers_of_each_job_together(kd_run: Run, tmp_path: Path) -> None:
    ran = kd_run("-m", *PEERS, "peers=2", "T=1,4", "hydra.sweep.dir=out")
    assert ran.code == 0, ran.err
    single = kd_run(*PEERS, "peers=2", "T=4", "hydra.run.dir=single")
    assert single.code == 0, single.err
    last = sorted(path.parent for path in (tmp_path / "out").glob("*/summary.json"))[-1]
    assert results(last)[1] == results(tmp_path / "single")[1]


def test_a_sweep_over_methods_gives_peers_to_those_that_couple_them(kd_run: Run, tmp_path: Path) -> None:
    argv = [word for word in PEERS if word != "method=mutual"]
    ran = kd_run("-m", *argv, "method=soft_targets,mutual", "peers=2", "hydra.sweep.dir=out")
    assert ran.code == 0, ran.err
    assert "peers are not used by method=soft_targets" in ran.err
    soft, mutual = (json.loads((run / "summary.json").read_text()) for run in ran.run_dirs)
    assert "peers" not in soft
    assert len(mutual["peers"]["peers"]) == 2
    assert soft["student_alone"]["fingerprint"] == mutual["student_alone"]["fingerprint"]
    assert "method=mutual: peer 1 (tinymlp)" in ran.out
    assert "method=mutual: peers together" in ran.out


KILLED = """
import os, signal
from kd_cli.storage.training_state import TrainingState
def killed(self, state, save=TrainingState.save):
    save(self, state)
    if state["epoch"] == 2 and "learners" in state["learner"] and "mutual_loss" in state["outcomes"][0]["history"][0]:
        os.kill(os.getpid(), signal.SIGKILL)
TrainingState.save = killed
"""


def test_killed_peers_continue_to_the_same_bytes(kd_run: Run, tmp_path: Path) -> None:
    argv = [
        *PEERS,
        "peers=[tinymlp,cnn]",
        "method.refresh_every=7",
        "training.epochs=3",
        "checkpoint.every=1",
        "hydra.run.dir=out",
    ]
    assert kd_run(*argv).code == 0
    whole = results(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(os.environ["KD_STORE"])
    assert kd_run(*argv, prelude=KILLED).code == -9
    resumed = kd_run("resume=out")
    assert resumed.code == 0, resumed.err
    assert results(tmp_path / "out") == whole


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["method=mutual", "peers=1"], "it takes two"),
        (["method=mutual", "peers=[smallmlp]"], "it takes two"),
        (["method=mutual", "peers=many"], "a whole number from 2 to 100, or a list of models"),
        (["method=mutual", "peers=[smallmlp,cn]"], "peers names 'cn', and there is no such model"),
        (["method=mutual", "peers=[cnn,smallmlp]"], "hint: student=cnn"),
        (["method=mutual"], "Mutual couples the students that train together"),
        (["peers=2"], "method=soft_targets trains each student by itself"),
        (["method=mutual", "peers=2", "T=auto"], "choose among students that are trained by themselves"),
    ],
)
def test_peers_that_cannot_be_are_refused_before_anything_is_trained(kd_run: Run, argv: list[str], said: str) -> None:
    ran = kd_run(*argv)
    assert ran.code == 1
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert not (Path(os.environ["KD_STORE"]) / "partial").exists()
    assert "loss" not in ran.err


OTHER = """
from torch import nn

def net(input_shape, num_classes, pixels, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes))
"""


@pytest.mark.parametrize(("keys", "said"), [("pixels: 64\nclasses: 7", "7"), ("pixels: 49\nclasses: 10", "[49, 10]")])
def test_peers_of_other_inputs_or_classes_are_refused_before_anything_is_trained(
    kd_run: Run, own_code: Callable[..., list[str]], keys: str, said: str
) -> None:
    here = own_code({"others.py": OTHER, "model/other": f"_target_: others.net\n{keys}\n"})
    ran = kd_run(*here, *PEERS, "peers=[tinymlp,other]")
    assert ran.code == 1
    assert "student=other" in ran.err
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert "loss" not in ran.err


def test_a_sweep_over_seeds_that_were_meant_as_peers_is_refused(kd_run: Run) -> None:
    ran = kd_run("-m", *PEERS, "seed=0,1")
    assert ran.code == 1
    assert "this run trains one" in ran.err
    assert ran.run_dirs == []
