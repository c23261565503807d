"""The later keys of a training: patience, averaged weights, accumulation, clipping, freezing, rare classes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import made
import pytest
import torch
from conftest import TINY
from process import Ran
from torch import nn
from torch.nn import functional as F

from kd_cli.config.values import TrainSpec
from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch, draw_balanced, shares_of_steps
from kd_cli.learn.engine import Interrupted, Outcome, Plan, ended_early
from kd_cli.learn.learner import ModuleLearner
from kd_cli.learn.methods import DKD, BinaryHard, BinaryTargets, Hard, LabelSmoothing, SoftTargets, Sum, Weights
from kd_cli.learn.methods.probe import try_method
from kd_cli.learn.objective import Objective
from kd_cli.learn.outputs import Outputs
from kd_cli.learn.recipe import AveragedWeights, Recipe, freeze_up_to
from kd_cli.learn.schedules import Cosine
from kd_cli.losses import balanced_label_weights, balanced_weights, binary_cross_entropy, hard_cross_entropy
from kd_cli.runs.parameters import trained_parameters

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
LARGE = partial(torch.optim.SGD, lr=0.5, momentum=0.9)  # steps that soon make validation worse


def learner(build: made.Build = made.small, *, optimizer: made.Optimizer = SGD, **recipe: Any) -> ModuleLearner:
    module = made.model(build)
    path = recipe.get("freeze")
    frozen = [] if path is None else freeze_up_to(module, path)
    parameters = [p for p in module.parameters() if p.requires_grad]
    objective = Objective(Hard(), made.some_weights())
    return ModuleLearner(
        module, optimizer(parameters), seed=0, objective=objective, recipe=Recipe(**recipe), frozen=frozen
    )


def trained(one: ModuleLearner, plan: Plan | None = None, **keys: Any) -> Outcome:
    (outcome,) = made.train(one, method=Hard(), plan=plan or made.a_plan(), **keys)
    return outcome


def resumed(make: Callable[[], ModuleLearner], plan: Plan) -> tuple[Outcome, Outcome]:
    """An uninterrupted training, and one that is stopped after its first epoch and goes on in another learner."""
    whole, kept = trained(make(), plan), made.InMemory()
    with pytest.raises(Interrupted):
        trained(make(), plan, checkpoint=kept, stopping=lambda: True)
    return whole, trained(make(), plan, checkpoint=kept)


@pytest.mark.parametrize("recipe", [{"ema": 0.9}, {"clip": 0.1}, {"freeze": "0"}, {"accumulate": 2}], ids=str)
def test_a_resumed_training_ends_with_the_same_bytes(recipe: dict[str, Any]) -> None:
    plan = replace(made.a_plan(epochs=3), accumulate=recipe.get("accumulate", 1), estimate_batchnorm=True)
    if recipe.get("freeze"):
        recipe = {"freeze": "layers.1"}
    whole, again = resumed(lambda: learner(made.Moody, **recipe), plan)
    assert made.difference(whole.state, again.state) == 0
    assert made.metrics(whole) == made.metrics(again)


# ---------------------------------------------------------------- averaged weights


def test_the_average_of_the_weights_is_that_of_its_formula() -> None:
    module = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    module.weight.data.fill_(1.0)
    average, expected = AveragedWeights(module, 0.5), 1.0
    for t, value in enumerate((2.0, 4.0, -3.0, 5.0), 1):
        module.weight.data.fill_(value)
        average.update()
        d = min(0.5, (1 + t) / (10 + t))
        expected = d * expected + (1 - d) * value
    average.show(True)
    assert module.weight.item() == pytest.approx(expected, rel=1e-12)
    average.show(False)
    assert module.weight.item() == 5.0


def test_the_average_is_tested_and_kept_and_training_goes_on_from_the_weights() -> None:
    plain, averaged = learner(), learner(ema=0.9)
    weights, seen = [], made.model(made.small)
    own = AveragedWeights(seen, 0.9)

    def watched(update: Callable[..., None]) -> Callable[..., None]:
        def step(rate: Any) -> None:
            update(rate)
            weights.append([p.detach().clone() for p in plain.module.parameters()])

        return step

    plain.update = watched(plain.update)  # type: ignore[method-assign]
    first, second = trained(plain), trained(averaged)
    for step in weights:
        for p, value in zip(seen.parameters(), step, strict=True):
            p.data.copy_(value)
        own.update()
    own.show(True)
    assert [row["loss"] for row in first.history] == [row["loss"] for row in second.history]
    assert made.difference(second.state, seen.state_dict()) < 1e-12
    assert made.difference(first.state, second.state) > 1e-3
    val = made.examples(30, "val")
    right = (seen(val.first(30)).argmax(1) == val.labels).double().mean()
    assert second.history[-1]["val_accuracy"] == pytest.approx(float(right))


# ---------------------------------------------------------------- several batches per step, clipping


def test_accumulated_batches_make_the_steps_of_large_ones() -> None:
    schedule = Cosine(warmup=0.2)
    large = trained(learner(), made.a_plan(batch_size=32, schedule=schedule))
    small = trained(learner(accumulate=4), replace(made.a_plan(batch_size=8, schedule=schedule), accumulate=4))
    assert made.difference(large.state, small.state) < 1e-12
    assert [row["loss"] for row in small.history] == pytest.approx([row["loss"] for row in large.history])


def test_the_last_step_of_an_epoch_takes_the_batches_that_are_left() -> None:
    assert shares_of_steps([4, 4, 4, 2], 3) == [(1 / 3, False), (1 / 3, False), (1 / 3, True), (1.0, True)]
    assert shares_of_steps([3, 1], 2) == [(0.75, False), (0.25, True)]


def test_a_step_is_no_longer_than_the_clipped_gradient_makes_it() -> None:
    one, two = (learner(optimizer=partial(torch.optim.SGD, lr=1.0), clip=most) for most in (0.01, 0.0))
    before = {name: t.clone() for name, t in one.module.state_dict().items()}
    plan = made.a_plan(epochs=1, batch_size=75)
    steps = [
        torch.cat([(outcome.state[name] - before[name]).flatten() for name in before])
        for outcome in (trained(one, plan), trained(two, plan))
    ]
    assert float(steps[0].norm()) == pytest.approx(0.01, rel=1e-4)
    torch.testing.assert_close(steps[0], 0.01 * steps[1] / steps[1].norm(), rtol=1e-4, atol=1e-8)


# ---------------------------------------------------------------- freezing


def test_frozen_parts_keep_weights_and_statistics_and_the_rest_learns() -> None:
    one = learner(made.Moody, freeze="layers.1", optimizer=partial(torch.optim.AdamW, lr=0.05, weight_decay=0.5))
    one.module.layers[1].running_mean.fill_(0.3)
    before = {name: t.clone() for name, t in one.module.state_dict().items()}
    outcome = trained(one, replace(made.a_plan(), estimate_batchnorm=True))
    changed = {name for name, t in outcome.state.items() if not torch.equal(t, before[name])}
    assert changed == {"layers.5.weight", "layers.5.bias"}


def test_everything_registered_up_to_the_path_is_frozen() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.zeros(2))
            self.stem = nn.Linear(2, 2)
            self.stages = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Dropout()), nn.Linear(2, 2))
            self.head = nn.Linear(2, 2)

    net = Net()
    frozen = freeze_up_to(net, "stages.1")
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {
        *("stages.2.weight", "stages.2.bias", "head.weight", "head.bias")
    }
    assert net.stages not in frozen
    assert net.stages[1][1] in frozen
    with pytest.raises(ConfigError, match="no module 'stage' to freeze up to"):
        freeze_up_to(Net(), "stage")
    with pytest.raises(ConfigError, match="nothing to train"):
        freeze_up_to(Net(), "head")


# ---------------------------------------------------------------- learning rates by module


def spec_of(**recipe: Any) -> TrainSpec:
    optimizer = {"_target_": "torch.optim.SGD", "lr": 0.4}
    return TrainSpec("net", {"_target_": "x"}, 1, 8, {}, optimizer, {}, 0, "float32", recipe=recipe)


def test_a_modules_factor_multiplies_its_learning_rate() -> None:
    module = made.model(made.Moody).eval()
    groups = trained_parameters(module, Hard(), spec_of(lr_factors={"layers": 0.5, "layers.5": 2.0}))
    assert [(len(group["params"]), group["lr"]) for group in groups] == [(4, 0.2), (2, 0.8)]
    assert groups[1]["params"][0] is module.layers[5].weight
    before = copy.deepcopy(module.state_dict())
    images, labels = made.pictures(8)
    optimizer = torch.optim.SGD(groups, lr=0.4)
    F.cross_entropy(module(images), labels).backward()
    optimizer.step()
    for name, p in module.named_parameters():
        rate = 0.8 if name.startswith("layers.5") else 0.2
        torch.testing.assert_close(p.detach(), before[name] - rate * p.grad)


def test_the_others_keep_the_optimisers_own_rate() -> None:
    module = made.model(made.Own)
    rest, first = trained_parameters(module, Hard(), spec_of(lr_factors={"first": 0.1}))
    assert "lr" not in rest
    assert len(rest["params"]) == 4
    assert first["lr"] == pytest.approx(0.04)
    flat = trained_parameters(module, Hard(), spec_of())
    assert [id(p) for p in flat] == [id(p) for p in module.parameters()]
    freeze_up_to(module, "first")
    assert len(trained_parameters(module, Hard(), spec_of(freeze="first"))) == 4
    with pytest.raises(ConfigError, match="lr_factors names 'firts'") as refused:
        trained_parameters(made.model(made.Own), Hard(), spec_of(lr_factors={"firts": 0.1}))
    assert refused.value.hint == "did you mean first?"


# ---------------------------------------------------------------- patience


def test_training_ends_when_validation_has_not_improved_for_the_patience() -> None:
    plan = replace(made.a_plan(epochs=60), patience=3, keep_best=True, loss_balance=True)
    one = trained(learner(optimizer=LARGE), plan)
    ranks = [(-row["val_accuracy"], row["val_nll"]) for row in one.history]
    assert len(ranks) < 60
    assert ranks.index(min(ranks)) == len(ranks) - 4
    assert one.epoch == len(ranks) - 3
    whole = trained(learner(optimizer=LARGE), replace(plan, patience=0))
    assert made.metrics(one) == made.metrics(whole)[: len(ranks)]


def test_a_training_that_is_resumed_after_its_last_epoch_ends_at_once() -> None:
    plan, kept = replace(made.a_plan(epochs=60), patience=3), made.InMemory()
    whole = trained(learner(optimizer=LARGE), plan)
    last = len(whole.history)

    class Counted:
        epochs = 0

        def __call__(self) -> bool:
            self.epochs += 1
            return self.epochs == last

    with pytest.raises(Interrupted):
        trained(learner(optimizer=LARGE), plan, checkpoint=kept, stopping=Counted())
    again = trained(learner(optimizer=LARGE), plan, checkpoint=kept)
    assert made.metrics(again) == made.metrics(whole)
    assert made.difference(again.state, whole.state) == 0


def test_several_models_are_not_ended_by_one_of_them() -> None:
    rows = [{"val_accuracy": 0.5, "val_nll": 1.0}] * 9
    plan = replace(made.a_plan(), patience=2)
    assert ended_early([Outcome({}, rows)], plan)
    assert not ended_early([Outcome({}, rows)] * 2, plan)
    assert not ended_early([Outcome({}, rows[:2])], plan)


# ---------------------------------------------------------------- rare classes


def test_balanced_sampling_draws_every_class_as_often() -> None:
    labels = torch.tensor([0] * 9000 + [2] * 900 + [5] * 100)
    (order,) = draw_balanced(labels, [0], "student", 1)
    shares = labels[order].bincount() / len(labels)
    torch.testing.assert_close(shares[[0, 2, 5]], torch.full((3,), 1 / 3), atol=0.02, rtol=0)
    assert len(order[labels[order] == 2].unique()) > 850  # of 900, each is drawn 3.7 times on average
    assert torch.equal(order, draw_balanced(labels, [0, 0], "student", 1)[0])
    assert not torch.equal(order, draw_balanced(labels, [0], "student", 2)[0])


def test_class_weights_multiply_each_examples_loss() -> None:
    own = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 8, 3, generator=own), torch.randint(3, (2, 8), generator=own)
    weights = torch.tensor([0.5, 2.0, 1.0])
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(2, 8)
    expected = (weights[labels] * each).mean(1)
    torch.testing.assert_close(hard_cross_entropy(logits, labels, weights), expected)
    torch.testing.assert_close(hard_cross_entropy(logits, labels, torch.ones(3)), hard_cross_entropy(logits, labels))
    labels = torch.tensor([0, 0, 0, 2])
    assert balanced_weights(labels, 3).tolist() == pytest.approx([4 / 6, 0, 2])
    assert float(balanced_weights(labels, 3)[labels].mean()) == pytest.approx(1)


def test_weights_of_independent_labels_are_those_of_two_classes_each() -> None:
    own = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(2, 8, 3, generator=own), torch.randint(2, (2, 8, 3), generator=own)
    weights = torch.tensor([[0.5, 2.0, 1.0], [3.0, 0.25, 1.0]])
    each = F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="none")
    chosen = torch.where(labels.bool(), weights[1], weights[0])
    torch.testing.assert_close(binary_cross_entropy(logits, labels, weights), (chosen * each).sum(-1).mean(-1))
    same = binary_cross_entropy(logits, labels, torch.ones(2, 3))
    torch.testing.assert_close(same, binary_cross_entropy(logits, labels))
    labels = torch.tensor([[1, 0], [0, 0], [0, 0], [0, 0]])  # of the second label there is one kind only
    assert balanced_label_weights(labels).tolist() == [[pytest.approx(4 / 6), 1], [2, 0]]


@pytest.mark.parametrize("method", [BinaryTargets(), BinaryHard()], ids=lambda method: type(method).__name__)
def test_methods_of_independent_labels_weigh_them(method: Any) -> None:
    student, teacher, batch, weights = batch_of()
    labels = torch.nn.functional.one_hot(batch.labels, made.CLASSES)
    batch = Batch(batch.index, batch.images, labels)
    plain = method(student, teacher, batch, weights)
    own = torch.linspace(0.5, 2, 2 * made.CLASSES, dtype=torch.float64).view(2, -1)
    weighted = copy.deepcopy(method)
    weighted.weigh_classes(own)
    found = weighted(student, teacher, batch, weights)
    torch.testing.assert_close(found["hard"], binary_cross_entropy(student.logits, labels, own))
    torch.testing.assert_close(found["loss"] - plain["loss"], weights.beta * (found["hard"] - plain["hard"]))


@pytest.mark.slow
def test_a_run_weighs_a_rare_label(kd_run: Callable[..., Ran]) -> None:
    keys = ["method=binary", "dataset.positive=3", "training.class_weights=balanced"]
    ran = kd_run(*TINY, *keys, "teacher_training.class_weights=balanced")
    assert ran.code == 0, ran.err


def batch_of() -> tuple[Outputs, Outputs, Batch, Weights]:
    """Outputs of a student and a teacher for eight examples, their batch, and weights."""
    own = torch.Generator().manual_seed(1)
    student, teacher = (Outputs(torch.randn(1, 8, made.CLASSES, generator=own, dtype=torch.float64)) for _ in "ab")
    labels = torch.randint(made.CLASSES, (1, 8), generator=own)
    index = torch.arange(8)[None]
    return student, teacher, Batch(index, index, labels), made.some_weights()


@pytest.mark.parametrize(
    "method",
    [SoftTargets(), DKD(), Sum(kd=SoftTargets()), LabelSmoothing()],
    ids=lambda method: type(method).__name__,
)
def test_methods_weigh_the_labels_loss_by_class(method: Any) -> None:
    student, teacher, batch, weights = batch_of()
    plain = method(student, teacher, batch, weights)
    classes = torch.tensor([0.5, 2.0, 1.0, 0.0], dtype=torch.float64)
    weighted = copy.deepcopy(method)
    weighted.weigh_classes(classes)
    found = weighted(student, teacher, batch, weights)
    own = hard_cross_entropy(student.logits, batch.labels, classes)
    torch.testing.assert_close(found["hard"], own)
    share = 0.9 if isinstance(method, LabelSmoothing) else 1.0
    torch.testing.assert_close(found["loss"] - plain["loss"], 0.5 * share * (own - plain["hard"]))


def test_a_method_that_takes_no_class_weights_is_refused() -> None:
    class Own(SoftTargets):
        def forward(self, student: Outputs, teacher: Outputs | None, batch: Any, weights: Any) -> Any:
            return {"loss": F.cross_entropy(student.logits[0], batch.labels[0])[None]}

    method = Own()
    setting = made.a_setting(method, made.model(made.small), made.model(made.small))
    try_method(method, setting, size=1)
    method.weigh_classes(torch.linspace(0.5, 2.0, made.CLASSES))
    with pytest.raises(ConfigError, match="Own does not weigh its loss by class"):
        try_method(method, setting, size=1)


def test_a_run_takes_all_of_the_keys_and_says_what_they_did(kd_run: Callable[..., Ran]) -> None:
    keys = ["training.epochs=40", "training.patience=1", "training.ema=0.5", "training.accumulate=2"]
    keys += ["training.clip=0.5", "training.freeze=1", "training.class_weights=balanced", "training.keep=best"]
    keys += ["teacher_training.sampling=balanced", "training.lr_factors={3: 0.5}"]
    ran = kd_run(*[word for word in TINY if "training.epochs" not in word], "teacher_training.epochs=1", *keys)
    assert ran.code == 0, ran.err
    notes = " ".join(ran.summary["notes"])
    assert "training.freeze=1: 90 of the 610 weights of tinymlp are trained" in notes
    n = ran.summary["student"]["epochs"]
    assert n < 40
    assert f"by soft_targets ended after {n} of 40 epochs: 1 without a better validation accuracy" in notes
    for arguments, said in (
        (["training.freeze=first"], "training.freeze: student tinymlp: there is no module 'first' to freeze up to"),
        (
            ["training.lr_factors={first: 0}"],
            "training.lr_factors is {'first': 0}; it must give modules numbers above 0",
        ),
        (["training.lr_factors={first: 0.1}"], "training.lr_factors: student tinymlp: lr_factors names 'first'"),
        (["training.patience=1", "dataset.val_fraction=0"], "training.patience chooses on validation data"),
        (["training.patience=1", "peers=2", "method=mutual"], "peers take every step together, and training.patience"),
        (["training.sampling=balanced", "transfer.labels=false"], "needs the labels of the transfer set"),
        (["training.sampling=balanced", "method=binary", "dataset.positive=3"], "is for data with classes"),
    ):
        refused = kd_run(*TINY, *arguments)
        assert refused.code == 1
        assert said in refused.err
