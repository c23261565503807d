"""Independent labels, one or several: losses, metrics, data, training and what a run says of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import made
import pytest
import torch
from conftest import TINY
from logits import weights_of
from PIL import Image
from process import Ran
from stacks import ADAMW, SEEDS, one_of
from torch.nn import functional as F

from kd_cli import losses
from kd_cli.data.lists import imagelist
from kd_cli.data.prepare import prepare
from kd_cli.data.source import Source
from kd_cli.errors import ConfigError, DataError
from kd_cli.export.load import load_student
from kd_cli.label_metrics import average_precision, evaluate_labels, label_agreement
from kd_cli.learn.batches import Batch, Examples
from kd_cli.learn.engine import validate
from kd_cli.learn.methods import (
    DIST,
    BinaryHard,
    BinaryTargets,
    Hard,
    LearnedTemperature,
    Method,
    Scheduled,
    Setting,
    SoftTargets,
    Sum,
)
from kd_cli.learn.outputs import Outputs
from kd_cli.learn.stacked.learner import StackedLearner
from kd_cli.learn.teachers import CachedTeacher
from kd_cli.metrics import evaluate_logits

B, L = 7, 4


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_labels(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, shape, generator=torch.Generator().manual_seed(seed))


OURS, THEIRS, LABELS = random(B, L), random(B, L, seed=1), random_labels(B, L)


def two_classes(logits: torch.Tensor) -> torch.Tensor:
    """A label's logit as the logits of two classes, the absence first."""
    return torch.stack([torch.zeros_like(logits), logits], -1)


# ---------------------------------------------------------------- losses


@pytest.mark.parametrize("T", [0.5, 1.0, 4.0])
def test_a_label_is_two_classes_whose_second_logit_is_0(T: float) -> None:
    by_label = [
        losses.kl_divergence(two_classes(z), two_classes(v), T=T) for z, v in zip(OURS.T, THEIRS.T, strict=True)
    ]
    torch.testing.assert_close(losses.binary_divergence(OURS, THEIRS, T=T), torch.stack(by_label).sum())
    by_label = [losses.hard_cross_entropy(two_classes(z), y) for z, y in zip(OURS.T, LABELS.T, strict=True)]
    torch.testing.assert_close(losses.binary_cross_entropy(OURS, LABELS), torch.stack(by_label).sum())


def test_the_losses_are_torchs() -> None:
    bernoulli = torch.distributions.Bernoulli
    found = torch.distributions.kl_divergence(bernoulli(logits=THEIRS / 2), bernoulli(logits=OURS / 2))
    torch.testing.assert_close(losses.binary_divergence(OURS, THEIRS, T=2.0), found.sum(-1).mean())
    expected = F.binary_cross_entropy_with_logits(OURS, LABELS.double(), reduction="none").sum(-1).mean()
    torch.testing.assert_close(losses.binary_cross_entropy(OURS, LABELS), expected)


def test_the_gradient_is_p_less_q_over_T() -> None:
    leaf = OURS.clone().requires_grad_()
    losses.binary_divergence(leaf, THEIRS, T=4.0).backward()
    torch.testing.assert_close(leaf.grad, ((OURS / 4).sigmoid() - (THEIRS / 4).sigmoid()) / 4 / B)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_logits_of_ten_thousand_are_finite(dtype: torch.dtype) -> None:
    edge = torch.tensor([[1e4, -1e4, 1e4, 0.0]], dtype=dtype)
    leaf = edge.flip(-1).requires_grad_()
    loss = losses.binary_divergence(leaf, edge, T=1.0) + losses.binary_cross_entropy(leaf, torch.tensor([[1, 0, 0, 1]]))
    loss.backward()
    assert loss.isfinite()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert losses.binary_divergence(edge, edge, T=1.0) == 0


def test_the_method_weighs_the_terms_as_soft_targets_do() -> None:
    batch = Batch(LABELS[None, :, 0], OURS, LABELS[None])
    weights = weights_of([3.0], alpha=0.7, beta=0.4)
    terms = BinaryTargets()(Outputs(OURS[None]), Outputs(THEIRS[None]), batch, weights)
    soft, hard = losses.binary_divergence(OURS, THEIRS, T=3.0), losses.binary_cross_entropy(OURS, LABELS)
    assert float(terms["loss"]) == pytest.approx(0.7 * 9 * float(soft) + 0.4 * float(hard))


# ---------------------------------------------------------------- metrics


def precision_and_recall(scores: list[float], labels: list[int], least: float) -> tuple[float, float]:
    """Of the examples with a score of `least` or more."""
    claimed = [label for score, label in zip(scores, labels, strict=True) if score >= least]
    return sum(claimed) / len(claimed), sum(claimed) / sum(labels)


def test_average_precision_and_f1_are_those_of_their_definitions() -> None:
    logits, labels = random(60, L).round(decimals=0), random_labels(60, L)  # rounded: many scores are equal
    found = evaluate_labels(logits, labels)
    areas = []
    for i, label in enumerate(found.labels):
        scores, true = logits[:, i].tolist(), labels[:, i].tolist()
        area, before = 0.0, 0.0
        for least in sorted(set(scores), reverse=True):
            precision, recall = precision_and_recall(scores, true, least)
            area, before = area + (recall - before) * precision, recall
        precision, recall = precision_and_recall(scores, true, min(score for score in scores if score > 0))
        assert label.average_precision == pytest.approx(area)
        assert label.f1 == pytest.approx(2 * precision * recall / (precision + recall))
        areas.append(area)
    assert found.mean_average_precision == pytest.approx(sum(areas) / L)


def test_the_results_by_hand() -> None:
    logits = torch.tensor([[2.0, -1.0], [-1.0, 3.0], [1.0, 1.0]])
    labels = torch.tensor([[1, 0], [1, 1], [0, 1]])
    found = evaluate_labels(logits, labels)
    assert (found.errors, found.total, found.label_errors) == (2, 3, 2)
    assert found.accuracy == pytest.approx(1 / 3)
    assert [label.errors for label in found.labels] == [2, 0]
    assert [label.positives for label in found.labels] == [2, 2]
    # scores 2, 1, -1 of a positive, a negative and a positive
    assert found.labels[0].average_precision == pytest.approx((1 + 2 / 3) / 2)
    assert found.labels[0].f1 == pytest.approx(0.5)
    assert found.labels[1].f1 == found.labels[1].average_precision == 1


def test_one_label_has_the_results_of_two_classes() -> None:
    logits, labels = random(50, 1), random_labels(50, 1)
    found, other = evaluate_labels(logits, labels), evaluate_logits(two_classes(logits[:, 0]), labels[:, 0])
    for key in ("errors", "total", "accuracy", "nll", "ece"):
        assert getattr(found, key) == pytest.approx(getattr(other, key), rel=1e-12)
    assert found.labels[0].ece == found.ece


def test_a_label_that_no_example_has() -> None:
    found = evaluate_labels(torch.tensor([[-1.0], [-2.0]]), torch.tensor([[0], [0]]))
    assert found.labels[0].average_precision is found.labels[0].f1 is found.mean_average_precision is None
    assert average_precision(torch.zeros(4), torch.tensor([1, 0, 0, 1])) == 0.5
    with pytest.raises(DataError):
        evaluate_labels(torch.zeros(0, 2), torch.zeros(0, 2))
    with pytest.raises(ValueError, match="expected logits"):
        evaluate_labels(torch.zeros(3, 2), torch.zeros(3))


def test_models_agree_where_all_labels_are_decided_alike() -> None:
    one, other = torch.tensor([[1.0, 1.0], [1.0, -1.0]]), torch.tensor([[2.0, 3.0], [1.0, 1.0]])
    assert label_agreement(one, other) == 0.5


# ---------------------------------------------------------------- methods refuse what is not theirs


def a_setting(*, multilabel: bool) -> Setting:
    outputs = Outputs(torch.zeros(1, 2, L))
    return Setting(L, 100, B, outputs, outputs, multilabel=multilabel)


@pytest.mark.parametrize("method", [SoftTargets(), Hard(), Scheduled(DIST()), Sum(a=SoftTargets())])
def test_methods_of_classes_refuse_independent_labels(method: Method) -> None:
    with pytest.raises(ConfigError, match="the data have independent labels"):
        method.setup(a_setting(multilabel=True))


@pytest.mark.parametrize("method", [BinaryTargets(), BinaryHard(), Scheduled(BinaryTargets())])
def test_methods_of_labels_refuse_classes(method: Method) -> None:
    method.setup(a_setting(multilabel=True))
    with pytest.raises(ConfigError, match="learns independent labels, and the data have 4 classes"):
        method.setup(a_setting(multilabel=False))


def test_a_sum_of_label_methods_is_refused() -> None:
    with pytest.raises(ConfigError, match="Sum learns which of several classes"):
        Sum(a=BinaryTargets()).setup(a_setting(multilabel=True))


# ---------------------------------------------------------------- training


NUMBERS = ("loss", "hard_loss", "train_accuracy", "val_accuracy", "val_nll")


def label_training(method: Method) -> dict[str, Any]:
    """75 training and 30 validation examples with four labels each, and a teacher's logits."""
    data = Examples(made.images(75), random_labels(75, made.CLASSES))
    val = Examples(made.images(30, "val"), random_labels(30, made.CLASSES, seed=2))
    return {"teacher": CachedTeacher(random(75, made.CLASSES)), "method": method, "data": data, "val": val}


@pytest.mark.parametrize("build", [made.small, made.conv], ids=["dense", "convolutional"])
@pytest.mark.parametrize("method", [BinaryTargets(), BinaryHard()])
def test_a_stack_trains_as_its_members_do_by_themselves(build: made.Build, method: Method) -> None:
    weights = made.some_weights(T=[1, 2, 8], alpha=[1, 0.5, 0], beta=[0.5, 0.1, 1])
    keys = label_training(method)
    stack = StackedLearner([made.model(build, seed) for seed in SEEDS], ADAMW, hyper=[{}] * 3, seeds=SEEDS)
    together = made.train(stack, seeds=SEEDS, weights=weights, **keys)
    for s, seed in enumerate(SEEDS):
        learner = made.solo(build, seed=seed, optimizer=ADAMW)
        (alone,) = made.train(learner, seeds=[seed], weights=one_of(weights, s), **keys)
        assert made.difference(alone.state, together[s].state) < 1e-12
        for one, other in zip(made.metrics(alone), made.metrics(together[s]), strict=True):
            assert one.keys() == other.keys()
            assert [one[key] for key in NUMBERS] == pytest.approx([other[key] for key in NUMBERS], rel=1e-9)


def test_an_epochs_metrics_are_those_of_the_labels() -> None:
    learner, keys = made.solo(method=BinaryHard()), label_training(BinaryHard())
    outcome = made.train(learner, **keys, plan=replace(made.a_plan(epochs=1), batch_size=75))[0]
    expected = evaluate_labels(learner.predict(keys["val"])[0], keys["val"].labels)
    assert outcome.history[0]["val_accuracy"] == pytest.approx(expected.accuracy)
    assert outcome.history[0]["val_nll"] == pytest.approx(expected.nll)
    (found,) = validate(learner, keys["data"])
    accuracy, nll = found["val_accuracy"], found["val_nll"]
    first = evaluate_labels(made.solo().predict(keys["data"])[0], keys["data"].labels)
    assert outcome.history[0]["train_accuracy"] == pytest.approx(first.accuracy)  # before the only step
    assert (accuracy, nll) != (first.accuracy, first.nll)


def test_the_temperature_of_labels_can_be_learned() -> None:
    method = LearnedTemperature(BinaryTargets(), reversal=1).double()
    method.setup(a_setting(multilabel=True))
    outcome = made.train(made.solo(method=method), **label_training(method))[0]
    assert outcome.history[0]["T"] != outcome.history[1]["T"]


# ---------------------------------------------------------------- data: one class as a label


def three_classes() -> Source:
    images, labels = torch.arange(60.0).reshape(30, 2), torch.arange(30) % 3
    return Source("three", images, labels, images[:6], labels[:6], ("a", "b", "c"))


def test_one_class_becomes_the_label_and_the_parts_stay_stratified() -> None:
    dataset = prepare(three_classes(), val_fraction=0.2, positive="b")
    assert dataset.multilabel
    assert dataset.class_names == ("b",)
    assert dataset.class_counts() == {"train": [8], "val": [2], "test": [2]}
    assert dataset.notes[0] == "one label, b: its examples are positive, those of a, c negative"
    assert prepare(three_classes(), val_fraction=0.2, positive=1).fingerprint == dataset.fingerprint
    assert prepare(three_classes(), val_fraction=0.2).fingerprint != dataset.fingerprint


def test_a_positive_class_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="names the class 'd', which three does not have"):
        prepare(three_classes(), val_fraction=0.2, positive="d")
    labelled = replace(three_classes(), train_labels=random_labels(30, 3), test_labels=random_labels(6, 3))
    with pytest.raises(ConfigError, match="has independent labels already"):
        prepare(labelled, val_fraction=0.2, positive="a")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.full((30, 3), 2), "from 2 to 2; with 3 labels they must be"),
        (torch.zeros(30, 2, dtype=torch.int64), "must be \\[N,3\\] of 0 and 1"),
        (torch.zeros(30, 3), "torch.int64 \\[N\\], or \\[N,L\\] for independent labels"),
    ],
)
def test_labels_that_are_none_are_refused(labels: torch.Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prepare(replace(three_classes(), train_labels=labels, test_labels=labels[:6]), val_fraction=0.2)


# ---------------------------------------------------------------- data: a list of pictures


def listed_pictures(folder: Path, lines: str, n: int = 12) -> Path:
    """Pictures 0.png, 1.png, ... below `folder`/art, red where the number is even, and a list of them."""
    for i in range(n):
        path = folder / "art" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (200 * (1 - i % 2), 100 * (i % 3 == 0), 10 * i)).save(path)
    (folder / "labels.csv").write_text(lines)
    return folder


def lines_of(n: int = 12, *, split: bool = True) -> str:
    rows = ["path,labels,split" if split else "path,labels"]
    for i in range(n):
        labels = ";".join(name for name, has in (("red", i % 2 == 0), ("green", i % 3 == 0)) if has)
        rows.append(f"art/{i}.png,{labels}" + (f",{'train' if i < 8 else 'test'}" if split else ""))
    return "\n".join(rows) + "\n"


def read(folder: Path, **keys: Any) -> Source:
    return imagelist(data_dir=folder / "data", root=str(folder), image_size=8, **keys)


def test_a_list_names_parts_and_labels(tmp_path: Path) -> None:
    source = read(listed_pictures(tmp_path, lines_of()))
    assert source.class_names == ("green", "red")
    assert source.train_labels.tolist() == [[int(i % 3 == 0), int(i % 2 == 0)] for i in range(8)]
    assert source.test_labels.tolist() == [[int(i % 3 == 0), int(i % 2 == 0)] for i in range(8, 12)]
    assert source.train_images[:, 0, 0, 0].tolist() == [200 * (1 - i % 2) for i in range(8)]
    assert source.test_names == tuple(f"art/{i}.png" for i in range(8, 12))
    assert source.notes[0] == "independent labels: green, red"


def test_a_list_without_parts_has_a_test_part_drawn(tmp_path: Path) -> None:
    source = read(listed_pictures(tmp_path, lines_of(split=False)), test_fraction=0.25)
    assert (len(source.train_labels), len(source.test_labels)) == (9, 3)
    assert not set(source.train_names) & set(source.test_names)
    assert "3 of its 12 pictures test, drawn without regard to their labels" in source.notes[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("path,labels", "file,labels"), "has no column path"),
        (lambda text: text.replace("art/3.png", "art/33.png"), "line 5: there is no file"),
        (lambda text: text.replace("art/3.png", "../3.png"), "line 5: the path '../3.png' does not lie below"),
        (lambda text: text.replace("art/3.png", "art/2.png"), "line 5: art/2.png is listed twice"),
        (lambda text: text.replace("3.png,green", "3.png,green,red"), "line 5: it has not as many fields"),
        (lambda text: text.replace("3.png,green,train", "3.png,green,tarin"), "line 5: the split 'tarin' is no part"),
        (lambda text: text.replace("3.png,green,train", "3.png,green,"), "has no split, and other pictures have one"),
        (lambda text: text.replace(",test", ",train"), "has no picture with the split test"),
        (lambda text: text.replace("red", "").replace("green", ""), "gives no picture a label"),
        (lambda text: text.partition("\n")[0], "lists no pictures"),
    ],
)
def test_a_list_that_is_wrong_is_refused(tmp_path: Path, change: Callable[[str], str], message: str) -> None:
    folder = listed_pictures(tmp_path, change(lines_of()))
    with pytest.raises(DataError, match=message):
        read(folder)


def test_a_list_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no list .*other.csv"):
        read(listed_pictures(tmp_path, lines_of()), list="other.csv")


# ---------------------------------------------------------------- runs


def test_a_single_logit_tells_one_class_from_the_others(tiny: Callable[..., Ran]) -> None:
    ran = tiny("method=binary", "dataset.positive=3", "training.epochs=8")
    summary = ran.summary
    assert summary["dataset"]["multilabel"]
    assert summary["dataset"]["class_names"] == ["3"]
    assert "516 test examples, 1 label;" in ran.out
    results = summary["student"]["test"]
    (label,) = results["labels"]
    assert (label["name"], label["errors"], label["ece"]) == ("3", results["errors"], results["ece"])
    assert [row["when"] for row in summary["student"]["loss_balance"]] == ["start", "middle", "end"]
    page = (ran.run_dir / "report.html").read_text()
    assert "Results by label" in page
    assert f"{label['average_precision']:.3f}" in page
    student = load_student(ran.run_dir)
    assert student.classes == ("3",)
    probabilities = student.probabilities(torch.zeros(2, *student.input_shape))
    torch.testing.assert_close(probabilities, student(torch.zeros(2, *student.input_shape)).sigmoid())


def test_pictures_with_several_labels_are_learned_and_reported(kd_run: Callable[..., Ran], tmp_path: Path) -> None:
    listed_pictures(tmp_path / "photos", lines_of())
    data = ["dataset=imagelist", "dataset.root=photos", "dataset.image_size=8", "dataset.val_fraction=0.2"]
    ran = kd_run(*TINY, *data, "method=binary", "training.jitter=1")
    assert ran.code == 0, ran.err
    assert [label["name"] for label in ran.summary["student"]["test"]["labels"]] == ["green", "red"]
    assert ran.summary["student"]["test"]["total"] == 4
    assert "independent labels: green, red" in ran.summary["notes"]
    rows = [json.loads(line) for line in (ran.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert {row["role"] for row in rows} == {"teacher", "student_alone", "student"}
    swept = kd_run("-m", *TINY, *data, "method=binary", "T=1,3")
    assert swept.code == 0, swept.err
    assert "T=3" in swept.out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["method=soft_targets"], "SoftTargets learns which of several classes an example has"),
        (["method=binary", "transfer.omit=[3]"], "leave out classes, and the data have independent labels"),
        (["method=binary", "teacher.members=2", "teacher.combine=arithmetic"], "averages probabilities of classes"),
    ],
)
def test_what_needs_classes_is_refused_before_training(
    kd_run: Callable[..., Ran], argv: list[str], message: str
) -> None:
    ran = kd_run(*TINY, "dataset.positive=3", *argv)
    assert ran.code != 0
    assert message in ran.err.replace("\n", " ")
    assert "epochs in" not in ran.err


def test_the_teacher_of_a_label_is_kept_and_is_not_that_of_the_classes(tiny: Callable[..., Ran]) -> None:
    first = tiny("method=binary", "dataset.positive=3", "training.epochs=2")
    again = tiny("method=binary", "dataset.positive=3", "training.epochs=2")
    assert again.summary["teacher"]["from_store"]
    assert again.summary["student"]["test"] == first.summary["student"]["test"]
    other = tiny("method=soft_targets", "training.epochs=2")
    assert not other.summary["teacher"]["from_store"]
