"""What all methods that compare features have in common: gradients, degenerate features, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from made import CLASSES, conv, images, learner_of, model, small, some_weights
from made_features import METHODS, big, called, outputs, random, ready, setting
from torch import Tensor, nn

from kd_cli.errors import ConfigError
from kd_cli.learn.methods import Method, SoftTargets, Sum
from kd_cli.learn.methods.attention import Attention, attention_map, mean_of_lengths, mean_of_squares
from kd_cli.learn.methods.crd import CRD
from kd_cli.learn.methods.feature import Feature, cosine_distance, squared_error, srd_distance
from kd_cli.learn.methods.hints import Hints, hint_loss
from kd_cli.learn.methods.pkt import pkt_loss
from kd_cli.learn.methods.probe import try_method
from kd_cli.learn.methods.relational import Relational, angle_loss, distance_loss
from kd_cli.learn.methods.review import Review, hierarchical_loss
from kd_cli.learn.methods.similarity import Similarity, similarity_loss
from kd_cli.learn.outputs import Outputs
from kd_cli.learn.stacked.learner import why_method_not

# ---------------------------------------------------------------- all methods


@pytest.mark.parametrize("name", METHODS)
def test_the_probe_passes_and_notes_say_which_layers_are_paired(name: str) -> None:
    student, teacher = model(conv), model(big)
    method = ready(METHODS[name](), student, teacher)
    try_method(method, setting(method, student, teacher), size=1)
    assert len(method.notes) == len(method.student_features) > 0
    for note, ours, theirs in zip(method.notes, method.student_features, method.teacher_features, strict=True):
        assert f"the student's {ours} (" in note
        assert f"the teacher's {theirs} (" in note


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_of_half_precision_and_of_size_1e4_give_finite_gradients(name: str, dtype: torch.dtype) -> None:
    student, teacher = model(conv), model(big)
    method = ready(METHODS[name](), student, teacher).float()
    for scale in (1e4, 1.0, 0.0):
        sides = []
        for side in outputs(method, student, teacher):
            features = {path: (scale * random(*x.shape)).to(dtype) for path, x in side.features.items()}
            sides.append(Outputs(side.logits.to(dtype), features))
        read = [x.requires_grad_() for x in sides[0].features.values()]
        loss = called(method, *sides)["loss"]
        assert loss.isfinite().all()
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum(), read))


FAULTS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "the same for all examples": lambda x: x[:, :1].expand_as(x).clone(),
    "one example of zeros": lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, 1:]], 1),
    "two equal examples": lambda x: torch.cat([x[:, :1], x[:, :1], x[:, 2:]], 1),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_degenerate_features_give_finite_gradients(name: str, side: str) -> None:
    student, teacher = model(conv), model(big)
    for fault in FAULTS.values():
        method = ready(METHODS[name](), student, teacher)
        ours, theirs = outputs(method, student, teacher)
        if side in ("student", "both"):
            ours = Outputs(ours.logits, {path: fault(x) for path, x in ours.features.items()})
        if side in ("teacher", "both"):
            theirs = Outputs(theirs.logits, {path: fault(x) for path, x in theirs.features.items()})
        read = [x.requires_grad_() for x in ours.features.values()]
        loss = called(method, ours, theirs)["loss"]
        found = torch.autograd.grad(loss.sum(), [*read, *method.parameters()])
        assert loss.isfinite().all()
        assert all(g.isfinite().all() and float(g.abs().max()) < 1e7 for g in found)


@pytest.mark.parametrize("name", ["feature", "feature srd", "hints", "similarity", "relational", "pkt", "crd"])
def test_vectors_of_fully_connected_networks_are_compared_too(name: str) -> None:
    student, teacher = model(small), model(big)
    given = {"student_layers": "4", "teacher_layers": "7"}  # the hidden layers behind ReLU
    method = ready(type(METHODS[name]())(**given), student, teacher)
    found = called(method, *outputs(method, student, teacher))
    assert found["loss"].isfinite().all()
    who = type(method).__name__
    assert method.notes == [
        f"{who}: the student's 4 (10) learns from the teacher's 7 (9)",
        f"{who} reads the teacher's 7 as the layer behind it leaves it, which works in place",  # a linear layer
    ]


@pytest.mark.parametrize("name", ["similarity", "relational", "pkt", "feature srd"])
def test_a_batch_of_one_is_refused_where_examples_are_compared(name: str) -> None:
    method = METHODS[name]()
    assert method.couples_examples
    with pytest.raises(ConfigError, match="needs batches of 2 examples or more, and the smallest has 1"):
        ready(method, model(conv), model(big), batch=1)


@pytest.mark.parametrize("name", ["feature", "feature cosine", "attention", "attention paper", "hints"])
def test_the_mean_over_examples_makes_a_batch_of_one_and_a_repeated_batch_weigh_the_same(name: str) -> None:
    student, teacher = model(conv), model(big)
    method = ready(METHODS[name](), student, teacher, batch=1)
    one = outputs(method, student, teacher, 1)
    many = [
        Outputs(x.logits.repeat(1, 5, 1), {k: f.repeat_interleave(5, 1) for k, f in x.features.items()}) for x in one
    ]
    term = next(term for term in called(method, *one) if term not in ("loss", "hard", "soft"))
    assert called(method, *one)[term].item() == pytest.approx(called(method, *many)[term].item(), rel=1e-9)


@pytest.mark.parametrize("loss", [similarity_loss, pkt_loss])
def test_relations_of_a_batch_shown_twice_weigh_the_same(loss: Callable[..., Tensor]) -> None:
    a, b = random(6, 5), random(6, 7, seed=1)
    assert loss(torch.cat([a, a]), torch.cat([b, b])).item() == pytest.approx(loss(a, b).item(), rel=1e-5)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "mse": squared_error,
    "cosine": cosine_distance,
    "srd": srd_distance,
    "attention, code": lambda s, t: mean_of_squares(attention_map(s), attention_map(t)),
    "attention, paper": lambda s, t: mean_of_lengths(attention_map(s), attention_map(t)),
    "hint": hint_loss,
    "review": hierarchical_loss,
    "similarity": similarity_loss,
    "distance": distance_loss,
    "angle": angle_loss,
    "pkt": pkt_loss,
    "pkt without diagonal": lambda s, t: pkt_loss(s, t, diagonal=False),
}
OF_MAPS = ("attention, code", "attention, paper", "review")
OF_POSITIONS = ("mse", "cosine", "srd")


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_differences_and_the_loss_is_least_where_both_agree(name: str) -> None:
    shape = (4, 3, 2, 2) if name in OF_MAPS else (4, 2, 3) if name in OF_POSITIONS else (4, 3)
    student, teacher = random(*shape).requires_grad_(), random(*shape, seed=1)
    assert torch.autograd.gradcheck(lambda x: LOSSES[name](x, teacher), student)
    agreed = LOSSES[name](teacher, teacher)
    assert agreed.item() == pytest.approx(2 * math.log(1e-6) if name == "srd" else 0, abs=1e-12)
    assert agreed < LOSSES[name](student, teacher)
    same = teacher.clone().requires_grad_()
    (slope,) = torch.autograd.grad(LOSSES[name](same, teacher), same)
    assert slope.abs().max() < (1e-6 if "pkt" in name else 1e-12)  # pkt adds 1e-7 to probabilities in logarithms


# ---------------------------------------------------------------- what is refused


REFUSED: dict[str, tuple[Callable[[], Method], str]] = {
    "as many layers": (lambda: Feature(["1"], ["1", "4"]), "there are 1 of the student and 2 of the teacher"),
    "a distance": (lambda: Feature(distance="l1"), "method.distance is 'l1'; it must be mse or cosine or srd"),
    "a weight": (lambda: Feature(weight=-1), "method.weight is -1; it must be a number above 0"),
    "no weight": (lambda: Similarity(weight=0), "method.weight is 0"),
    "no relation": (lambda: Relational(distance=0, angle=0), "both 0"),
    "a power": (lambda: Attention(power=0.5), "method.power is 0.5; it must be at least 1"),
    "three stages": (lambda: Hints(stages=3), "method.stages is 3; it must be 1 or 2"),
    "a share": (lambda: Hints(first_stage=1), "method.first_stage is 1"),
    "layers": (lambda: Feature(student_layers=[]), "layers are \\[\\]; they must be auto, a module path or a list"),
    "a warm-up": (lambda: Review(warmup=2), "method.warmup is 2"),
    "others": (lambda: CRD(K=0), "method.K is 0; it must be a whole number of at least 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_value_that_cannot_be_meant_is_refused_when_the_method_is_built(name: str) -> None:
    build, said = REFUSED[name]
    with pytest.raises(ConfigError, match=said):
        build()


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (lambda: Feature("4", "8", form="map"), "compares positions, and the student's are 4x3x3, the teacher's 9"),
        (lambda: Hints("4", "8"), "two maps or two vectors, and the student's layer gives 4x3x3, the teacher's 9"),
        (lambda: Hints("8", "8", regressor="conv_bn_relu"), "compares maps"),
        (lambda: CRD(["1", "4"], ["1", "4"]), "compares one pair of layers, and there are 2"),
    ],
)
def test_layers_that_cannot_be_compared_are_refused_at_setup(method: Callable[[], Method], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ready(method(), model(conv), model(big))


def test_one_sides_layers_may_be_named_and_the_others_found() -> None:
    method = Attention(student_layers=["4"])
    method.choose_layers(model(conv), model(big), images(2))
    assert (list(method.student_features), list(method.teacher_features)) == (["4"], ["5"])
    method = Attention(student_layers=[0, 1, 3, 4])
    with pytest.raises(ConfigError, match="there are 4 of the student and 3 of the teacher"):
        method.choose_layers(model(conv), model(big), images(2))


def test_a_network_in_which_nothing_is_found_is_named() -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(36, CLASSES)).double()
    with pytest.raises(ConfigError, match="finds no layer of the student to read") as caught:
        Feature().choose_layers(linear, model(big), images(2))
    assert caught.value.hint == "method.student_layers=PATH; the student has 0, 1"


# ---------------------------------------------------------------- in sums


def test_a_sum_finds_the_layers_of_its_methods_and_says_which() -> None:
    student, teacher = model(conv), model(big)
    parts = {"attend": Attention(), "relate": Relational(), "soft": SoftTargets(), "match": Feature()}
    both = ready(Sum({"attend": 0.01}, **parts), student, teacher)
    assert why_method_not(Sum(a=Attention())) == "Sum reads features"
    assert (list(both.student_features), list(both.teacher_features)) == (["1", "4", "5"], ["1", "4", "5"])
    assert [note.partition(":")[0] for note in both.notes] == ["Attention"] * 2 + ["Relational", "Feature"]
    assert len(list(both.parameters())) == 2  # the projection's
    try_method(both, setting(both, student, teacher), size=1)
    found = called(both, *outputs(both, student, teacher))
    T, alpha, beta = (x.item() for x in vars(some_weights()).values())
    terms = {name: term.item() for name, term in found.items()}
    of_features = 0.01 * 1000 * terms["attend_attention"] + terms["match_feature"]
    relations = 25 * terms["relate_distance"] + 50 * terms["relate_angle"]
    expected = alpha * (of_features + relations + T**2 * terms["soft_soft"]) + beta * terms["hard"]
    assert terms["loss"] == pytest.approx(expected)


def test_a_learner_keeps_no_features_when_it_only_predicts() -> None:
    module, teacher = model(conv), model(big)
    method = ready(Feature(), module, teacher)
    learner = learner_of(module, method=method)
    kept: list[dict[str, Any]] = []
    module.register_forward_hook(lambda *_: kept.append(dict(learner.features.kept)))
    learner.logits(images(8))
    assert list(learner.outputs(images(8)[None]).features) == ["5"]
    assert [list(features) for features in kept] == [[], ["5"]]
