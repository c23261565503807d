"""A teacher's label smoothing: how it is trained, the clusters of its classes, and the experiment that compares."""

from __future__ import annotations

import json
from collections.abc import Callable

import made
import pytest
import torch
from process import Ran
from torch import Tensor, nn

from kd_cli.config.schema import TeacherTraining, Training
from kd_cli.errors import DataError
from kd_cli.experiments.projection import penultimate, projected, templates
from kd_cli.experiments.smoothed import difference
from kd_cli.learn.batches import Examples
from kd_cli.metrics import clusters
from kd_cli.models.cifar import resnet
from kd_cli.models.mlp import mlp


def test_clusters_of_two_classes_by_hand() -> None:
    features = torch.tensor([[0.0, 0.0], [0.0, 2.0], [4.0, 4.0], [4.0, 4.0]])
    found = clusters(features, torch.tensor([0, 0, 7, 7]))
    assert found.within == pytest.approx((1 + 1 + 0 + 0) / 4)
    assert found.between == pytest.approx(5.0)  # from (0, 1) to (4, 4)
    assert found.ratio == pytest.approx(0.1)


def test_the_ratio_does_not_depend_on_scale_rotation_or_order() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (40,), generator=generator)
    features = torch.randn(40, 5, generator=generator, dtype=torch.float64) + labels[:, None]
    turned, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))
    order = torch.randperm(40, generator=generator)
    other = clusters((7 * features @ turned + 3)[order], labels[order])
    assert other.ratio == pytest.approx(clusters(features, labels).ratio)


def test_clusters_need_two_classes() -> None:
    with pytest.raises(DataError, match="two classes"):
        clusters(torch.ones(3, 2), torch.zeros(3, dtype=torch.int64))


def test_the_penultimate_layer_is_what_the_classifier_sees() -> None:
    examples = made.examples(20)
    images = examples.first(20)

    def classified(module: nn.Module, features: Tensor, head: str) -> Tensor:
        found: Tensor = module.get_submodule(head)(features)
        return found

    network = made.model(lambda: mlp(hidden=[7, 5], **made.SIZES)).eval()
    assert torch.equal(classified(network, penultimate(network, examples), "5"), network(images))
    pictures = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    small = resnet(input_shape=(3, 8, 8), num_classes=4, depth=8, widths=[4, 4, 6, 8]).eval()
    seen = penultimate(small, Examples(pictures, torch.zeros(6, dtype=torch.int64)))
    assert torch.allclose(classified(small, seen, "fc"), small(pictures), atol=1e-6)


def test_three_templates_lie_in_the_plane_and_distances_in_it_are_kept() -> None:
    generator = torch.Generator().manual_seed(0)
    three = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    places = projected(three, three)
    assert places[0].tolist() == pytest.approx([0, 0])
    assert float(places[1, 1]) == pytest.approx(0)
    assert float(places[2, 1]) > 0
    assert torch.allclose(torch.cdist(places, places), torch.cdist(three, three))
    away = torch.linalg.svd(three - three[0]).Vh[-1]  # at a right angle to the plane
    assert torch.allclose(projected(three + 5 * away, three), places)
    network = made.model(lambda: mlp(hidden=[7, 5], **made.SIZES))
    assert torch.equal(templates(network, made.SIZES["num_classes"]), network.get_submodule("5").weight)


def test_differences_are_paired_by_seed() -> None:
    found = difference({0: 12.0, 1: 15.0, 2: 9.0}, {1: 11.0, 0: 10.0, 3: 0.0})
    assert found is not None
    assert (found["mean"], found["n"]) == (3.0, 2)


def test_a_teacher_without_smoothing_keeps_its_fingerprint() -> None:
    assert TeacherTraining().recipe() == Training().recipe() == {}
    assert TeacherTraining(label_smoothing=0.1, ema=0.9).recipe() == {"ema": 0.9, "label_smoothing": 0.1}


def test_smoothing_is_the_teachers_alone_and_the_experiment_compares_by_it(kd_run: Callable[..., Ran]) -> None:
    small = ["dataset=digits", "teacher.hidden=[16]", "student.hidden=[8]", "training.epochs=1", "seed=0,1"]
    ran = kd_run("experiment=smoothed_teachers", *small, "teacher_training.epochs=2", "T=1", "transfer.fraction=1")
    assert ran.code == 0, ran.err
    (folder,) = {path.parent for path in ran.run_dirs}
    found = json.loads((folder / "smoothed.json").read_text())
    assert [one["smoothing"] for one in found["teachers"]] == [0.0, 0.1]
    assert all(0 < seed["ratio"] < 5 for one in found["teachers"] for seed in one["by_seed"])
    assert len(found["alone"]) == 2
    page = (folder / "smoothed.html").read_text()
    assert "taught by a teacher with smoothing 0.1" in page
    assert "Three classes before the classifier, label smoothing 0.1" in page
    summaries = [json.loads((path / "summary.json").read_text()) for path in ran.run_dirs]
    assert len({summary["teacher"]["fingerprint"] for summary in summaries}) == 4
    assert len({summary["student_alone"]["fingerprint"] for summary in summaries}) == 2
    rows = [json.loads(line) for line in (ran.run_dirs[-1] / "metrics.jsonl").read_text().splitlines()]
    (last,) = [row for row in rows if row["role"] == "teacher"][-1:]
    mixed = 0.9 * last["hard_loss"] + 0.1 * last["soft_loss"]  # Szegedy et al. 2016, section 7
    assert last["loss"] == pytest.approx(mixed, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["teacher_training.label_smoothing=1"], "teacher_training.label_smoothing is 1.0; it must be a share of the"),
        (["training.ema=1"], "training.ema is 1.0; it must be a decay, at least 0 and below 1"),
        (["training.clip=-1"], "training.clip is -1.0; it must be a norm, 0 or more"),
        (["training.label_smoothing=0.1"], "label_smoothing"),
        (
            ["dataset.positive=3", "method=binary", "teacher_training.label_smoothing=0.1"],
            "teacher_training.label_smoothing is for data with classes",
        ),
    ],
)
def test_a_smoothing_that_cannot_be_is_refused(kd_run: Callable[..., Ran], words: list[str], message: str) -> None:
    ran = kd_run(*words)
    assert ran.code != 0
    assert message in ran.err
    assert "epochs in" not in ran.err + ran.out
