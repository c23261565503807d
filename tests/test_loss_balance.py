"""The shares of a loss's terms in the gradient: their values, and that a training goes on as if none were measured."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import made
import made_features
import pytest
import torch
from process import Ran
from stacks import ADAMW, JITTER, SEEDS, one_of, teacher
from torch import nn

from kd_cli.learn.batches import Batch, draw_order
from kd_cli.learn.engine import Interrupted, Outcome
from kd_cli.learn.learner import Learner
from kd_cli.learn.methods import (
    CRD,
    DIST,
    DKD,
    NKD,
    RLD,
    TTM,
    WSLD,
    Hints,
    Method,
    Ramp,
    Relational,
    Scheduled,
    SoftTargets,
    Sum,
)
from kd_cli.learn.outputs import FeatureHooks, Outputs
from kd_cli.learn.stacked.learner import StackedLearner
from kd_cli.learn.teachers import CachedTeacher, LiveTeacher
from kd_cli.models.cnn import cnn
from kd_cli.runs.loss_balance import small_terms

Build = Callable[[], nn.Module]


def trained(build: Build, *, measured: bool, epochs: int = 2, alpha: float = 1.0) -> Outcome:
    teacher = CachedTeacher(
        torch.randn(1, 75, made.CLASSES, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    plan = replace(made.a_plan(epochs=epochs), loss_balance=measured)
    learner: Learner = made.solo(build)
    return made.train(learner, teacher=teacher, plan=plan, weights=made.some_weights(alpha=(alpha,)))[0]


@pytest.mark.parametrize("build", [made.small, made.big, made.Moody], ids=["small", "dropout", "batchnorm"])
def test_a_training_whose_balance_is_measured_gives_the_same_bytes(build: Build) -> None:
    with_shares, without = trained(build, measured=True), trained(build, measured=False)
    assert made.difference(with_shares.state, without.state) == 0
    assert made.metrics(with_shares) == made.metrics(without)
    assert [(row["when"], row["epoch"]) for row in with_shares.balance] == [("start", 0), ("middle", 1), ("end", 2)]
    assert without.balance == []


def test_the_shares_are_in_proportion_to_the_weights() -> None:
    one, ten = (trained(made.small, measured=True, alpha=alpha).balance[0]["shares"] for alpha in (1.0, 10.0))
    assert one["soft"] + one["hard"] == pytest.approx(1)
    assert ten["soft"] / ten["hard"] == pytest.approx(10 * one["soft"] / one["hard"])


def test_a_training_of_one_epoch_has_a_start_and_an_end() -> None:
    assert [row["when"] for row in trained(made.small, measured=True, epochs=1).balance] == ["start", "end"]


def test_a_sum_has_a_share_for_each_part() -> None:
    method = Sum({"b": 0.5}, a=SoftTargets(), b=DIST())
    teacher = CachedTeacher(torch.randn(1, 75, made.CLASSES, dtype=torch.float64))
    plan = replace(made.a_plan(), loss_balance=True)
    outcome = made.train(made.solo(method=method), method=method, teacher=teacher, plan=plan)[0]
    assert list(outcome.balance[0]["shares"]) == ["a", "b", "hard"]


def test_a_term_below_one_percent_is_named_and_one_without_a_weight_is_not() -> None:
    rows = [{"when": "start", "epoch": 0, "shares": {"soft": 0.004, "hard": 0.996, "third": 0.0}}]
    (sentence,) = small_terms(rows)
    assert "'soft' is less than 1 % of the student's gradient (0.004 at the start" in sentence


# ---------------------------------------------------------------- the training goes on as if nothing was measured


def moody_training(*, measured: bool, epochs: int = 4) -> dict[str, Any]:
    """A live teacher, jitter and mirrored images, for a network with dropout and BatchNorm."""
    plan = made.a_plan(epochs=epochs, augment=JITTER)
    plan = replace(plan, loss_balance=measured, estimate_batchnorm=True, keep_best=True)
    return {"teacher": LiveTeacher([made.model(made.Moody, 9)]), "plan": plan}


def test_augmentation_dropout_and_statistics_go_on_as_without_the_measurement() -> None:
    found = [made.train(made.solo(made.Moody), **moody_training(measured=measured))[0] for measured in (True, False)]
    assert made.difference(found[0].state, found[1].state) == 0
    assert made.metrics(found[0]) == made.metrics(found[1])
    assert [row["epoch"] for row in found[0].balance] == [0, 2, 4]


def test_the_global_generator_is_where_it_was() -> None:
    learner, keys = made.solo(made.Moody), moody_training(measured=True)
    before = torch.get_rng_state()
    made.train(learner, **keys)
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_resumed_training_has_the_earlier_measurements(stop_after: int) -> None:
    whole = made.train(made.solo(made.Moody), **moody_training(measured=True))[0]
    checkpoint, epochs = made.InMemory(), itertools.count(1)
    with pytest.raises(Interrupted):
        made.train(
            made.solo(made.Moody),
            **moody_training(measured=True),
            checkpoint=checkpoint,
            stopping=lambda: next(epochs) == stop_after,
        )
    resumed = made.train(made.solo(made.Moody), **moody_training(measured=True), checkpoint=checkpoint)[0]
    assert resumed.balance == whole.balance
    assert made.difference(resumed.state, whole.state) == 0


def test_measuring_moves_no_memory_of_a_method() -> None:
    students, methods = [], []
    for measured in (True, False):
        teacher = made.model(made_features.big, 9)
        with torch.random.fork_rng():
            torch.manual_seed(5)
            method = made_features.ready(CRD(dim=5, K=20), made.model(made.conv), teacher, examples=75)
        live = LiveTeacher([teacher])
        live.read_features(method.teacher_features)
        plan = replace(made.a_plan(), loss_balance=measured)
        outcome = made.train(made.solo(made.conv, method=method), teacher=live, method=method, plan=plan)[0]
        students.append(outcome)
        methods.append(dict(method.state_dict()))
    assert made.difference(*methods) == 0
    assert made.difference(students[0].state, students[1].state) == 0
    assert 0 < students[0].balance[0]["shares"]["soft"] < 1


def test_a_methods_own_batchnorm_takes_the_batchs_statistics() -> None:
    def student() -> nn.Module:
        return cnn(channels=[3, 4], hidden=8, **made.SIZES)

    module, teacher = made.model(student), made.model(made_features.big, 9)
    method = made_features.ready(Hints(regressor="conv_bn_relu"), module, teacher, examples=75)
    live = LiveTeacher([teacher])
    live.read_features(method.teacher_features)
    by_hand, index = copy.deepcopy(method).train(), draw_order(75, [0], "student", 1)[:, :16]
    data, weights = made.examples(75), made.some_weights()
    batch = Batch(index, data.images(index), data.labels[index])
    hooks = FeatureHooks(module, method.student_features, role="student")
    logits = module(batch.images[0])[None]
    ours = Outputs(logits, {path: x[None] for path, x in hooks.take().items()})
    hooks.remove()
    norms = {}
    for name, term in by_hand.weighted_terms(ours, live(batch, weights.T), batch, weights).items():
        found = torch.autograd.grad(term.sum(), list(module.parameters()), retain_graph=True, materialize_grads=True)
        norms[name] = float(torch.cat([x.flatten() for x in found]).norm())
    plan = replace(made.a_plan(), loss_balance=True)
    (outcome,) = made.train(made.learner_of(module, method=method), teacher=live, method=method, plan=plan)
    total = sum(norms.values())
    assert outcome.balance[0]["shares"] == pytest.approx({name: norm / total for name, norm in norms.items()})


# ---------------------------------------------------------------- stacks


@pytest.mark.parametrize("build", [made.small, made.conv], ids=["dense", "convolutional"])
def test_the_shares_of_a_stack_are_those_of_its_members_by_themselves(build: Build) -> None:
    weights = made.some_weights(T=[1, 2, 8], alpha=[1, 0.5, 0], beta=[0.5, 0, 1])
    keys: dict[str, Any] = {"teacher": teacher(live=False), "plan": replace(made.a_plan(), loss_balance=True)}
    modules = [made.model(build, seed) for seed in SEEDS]
    stack = StackedLearner(modules, ADAMW, hyper=[{}] * 3, seeds=SEEDS)
    together = made.train(stack, seeds=SEEDS, weights=weights, **keys)
    for s, seed in enumerate(SEEDS):
        learner = made.solo(build, seed=seed, optimizer=ADAMW)
        (alone,) = made.train(learner, seeds=[seed], weights=one_of(weights, s), **keys)
        for one, other in zip(alone.balance, together[s].balance, strict=True):
            assert (one["when"], one["epoch"]) == (other["when"], other["epoch"])
            assert one["shares"] == pytest.approx(other["shares"], rel=1e-6, abs=1e-12)


# ---------------------------------------------------------------- weights that no recipe has


def test_a_weight_far_from_published_ones_is_named() -> None:
    method = SoftTargets()
    assert method.unusual_weights(alpha=1, beta=0.5) == []
    assert method.unusual_weights(alpha=30, beta=0.5) == [
        "SoftTargets: alpha / beta = 60 is unusual; published recipes have 0.33 to 9"
    ]
    assert method.unusual_weights(alpha=0, beta=1) == method.unusual_weights(alpha=1, beta=0) == []
    assert SoftTargets(standardise=True).unusual_weights(alpha=9, beta=0.1) == []
    assert len(SoftTargets(standardise=True).unusual_weights(alpha=1, beta=0.5)) == 1


def test_a_weight_of_the_methods_own_is_multiplied_by_alpha() -> None:
    assert DKD(nckd_weight=80).unusual_weights(alpha=0.1, beta=1) == [
        "DKD: method.tckd_weight * alpha / beta = 0.1 is unusual; published recipes have 1"
    ]
    assert CRD(weight=80).unusual_weights(alpha=1, beta=1) == [
        "CRD: method.weight * alpha / beta = 80 is unusual; published recipes have 0.8"
    ]


def test_the_parts_of_a_composition_are_named_with_their_weights() -> None:
    method = Sum({"second": 0.001}, first=SoftTargets(), second=Relational())
    (distance, angle) = method.unusual_weights(alpha=1, beta=1)
    assert distance.startswith("Relational: method.distance * alpha / beta = 0.025 is unusual")
    assert angle.endswith("(alpha is times method.weights.second = 0.001)")
    fading = Scheduled(SoftTargets(), alpha=Ramp(1, 100))
    assert fading.unusual_weights(alpha=1, beta=1)[0].endswith("0.33 to 9 (at the end of the schedule)")


def test_published_recipes_are_not_unusual() -> None:
    recipes: list[tuple[Method, float, float]] = [
        (SoftTargets(), 0.9, 0.1),
        (DIST(), 2, 1),
        (DIST(square_T=True), 2, 1),
        (DKD(), 1, 1),
        (NKD(), 1, 1),
        (NKD(gamma=3.5), 1, 1),
        (TTM(), 45, 1),
        (TTM(weighted=True), 4, 1),
        (RLD(), 1, 1),
        (WSLD(), 2.5, 1),
        *((build(), 1, 1) for build in made_features.METHODS.values()),
    ]
    assert [method.unusual_weights(alpha=alpha, beta=beta) for method, alpha, beta in recipes] == [[]] * len(recipes)


# ---------------------------------------------------------------- what a run says


def test_a_run_says_what_hardly_counts_and_what_is_unusual(tiny: Callable[..., Ran]) -> None:
    ran = tiny("alpha=0.001", "training.epochs=2")
    balance = ran.summary["student"]["loss_balance"]
    assert [row["when"] for row in balance] == ["start", "middle", "end"]
    unusual, small = ran.summary["notes"]
    assert unusual == "SoftTargets: alpha / beta = 0.002 is unusual; published recipes have 0.33 to 9"
    assert small.startswith("the loss's term 'soft' is less than 1 % of the student's gradient (0.00")
    page = (ran.run_dir / "report.html").read_text()
    for note in (unusual, small):
        assert ran.err.count(note) == 1
        assert (ran.run_dir / "run.log").read_text().count(note) == 1
        assert note.partition("'")[0] in page
    assert "Balance of the loss" in page
    assert f"{balance[0]['shares']['hard']:.1%}" in page


def test_a_run_without_a_teacher_has_no_balance(tiny: Callable[..., Ran]) -> None:
    ran = tiny("method=hard")
    assert ran.summary["student"]["loss_balance"] == []
    assert "Balance of the loss" not in (ran.run_dir / "report.html").read_text()


def test_of_several_settings_the_chosen_one_is_judged(tiny: Callable[..., Ran]) -> None:
    ran = tiny("alpha=auto", "beta=0.001")
    alpha = ran.summary["alpha"]
    (unusual,) = (note for note in ran.summary["notes"] if "unusual" in note)
    assert unusual.startswith(f"SoftTargets: alpha / beta = {alpha / 0.001:.3g} is unusual")
