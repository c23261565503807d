from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_cli.errors import DataError
from kd_cli.metrics import agreement, confusion, evaluate_logits, reliability
from kd_cli.statistics import gap_closed, mean_std


def surely(*probabilities: list[float]) -> Tensor:
    """Logits whose softmax is these probabilities."""
    return torch.tensor(probabilities, dtype=torch.float64).log()


# Three examples in the bin (0.6, 0.667] at 0.65, two of them right; one in (0.933, 1] at 0.95, wrong.
FOUR = surely([0.65, 0.35], [0.65, 0.35], [0.35, 0.65], [0.95, 0.05])
FOUR_LABELS = torch.tensor([0, 1, 1, 1])


def test_errors_accuracy_likelihood_and_calibration_of_four_examples_by_hand() -> None:
    result = evaluate_logits(FOUR, FOUR_LABELS)
    assert (result.errors, result.total, result.accuracy) == (2, 4, 0.5)
    nll = -(math.log(0.65) + math.log(0.35) + math.log(0.65) + math.log(0.05)) / 4
    assert result.nll == pytest.approx(nll, abs=1e-12)
    assert result.ece == pytest.approx(3 / 4 * (2 / 3 - 0.65) + 1 / 4 * 0.95, abs=1e-12)


def test_calibration_nets_out_inside_a_bin_and_not_between_bins() -> None:
    # 0.55 and 0.58 are in (0.533, 0.6]: one right of two, mean 0.565. 0.75 alone in (0.733, 0.8]: right.
    logits, labels = surely([0.55, 0.45], [0.58, 0.42], [0.25, 0.75]), torch.tensor([0, 1, 1])
    expected = 2 / 3 * abs(0.5 - 0.565) + 1 / 3 * abs(1 - 0.75)
    assert evaluate_logits(logits, labels).ece == pytest.approx(expected, abs=1e-12)


def test_calibration_is_zero_for_one_who_is_as_often_right_as_sure() -> None:
    logits = surely(*[[0.75, 0.25]] * 4)
    assert evaluate_logits(logits, torch.tensor([0, 0, 0, 1])).ece == pytest.approx(0, abs=1e-12)


def test_a_perfect_and_certain_model_scores_zero_everywhere() -> None:
    labels = torch.arange(10)
    result = evaluate_logits(F.one_hot(labels, 10) * 1e4, labels)
    assert dataclasses.astuple(result) == (0, 10, 1.0, 0.0, 0.0, [1.0] * 10, 1.0, 0)


def test_recall_by_class_shows_a_rare_class_that_is_never_predicted() -> None:
    labels = torch.tensor([0] * 97 + [1] * 3)  # and none of class 2
    logits = torch.tensor([[1.0, 0.0, 0.0]] * 96 + [[0.0, 1.0, 0.0]] + [[1.0, 0.0, 0.0]] * 3)
    result = evaluate_logits(logits, labels)
    assert result.accuracy == 0.96
    assert result.recall == [96 / 97, 0.0, None]
    assert result.balanced_accuracy == pytest.approx((96 / 97 + 0) / 2, abs=1e-12)
    assert result.worst_class == 1


def test_logits_that_are_no_numbers_have_a_recall_all_the_same() -> None:
    result = evaluate_logits(torch.full((4, 2), math.nan), torch.tensor([0, 0, 1, 1]))
    assert result.recall == [1.0, 0.0]
    assert result.worst_class == 1


def test_a_certain_model_that_is_wrong_has_a_finite_likelihood_and_the_whole_calibration_error() -> None:
    result = evaluate_logits(torch.tensor([[1e4, 0.0, 0.0]]), torch.tensor([2]))
    assert (result.errors, result.nll, result.ece) == (1, 1e4, 1.0)


def test_likelihood_is_computed_in_double_precision() -> None:
    logits, labels = torch.tensor([[20.0, 0.0]]), torch.tensor([0])
    assert evaluate_logits(logits, labels).nll == pytest.approx(math.log1p(math.exp(-20)), rel=1e-6)
    assert F.cross_entropy(logits, labels).item() == 0  # what single precision would have said


def test_reliability_counts_every_example_once_in_its_bin() -> None:
    bins = reliability(FOUR, FOUR_LABELS)
    assert len(bins) == 15
    assert [(i, b.count) for i, b in enumerate(bins) if b.count] == [(9, 3), (14, 1)]
    assert bins[9].confidence == pytest.approx(0.65)
    assert bins[9].accuracy == pytest.approx(2 / 3)
    assert (bins[9].lower, bins[9].upper) == pytest.approx((0.6, 2 / 3))
    assert (bins[14].confidence, bins[14].accuracy) == (pytest.approx(0.95), 0.0)
    assert (bins[0].confidence, bins[0].accuracy) == (None, None)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below_and_certainty_to_the_last() -> None:
    bins = reliability(torch.tensor([[0.0, 0.0], [1e4, 0.0]]), torch.tensor([0, 0]), bins=2)
    assert [b.count for b in bins] == [1, 1]  # exactly 0.5 is in (0, 0.5]
    assert bins[0].confidence == 0.5
    assert bins[1].confidence == 1.0


def test_the_number_of_bins_can_be_chosen_and_one_bin_compares_the_means() -> None:
    (only,) = reliability(FOUR, FOUR_LABELS, bins=1)
    assert only.count == 4
    assert only.confidence == pytest.approx((0.65 * 3 + 0.95) / 4)
    assert only.accuracy == 0.5


def test_confusion_has_the_truth_in_rows_and_the_prediction_in_columns() -> None:
    logits = F.one_hot(torch.tensor([0, 1, 1, 2]), 3).float()
    table = confusion(logits, torch.tensor([0, 0, 1, 0]))
    assert table.tolist() == [[1, 1, 1], [0, 1, 0], [0, 0, 0]]
    assert table.dtype == torch.int64


def test_confusion_keeps_the_classes_nobody_saw_and_its_diagonal_is_what_is_right() -> None:
    logits, labels = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 5
    table = confusion(logits, labels)
    assert table.shape == (7, 7)
    assert int(table.sum() - table.trace()) == evaluate_logits(logits, labels).errors
    assert table.sum(1).tolist() == [10] * 5 + [0, 0]


def test_agreement_counts_equal_answers_right_or_wrong() -> None:
    a = F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()
    b = F.one_hot(torch.tensor([0, 1, 1, 2]), 3) * 7.0
    assert agreement(a, b) == 0.5
    assert agreement(a, a * 0.1) == 1.0


def test_half_precision_and_gradients_are_no_obstacle() -> None:
    logits = FOUR.to(torch.bfloat16).requires_grad_()
    result = evaluate_logits(logits, FOUR_LABELS)
    assert result.errors == 2
    assert isinstance(result.nll, float)
    assert agreement(logits, FOUR) == 1.0


def test_a_diverged_model_is_told_by_a_likelihood_that_is_not_a_number() -> None:
    result = evaluate_logits(torch.full((3, 2), math.nan), torch.tensor([0, 1, 0]))
    assert math.isnan(result.nll)
    assert math.isnan(result.ece)


def test_the_gap_closed_on_mnist_is_nine_tenths() -> None:
    assert gap_closed(67, 146, 74) == pytest.approx(72 / 79)


@pytest.mark.parametrize(
    ("teacher", "alone", "student", "closed"),
    [
        (10, 20, 10, 1.0),
        (10, 20, 20, 0.0),
        (10, 20, 25, -0.5),
        (10, 20, 5, 1.5),
        (0, 20, 15, 0.25),
        (20, 20, 10, None),
        (30, 20, 10, None),
    ],
)
def test_the_gap_closed_is_a_share_and_none_without_a_gap(
    teacher: float, alone: float, student: float, closed: float | None
) -> None:
    assert gap_closed(teacher, alone, student) == closed


def test_mean_and_deviation_divide_by_one_less_than_the_number() -> None:
    mean, std, n = mean_std([2.0, 4.0, 4.0, 4.0, 5.0, 5.0, 7.0, 9.0])
    assert (mean, n) == (5.0, 8)
    assert std == pytest.approx(math.sqrt(32 / 7))


def test_one_value_has_no_deviation_and_none_has_no_mean() -> None:
    assert mean_std([3]) == (3.0, None, 1)
    assert mean_std([3, 3]) == (3.0, 0.0, 2)
    with pytest.raises(ValueError, match="at least one value"):
        mean_std([])


@pytest.mark.parametrize("metric", [evaluate_logits, reliability, confusion])
def test_no_examples_are_refused(metric: Callable[[Tensor, Tensor], object]) -> None:
    with pytest.raises(DataError, match=r"no examples.*\[0, 10\]"):
        metric(torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64))


def test_no_examples_have_no_agreement() -> None:
    with pytest.raises(DataError, match="no examples"):
        agreement(torch.zeros(0, 10), torch.zeros(0, 10))


@pytest.mark.parametrize("metric", [evaluate_logits, reliability, confusion])
def test_labels_of_another_number_are_refused_and_not_broadcast(metric: Callable[[Tensor, Tensor], object]) -> None:
    with pytest.raises(ValueError, match=r"\[4, 2\] and \[1\]"):
        metric(FOUR, torch.tensor([0]))


def test_logits_of_another_number_have_no_agreement() -> None:
    with pytest.raises(ValueError, match=r"\[4, 2\] and \[1, 2\]"):
        agreement(FOUR, FOUR[:1])


@pytest.mark.parametrize("label", [2, -1])
def test_a_label_the_model_has_no_output_for_is_refused(label: int) -> None:
    with pytest.raises(DataError, match="has 2 classes") as caught:
        evaluate_logits(FOUR, torch.tensor([0, 1, label, 0]))
    assert caught.value.hint
