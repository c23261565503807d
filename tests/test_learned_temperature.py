"""A temperature that is learned against the student: its gradient, what it needs, that it is saved."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import made
import pytest
import torch
from conftest import TINY
from logits import some_labels, some_logits, terms_of, weights_of
from process import Ran
from safetensors.torch import load_file
from stacks import teacher
from torch import nn

from kd_cli import losses
from kd_cli.config.values import TrainSpec
from kd_cli.errors import ConfigError
from kd_cli.learn.engine import Interrupted
from kd_cli.learn.methods import (
    DIST,
    DKD,
    NKD,
    RLD,
    TTM,
    WSLD,
    Attention,
    LearnedTemperature,
    Method,
    Ramp,
    Scheduled,
    Setting,
    SoftTargets,
    Sum,
)
from kd_cli.learn.outputs import Outputs
from kd_cli.learn.stacked.learner import why_method_not
from kd_cli.runs.building import trained_parameters

B, C = 6, 5
OURS, THEIRS, LABELS = some_logits(B, C), some_logits(B, C, seed=1), some_labels(B, classes=C)
WEIGHTS = weights_of([3.0], alpha=0.7, beta=0.4)


def loss_of(method: Method, *, T: float = 3.0, progress: float = 1.0) -> torch.Tensor:
    weights = weights_of([T], alpha=0.7, beta=0.4)
    return terms_of(method, OURS, THEIRS, LABELS, weights, progress=progress)["loss"]


def slope(method: LearnedTemperature, progress: float = 1.0) -> float:
    """The gradient on theta."""
    (found,) = torch.autograd.grad(loss_of(method, progress=progress).sum(), [method.offset])
    return float(found)


def learned(of: Method | None = None, **keys: Any) -> LearnedTemperature:
    return LearnedTemperature(of or SoftTargets(), **keys).double()


# ---------------------------------------------------------------- value and gradient


@pytest.mark.parametrize("of", [SoftTargets, DKD, DIST, RLD, lambda: SoftTargets(standardise=True)])
def test_it_starts_as_the_method_at_the_runs_temperature(of: Callable[[], Method]) -> None:
    torch.testing.assert_close(loss_of(learned(of())), loss_of(of()))
    terms = terms_of(learned(of()), OURS, THEIRS, LABELS, WEIGHTS)
    assert terms["T"].tolist() == pytest.approx([3.0], rel=1e-12)


def disagreement(T: float) -> float:
    """`T^2 KL` by hand."""
    p, q = (OURS / T).softmax(-1), (THEIRS / T).softmax(-1)
    return T**2 * float((q * (q / p).log()).sum(-1).mean())


def test_the_gradient_is_the_divergences_reversed() -> None:
    small = 1e-5
    by_T = 0.7 * (disagreement(3 + small) - disagreement(3 - small)) / (2 * small)
    share = (3 - 1) / 20
    by_theta = by_T * 20 * share * (1 - share)  # T = 1 + 20 sigmoid(theta)
    assert slope(learned(reversal=1)) == pytest.approx(-by_theta, rel=1e-7)
    assert slope(learned(reversal=0.25)) == pytest.approx(-by_theta / 4, rel=1e-7)
    assert slope(learned(reversal=0)) == 0
    # of the cross entropy, whose value the loss has, the gradient would be another
    entropy = losses.soft_cross_entropy(OURS, THEIRS, T=3 + small) * (3 + small) ** 2
    entropy -= losses.soft_cross_entropy(OURS, THEIRS, T=3 - small) * (3 - small) ** 2
    assert 0.7 * float(entropy) / (2 * small) > 2 * abs(by_T)


def test_a_student_that_is_the_teacher_leaves_the_temperature_where_it_is() -> None:
    method = learned(reversal=1)
    loss = terms_of(method, THEIRS, THEIRS, LABELS, WEIGHTS, progress=1.0)["loss"]
    (found,) = torch.autograd.grad(loss.sum(), [method.offset])
    assert float(found) == pytest.approx(0, abs=1e-12)


def test_a_step_goes_where_they_disagree_more() -> None:
    method = learned(reversal=1)
    optimizer = torch.optim.SGD([method.offset], lr=0.01)
    loss_of(method).sum().backward()
    optimizer.step()
    (T,) = terms_of(method, OURS, THEIRS, LABELS, WEIGHTS, progress=1.0)["T"].tolist()
    assert pytest.approx(3.0, abs=1e-6) != T
    assert disagreement(T) > disagreement(3.0)


def test_the_students_gradient_is_that_of_the_method() -> None:
    def on_logits(method: Method) -> torch.Tensor:
        leaf = OURS.clone().requires_grad_()
        loss = terms_of(method, leaf, THEIRS, LABELS, WEIGHTS, progress=1.0)["loss"]
        return torch.autograd.grad(loss.sum(), leaf)[0]

    torch.testing.assert_close(on_logits(learned()), on_logits(SoftTargets()))


def test_the_reversal_grows_with_the_training() -> None:
    method = learned()
    assert slope(method, 0.0) == 0
    assert slope(method, 5 / 240) == pytest.approx(slope(method, 1.0) / 2)
    assert slope(method, 10 / 240) == slope(method, 0.5) == slope(method, 1.0) != 0


def test_the_temperature_stays_between_its_bounds() -> None:
    method = learned(least=0.5, most=8, reversal=1)
    for value, bound in ((50.0, 8.0), (-50.0, 0.5)):
        with torch.no_grad():
            method.offset.fill_(value)
        assert terms_of(method, OURS, THEIRS, LABELS, WEIGHTS)["T"].tolist() == pytest.approx([bound])
        assert loss_of(method).isfinite()


def test_parts_without_a_temperature_and_schedules_of_weights_compose() -> None:
    both = learned(Sum({"b": 2}, a=SoftTargets(), b=DKD()), reversal=1)
    alone = [slope(learned(of, reversal=1)) for of in (SoftTargets(), DKD())]
    assert slope(both) == pytest.approx(alone[0] + 2 * alone[1])
    scheduled = learned(Scheduled(SoftTargets(), alpha=Ramp(0.0, 3.0)), reversal=1)
    assert slope(scheduled) == pytest.approx(3 * alone[0])
    inside = Sum(a=learned(reversal=1), b=DIST())
    assert set(terms_of(inside, OURS, THEIRS, LABELS, WEIGHTS)) == {
        "loss",
        "a_soft",
        "a_T",
        "b_inter",
        "b_intra",
        "hard",
    }


# ---------------------------------------------------------------- what it cannot do


def some_setting() -> Setting:
    outputs = Outputs(THEIRS[None])
    return Setting(C, 100, B, outputs, outputs)


@pytest.mark.parametrize("of", [NKD, TTM, WSLD])
def test_a_method_whose_loss_is_no_divergence_is_refused(of: Callable[[], Method]) -> None:
    with pytest.raises(ConfigError, match=f"{of.__name__} does not say which part of its loss depends on the teacher"):
        learned(of()).setup(some_setting())


@pytest.mark.parametrize(
    ("made_of", "message"),
    [
        (lambda: LearnedTemperature(Attention()), "Attention has no temperature"),
        (lambda: LearnedTemperature(learned()), "LearnedTemperature learns a temperature itself"),
        (lambda: LearnedTemperature(SoftTargets(), least=3, most=2), "the first must be less"),
        (lambda: LearnedTemperature(SoftTargets(), reversal=-1), "method.reversal is -1; it must be a number"),
        (lambda: learned().check_temperature(1.0), "must be above method.least = 1"),
        (lambda: Sum(a=learned(), b=DIST()).check_temperature(21.0), "below method.most = 21"),
    ],
)
def test_what_cannot_be_is_refused(made_of: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        made_of()


def test_students_with_temperatures_of_their_own_are_not_stacked() -> None:
    assert why_method_not(learned()) == "LearnedTemperature has parameters of its own"


# ---------------------------------------------------------------- training


def a_training(**keys: Any) -> dict[str, Any]:
    return {
        "teacher": teacher(live=False),
        "method": learned(reversal=0.1, **keys),
        "plan": replace(made.a_plan(epochs=4), loss_balance=True),
    }


def test_a_resumed_training_has_the_same_temperatures_and_bytes() -> None:
    keys = a_training()
    whole = made.train(made.solo(method=keys["method"]), **keys)[0]
    temperatures = [row["T"] for row in whole.history]
    assert len(set(temperatures)) == 4
    checkpoint, epochs = made.InMemory(), itertools.count(1)
    keys = a_training()
    stopping = partial(lambda counted: next(counted) == 2, epochs)
    with pytest.raises(Interrupted):
        made.train(made.solo(method=keys["method"]), **keys, checkpoint=checkpoint, stopping=stopping)
    keys = a_training()
    resumed = made.train(made.solo(method=keys["method"]), **keys, checkpoint=checkpoint)[0]
    assert [row["T"] for row in resumed.history] == temperatures
    assert made.difference(resumed.state, whole.state) == 0
    assert whole.state.keys() == made.small().state_dict().keys()


def test_weight_decay_does_not_reach_the_temperature() -> None:
    method, module = Sum(a=learned(), b=DKD()), nn.Linear(2, 2)
    spec = TrainSpec("net", {"_target_": "x"}, 1, 8, {}, {}, {}, 0, "float32")
    decayed, undecayed = trained_parameters(module, method, spec)
    assert decayed["params"] == list(module.parameters())
    assert undecayed == {"params": [method.parts[0].offset], "weight_decay": 0.0}
    plain = trained_parameters(module, SoftTargets(), spec)
    assert plain == list(module.parameters())


# ---------------------------------------------------------------- runs


def test_a_run_logs_the_temperature_by_epoch_and_ships_the_student_alone(tiny: Callable[..., Ran]) -> None:
    ran = tiny("method=learned_temperature", "training.epochs=3", "diagnostics=true")
    rows = [json.loads(line) for line in (ran.run_dir / "metrics.jsonl").read_text().splitlines()]
    temperatures = [row["T"] for row in rows if row["role"] == "student"]
    assert temperatures[0] == pytest.approx(2, abs=0.2)
    assert len(set(temperatures)) == 3
    assert all("T" not in row for row in rows if row["role"] != "student")
    (note,) = (note for note in ran.summary["notes"] if "was learned" in note)
    said = f"{temperatures[0]:.3g} in the first epoch, {temperatures[-1]:.3g} in the last"
    assert note == f"the temperature T was learned: {said}"
    assert not any("T_gradient" in key for key in rows[-1])
    shipped = load_file(ran.run_dir / "student.safetensors")
    assert sum(t.numel() for t in shipped.values()) == ran.summary["student"]["parameters"]
    assert "Temperature by epoch" in (ran.run_dir / "report.html").read_text()


def test_a_run_whose_temperature_is_out_of_range_is_refused_before_training(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run(*TINY, "method=learned_temperature", "T=1")
    assert ran.code != 0
    assert "starts at T = 1, which must be above method.least = 1" in ran.err
    assert "hint: method.least=0.5" in ran.err
    two = ["teacher.members=2", "teacher.combine=arithmetic"]
    ran = kd_run(*TINY, "method=learned_temperature", *two)
    assert "changes T, and the teachers' mean probabilities are taken at the run's T" in ran.err
