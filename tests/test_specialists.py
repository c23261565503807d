"""Specialists: the joint prediction against a slow solver and closed forms, their samples, their start, the command."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from process import Ran
from torch import Tensor

from kd_cli.learn.batches import Batch, Examples
from kd_cli.learn.engine import Plan
from kd_cli.learn.joint_prediction import by_rounds, geometric_prediction, joint_prediction
from kd_cli.learn.methods import Hard, Weights
from kd_cli.learn.objective import Objective
from kd_cli.learn.outputs import Outputs
from kd_cli.learn.schedules import Constant
from kd_cli.learn.specialists import (
    Classes,
    SoftOutside,
    SpecialistLoss,
    SpecialistTraining,
    active,
    covariance,
    families_found,
    from_generalist,
    grouped,
    log_probabilities,
)


def random_probabilities(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator, dtype=torch.float64)).softmax(-1)


def total_divergence(q: Tensor, g: Tensor, specialists: list[Tensor], own: list[list[int]], which: Tensor) -> Tensor:
    """The sum that q minimises, up to a constant, by the definition: [N]."""
    total = -(g * q.log()).sum(1)
    for m, (p, classes) in enumerate(zip(specialists, own, strict=True)):
        others = [c for c in range(q.shape[1]) if c not in classes]
        grouped = torch.cat([q[:, classes], q[:, others].sum(1, keepdim=True)], 1)
        total = total - which[:, m] * (p * grouped.log()).sum(1)
    return total


def test_the_joint_prediction_is_that_of_a_slow_solver() -> None:
    own = [[0, 1, 2], [2, 3], [5, 6, 7]]
    g = random_probabilities(5, 9, seed=0)
    specialists = [random_probabilities(5, len(some) + 1, seed=k + 1) for k, some in enumerate(own)]
    which = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    q = joint_prediction(g, specialists, own, which, tolerance=1e-13)

    logits = torch.zeros(5, 9, dtype=torch.float64, requires_grad=True)
    momentum = torch.zeros_like(logits)
    for _ in range(400):  # gradient descent on logits, as in the paper, with momentum
        loss = total_divergence(logits.softmax(1), g, specialists, own, which).sum()
        momentum = 0.9 * momentum - 2 * torch.autograd.grad(loss, logits)[0]
        logits.data += momentum
    torch.testing.assert_close(q, logits.detach().softmax(1), atol=1e-4, rtol=0)
    torch.testing.assert_close(q.sum(1), torch.ones(5, dtype=torch.float64))


def test_the_geometric_prediction_is_that_of_a_slow_solver_and_the_geometric_mean() -> None:
    own = [[0, 1, 2], [2, 3], [5, 6, 7]]
    g = random_probabilities(5, 9, seed=0)
    specialists = [random_probabilities(5, len(some) + 1, seed=k + 1) for k, some in enumerate(own)]
    which = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0], [1, 1, 0]], dtype=torch.bool)
    q = geometric_prediction(g, specialists, own, which, tolerance=1e-13)

    def divergence(q: Tensor) -> Tensor:  # KL(q, g) + sum of KL(q, p_m), q summed over the classes of others
        total = (q * (q.log() - g.log())).sum(1)
        for m, (some, p) in enumerate(zip(own, specialists, strict=True)):
            other = [c for c in range(9) if c not in some]
            seen = torch.cat([q[:, some], q[:, other].sum(1, keepdim=True)], 1)
            total = total + which[:, m] * (seen * (seen.log() - p.log())).sum(1)
        return total

    logits = torch.zeros(5, 9, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        total = divergence(logits.softmax(1)).sum()
        total.backward()
        return total

    solver.step(loss)  # type: ignore[arg-type]
    torch.testing.assert_close(q, logits.detach().softmax(1), atol=1e-4, rtol=0)

    every, nothing = list(range(9)), torch.zeros(5, 1, dtype=torch.float64)
    one = random_probabilities(5, 9, seed=7)
    both = geometric_prediction(g, [torch.cat([one, nothing], 1)], [every], torch.ones(5, 1, dtype=torch.bool))
    mean = (g * one).sqrt()
    torch.testing.assert_close(both, mean / mean.sum(1, keepdim=True))


def test_models_with_a_probability_for_each_class_are_averaged() -> None:
    g, one, two = (random_probabilities(4, 6, seed=k) for k in range(3))
    nothing = torch.zeros(4, 1, dtype=torch.float64)  # in a dustbin of no classes
    every = list(range(6))
    specialists = [torch.cat([p, nothing], 1) for p in (one, two)]
    both = joint_prediction(g, specialists, [every, every], torch.ones(4, 2, dtype=torch.bool))
    torch.testing.assert_close(both, (g + one + two) / 3)
    none = joint_prediction(g, specialists, [every, every], torch.zeros(4, 2, dtype=torch.bool))
    torch.testing.assert_close(none, g)


def test_one_specialist_has_a_closed_form() -> None:
    own = [1, 3]
    g, p = random_probabilities(4, 5, seed=0), random_probabilities(4, 3, seed=1)
    q = joint_prediction(g, [p], [own], torch.ones(4, 1, dtype=torch.bool), tolerance=1e-12)
    expected = g.clone()
    expected[:, own] = (g[:, own] + p[:, :2]) / 2
    rest = [0, 2, 4]
    mass = (g[:, rest].sum(1) + p[:, 2]) / 2
    expected[:, rest] = g[:, rest] * (mass / g[:, rest].sum(1))[:, None]
    torch.testing.assert_close(q, expected, atol=1e-9, rtol=0)
    rounds = by_rounds(g, [p], [own], torch.ones(4, 1, dtype=torch.bool), tolerance=1e-12)
    torch.testing.assert_close(rounds, expected, atol=1e-9, rtol=0)


def test_the_specialists_of_the_likeliest_classes_are_active() -> None:
    owned = Classes.of([[0, 1], [2], [1, 2]], torch.ones(4)).owned()
    g = torch.tensor([[0.6, 0.1, 0.3, 0.0], [0.0, 0.1, 0.2, 0.7]])
    assert active(g, owned, best=1).tolist() == [[True, False, False], [False, False, False]]
    assert active(g, owned, best=2).tolist() == [[True, True, True], [False, True, True]]


# ---------------------------------------------------------------- training


def test_the_dustbins_shift_undoes_the_oversampling() -> None:
    counts = torch.tensor([10, 30, 40, 120])
    classes = Classes.of([[0, 1], [2]], counts)
    shift = classes.dustbin_shift()
    assert shift.tolist() == pytest.approx([math.log(0.8 / 0.2), math.log(0.8 / 0.2)])
    # One that knows nothing but how often it saw its classes says, corrected, how often they occur.
    seen = torch.tensor([[[0.125, 0.375, 0.5]], [[0.5, 0.0, 0.5]]]).log()
    p = log_probabilities(seen, classes).exp()
    torch.testing.assert_close(p[0, 0], torch.tensor([0.05, 0.15, 0.8]))
    torch.testing.assert_close(p[1, 0], torch.tensor([0.2, 0.0, 0.8]))


def test_half_of_a_specialists_examples_are_of_its_classes() -> None:
    labels = torch.arange(10).repeat(20)
    classes = Classes.of([[0], [1, 2, 3]], torch.full((10,), 20))
    ones = torch.ones(2)
    training = SpecialistTraining(
        Examples(torch.zeros(200, 1), labels),
        Examples(torch.zeros(0, 1), labels[:0]),
        "specialist",
        [5, 6],
        Plan(epochs=1, batch_size=50, schedule=Constant()),
        Objective(Hard(), Weights(ones, ones, ones)),
        owned=classes.owned(),
    )
    order = training.order(1)
    assert order.shape == (2, 200)
    for row, own in zip(order, ([0], [1, 2, 3]), strict=True):
        mine = torch.isin(labels[row], torch.tensor(own))
        assert int(mine.sum()) == 100
        assert 10 < int(mine[:50].sum()) < 40  # mixed
        often = torch.bincount(row[mine], minlength=200)[torch.isin(labels, torch.tensor(own))]
        assert int(often.max() - often.min()) <= 1
    assert torch.equal(order, training.order(1))
    assert not torch.equal(order, training.order(2))


def test_the_loss_is_the_cross_entropy_of_own_classes_and_dustbin() -> None:
    classes = Classes.of([[4, 1], [0, 2, 3]], torch.ones(5))
    logits = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(5)[None].expand(2, 5)
    batch = Batch(labels, labels[..., None].float(), labels)
    ones = torch.ones(2)
    loss = SpecialistLoss(classes)(Outputs(logits), None, batch, Weights(ones, ones, ones))["loss"]
    narrow = logits[0][:, [0, 1, 3]]  # the third logit stands for nothing
    first = torch.nn.functional.cross_entropy(narrow, torch.tensor([2, 1, 2, 2, 0]))
    second = torch.nn.functional.cross_entropy(logits[1], torch.tensor([0, 3, 1, 2, 3]))
    torch.testing.assert_close(loss, torch.stack([first, second]))


def test_outside_its_classes_a_specialist_learns_the_generalists_soft_targets() -> None:
    classes = Classes.of([[0], [1, 2]], torch.ones(3))
    generator = torch.Generator().manual_seed(0)
    logits, teacher = torch.randn(2, 3, 3, generator=generator), torch.randn(1, 3, 3, generator=generator)
    labels = torch.arange(3)[None].expand(2, 3)
    batch = Batch(labels, labels[..., None].float(), labels)
    ones = torch.ones(2)
    loss = SoftOutside(classes)(Outputs(logits), Outputs(teacher), batch, Weights(2 * ones, ones, ones))["loss"]
    for s, own in enumerate(([0], [1, 2])):
        parts = [
            torch.nn.functional.cross_entropy(logits[s, i], torch.tensor(i))
            if i in own
            else 4 * torch.nn.functional.cross_entropy(logits[s, i] / 2, (teacher[0, i] / 2).softmax(0))
            for i in range(3)
        ]
        torch.testing.assert_close(loss[s], torch.stack(parts).mean())


def test_logits_of_all_classes_are_grouped_without_changing_their_probabilities() -> None:
    classes = Classes.of([[3, 1], [0]], torch.ones(4))
    logits = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    p = grouped(logits, classes).softmax(-1)
    whole = logits.softmax(-1)
    torch.testing.assert_close(p[0], torch.stack([whole[0, :, 3], whole[0, :, 1], whole[0, :, [0, 2]].sum(1)], 1))
    torch.testing.assert_close(p[1], torch.stack([whole[1, :, 0], torch.zeros(5), whole[1, :, 1:].sum(1)], 1))


def test_a_specialist_starts_with_the_generalists_rows() -> None:
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    found = from_generalist(weight, torch.zeros(4, 3), [4, 1])
    torch.testing.assert_close(found, torch.stack([weight[4], weight[1], torch.zeros(3), weight[[0, 2, 3]].mean(0)]))
    assert torch.equal(from_generalist(weight, torch.zeros(5, 3), [4, 1]), weight)
    with pytest.raises(ValueError, match="row for each class"):
        from_generalist(weight, torch.zeros(4, 2), [0])


# ---------------------------------------------------------------- clusters


def test_the_covariance_is_that_of_numpy() -> None:
    p = random_probabilities(50, 4, seed=0)
    expected = torch.cov(p.T, correction=0)
    torch.testing.assert_close(covariance(p), expected)


def test_clusters_are_the_classes_that_are_confused() -> None:
    pytest.importorskip("sklearn")
    from kd_cli.experiments.clusters import clusters

    blocks = torch.block_diag(torch.full((3, 3), 0.3), torch.full((2, 2), 0.3), torch.full((4, 4), 0.3))
    found = clusters(covariance(torch.cat([blocks] * 5)), 3)
    assert sorted(found) == [(0, 1, 2), (3, 4), (5, 6, 7, 8)]
    sized = clusters(covariance(torch.cat([blocks] * 5)), 3, size=4)
    assert all(len(some) == 4 for some in sized)
    assert (5, 6, 7, 8) in sized


def test_families_are_found_where_groups_are_families() -> None:
    perfect = families_found([[0, 1], [2, 3, 4]], [0, 0, 1, 1, 1])
    assert (perfect["purity"], perfect["adjusted_rand"]) == (1.0, pytest.approx(1.0))
    assert perfect["mutual_information"] == pytest.approx(1.0)
    mixed = families_found([[0, 2], [1, 3]], [0, 0, 1, 1])
    assert (mixed["purity"], mixed["adjusted_rand"]) == (0.5, pytest.approx(-0.5))  # 2 pairs, 2/3 by chance
    assert mixed["mutual_information"] == pytest.approx(0.0)
    assert mixed["purity_by_chance"] == pytest.approx(2 / 3, abs=0.05)  # a third of the partitions is that of families


def test_the_adjusted_rand_index_is_scikit_learns() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    random = torch.Generator().manual_seed(0)
    group, family = (torch.randint(k, (60,), generator=random) for k in (5, 4))
    groups = [(group == g).nonzero()[:, 0].tolist() for g in range(5)]
    found = families_found(groups, family.tolist())["adjusted_rand"]
    assert found == pytest.approx(metrics.adjusted_rand_score(family, group))


# ---------------------------------------------------------------- the command


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tinymlp", "resnet20"])
def test_the_experiment_runs(model: str, kd_run: Callable[..., Ran], tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    small = {"tinymlp": ["teacher.hidden=[16]", "student.hidden=[8]", "teacher_training.epochs=3"]}
    words = [f"teacher={model}", "student=tinymlp", "training.epochs=1", "after_sweep.epochs=1"]
    words += small.get(model, ["teacher.depth=8", "teacher.widths=[4,4,8,8]", "teacher_training.epochs=1"])
    seeds = "seed=0,1" if model == "tinymlp" else "seed=0"
    words += ["after_sweep.outside=soft"] if model == "resnet20" else []
    ran = kd_run("experiment=specialists", *words, seeds, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "sweep" / "specialists.json").read_text())
    for run in found["runs"]:
        assert sorted(c for own in run["groups"] for c in own) == list(range(10))  # a partition
        test = run["test"]
        assert sum(row["examples"] for row in test["by_cover"]) == test["examples"] == 516
        assert sum(row["with_right"] for row in test["by_cover"]) == round(516 * test["with_specialists"])
        assert test["conditional_generalist"] >= test["generalist"]  # among fewer classes
        assert 0 < run["student_of_q"] < 1
    summaries = [json.loads(file.read_text()) for file in sorted(tmp_path.rglob("summary.json"))]
    generalists = [summary["teacher"]["test"]["accuracy"] for summary in summaries]
    assert [run["test"]["generalist"] for run in found["runs"]] == pytest.approx(generalists)
    assert "with specialists" in (tmp_path / "sweep" / "specialists.html").read_text()


@pytest.mark.slow
def test_the_clusters_of_made_alphabets_are_compared_with_them(kd_run: Callable[..., Ran], tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    random = torch.Generator().manual_seed(0)
    for name in ("Bars-01", "Bars-02", "Bars-03", "Dots-01", "Dots-02", "Dots-03"):
        ink = torch.randint(0, 256, (7, 7), generator=random)
        (tmp_path / "omniglot" / name).mkdir(parents=True)
        for drawer in range(1, 21):
            drawn = (ink + torch.randint(-9, 9, (7, 7), generator=random)).clamp(0, 255).byte()
            picture = drawn.repeat_interleave(4, 0).repeat_interleave(4, 1).numpy()
            Image.fromarray(picture).save(tmp_path / "omniglot" / name / f"{drawer:02}.png")
    small = ["teacher.hidden=[8]", "teacher_training.epochs=2", "after_sweep.count=2", "seed=0", f"data_dir={tmp_path}"]
    ran = kd_run("experiment=omniglot_clusters", *small, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert ran.code == 0, ran.err
    tables = json.loads((tmp_path / "sweep" / "class_clusters.json").read_text())
    assert [table["cluster_T"] for table in tables] == [1, 4]
    for table in tables:
        assert table["families"] == [0, 0, 0, 1, 1, 1]
        (run,) = table["runs"]
        assert sorted(c for group in run["groups"] for c in group) == list(range(6))
        assert run["purity"] == families_found(run["groups"], table["families"])["purity"]
    assert "Do the clusters find the families? at T = 4" in (tmp_path / "sweep" / "class_clusters.html").read_text()
