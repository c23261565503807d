"""S models trained as one stack are the S models trained one by one."""

from __future__ import annotations

import collections
import gc
import math
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import made
import pytest
import torch
from kd_cli.learn.optim import Cosine, FusedAdam
from torch import Tensor, nn
from torch.nn import functional as F

from kd_cli.learn.augment import Augment
from kd_cli.learn.engine import Outcome
from kd_cli.learn.learner import Autocast, SoloLearner
from kd_cli.learn.methods import Hard, LabelSmoothing, Logits, Method, SoftTargets, Terms, Weights, stack_methods
from kd_cli.learn.randomness import generator
from kd_cli.learn.stacked import dense, flat
from kd_cli.learn.stacked.dense import is_dense, linear_of_onednn
from kd_cli.learn.stacked.learner import StackedLearner, why_not
from kd_cli.learn.teachers import CachedTeacher, LiveTeacher, Teacher
from kd_cli.models.layers import Dropout
from kd_cli.models.mlp import mlp

JITTER = Augment(jitter=1, flip=True)
Optimizer = Callable[..., torch.optim.Optimizer]
Hyper = Sequence[dict[str, float]]

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
NESTEROV = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True)
ADAMW = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.02)
FUSED = partial(torch.optim.AdamW, lr=0.01, weight_decay=0.02, fused=True)

SAME_SEED = (3, 3, 3)
SEEDS = (0, 1, 2)
WEIGHTS = made.some_weights(T=[1, 2, 8], alpha=[1, 0.5, 0], beta=[0.5, 0, 1])
ALIKE: Hyper = [{"lr": 0.02}] * 3
UNLIKE: Hyper = [{"lr": 0.02, "weight_decay": 0.0}, {"lr": 0.02, "weight_decay": 0.1}, {"lr": 0.005, "weight_decay": 0}]


def teacher(live: bool, members: int = 1) -> Teacher:
    modules = [made.made(made.small, seed=8 + m) for m in range(members)]
    if live:
        return LiveTeacher(modules, combine="arithmetic")
    with torch.no_grad():
        logits = torch.stack([3 * module(made.examples(75).images) for module in modules])
    return CachedTeacher(logits, combine="arithmetic")


def one_of(weights: Weights, s: int) -> Weights:
    return Weights(weights.T[s : s + 1], weights.alpha[s : s + 1], weights.beta[s : s + 1])


def both_ways(
    build: made.Build,
    optimizer: Optimizer,
    *,
    seeds: Sequence[int] = SEEDS,
    hyper: Hyper = ALIKE,
    weights: Weights = WEIGHTS,
    methods: Sequence[Method] = (SoftTargets(),) * 3,
    augment: Augment | None = None,
    dtype: torch.dtype = torch.float64,
    epochs: int = 3,
    members: int = 1,
) -> tuple[list[Outcome], list[Outcome]]:
    """The outcomes of a stack, and of its models one by one."""
    plan = made.a_plan(epochs=epochs, schedule=Cosine(warmup=0.2), augment=augment)
    teaching: Any = {"teacher": teacher(augment is not None, members), "plan": plan}
    modules = [made.made(build, seed) for seed in seeds]
    stack = StackedLearner(modules, optimizer, hyper=hyper, seeds=seeds)
    together = made.train(stack, seeds=seeds, weights=weights, method=stack_methods(methods), **teaching)
    alone = []
    for s, seed in enumerate(seeds):
        module = made.made(build, seed)
        solo = SoloLearner(module, optimizer(module.parameters(), **hyper[s]), seed=seed)
        alone += made.train(solo, seeds=[seed], weights=one_of(weights, s), method=methods[s], **teaching)
    return together, alone


def assert_equal(together: list[Outcome], alone: list[Outcome]) -> None:
    assert len({row["loss"] for outcome in together for row in outcome.history}) == 3 * 3  # the models are unlike
    for one, other in zip(together, alone, strict=True):
        assert made.apart(one.state, other.state) < 1e-9
        assert [list(row) for row in one.history] == [list(row) for row in other.history]
        for mine, its in zip(made.told(one), made.told(other), strict=True):
            assert mine.pop("role") == its.pop("role")
            assert mine == pytest.approx(its, abs=1e-9)


# ---------------------------------------------------------------- stacked = one by one


@pytest.mark.parametrize("build", [made.small, made.big, made.conv, made.Own])
@pytest.mark.parametrize("optimizer", [SGD, NESTEROV, ADAMW, FUSED], ids=["sgd", "nesterov", "adamw", "fused"])
def test_a_stack_equals_its_models_one_by_one(build: made.Build, optimizer: Optimizer) -> None:
    assert_equal(*both_ways(build, optimizer))


@pytest.mark.parametrize("build", [made.small, made.big, made.conv, made.Own])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW, FUSED], ids=["sgd", "adamw", "fused"])
@pytest.mark.parametrize("augment", [None, JITTER], ids=["still", "augmented"])
def test_a_stack_of_one_equals_the_module(build: made.Build, optimizer: Optimizer, augment: Augment | None) -> None:
    together, alone = both_ways(build, optimizer, seeds=[4], hyper=[{}], weights=one_of(WEIGHTS, 0), augment=augment)
    assert made.apart(together[0].state, alone[0].state) < 1e-9
    for mine, its in zip(made.told(together[0]), made.told(alone[0]), strict=True):
        assert {**mine, "role": ""} == pytest.approx({**its, "role": ""}, abs=1e-9)


ODD = partial(mlp, hidden=[15], **made.SIZES)  # in double precision its products depend on how many models share one
LINEAR = partial(mlp, hidden=[], **made.SIZES)
WIDE = partial(mlp, hidden=[16, 10], **made.SIZES)  # a first layer that one product serves for all models of a seed
UNEVEN = made.some_weights(T=[1, 2, 8, 4], alpha=[1, 0.5, 0, 1], beta=[0.5, 0, 1, 1])


@pytest.mark.parametrize("build", [made.small, WIDE, made.big, made.conv, made.Own])
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
        assert made.apart(one.state, other.state) < 1e-9
        for mine, its in zip(made.told(one), made.told(other), strict=True):
            assert {**mine, "role": ""} == pytest.approx({**its, "role": ""}, abs=1e-9)


# ---------------------------------------------------------------- quicker ways to the same


def trained(build: made.Build, optimizer: Optimizer, seeds: Sequence[int], hyper: Hyper) -> tuple[Any, list[Outcome]]:
    stack = StackedLearner([made.made(build, seed) for seed in seeds], optimizer, hyper=hyper, seeds=seeds)
    plan = made.a_plan(epochs=3, schedule=Cosine(warmup=0.2))
    weights = made.some_weights(T=[2] * len(seeds), alpha=[1] * len(seeds), beta=[0.5] * len(seeds))
    return stack, made.train(
        stack, seeds=seeds, weights=weights, teacher=teacher(False), plan=plan, method=SoftTargets()
    )


@pytest.mark.parametrize("build", [made.small, made.big])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW, FUSED], ids=["sgd", "adamw", "fused"])
@pytest.mark.parametrize(("seeds", "hyper"), [([4], [{}]), (SEEDS, ALIKE), (SEEDS, UNLIKE)], ids=["1", "3", "unlike"])
@pytest.mark.parametrize(("piece", "pieces"), [(0, 3), (100, 2), (10_000, 1)])
def test_models_advanced_piece_by_piece(
    build: made.Build,
    optimizer: Optimizer,
    seeds: Sequence[int],
    hyper: Hyper,
    piece: int,
    pieces: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if pieces == 2:
        piece *= len(seeds)
    _, at_once = trained(build, optimizer, seeds, hyper)
    monkeypatch.setattr(flat, "LARGE", 0)
    monkeypatch.setattr(flat, "PIECE", piece)
    stack, by_piece = trained(build, optimizer, seeds, hyper)
    assert len(stack.flat.pieces) == pieces
    for one, other in zip(by_piece, at_once, strict=True):
        assert made.apart(one.state, other.state) == 0
        assert made.told(one) == made.told(other)


def test_gradients_of_pieces_are_all_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradients() -> list[Tensor]:
        stack = StackedLearner([made.made(made.small, s) for s in SEEDS], SGD, hyper=ALIKE, seeds=SEEDS)
        logits = stack.logits(made.examples(9).images[None])
        return [slope.clone() for slope in stack.gradients(torch.ones_like(logits))]

    at_once = gradients()
    monkeypatch.setattr(flat, "LARGE", 0)
    monkeypatch.setattr(flat, "PIECE", 0)
    by_piece = gradients()
    assert len(by_piece) == 6
    assert all(torch.equal(one, other) and one.any() for one, other in zip(by_piece, at_once, strict=True))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"maximize": True}, {"amsgrad": True}, {"betas": (0.5, 0.9)}], ids=str
)
@pytest.mark.parametrize("hyper", [ALIKE, UNLIKE], ids=["alike", "unlike"])
def test_the_kernel_alone_is_the_step(
    kind: Optimizer, options: dict[str, Any], hyper: Hyper, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = partial(kind, lr=0.01, fused=True, **options)
    called = []
    call = FusedAdam.__call__
    monkeypatch.setattr(FusedAdam, "__call__", lambda self: (called.append(self), call(self)))
    _, short = trained(made.small, optimizer, SEEDS, hyper)
    assert bool(called) is not options.get("amsgrad", False)
    monkeypatch.setattr(FusedAdam, "can", staticmethod(lambda optimizer, group: False))
    _, whole = trained(made.small, optimizer, SEEDS, hyper)
    for one, other in zip(short, whole, strict=True):
        assert made.apart(one.state, other.state) == 0


@pytest.mark.skipif(linear_of_onednn() is None, reason="this processor has no quicker product")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [64, 100, 63])
def test_the_quicker_product(bias: bool, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(36, 520, bias), nn.ReLU(), nn.Linear(520, 520, bias), nn.ReLU(), nn.Linear(520, 4)
    )
    images = made.examples(batch, dtype=torch.float32).images
    calls = []
    quick = linear_of_onednn()
    monkeypatch.setattr(dense, "linear_of_onednn", lambda: lambda *of: (calls.append(of), quick(*of))[1])
    stack = StackedLearner([module], SGD, hyper=[{}], seeds=[0])
    logits = stack.logits(images[None])
    slope = torch.randn(logits.shape, generator=generator(0, "slope")) / batch
    found = stack.gradients(slope.clone())
    assert len(calls) == (2 if batch >= 64 else 0)  # forward and backward of the one large layer
    expected = module(images)
    assert (logits[0] - expected).abs().max() < 1e-5
    for one, other in zip(found, torch.autograd.grad(expected, list(module.parameters()), slope[0]), strict=True):
        assert (one[0] - other).abs().max() < 1e-6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_quicker_product_hides_no_nan(value: float) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 520), nn.ReLU(), nn.Linear(520, 520), nn.ReLU())
    with torch.no_grad():
        module[3].weight[7, 3] = value
        module[3].weight[8] = -module[3].weight[7]
    images = made.examples(64, dtype=torch.float32).images
    found = StackedLearner([module], SGD, hyper=[{}], seeds=[0]).logits(images[None])[0]
    expected = module(images)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
    assert not expected.isfinite().all()


@pytest.mark.parametrize("seeds", [[4], SEEDS], ids=str)
@pytest.mark.parametrize("kind", ["dense", "convolutional"])
def test_a_layer_that_comes_again_is_not_left_out(kind: str, seeds: Sequence[int]) -> None:
    def again() -> nn.Module:
        relu = nn.ReLU()
        if kind == "dense":
            return nn.Sequential(
                nn.Flatten(), nn.Linear(36, 8), relu, nn.Linear(8, 8), relu, nn.Linear(8, made.CLASSES)
            )
        layers = [nn.Conv2d(1, 3, 3), relu, nn.Flatten(), nn.Linear(48, 8), relu, nn.Linear(8, made.CLASSES)]
        return nn.Sequential(*layers)

    modules = [made.made(again, seed) for seed in seeds]
    stack = StackedLearner(modules, SGD, hyper=[{}] * len(seeds), seeds=seeds)
    images = made.examples(20).images
    for module, logits in zip(modules, stack.logits(images[None]), strict=True):
        assert (logits - module(images)).abs().max() < 1e-12


def test_layers_that_share_weights_do_not_stack() -> None:
    linear = nn.Linear(36, 36)
    module = nn.Sequential(nn.Flatten(), linear, nn.ReLU(), linear)
    said = why_not(module, SGD(module.parameters()), torch.zeros(made.SHAPE))
    assert said == "Sequential has layers that share weights"


def named() -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(36, 16, bias=False), nn.ReLU(), nn.Linear(16, made.CLASSES)]
    return nn.Sequential(collections.OrderedDict(zip(("flat", "one", "bend", "two"), layers, strict=True)))


@pytest.mark.parametrize("seeds", [(4,), (0, 1, 1), (3, 3, 3)], ids=str)
def test_layers_may_have_names_and_no_bias(seeds: Sequence[int]) -> None:
    weights = made.some_weights(T=[1, 2, 8][: len(seeds)], alpha=[1] * len(seeds), beta=[0.5] * len(seeds))
    together, alone = both_ways(named, FUSED, seeds=seeds, hyper=[{}] * len(seeds), weights=weights)
    for one, other in zip(together, alone, strict=True):
        assert made.apart(one.state, other.state) < 1e-9


def test_what_was_dropped_is_given_back_at_once() -> None:
    learner = StackedLearner([made.made(made.big)], SGD, hyper=[{}], seeds=[0])
    made.train(learner, method=Hard())
    there = weakref.ref(learner), weakref.ref(learner.network)
    gc.disable()
    try:
        del learner
        assert [ref() for ref in there] == [None, None]
    finally:
        gc.enable()


class Keeping(Hard):
    """A user's method that remembers the logits of the batch before."""

    def __init__(self) -> None:
        self.kept: list[Tensor] = []

    def __call__(self, student_SBC: Tensor, teacher: Tensor | None, labels_SB: Tensor, weights: Weights) -> Terms:
        self.kept += [student_SBC.detach(), student_SBC.detach().clone()]
        return super().__call__(student_SBC, teacher, labels_SB, weights)


def test_a_method_may_keep_the_logits() -> None:
    method = Keeping()
    made.train(StackedLearner([made.made(made.small)], SGD, hyper=[{}], seeds=[0]), method=method)
    assert len(method.kept) == 20
    for kept, copied in zip(method.kept[::2], method.kept[1::2], strict=True):
        assert torch.equal(kept, copied)


def test_in_bfloat16_the_closed_form_does_what_autocast_does() -> None:
    autocast, plan = Autocast(torch.device("cpu"), "bfloat16"), made.a_plan(epochs=2)
    data = made.examples(75, dtype=torch.float32)
    weights = made.some_weights(dtype=torch.float32)
    module = made.made(WIDE, 0, torch.float32)
    closed = StackedLearner([module], FUSED, hyper=[{}], seeds=[0], autocast=autocast)
    solo = SoloLearner(module, FUSED(module.parameters()), seed=0, autocast=autocast)
    full = StackedLearner([made.made(WIDE, 0, torch.float32)], FUSED, hyper=[{}], seeds=[0])
    one, other, single = (
        made.train(learner, method=Hard(), weights=weights, data=data, plan=plan)[0] for learner in (closed, solo, full)
    )
    assert one.history[-1]["loss"] == pytest.approx(other.history[-1]["loss"], rel=2e-2)
    assert one.history[-1]["loss"] == pytest.approx(single.history[-1]["loss"], rel=5e-2)
    assert one.history[-1]["loss"] != single.history[-1]["loss"]


class Stubborn(Hard):
    """A user's method that says another loss and knows nothing of `gradient`."""

    def __call__(self, student_SBC: Tensor, teacher: Tensor | None, labels_SB: Tensor, weights: Weights) -> Terms:
        terms = super().__call__(student_SBC, teacher, labels_SB, weights)
        return Terms(terms.loss + student_SBC.square().sum((-2, -1)), None, terms.hard)


def test_a_loss_of_ones_own_is_what_is_minimised() -> None:
    outcomes = [
        made.train(StackedLearner([made.made(made.small)], SGD, hyper=[{}], seeds=[0]), method=method)[0]
        for method in (Hard(), Stubborn())
    ]
    assert made.apart(outcomes[0].state, outcomes[1].state) > 1e-3
    assert outcomes[1].history[-1]["loss"] > 0.6 * outcomes[1].history[-1]["hard_loss"]
    solo = made.made(made.small)
    alone = made.train(SoloLearner(solo, SGD(solo.parameters()), seed=0), method=Stubborn())[0]
    assert made.apart(outcomes[1].state, alone.state) < 1e-9


def frozen() -> nn.Module:
    module = made.small()
    next(module.parameters()).requires_grad_(False)
    return module


def hooked() -> nn.Module:
    module = made.small()
    module[1].register_forward_hook(lambda layer, inputs, output: 2 * output)  # type: ignore[index]
    return module


def buffered() -> nn.Module:
    module = made.small()
    module.register_buffer("mean", torch.zeros(1))
    return module


def tied() -> nn.Module:
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 36), nn.ReLU(), nn.Linear(36, 36))
    module[3].weight = module[1].weight
    return module


@pytest.mark.parametrize(
    "module",
    [
        frozen(),
        hooked(),
        buffered(),
        tied(),
        nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(36, 4))),
        nn.Sequential(nn.Linear(36, 4)),
        nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(36, 4)),
        nn.Sequential(nn.Flatten(2), nn.Linear(36, 4)),
        nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Tanh()),
        nn.Sequential(nn.Flatten(), *[nn.Linear(36, 36)] * 2),
        nn.Sequential(nn.Flatten()),
        made.conv(),
        made.Own(),
    ],
    ids=lambda module: "",
)
def test_only_plain_sequences_of_known_layers_have_a_closed_form(module: nn.Module) -> None:
    assert not is_dense(module)
    assert is_dense(made.big())


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
    build: made.Build, optimizer: Optimizer, seeds: Sequence[int]
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


def test_company_and_place_in_the_stack_change_nothing() -> None:
    hyper, plan = [{"lr": 0.02}] * 4, made.a_plan(augment=JITTER)

    def train(seeds: Sequence[int]) -> list[Outcome]:
        modules = [made.made(made.big, seed) for seed in seeds]
        learner = StackedLearner(modules, SGD, hyper=hyper[: len(seeds)], seeds=seeds)
        weights = made.some_weights(*([value] * len(seeds) for value in (2, 1, 0.5)))
        return made.train(learner, seeds=seeds, weights=weights, teacher=teacher(live=True), plan=plan)

    few, many = train([4, 5]), train([7, 5, 6, 4])
    assert made.apart(few[0].state, many[3].state) < 1e-9
    assert made.apart(few[1].state, many[1].state) < 1e-9
    assert made.apart(few[0].state, few[1].state) > 1e-3


def test_the_modules_that_a_stack_is_made_of_are_left_as_they_are() -> None:
    modules = [made.made(made.small, seed) for seed in SEEDS]
    before = [{name: t.clone() for name, t in module.state_dict().items()} for module in modules]
    made.train(
        StackedLearner(modules, SGD, hyper=ALIKE, seeds=SEEDS),
        seeds=SEEDS,
        method=Hard(),
        weights=made.some_weights(beta=[1, 1, 1]),
    )
    for module, state in zip(modules, before, strict=True):
        assert made.apart(module.state_dict(), state) == 0


# ---------------------------------------------------------------- divergence


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("build", [made.small, made.big, made.conv, made.Own])
@pytest.mark.parametrize("optimizer", [SGD, FUSED], ids=["sgd", "fused"])
@pytest.mark.parametrize(("rate", "beta"), [(1e30, 0.5), (math.inf, 0.5), (math.nan, 0.5), (0.02, math.nan)], ids=str)
def test_a_model_that_diverges_leaves_its_neighbours_bit_identical(
    build: made.Build, optimizer: Optimizer, dtype: torch.dtype, rate: float, beta: float
) -> None:
    def train(rate: float, beta: float) -> list[Outcome]:
        modules = [made.made(build, seed, dtype) for seed in SEEDS]
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
    assert made.apart(harmful[1].state, harmless[1].state) != 0
    for s in (0, 2):
        assert harmful[s].diverged is None
        assert made.apart(harmful[s].state, harmless[s].state) == 0
        assert made.told(harmful[s]) == made.told(harmless[s])
        assert len(harmful[s].history) == 3


@pytest.mark.parametrize("precision", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("build", [made.small, made.big, WIDE, ODD, LINEAR, made.conv, made.Own])
@pytest.mark.parametrize("optimizer", [SGD, ADAMW, FUSED], ids=["sgd", "adamw", "fused"])
@pytest.mark.parametrize("seeds", [(0, 1, 2, 3), (5, 5, 5, 5), (1, 1, 2, 2), (5, 6, 5, 5)], ids=str)
@pytest.mark.parametrize("cause", ["beta", "lr"])
def test_a_stack_without_the_one_that_diverges_gives_its_neighbours_bit_identical(
    build: made.Build, optimizer: Optimizer, precision: str, seeds: Sequence[int], cause: str
) -> None:
    dtype = torch.float64 if precision == "float64" else torch.float32
    autocast = Autocast(torch.device("cpu"), precision)

    def train(which: Sequence[int]) -> list[Outcome]:
        betas = [math.nan if s == 1 and cause == "beta" else 0.5 for s in which]
        return made.train(
            StackedLearner(
                [made.made(build, seeds[s], dtype) for s in which],
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

    company, without = train([0, 1, 2, 3]), train([0, 2, 3])
    assert company[1].diverged == 1
    for one, other in zip([company[s] for s in (0, 2, 3)], without, strict=True):
        assert one.diverged is other.diverged is None
        assert made.apart(one.state, other.state) == 0
        assert made.told(one) == made.told(other)


# ---------------------------------------------------------------- what does not stack


def reason(module: nn.Module, optimizer: Optimizer = SGD) -> str | None:
    return why_not(module, optimizer(module.parameters()), made.examples(1, dtype=torch.float32).images[0])


def test_what_stacks_has_no_reason_against_it() -> None:
    for build in (made.small, made.big, made.conv, made.Own):
        for optimizer in (SGD, ADAMW, FUSED):
            assert reason(made.made(build, dtype=torch.float32), optimizer) is None


def test_running_statistics_do_not_stack() -> None:
    found = reason(made.made(made.Moody, dtype=torch.float32))
    assert found is not None
    assert "BatchNorm2d" in found
    assert "running statistics" in found


def test_an_optimiser_that_looks_at_all_weights_at_once_does_not_stack() -> None:
    found = reason(made.made(made.small, dtype=torch.float32), torch.optim.LBFGS)
    assert found is not None
    assert "LBFGS" in found


class OwnAdam(torch.optim.Adam):
    pass


def test_an_optimiser_of_ones_own_does_not_stack() -> None:
    found = reason(made.made(made.small, dtype=torch.float32), OwnAdam)
    assert found is not None
    assert "OwnAdam" in found


@pytest.mark.parametrize("dropout", [nn.Dropout, Dropout])
def test_dropout_in_a_forward_of_ones_own_does_not_stack(dropout: Callable[[float], nn.Module]) -> None:
    class Net(made.Own):
        def __init__(self) -> None:
            super().__init__()
            self.drop = dropout(0.5)

        def forward(self, images: Tensor) -> Tensor:
            return self.drop(super().forward(images))

    found = reason(Net())
    assert found is not None
    assert "Net" in found
    assert "dropout" in found


def test_weights_that_the_forward_does_not_use_do_not_stack() -> None:
    class Net(made.Own):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(2, 2)

    found = reason(Net())
    assert found is not None
    assert "does not use" in found


def test_weights_that_are_not_trained_do_not_stack() -> None:
    found = reason(frozen())
    assert found is not None
    assert "not trained" in found


def test_a_forward_that_torch_cannot_map_does_not_stack() -> None:
    class Net(made.Own):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return logits if logits.sum() > 0 else -logits

    found = reason(Net())
    assert found is not None
    assert "vmap" in found


# ---------------------------------------------------------------- float32


def test_in_single_precision_a_stack_differs_no_more_than_another_number_of_threads() -> None:
    """Rounding is the only difference: no larger than between one thread and two."""
    build = partial(mlp, hidden=[128, 128], **made.SIZES)
    data, test = made.examples(600, dtype=torch.float32), made.examples(1000, "test", torch.float32)
    plan = made.a_plan(epochs=3, batch_size=128)
    weights = made.some_weights(*([value] * 2 for value in (2, 1, 0.5)), dtype=torch.float32)
    seeds = [0, 1]

    def errors(outcome: Outcome) -> int:
        module = build()
        module.load_state_dict(outcome.state)
        return int((module.eval()(test.images).argmax(-1) != test.labels).sum())

    def one_by_one(threads: int) -> list[int]:
        torch.set_num_threads(threads)
        found = []
        for s, seed in enumerate(seeds):
            module = made.made(build, seed, torch.float32)
            learner = SoloLearner(module, FUSED(module.parameters()), seed=seed)
            found += made.train(learner, seeds=[seed], method=Hard(), weights=one_of(weights, s), data=data, plan=plan)
        torch.set_num_threads(1)
        return [errors(outcome) for outcome in found]

    modules = [made.made(build, seed, torch.float32) for seed in seeds]
    learner = StackedLearner(modules, FUSED, hyper=[{}] * 2, seeds=seeds)
    stacked = [
        errors(o) for o in made.train(learner, seeds=seeds, method=Hard(), weights=weights, data=data, plan=plan)
    ]
    one, two = one_by_one(1), one_by_one(2)
    print(f"errors of 1,000: stacked {stacked}, one thread {one}, two threads {two}")
    apart = [max(abs(a - b) for a, b in zip(one, other, strict=True)) for other in (stacked, two)]
    assert apart[0] <= apart[1] + 1
    assert len(set(one)) > 1


class Viewing:
    """A method that reads logits as they usually lie in memory."""

    needs_teacher = False

    def __call__(self, student_SBC: Tensor, teacher: Tensor | None, labels_SB: Tensor, weights: Weights) -> Terms:
        flat = student_SBC.view(-1, student_SBC.shape[-1])
        hard = F.cross_entropy(flat, labels_SB.reshape(-1), reduction="none").view(len(student_SBC), -1).mean(1)
        return Terms(weights.beta * hard, None, hard)


class ViewingItsGradient(Viewing):
    """The same, with its gradient."""

    def __call__(self, student_SBC: Tensor, teacher: Tensor | None, labels_SB: Tensor, weights: Weights) -> Terms:
        return super().__call__(student_SBC, teacher, labels_SB, weights)

    def target(self, like: Tensor, teacher: Tensor | None, labels_SB: Tensor, weights: Weights) -> Tensor:
        return weights.beta[:, None, None] * F.one_hot(labels_SB, like.shape[-1])

    def gradient(self, student_SBC: Tensor, target_SBC: Tensor, weights: Weights) -> Tensor:
        p = torch.softmax(student_SBC.view(-1, student_SBC.shape[-1]), -1).view(target_SBC.shape)
        return (weights.beta[:, None, None] * p - target_SBC) / p.shape[1]


@pytest.mark.parametrize("method", [Viewing(), ViewingItsGradient()], ids=lambda method: type(method).__name__)
def test_a_method_of_ones_own_gets_logits_that_lie_as_usual(method: Method) -> None:
    def train(method: Method) -> list[Outcome]:
        modules = [made.made(made.small, seed) for seed in SEEDS]
        learner = StackedLearner(modules, ADAMW, hyper=ALIKE, seeds=SEEDS)
        plan = made.a_plan(epochs=2)
        return made.train(learner, seeds=SEEDS, method=method, weights=WEIGHTS, data=made.examples(75), plan=plan)

    for own, shipped in zip(train(method), train(Hard()), strict=True):
        assert made.apart(own.state, shipped.state) < 1e-9
        assert own.history[-1]["loss"] == pytest.approx(shipped.history[-1]["loss"], rel=1e-9)
