"""Co-distillation: peers that begin alone and learn from earlier weights, and how often retrainings differ."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made
import pytest
import torch
from process import Ran
from test_peers import PEERS, divergence, made_batch, peers_of, weights_of
from torch.nn import functional as F

from kd_cli.errors import ConfigError
from kd_cli.learn.engine import Training, fit, validate
from kd_cli.learn.methods import Mutual, SoftTargets
from kd_cli.learn.methods.compose import Sum
from kd_cli.learn.objective import Objective
from kd_cli.learn.outputs import Outputs
from kd_cli.metrics import agreement
from kd_cli.report.churn import mean_disagreement

Run = Callable[..., Ran]


def test_before_the_burn_in_ends_peers_learn_from_labels_alone() -> None:
    logits, labels, batch = made_batch(3)
    weights = weights_of(3, 2.0, 1.0, 0.5)
    method = Mutual(burn_in=0.25)
    early, late = (
        method(Outputs(logits), None, vary(batch, progress), weights)["loss"].detach() for progress in (0.2, 0.25)
    )
    assert torch.allclose(
        early, 0.5 * torch.stack([F.cross_entropy(one, labels) for one in logits.detach()]), rtol=1e-12
    )
    assert torch.equal(late, Mutual()(Outputs(logits), None, batch, weights)["loss"].detach())


def vary(batch: Any, progress: float) -> Any:
    return type(batch)(batch.index, batch.images, batch.labels, progress)


@pytest.mark.parametrize("every", [2, 4])
def test_stale_answers_are_those_of_a_loop_written_by_hand(every: int) -> None:
    builds, plan, seen = [made.small, made.Own, made.Own], made.a_plan(epochs=1), []

    class Seeing(Mutual):
        def forward(self, student: Outputs, teacher: Any, batch: Any, weights: Any) -> Any:
            seen.append(batch)
            return super().forward(student, teacher, batch, weights)

    objective = Objective(Seeing(refresh_every=every), weights_of(3, 2.0, 1.0, 0.5))
    data = made.examples(75), made.examples(30, "val")
    found = fit(peers_of(builds), Training(*data, "student", [0], plan, objective))

    modules = [made.model(build, s).train() for s, build in enumerate(builds)]
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9) for module in modules]
    copies: list[torch.nn.Module] = []
    for number, batch in enumerate(seen):
        if number % every == 0:
            copies = [made.model(build, s).eval() for s, build in enumerate(builds)]
            for copy, module in zip(copies, modules, strict=True):
                copy.load_state_dict(module.state_dict())
        images, labels = batch.images[0], batch.labels[0]
        shown = [copy(images).detach() for copy in copies]
        for i, (module, optimizer) in enumerate(zip(modules, optimizers, strict=True)):
            answer = module(images)
            others = [divergence(shown[j], answer, 2.0) for j in range(3) if j != i]
            loss = 4 * sum(others) / 2 + 0.5 * F.cross_entropy(answer, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert len(seen) == 5
    for module, outcome in zip(modules, found, strict=True):
        assert made.difference(module.state_dict(), outcome.state) < 1e-12


def test_a_sum_shows_its_parts_the_earlier_answers() -> None:
    logits, _, batch = made_batch(3)
    shown, weights = logits.detach().flip(0), weights_of(3, 2.0, 1.0, 0.0)
    teacher = Outputs(logits.detach()[:1])
    both = Sum(first=SoftTargets(), second=Mutual(refresh_every=5))
    assert both.refresh_every == 5
    found = both(Outputs(logits, shown=shown), teacher, batch, weights)
    alone = Mutual()(Outputs(logits, shown=shown), None, batch, weights)
    assert torch.equal(found["second_mutual"], alone["mutual"])
    with pytest.raises(ConfigError, match="it must be one number"):
        Sum(first=Mutual(), second=Mutual(refresh_every=5))


@pytest.mark.parametrize(
    ("keys", "said"),
    [({"burn_in": 1}, "below 1"), ({"burn_in": "x"}, "below 1"), ({"refresh_every": 0}, "1 or more")],
)
def test_impossible_numbers_are_refused(keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Mutual(**keys)


def test_each_epoch_has_the_agreement_of_a_peer_with_the_others() -> None:
    peers, val = peers_of([made.small, made.conv, made.Own]), made.examples(30, "val")
    logits = peers.predict(val)
    rows = validate(peers, val, coupled=True)
    for s, row in enumerate(rows):
        expected = [agreement(logits[s], logits[other]) for other in range(3) if other != s]
        assert row["val_agreement"] == pytest.approx(sum(expected) / 2, abs=1e-12)
    assert "val_agreement" not in validate(peers, val)[0]


def test_a_teacher_that_learns_on_begins_with_its_own_weights(kd_run: Run) -> None:
    keys = ["peers=1", "method.with_teacher=true", "optimizer.lr=1e-12", "hydra.run.dir=out"]
    ran = kd_run(*PEERS, *keys)
    assert ran.code == 0, ran.err
    student, teacher = ran.summary["peers"]["peers"]
    assert teacher["learned_on"]
    assert teacher["test"]["errors"] == ran.summary["teacher"]["test"]["errors"]
    assert teacher["test"]["nll"] == pytest.approx(ran.summary["teacher"]["test"]["nll"], rel=1e-5)
    assert ran.summary["peers"]["mean_errors"] == student["test"]["errors"]
    assert "teacher, having learned on as peer 1 (tinymlp)" in ran.out


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["method=mutual", "peers=1"], "it takes two"),
        (["method=mutual", "peers=2", "method.with_teacher=1"], "it must be true or false"),
        (["method=mutual", "peers=1", "method.with_teacher=true", "teacher.members=2"], "one teacher a peer"),
        (["method=mutual", "peers=2", "method.burn_in=1"], "below 1"),
    ],
)
def test_peers_that_cannot_be_are_refused_before_training(kd_run: Run, argv: list[str], said: str) -> None:
    ran = kd_run(*argv)
    assert ran.code == 1
    assert said in ran.err
    assert "loss" not in ran.err
    assert "Traceback" not in ran.err


# ---------------------------------------------------------------- churn


def test_disagreement_is_the_mean_over_all_pairs() -> None:
    answers = [[0, 1, 2, 3, 1], [0, 1, 2, 0, 0], [0, 2, 2, 1, 1], [0, 2, 1, 2, 1]]
    pairs = [sum(a != b for a, b in zip(*two, strict=True)) / 5 for two in itertools.combinations(answers, 2)]
    assert mean_disagreement(answers) == pytest.approx(sum(pairs) / 6, abs=1e-12)
    assert mean_disagreement([[1, 2], [1, 2]]) == 0


def test_a_sweep_over_seeds_tells_how_often_two_retrainings_differ(kd_run: Run, tmp_path: Path) -> None:
    keys = ["peers=2", "method.burn_in=0.5", "method.refresh_every=3", "hydra.sweep.dir=out"]
    ran = kd_run("-m", *PEERS, *keys, "seed=0,2", "training.epochs=2")
    assert ran.code == 0, ran.err
    said = [json.loads((run / "predictions.json").read_text()) for run in ran.run_dirs]
    differing = sum(a != b for a, b in zip(said[0]["student"], said[1]["student"], strict=True))
    assert "churn" in ran.out
    assert f"{differing / len(said[0]['student']):.1%}" in ran.out
    header, *rows = (line.split(",") for line in (tmp_path / "out" / "sweep.csv").read_text().splitlines())
    column = header.index("churn")
    for row in rows:
        assert float(row[column]) == pytest.approx(differing / len(said[0]["student"]))
    lines = (ran.run_dirs[0] / "metrics.jsonl").read_text().splitlines()
    first, second, *_ = (row for row in map(json.loads, lines) if row["role"] == "student")
    assert 0 <= first["val_agreement"] <= 1
    assert second["loss"] > second["hard_loss"]
    assert first["loss"] == pytest.approx(first["hard_loss"], rel=1e-6)  # the burn-in
