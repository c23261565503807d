"""S models trained as one stack are the S models trained one by one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import made
import pytest
import torch
from pairwise import pairwise
from stacks import ADAMW, ALIKE, FUSED, JITTER, SAME_SEED, SEEDS, SGD, UNLIKE, WEIGHTS, both_ways, one_of, teacher

from kd_cli.learn.augment import Augment
from kd_cli.learn.engine import Outcome
from kd_cli.learn.learner import Autocast
from kd_cli.learn.methods import Hard, LabelSmoothing, Logits, Method, SoftTargets
from kd_cli.learn.stacked.learner import StackedLearner
from kd_cli.models.mlp import mlp

NESTEROV = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True)
ODD = partial(mlp, hidden=[15], **made.SIZES)  # in double precision its products depend on how many models share one
LINEAR = partial(mlp, hidden=[], **made.SIZES)
UNEVEN = made.some_weights(T=[1, 2, 8, 4], alpha=[1, 0.5, 0, 1], beta=[0.5, 0, 1, 1])


def assert_equal(together: list[Outcome], alone: list[Outcome]) -> None:
    assert len({row["loss"] for outcome in together for row in outcome.history}) == 3 * 3  # the models are unlike
    for one, other in zip(together, alone, strict=True):
        assert made.difference(one.state, other.state) < 1e-9
        assert [list(row) for row in one.history] == [list(row) for row in other.history]
        for mine, its in zip(made.metrics(one), made.metrics(other), strict=True):
            assert mine.pop("role") == its.pop("role")
            assert mine == pytest.approx(its, abs=1e-9)


# ---------------------------------------------------------------- stacked = one by one


@pytest.mark.parametrize("build", [made.small, made.big, made.conv, made.Own])
@pytest.mark.parametrize("optimizer", [SGD, NESTEROV, ADAMW, FUSED], ids=["sgd", "nesterov", "adamw", "fused"])
def test_a_stack_equals_its_models_one_by_one(build: made.Build, optimizer: made.Optimizer) -> None:
    assert_equal(*both_ways(build, optimizer))


@pytest.mark.parametrize("build", [made.small, made.big, made.conv, made.Own])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW, FUSED], ids=["sgd", "adamw", "fused"])
@pytest.mark.parametrize("augment", [None, JITTER], ids=["still", "augmented"])
def test_a_stack_of_one_equals_the_module(
    build: made.Build, optimizer: made.Optimizer, augment: Augment | None
) -> None:
    together, alone = both_ways(build, optimizer, seeds=[4], hyper=[{}], weights=one_of(WEIGHTS, 0), augment=augment)
    assert made.difference(together[0].state, alone[0].state) < 1e-9
    for mine, its in zip(made.metrics(together[0]), made.metrics(alone[0]), strict=True):
        assert {**mine, "role": ""} == pytest.approx({**its, "role": ""}, abs=1e-9)


@pytest.mark.parametrize("build", [made.small, made.wide, made.big, made.conv, made.Own])
@pytest.mark.parametrize("augment", [None, JITTER], ids=["cached", "live"])
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("seeds", [(1, 1, 0, 0), (0, 1, 1, 0), (2, 2, 2, 0)], ids=str)
def test_models_of_one_seed_share_their_batches(
    build: made.Build, augment: Augment | None, members: int, seeds: Sequence[int]
) -> None:
    together, alone = both_ways(
        build,
        FUSED,
        seeds=seeds,
        hyper=[{}] * 4,
        weights=UNEVEN,
        methods=[SoftTargets()] * 4,
        augment=augment,
        members=members,
    )
    for one, other in zip(together, alone, strict=True):
        assert made.difference(one.state, other.state) < 1e-9
        for mine, its in zip(made.metrics(one), made.metrics(other), strict=True):
            assert {**mine, "role": ""} == pytest.approx({**its, "role": ""}, abs=1e-9)


@pytest.mark.parametrize("build", [made.small, made.big, made.conv, made.Own])
@pytest.mark.parametrize("seeds", [SEEDS, SAME_SEED, (1, 1, 0)], ids=["seeds", "same seed", "two seeds"])
def test_a_stack_equals_its_models_with_augmented_images(build: made.Build, seeds: Sequence[int]) -> None:
    assert_equal(*both_ways(build, SGD, seeds=seeds, augment=JITTER))


@pytest.mark.parametrize("build", [made.small, made.big, made.conv, made.Own])
def test_models_of_one_seed_may_differ_in_T_alpha_and_beta(build: made.Build) -> None:
    assert_equal(*both_ways(build, ADAMW, seeds=SAME_SEED))


@pytest.mark.parametrize("build", [made.small, made.big, made.Own])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW, FUSED], ids=["sgd", "adamw", "fused"])
@pytest.mark.parametrize("seeds", [SEEDS, SAME_SEED], ids=["seeds", "same seed"])
def test_models_may_differ_in_learning_rate_and_weight_decay(
    build: made.Build, optimizer: made.Optimizer, seeds: Sequence[int]
) -> None:
    together, alone = both_ways(build, optimizer, seeds=seeds, hyper=UNLIKE)
    assert_equal(together, alone)
    assert [outcome.history[0]["lr"] for outcome in together] == [outcome.history[0]["lr"] for outcome in alone]
    assert together[0].history[0]["lr"] == 4 * together[2].history[0]["lr"]


@pytest.mark.parametrize("augment", [None, JITTER], ids=["cached", "live"])
@pytest.mark.parametrize("seeds", [SEEDS, SAME_SEED], ids=["seeds", "same seed"])
def test_each_model_meets_the_ensemble_at_its_own_T(augment: Augment | None, seeds: Sequence[int]) -> None:
    assert_equal(*both_ways(made.small, SGD, seeds=seeds, augment=augment, members=3))


def test_models_may_differ_in_label_smoothing() -> None:
    methods = [LabelSmoothing(smoothing) for smoothing in (0, 0.1, 0.5)]
    weights = made.some_weights(T=[1, 1, 1], beta=[0.5, 1, 2], alpha=[0, 0, 0])
    assert_equal(*both_ways(made.small, SGD, seeds=SAME_SEED, methods=methods, weights=weights))


@pytest.mark.parametrize("method", [Hard(), Logits()], ids=["hard", "logits"])
def test_other_methods_stack_too(method: Method) -> None:
    weights = made.some_weights(T=[1, 1, 1], alpha=[1, 0.5, 0.1], beta=[0.5, 0.2, 1])
    assert_equal(*both_ways(made.small, SGD, weights=weights, methods=[method] * 3))


def test_the_bound_on_the_norm_holds_in_each_model_of_a_stack() -> None:
    together, _ = both_ways(made.big, partial(torch.optim.SGD, momentum=0.9), hyper=[{"lr": 0.3}] * 3, epochs=2)
    for outcome in together:
        norms = torch.cat([outcome.state[name].norm(dim=1) for name in ("2.weight", "5.weight")])
        assert 0.59 < norms.max() <= 0.6 + 1e-12


def test_neighbours_and_place_in_the_stack_change_nothing() -> None:
    hyper, plan = [{"lr": 0.02}] * 4, made.a_plan(augment=JITTER)

    def train(seeds: Sequence[int]) -> list[Outcome]:
        modules = [made.model(made.big, seed) for seed in seeds]
        learner = StackedLearner(modules, SGD, hyper=hyper[: len(seeds)], seeds=seeds)
        weights = made.some_weights(*([value] * len(seeds) for value in (2, 1, 0.5)))
        return made.train(learner, seeds=seeds, weights=weights, teacher=teacher(live=True), plan=plan)

    few, many = train([4, 5]), train([7, 5, 6, 4])
    assert made.difference(few[0].state, many[3].state) < 1e-9
    assert made.difference(few[1].state, many[1].state) < 1e-9
    assert made.difference(few[0].state, few[1].state) > 1e-3


def test_the_modules_that_a_stack_is_made_of_are_left_as_they_are() -> None:
    modules = [made.model(made.small, seed) for seed in SEEDS]
    before = [{name: t.clone() for name, t in module.state_dict().items()} for module in modules]
    made.train(
        StackedLearner(modules, SGD, hyper=ALIKE, seeds=SEEDS),
        seeds=SEEDS,
        method=Hard(),
        weights=made.some_weights(*[[1.0] * 3] * 3),
    )
    for module, state in zip(modules, before, strict=True):
        assert made.difference(module.state_dict(), state) == 0


# ---------------------------------------------------------------- divergence


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("build", [made.small, made.big, made.conv, made.Own])
@pytest.mark.parametrize("optimizer", [SGD, FUSED], ids=["sgd", "fused"])
@pytest.mark.parametrize(("rate", "beta"), [(1e30, 0.5), (math.inf, 0.5), (math.nan, 0.5), (0.02, math.nan)], ids=str)
def test_a_model_that_diverges_leaves_its_neighbours_bit_identical(
    build: made.Build, optimizer: made.Optimizer, dtype: torch.dtype, rate: float, beta: float
) -> None:
    def train(rate: float, beta: float) -> list[Outcome]:
        modules = [made.model(build, seed, dtype) for seed in SEEDS]
        hyper = [{"lr": 0.02}, {"lr": rate}, {"lr": 0.02}]
        return made.train(
            StackedLearner(modules, optimizer, hyper=hyper, seeds=SEEDS),
            seeds=SEEDS,
            method=Hard(),
            weights=made.some_weights([2, 2, 2], [1, 1, 1], [0.5, beta, 0.5], dtype=dtype),
            data=made.examples(75, dtype=dtype),
            plan=made.a_plan(epochs=3, augment=JITTER),
        )

    harmless, harmful = train(0.02 if rate == 0.02 else 0.03, 0.5), train(rate, beta)
    assert harmless[1].diverged is None
    assert harmful[1].diverged == 1 or rate == 1e30  # a normalised network may stay finite
    assert made.difference(harmful[1].state, harmless[1].state) != 0
    for s in (0, 2):
        assert harmful[s].diverged is None
        assert made.difference(harmful[s].state, harmless[s].state) == 0
        assert made.metrics(harmful[s]) == made.metrics(harmless[s])
        assert len(harmful[s].history) == 3


@pytest.mark.parametrize(
    ("precision", "build", "optimizer", "seeds", "cause"),
    pairwise(
        ["float32", "float64", "bfloat16"],
        [made.small, made.big, made.wide, ODD, LINEAR, made.conv, made.Own],
        [SGD, ADAMW, FUSED],
        [(0, 1, 2, 3), (5, 5, 5, 5), (1, 1, 2, 2), (5, 6, 5, 5)],
        ["beta", "lr"],
    ),
)
def test_a_stack_without_the_one_that_diverges_gives_its_neighbours_bit_identical(
    build: made.Build, optimizer: made.Optimizer, precision: str, seeds: Sequence[int], cause: str
) -> None:
    dtype = torch.float64 if precision == "float64" else torch.float32
    autocast = Autocast(torch.device("cpu"), precision)

    def train(which: Sequence[int]) -> list[Outcome]:
        betas = [math.nan if s == 1 and cause == "beta" else 0.5 for s in which]
        return made.train(
            StackedLearner(
                [made.model(build, seeds[s], dtype) for s in which],
                optimizer,
                hyper=[{"lr": math.inf if s == 1 and cause == "lr" else 0.02} for s in which],
                seeds=[seeds[s] for s in which],
                autocast=autocast,
            ),
            seeds=[seeds[s] for s in which],
            method=Hard(),
            weights=made.some_weights([2.0] * len(which), [1.0] * len(which), betas, dtype=dtype),
            data=made.examples(75, dtype=dtype),
            plan=made.a_plan(epochs=3, augment=JITTER),
        )

    beside, without = train([0, 1, 2, 3]), train([0, 2, 3])
    assert beside[1].diverged == 1
    for one, other in zip([beside[s] for s in (0, 2, 3)], without, strict=True):
        assert one.diverged is other.diverged is None
        assert made.difference(one.state, other.state) == 0
        assert made.metrics(one) == made.metrics(other)


# ---------------------------------------------------------------- float32


def test_in_single_precision_a_stack_differs_no_more_than_another_number_of_threads() -> None:
    """Rounding is the only difference: no larger than between one thread and two."""
    build = partial(mlp, hidden=[128, 128], **made.SIZES)
    data = made.examples(600, dtype=torch.float32)
    images, labels = made.pictures(1000, "test", torch.float32)
    plan = made.a_plan(epochs=3, batch_size=128)
    weights = made.some_weights(*([value] * 2 for value in (2, 1, 0.5)), dtype=torch.float32)
    seeds = [0, 1]

    def errors(outcome: Outcome) -> int:
        module = build()
        module.load_state_dict(outcome.state)
        return int((module.eval()(images).argmax(-1) != labels).sum())

    def one_by_one(threads: int) -> list[int]:
        torch.set_num_threads(threads)
        found = []
        for s, seed in enumerate(seeds):
            learner = made.learner_of(made.model(build, seed, torch.float32), FUSED, seed=seed)
            found += made.train(learner, seeds=[seed], method=Hard(), weights=one_of(weights, s), data=data, plan=plan)
        torch.set_num_threads(1)
        return [errors(outcome) for outcome in found]

    modules = [made.model(build, seed, torch.float32) for seed in seeds]
    learner = StackedLearner(modules, FUSED, hyper=[{}] * 2, seeds=seeds)
    stacked = [
        errors(o) for o in made.train(learner, seeds=seeds, method=Hard(), weights=weights, data=data, plan=plan)
    ]
    one, two = one_by_one(1), one_by_one(2)
    print(f"errors of 1,000: stacked {stacked}, one thread {one}, two threads {two}")
    differences = [max(abs(a - b) for a, b in zip(one, other, strict=True)) for other in (stacked, two)]
    assert differences[0] <= differences[1] + 1
    assert len(set(one)) > 1
