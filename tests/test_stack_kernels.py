"""The stack's own ways of computing the same: closed forms, buffers, one pass of the optimiser over all weights."""

from __future__ import annotations

import collections
import gc
import math
import weakref
from collections.abc import Sequence
from functools import partial
from typing import Any

import made
import pytest
import torch
from stacks import ADAMW, ALIKE, FUSED, SEEDS, SGD, UNLIKE, WEIGHTS, Hyper, both_ways, teacher
from torch import Tensor, nn
from torch.nn import functional as F

from kd_cli.learn.batches import Batch
from kd_cli.learn.engine import Outcome
from kd_cli.learn.learner import Autocast
from kd_cli.learn.methods import Hard, Method, Terms, Weights
from kd_cli.learn.outputs import Outputs
from kd_cli.learn.randomness import generator
from kd_cli.learn.stacked.learner import StackedLearner
from kd_cli.learn.stacked.structure import is_dense, is_trained_dense

# ---------------------------------------------------------------- fully connected networks in closed form


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [64, 63, 1])
@pytest.mark.parametrize("size", [1, 3])
def test_logits_and_gradients_of_a_dense_network_are_those_of_autograd(bias: bool, batch: int, size: int) -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            nn.Flatten(), nn.Linear(36, 520, bias), nn.ReLU(), nn.Linear(520, 520, bias), nn.ReLU(), nn.Linear(520, 4)
        )

    modules = [made.model(build, seed, torch.float32) for seed in range(size)]
    images = made.images(batch, dtype=torch.float32)
    stack = StackedLearner(modules, SGD, hyper=[{}] * size, seeds=range(size))
    with torch.enable_grad():
        logits = stack.network.logits(images[None])
    slope = torch.randn(logits.shape, generator=generator(0, "slope")) / batch
    stack.network.backward(slope.clone())
    for s, module in enumerate(modules):
        expected = module(images)
        assert (logits[s] - expected).abs().max() < 1e-5
        found = torch.autograd.grad(expected, list(module.parameters()), slope[s])
        for gradient, by_autograd in zip(stack.flat.gradients.values(), found, strict=True):
            assert gradient[s].any()
            assert (gradient[s] - by_autograd).abs().max() < 1e-6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_show_in_the_logits(value: float) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 520), nn.ReLU(), nn.Linear(520, 520), nn.ReLU())
    with torch.no_grad():
        module[3].weight[7, 3] = value
        module[3].weight[8] = -module[3].weight[7]
    images = made.images(64, dtype=torch.float32)
    found = StackedLearner([module], SGD, hyper=[{}], seeds=[0]).logits(images)[0]
    expected = module(images)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf())
    assert not expected.isfinite().all()


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.1}, {"maximize": True}, {"amsgrad": True}, {"betas": (0.5, 0.9)}], ids=str
)
@pytest.mark.parametrize("hyper", [ALIKE, UNLIKE], ids=["alike", "unlike"])
def test_the_bare_step_is_the_optimisers_step(kind: made.Optimizer, options: dict[str, Any], hyper: Hyper) -> None:
    def trained(*, bare: bool) -> list[Outcome]:
        modules = [made.model(made.small, seed) for seed in SEEDS]
        stack = StackedLearner(modules, partial(kind, lr=0.01, fused=True, **options), hyper=hyper, seeds=SEEDS)
        if not bare:
            stack.optimizer_step = stack.optimizer.step
        return made.train(stack, seeds=SEEDS, weights=WEIGHTS, teacher=teacher(live=False))

    for one, other in zip(trained(bare=True), trained(bare=False), strict=True):
        assert made.difference(one.state, other.state) == 0
        assert made.metrics(one) == made.metrics(other)


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

    modules = [made.model(again, seed) for seed in seeds]
    stack = StackedLearner(modules, SGD, hyper=[{}] * len(seeds), seeds=seeds)
    images = made.images(20)
    for module, logits in zip(modules, stack.logits(images), strict=True):
        assert (logits - module(images)).abs().max() < 1e-12


def named() -> nn.Module:
    layers = [nn.Flatten(), nn.Linear(36, 16, bias=False), nn.ReLU(), nn.Linear(16, made.CLASSES)]
    return nn.Sequential(collections.OrderedDict(zip(("flat", "one", "bend", "two"), layers, strict=True)))


@pytest.mark.parametrize("seeds", [(4,), (0, 1, 1), (3, 3, 3)], ids=str)
def test_layers_may_have_names_and_no_bias(seeds: Sequence[int]) -> None:
    weights = made.some_weights(T=[1, 2, 8][: len(seeds)], alpha=[1] * len(seeds), beta=[0.5] * len(seeds))
    together, alone = both_ways(named, FUSED, seeds=seeds, hyper=[{}] * len(seeds), weights=weights)
    for one, other in zip(together, alone, strict=True):
        assert made.difference(one.state, other.state) < 1e-9


def test_a_learner_that_is_dropped_is_freed_at_once() -> None:
    learner = StackedLearner([made.model(made.big)], SGD, hyper=[{}], seeds=[0])
    made.train(learner, method=Hard())
    references = weakref.ref(learner), weakref.ref(learner.network)
    gc.disable()
    try:
        del learner
        assert [reference() for reference in references] == [None, None]
    finally:
        gc.enable()


class Keeping(Hard):
    """A user's method that keeps the logits of earlier batches."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Tensor] = []

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        self.kept += [student.logits.detach(), student.logits.detach().clone()]
        return super().forward(student, teacher, batch, weights)


def test_a_method_may_keep_the_logits() -> None:
    method = Keeping()
    made.train(StackedLearner([made.model(made.small)], SGD, hyper=[{}], seeds=[0]), method=method)
    assert len(method.kept) == 20
    for kept, copied in zip(method.kept[::2], method.kept[1::2], strict=True):
        assert torch.equal(kept, copied)


def test_in_bfloat16_the_closed_form_does_what_autocast_does() -> None:
    autocast, plan = Autocast(torch.device("cpu"), "bfloat16"), made.a_plan(epochs=2)
    data = made.examples(75, dtype=torch.float32)
    weights = made.some_weights(dtype=torch.float32)
    module = made.model(made.wide, 0, torch.float32)
    closed = StackedLearner([module], FUSED, hyper=[{}], seeds=[0], autocast=autocast)
    solo = made.learner_of(module, FUSED, autocast=autocast)
    full = StackedLearner([made.model(made.wide, 0, torch.float32)], FUSED, hyper=[{}], seeds=[0])
    one, other, single = (
        made.train(learner, method=Hard(), weights=weights, data=data, plan=plan)[0] for learner in (closed, solo, full)
    )
    assert one.history[-1]["loss"] == pytest.approx(other.history[-1]["loss"], rel=2e-2)
    assert one.history[-1]["loss"] == pytest.approx(single.history[-1]["loss"], rel=5e-2)
    assert one.history[-1]["loss"] != single.history[-1]["loss"]


class Stubborn(Hard):
    """A user's method: a subclass of one that has a closed form, with another loss."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        terms = super().forward(student, teacher, batch, weights)
        return {**terms, "loss": terms["loss"] + student.logits.square().sum((-2, -1))}


def test_a_loss_of_the_users_own_is_what_is_minimised() -> None:
    outcomes = [
        made.train(StackedLearner([made.model(made.small)], SGD, hyper=[{}], seeds=[0]), method=method)[0]
        for method in (Hard(), Stubborn())
    ]
    assert made.difference(outcomes[0].state, outcomes[1].state) > 1e-3
    assert outcomes[1].history[-1]["loss"] > 0.6 * outcomes[1].history[-1]["hard_loss"]
    alone = made.train(made.solo(optimizer=SGD), method=Stubborn())[0]
    assert made.difference(outcomes[1].state, alone.state) < 1e-9


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
    assert not is_trained_dense(module)
    assert is_trained_dense(made.big())
    assert is_dense(frozen())


class Viewing(Method):
    """A method that needs the usual memory layout of logits."""

    needs_teacher = False

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        flat = student.logits.view(-1, student.logits.shape[-1])
        hard = F.cross_entropy(flat, batch.labels.reshape(-1), reduction="none").view(len(student.logits), -1).mean(1)
        return {"loss": weights.beta * hard, "hard": hard}


def test_a_method_of_the_users_own_gets_logits_in_the_usual_memory_layout() -> None:
    def train(method: Method) -> list[Outcome]:
        modules = [made.model(made.small, seed) for seed in SEEDS]
        learner = StackedLearner(modules, ADAMW, hyper=ALIKE, seeds=SEEDS)
        plan = made.a_plan(epochs=2)
        return made.train(learner, seeds=SEEDS, method=method, weights=WEIGHTS, data=made.examples(75), plan=plan)

    for own, shipped in zip(train(Viewing()), train(Hard()), strict=True):
        assert made.difference(own.state, shipped.state) < 1e-9
        assert own.history[-1]["loss"] == pytest.approx(shipped.history[-1]["loss"], rel=1e-9)
