"""Methods that compare the examples of a batch, or with a memory of all: values by hand and the published codes."""

from __future__ import annotations

import math

import pytest
import torch
from made import CLASSES, conv, model
from made_features import big, called, outputs, random, ready, rows
from torch import Tensor
from torch.nn import functional as F

from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.crd import CRD
from kd_cli.learn.methods.pkt import pkt_loss
from kd_cli.learn.methods.relational import angle_loss, distance_loss, few_columns
from kd_cli.learn.methods.similarity import similarity_loss

# ---------------------------------------------------------------- relations of a batch


def test_similarity_is_that_by_hand_and_b_times_the_papers() -> None:
    apart, alike = rows([1, 0], [0, 1]), rows([3, 0], [3, 0])
    assert similarity_loss(apart, alike).item() == pytest.approx(2 - math.sqrt(2))  # rows (1, 0) and (1, 1) / sqrt 2
    student, teacher = random(5, 2, 3, 3), random(5, 4, 2, 2, seed=1)
    g_s, g_t = (F.normalize(x.flatten(1) @ x.flatten(1).T) for x in (student, teacher))
    papers = (g_t - g_s).pow(2).sum() / 5**2
    assert similarity_loss(student, teacher).item() == pytest.approx(float(5 * papers))


def test_distances_are_those_by_hand() -> None:
    student, teacher = rows([0], [1], [3]), rows([0], [1], [2])  # over their means: .5, 1.5, 1 and .75, 1.5, .75
    assert distance_loss(student, teacher).item() == pytest.approx((0.25**2 / 2 + 0 + 0.25**2 / 2) / 3)


@pytest.mark.parametrize("width", [3, 50])
def test_fewer_columns_keep_distances_and_angles(width: int) -> None:
    student, teacher = random(7, 4), random(7, width, seed=1) + 30
    teacher[2] = teacher[5]  # two examples that are one
    few = few_columns(teacher)
    assert few.shape == (7, min(7, width))
    for loss in (distance_loss, angle_loss):
        torch.testing.assert_close(loss(student, few), loss(student, teacher))


def test_angles_are_those_by_hand() -> None:
    right, even = rows([0, 0], [1, 0], [0, 1]), rows([0, 0], [1, 0], [0.5, math.sqrt(3) / 2])
    expected = (0.5**2 / 2 + 2 * (math.sqrt(0.5) - 0.5) ** 2 / 2) / 3  # cosines 0, .7, .7 and .5, .5, .5
    assert angle_loss(right, even).item() == pytest.approx(expected)


def test_angles_in_parts_are_those_at_once() -> None:
    student, teacher = random(7, 3).requires_grad_(), random(7, 2, seed=1)
    found = [angle_loss(student, teacher, at_once=size) for size in (10**6, 100, 1)]
    slopes = [torch.autograd.grad(loss, student, retain_graph=True)[0] for loss in (*found, found[1])]
    assert all(torch.allclose(loss, found[0], rtol=1e-12) for loss in found)
    assert all(torch.allclose(slope, slopes[0], rtol=1e-12) for slope in slopes)


def test_relations_do_not_depend_on_place_scale_or_rotation() -> None:
    x = random(6, 3)
    rotation = torch.linalg.qr(random(3, 3, seed=2))[0]
    moved = 5 * x @ rotation + 2
    assert distance_loss(moved, x) < 1e-25
    assert angle_loss(moved, x) < 1e-25
    assert pkt_loss(5 * x @ rotation, x).abs() < 1e-12
    assert similarity_loss(5 * x @ rotation, x) < 1e-25


def test_relations_are_the_references_but_for_pairs_of_an_example_with_itself() -> None:
    n = 5
    student, teacher = random(n, 3), random(n, 4, seed=1)

    def distances(x: Tensor) -> Tensor:  # RepDistiller's
        found = (x.pow(2).sum(1)[:, None] + x.pow(2).sum(1)[None] - 2 * x @ x.T).clamp(min=1e-12).sqrt()
        found[range(n), range(n)] = 0
        return found / found[found > 0].mean()

    def angles(x: Tensor) -> Tensor:
        unit = F.normalize(x[None] - x[:, None], p=2, dim=2)
        return torch.bmm(unit, unit.transpose(1, 2)).view(-1)

    reference = F.smooth_l1_loss(distances(student), distances(teacher))
    assert distance_loss(student, teacher).item() == pytest.approx(float(reference) * n / (n - 1))
    reference = F.smooth_l1_loss(angles(student), angles(teacher))
    assert angle_loss(student, teacher).item() == pytest.approx(float(reference) * n**2 / ((n - 1) * (n - 2)))


def test_two_examples_have_no_angle_and_a_distance_that_is_always_the_mean() -> None:
    student, teacher = random(2, 3).requires_grad_(), random(2, 3, seed=1)
    for loss in (distance_loss, angle_loss):
        (slope,) = torch.autograd.grad(loss(student, teacher), student)
        assert loss(student, teacher).item() == pytest.approx(0, abs=1e-12)
        assert slope.abs().max() < 1e-12


def test_neighbours_are_those_by_hand_and_b_times_the_references() -> None:
    apart, alike = rows([1, 0], [0, 1]), rows([3, 0], [3, 0])  # neighbours (2/3, 1/3) and (1/2, 1/2)
    assert pkt_loss(apart, alike).item() == pytest.approx(0.5 * math.log(0.75) + 0.5 * math.log(1.5), rel=1e-5)
    assert pkt_loss(random(2, 3), random(2, 3, seed=1), diagonal=False).abs() < 1e-6  # the one neighbour there is
    student, teacher = random(5, 3), random(5, 4, seed=1)

    def probabilities(x: Tensor) -> Tensor:  # RepDistiller's
        x = x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-7)
        found = (x @ x.T + 1) / 2
        return found / found.sum(1, keepdim=True)

    p, q = probabilities(student), probabilities(teacher)
    reference = torch.mean(q * torch.log((q + 1e-7) / (p + 1e-7)))
    assert pkt_loss(student, teacher).item() == pytest.approx(float(5 * reference), rel=1e-5)


# ---------------------------------------------------------------- contrast


def test_crd_contrasts_with_the_memory_as_the_reference_does() -> None:
    student, teacher = model(conv), model(big)
    torch.manual_seed(0)
    method = ready(CRD(dim=5, K=20), student, teacher)
    assert isinstance(method, CRD)
    pair = outputs(method, student, teacher)
    memories = [method.teacher_memory.clone(), method.student_memory.clone()]
    state = torch.get_rng_state()
    found = called(method, *pair)["crd"]
    torch.set_rng_state(state)
    index, n, K = torch.arange(8), 30, 20
    others = method.draw(Batch(index, index, index % CLASSES))
    expected = 0.0
    for side, head, memory in zip(pair, (method.student_head, method.teacher_head), memories, strict=True):
        (maps,) = side.features.values()
        x = F.normalize(head(maps[0].mean((2, 3))), dim=1)
        out = torch.einsum("bd,bkd->bk", x, memory[torch.cat([index[:, None], others], 1)]).div(0.07).exp()
        h = out / (out.mean() * n)  # Z of the first batch
        own, rest = h[:, 0] / (h[:, 0] + K / n), (K / n) / (h[:, 1:] + K / n)
        expected -= (own.log().sum() + rest.log().sum()).item() / 8
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_crd_moves_the_entries_of_the_batch_and_leaves_the_others_and_its_constant() -> None:
    student, teacher = model(conv), model(big)
    method = ready(CRD(dim=5, K=20), student, teacher)
    assert isinstance(method, CRD)
    ours, theirs = outputs(method, student, teacher)
    before = method.student_memory.clone()
    called(method, ours, theirs)["loss"].sum().backward()
    (maps,) = ours.features.values()
    x = F.normalize(method.student_head(maps[0].mean((2, 3))), dim=1)
    moved = F.normalize(0.5 * before[:8] + 0.5 * x, dim=1)
    assert torch.allclose(method.student_memory[:8], moved)
    assert torch.equal(method.student_memory[8:], before[8:])
    constant, memory = method.log_z.clone(), method.student_memory.clone()
    called(method.eval(), ours, theirs)
    assert torch.equal(method.student_memory, memory)  # what is only measured leaves no trace
    called(method.train(), ours, theirs)
    assert torch.equal(method.log_z, constant)
    assert all(p.grad is not None for p in method.parameters())  # the teacher's head learns too


def test_crd_draws_others_of_other_classes_and_never_the_example_itself() -> None:
    method = ready(CRD(dim=5, K=200), model(conv), model(big), examples=12)
    assert isinstance(method, CRD)
    method.labels.copy_(torch.arange(12) % 3)
    index = torch.tensor([0, 4])
    others = method.draw(Batch(index, index, index % 3))
    assert set(others[0].tolist()) == {i for i in range(12) if i % 3 != 0}
    method.labels.fill_(1)
    others = method.draw(Batch(index, index, torch.ones(2, dtype=torch.int64)))  # a class by itself
    assert set(others[1].tolist()) == set(range(12)) - {4}
    unlabelled = CRD(negatives="other_examples")
    assert (CRD().needs_labels, unlabelled.needs_labels) == (True, False)
