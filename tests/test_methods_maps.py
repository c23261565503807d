"""Projected features, attention and hints: values by hand, the published codes, which layers are read."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from made import conv, images, model, small, some_weights
from made_features import big, called, outputs, random, ready, rows
from torch import Tensor, nn
from torch.nn import functional as F

from kd_cli.errors import ConfigError
from kd_cli.learn.methods.attention import Attention, attention_map, mean_of_lengths, mean_of_squares
from kd_cli.learn.methods.feature import Feature, cosine_distance, squared_error, srd_distance
from kd_cli.learn.methods.hints import Hints
from kd_cli.learn.methods.review import Review, hierarchical_loss
from kd_cli.learn.outputs import FeatureHooks, Outputs

# ---------------------------------------------------------------- projected features


def test_the_distances_of_features_are_those_by_hand() -> None:
    student, teacher = rows([[1, 0]], [[0, 2]]), rows([[1, 0]], [[3, 0]])
    assert squared_error(student, teacher) == (0 + 0 + 9 + 4) / 4
    assert cosine_distance(student, teacher) == ((1 - 1) + (1 - 0)) / 2
    assert cosine_distance(torch.zeros(2, 1, 2), teacher) == 1
    # one number of two examples is -1 and 1 when standardised: d = 2 of both, d^4 = 16
    assert srd_distance(rows([[0]], [[2000]]), rows([[2000]], [[0]])).item() == pytest.approx(2 * math.log(16))


def test_srd_has_the_gradient_of_the_references_sum() -> None:
    student, teacher = random(6, 1, 3).requires_grad_(), random(6, 1, 3, seed=1)
    norm = nn.BatchNorm1d(3, affine=False).double()
    reference = 2 * (norm(student[:, 0]) - norm(teacher[:, 0])).abs().pow(4).sum().log()
    slopes = [torch.autograd.grad(loss, student)[0] for loss in (reference, srd_distance(student, teacher))]
    assert torch.allclose(*slopes, rtol=1e-5)


def test_pooled_features_are_means_over_positions_and_maps_are_compared_at_the_smaller_size() -> None:
    student, teacher = random(3, 2, 4, 4), random(3, 2, 2, 2, seed=1)
    pooled = squared_error(*Feature(form="pooled").vectors(student, teacher))
    assert pooled.item() == pytest.approx((student.mean((2, 3)) - teacher.mean((2, 3))).square().mean().item())
    quarter = student.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5))
    compared = squared_error(*Feature(form="map").vectors(student, teacher))
    assert compared.item() == pytest.approx((quarter - teacher).square().mean().item())
    odd = Feature(form="map").vectors(random(3, 2, 7, 5), random(3, 2, 4, 6))
    assert [x.shape for x in odd] == [(3, 20, 2)] * 2
    tokens = random(3, 9, 2)
    assert torch.equal(Feature(form="pooled").vectors(student, tokens)[1][:, 0], tokens.mean(1))


def test_a_projection_is_made_where_widths_differ_or_where_it_is_asked_for() -> None:
    def count(**keys: Any) -> int:
        return sum(p.numel() for p in ready(Feature(**keys), model(conv), model(big)).parameters())

    assert count() == 4 * 7 + 7
    assert count(distance="srd") == 4 * 7
    assert count(teacher_layers="7", student_layers="7", projection="always") == 8 * 9 + 9
    method = Feature(projection="always")
    assert len(list(ready(method, model(conv), model(conv)).parameters())) == 2
    assert not list(ready(Feature(), model(conv), model(conv)).parameters())
    with pytest.raises(ConfigError, match="projection=never, and the student's layer has 4 channels, the teacher's 7"):
        count(projection="never")


# ---------------------------------------------------------------- attention


def test_attention_is_the_strength_of_each_position_over_the_length_of_all() -> None:
    maps = rows([[[1, 2]], [[1, 0]]])  # two channels, two positions: means of squares 1 and 2
    assert torch.allclose(attention_map(maps), rows([1, 2]) / math.sqrt(5))
    assert torch.allclose(attention_map(-7 * maps), rows([1, 2]) / math.sqrt(5))
    assert torch.allclose(attention_map(maps, power=1), rows([1, 1]) / math.sqrt(2))
    student, teacher = rows([[[1, 0]]]), rows([[[0, 3]]])
    assert mean_of_squares(attention_map(student), attention_map(teacher)) == (1 + 1) / 2
    assert mean_of_lengths(attention_map(student), attention_map(teacher)).item() == pytest.approx(math.sqrt(2))


def test_attention_weighs_as_in_the_reference_code_and_says_what_that_is_at_each_size() -> None:
    student, teacher = model(conv), model(big)
    method = ready(Attention(), student, teacher)
    ours, theirs = outputs(method, student, teacher)

    def at(x: Tensor) -> Tensor:  # of the authors' code
        return F.normalize(x.pow(2).mean(1).view(x.size(0), -1))

    pairs = [
        (ours.features[a][0], theirs.features[b][0])
        for a, b in zip(method.student_features, method.teacher_features, strict=True)
    ]
    reference = sum((at(a) - at(b)).pow(2).mean() for a, b in pairs)
    found = called(method, ours, theirs)
    assert found["attention"].item() == pytest.approx(float(reference), rel=1e-6)
    assert found["loss"].item() == pytest.approx(float(1000 * reference + 0.5 * found["hard"]), rel=1e-6)
    assert [note.rpartition(";")[2] for note in method.notes] == [
        " at 6x6 positions the weight 1000 of a mean over them is 27.8 of their sum",
        " at 3x3 positions the weight 1000 of a mean over them is 111 of their sum",
    ]  # the last maps, of 1x1, are left out


def test_attention_refuses_vectors_and_maps_of_one_position() -> None:
    for layers, said in (("8", "compares maps"), ("5", "attention is always 1")):
        with pytest.raises(ConfigError, match=said):
            ready(Attention(layers, layers), model(conv), model(big))
    with pytest.raises(ConfigError, match="finds no pair of maps"):
        ready(Attention(), model(small), model(small))


# ---------------------------------------------------------------- hints


def test_hints_read_the_middle_size_and_add_to_the_labels_in_one_stage() -> None:
    student, teacher = model(conv), model(big)
    method = ready(Hints(), student, teacher)
    assert (list(method.student_features), list(method.teacher_features)) == (["4"], ["4"])
    assert not method.has_T
    found = called(method, *outputs(method, student, teacher))
    assert found["loss"].item() == pytest.approx(100 * found["hint"].item() + 0.5 * found["hard"].item())


def test_hints_in_two_stages_are_the_hint_alone_and_then_soft_targets_that_weigh_4_to_1() -> None:
    student, teacher = model(conv), model(big)
    method = ready(Hints(stages=2, first_stage=0.5), student, teacher)
    assert method.has_T
    pair = outputs(method, student, teacher)
    T, alpha, beta = (float(x) for x in vars(some_weights()).values())
    for progress, factor in ((0.5, 4.0), (0.75, 2.5), (1.0, 1.0)):
        found = called(method, *pair, progress=progress)
        expected = factor * alpha * T**2 * found["soft"] + beta * found["hard"]
        assert found["loss"].item() == pytest.approx(float(expected))
    for progress in (0.0, 0.49):
        found = called(method, *pair, progress=progress)
        assert found["loss"].item() == 100 * found["hint"].item()


def test_the_first_stage_trains_the_layers_up_to_the_hint_and_no_others() -> None:
    student, teacher = model(conv), model(big)
    method = ready(Hints(stages=2), student, teacher)
    kept: dict[str, Tensor] = {}
    student.get_submodule("4").register_forward_hook(lambda _m, _i, output: kept.update(hint=output))
    logits = student(images(8))
    ours = Outputs(logits[None], {"4": kept["hint"][None]})
    called(method, ours, outputs(method, student, teacher)[1])["loss"].sum().backward()
    trained = {name for name, p in student.named_parameters() if p.grad is not None}
    assert trained == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert all(p.grad is not None for p in method.parameters())


def test_an_output_that_is_overwritten_in_place_is_read_as_what_it_became() -> None:
    found = [ready(Feature([layer], ["4"], form="map"), model(conv), model(big)) for layer in ("3", "4")]
    found[1].load_state_dict(found[0].state_dict())  # "3" is the convolution, "4" the ReLU that overwrites its output
    slopes = []
    for method in found:
        student, teacher = model(conv), model(big)
        ours = FeatureHooks(student, method.student_features, role="student")
        logits = student.eval()(images(8))
        pair = Outputs(logits[None], {path: x[None] for path, x in ours.take().items()})
        loss = called(method, pair, outputs(method, student, teacher)[1])["loss"].sum()
        slopes.append(torch.autograd.grad(loss, student.get_submodule("0").weight)[0])
    assert torch.equal(*slopes)
    assert slopes[0].abs().max() > 0


# ---------------------------------------------------------------- review


def test_maps_are_compared_at_their_size_and_pooled_to_smaller_ones() -> None:
    student, teacher = random(2, 3, 4, 4), random(2, 3, 4, 4, seed=1)
    at = {n: F.mse_loss(*(F.adaptive_avg_pool2d(x, n) for x in (student, teacher))) for n in (4, 2, 1)}
    expected = (at[4] + at[2] / 2 + at[1] / 4) / 1.75  # 4 is the map's own size
    assert hierarchical_loss(student, teacher).item() == pytest.approx(expected.item())
    points = random(2, 3, 1, 1), random(2, 3, 1, 1, seed=1)
    assert hierarchical_loss(*points).item() == pytest.approx(F.mse_loss(*points).item())


def test_review_fuses_each_size_with_the_smaller_ones_and_grows_in_its_warm_up() -> None:
    student, teacher = model(conv), model(big)
    method = ready(Review(warmup=0.5), student, teacher)
    assert isinstance(method, Review)
    ours, theirs = outputs(method, student, teacher)
    read = [x.requires_grad_() for x in ours.features.values()]
    for progress, ramp in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.9, 1.0)):
        found = called(method, ours, theirs, progress=progress)
        expected = 5 * ramp * found["review"].item() + 0.5 * found["hard"].item()
        assert found["loss"].item() == pytest.approx(expected)
    largest = next(iter(theirs.features))
    other = Outputs(theirs.logits, {**theirs.features, largest: theirs.features[largest] + 1})
    slopes = [torch.autograd.grad(called(method, ours, t)["review"].sum(), read) for t in (theirs, other)]
    assert all(not torch.allclose(a, b) for a, b in zip(*slopes, strict=True))  # the largest map teaches all sizes


def test_review_takes_maps_from_the_largest_to_the_smallest() -> None:
    with pytest.raises(ConfigError, match="from the largest map to the smallest, and they are 4x3x3, 3x6x6"):
        ready(Review(["4", "1"], ["4", "1"]), model(conv), model(big))
    with pytest.raises(ConfigError, match="compares maps"):
        ready(Review("8", "8"), model(conv), model(big))
    with pytest.raises(ConfigError, match="a batch of one example at a map of one position"):
        ready(Review(), model(conv), model(big), batch=1)
