"""Methods that learn from the teacher's logits: values and gradients by hand, limits, and what they reduce to."""

from __future__ import annotations

import math
from math import exp, log

import numpy as np
import pytest
import torch
from logits import gradient_of, loss_of, some_labels, some_logits, terms_of, weights_of

from kd_cli import losses
from kd_cli.learn.methods import DIST, DKD, NKD, RLD, TTM, WSLD, LabelSmoothing, SoftTargets, TeacherFree
from kd_cli.learn.methods.logit_method import standardised

# Two distributions over three classes, as logits: at T = 1 their softmax gives them back.
TEACHER = torch.tensor([[0.6, 0.3, 0.1]], dtype=torch.float64).log()
STUDENT = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log()
FIRST = torch.tensor([0])
B, C = 6, 5
OURS, THEIRS, LABELS = some_logits(B, C), some_logits(B, C, seed=1), some_labels(B, classes=C)


def kl(T: float) -> float:
    return float(losses.kl_divergence(OURS, THEIRS, T=T))


# ---------------------------------------------------------------- DKD


def test_dkds_two_divergences_by_hand() -> None:
    terms = terms_of(DKD(), STUDENT, TEACHER, FIRST, weights_of([1.0]))
    assert float(terms["tckd"]) == pytest.approx(0.6 * log(0.6 / 0.2) + 0.4 * log(0.4 / 0.8))
    assert float(terms["nckd"]) == pytest.approx(0.75 * log(0.75 / 0.625) + 0.25 * log(0.25 / 0.375))
    assert float(terms["loss"]) == pytest.approx(float(terms["tckd"] + 8 * terms["nckd"]))


def test_dkds_gradient_by_hand() -> None:
    # d TCKD / d z_y = p_y - q_y; on the others it is shared in proportion to their probabilities; NCKD adds p - q of
    # the others among themselves.
    tckd = torch.tensor([[0.2 - 0.6, 0.4 * 0.625, 0.4 * 0.375]], dtype=torch.float64)
    nckd = torch.tensor([[0.0, 0.625 - 0.75, 0.375 - 0.25]], dtype=torch.float64)
    torch.testing.assert_close(gradient_of(DKD(1, 0), STUDENT, TEACHER, FIRST), tckd)
    torch.testing.assert_close(gradient_of(DKD(0, 2), STUDENT, TEACHER, FIRST), 2 * nckd)


def test_dkd_splits_the_softened_distributions_not_the_others() -> None:
    T = 4.0
    q, p = (losses.soften(x, T=T)[0, 0].item() for x in (TEACHER, STUDENT))
    by_hand = T**2 * (q * log(q / p) + (1 - q) * log((1 - q) / (1 - p)))
    assert loss_of(DKD(1, 0), STUDENT, TEACHER, FIRST, T=T) == pytest.approx(by_hand)


@pytest.mark.parametrize("T", [1.0, 4.0])
def test_dkd_is_soft_targets_when_the_others_weigh_what_the_teacher_gives_them(T: float) -> None:
    for i in range(B):
        others = 1 - losses.soften(THEIRS[i : i + 1], T=T)[0, LABELS[i]].item()
        one = slice(i, i + 1)
        dkd = gradient_of(DKD(1, others), OURS[one], THEIRS[one], LABELS[one], T=T)
        torch.testing.assert_close(dkd, gradient_of(SoftTargets(), OURS[one], THEIRS[one], LABELS[one], T=T))


def test_dkd_with_the_teachers_targets_is_dkd_with_its_predictions_as_labels() -> None:
    assert DKD(target="teacher").needs_labels is False
    assert loss_of(DKD(target="teacher"), OURS, THEIRS, LABELS) == loss_of(DKD(), OURS, THEIRS, THEIRS.argmax(-1))


# ---------------------------------------------------------------- DIST


@pytest.mark.parametrize("T", [1.0, 3.0])
def test_dists_correlations_are_numpys(T: float) -> None:
    p, q = (losses.soften(x, T=T).numpy() for x in (OURS, THEIRS))
    terms = terms_of(DIST(1, 2), OURS, THEIRS, LABELS, weights_of([T]))
    inter = 1 - np.mean([np.corrcoef(p[i], q[i])[0, 1] for i in range(B)])
    intra = 1 - np.mean([np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(C)])
    assert float(terms["inter"]) == pytest.approx(inter, rel=1e-12)
    assert float(terms["intra"]) == pytest.approx(intra, rel=1e-12)
    assert float(terms["loss"]) == pytest.approx(inter + 2 * intra)
    assert loss_of(DIST(1, 2, square_T=True), OURS, THEIRS, LABELS, T=T) == pytest.approx(T**2 * (inter + 2 * intra))


def test_dist_is_nothing_for_a_student_that_gives_what_the_teacher_gives() -> None:
    assert loss_of(DIST(), THEIRS, THEIRS, LABELS) == pytest.approx(0, abs=1e-12)
    assert gradient_of(DIST(), THEIRS, THEIRS, LABELS).abs().max() < 1e-12


def test_dist_at_a_high_temperature_is_the_correlation_of_the_logits_and_its_gradient_does_not_shrink() -> None:
    by_hand = 1 - np.mean([np.corrcoef(OURS[i], THEIRS[i])[0, 1] for i in range(B)])
    # Below T of about 30 these students' probabilities vary by more than 10 %; the next test is about flatter ones.
    assert loss_of(DIST(1, 0), OURS, THEIRS, LABELS, T=25) == pytest.approx(by_hand, abs=0.05)
    at_25, at_20 = (gradient_of(DIST(1, 0), OURS, THEIRS, LABELS, T=T).norm() for T in (25, 20))
    assert float(at_25 / at_20) == pytest.approx(1, abs=0.05)


def test_dist_of_flat_rows_is_exact_where_the_student_varies_as_the_teacher_and_linear_where_less() -> None:
    flat = OURS / 1000
    assert loss_of(DIST(1, 0), flat, flat, LABELS) == pytest.approx(0, abs=1e-9)
    assert loss_of(DIST(1, 0), 2 * flat, flat, LABELS) == pytest.approx(0, abs=1e-4)
    assert loss_of(DIST(1, 0), flat / 4, flat, LABELS) == pytest.approx(0.75, abs=1e-3)


# ---------------------------------------------------------------- NKD


def test_nkds_terms_by_hand() -> None:
    terms = terms_of(NKD(gamma=3), STUDENT, TEACHER, FIRST, weights_of([1.0]))
    target, others = -0.6 * log(0.2), -0.75 * log(0.625) - 0.25 * log(0.375)
    assert float(terms["target"]) == pytest.approx(target)
    assert float(terms["others"]) == pytest.approx(others)
    assert float(terms["loss"]) == pytest.approx(target + 3 * others)


def test_nkd_softens_the_others_only() -> None:
    T = 2.0
    q, p = (torch.softmax(x[0, 1:] / T, -1) for x in (TEACHER, STUDENT))
    by_hand = -0.6 * log(0.2) - 1.5 * T**2 * float((q * p.log()).sum())
    assert loss_of(NKD(), STUDENT, TEACHER, FIRST, T=T) == pytest.approx(by_hand)


def test_nkds_others_have_dkds_gradient() -> None:
    ours = gradient_of(NKD(gamma=1), OURS, THEIRS, LABELS, T=3) - gradient_of(NKD(gamma=0), OURS, THEIRS, LABELS)
    torch.testing.assert_close(ours, gradient_of(DKD(0, 1), OURS, THEIRS, LABELS, T=3))


# ---------------------------------------------------------------- TTM and WTTM


def test_ttm_raises_the_teachers_probabilities_to_a_power_and_leaves_the_student() -> None:
    T = 4.0
    powers = torch.tensor([0.6, 0.3, 0.1]) ** (1 / T)
    q, p = powers / powers.sum(), torch.tensor([0.2, 0.5, 0.3])
    by_hand = float((q * (q / p).log()).sum())
    assert loss_of(TTM(), STUDENT, TEACHER, FIRST, T=T) == pytest.approx(by_hand, rel=1e-5)
    assert loss_of(TTM(weighted=True), STUDENT, TEACHER, FIRST, T=T) == pytest.approx(
        by_hand * float(powers.sum()), rel=1e-5
    )


def test_both_are_the_divergence_at_temperature_1() -> None:
    for weighted in (False, True):
        assert loss_of(TTM(weighted), OURS, THEIRS, LABELS, T=1) == pytest.approx(kl(1))


def test_wttms_weight_goes_from_1_for_a_certain_teacher_to_a_power_of_the_classes_for_an_undecided_one() -> None:
    T = 5.0
    certain, undecided = 1e4 * torch.nn.functional.one_hot(LABELS, C).double(), torch.zeros(B, C, dtype=torch.float64)
    assert loss_of(TTM(True), OURS, certain, LABELS, T=T) == pytest.approx(loss_of(TTM(), OURS, certain, LABELS, T=T))
    assert loss_of(TTM(True), OURS, undecided, LABELS, T=T) == pytest.approx(
        C ** (1 - 1 / T) * loss_of(TTM(), OURS, undecided, LABELS, T=T)
    )


# ---------------------------------------------------------------- RLD


def test_rld_is_dkd_where_the_teacher_is_right() -> None:
    right = THEIRS.argmax(-1)
    assert loss_of(RLD(2, 3), OURS, THEIRS, right, T=4) == pytest.approx(loss_of(DKD(2, 3), OURS, THEIRS, right, T=4))


def test_rld_of_a_teacher_that_is_wrong_by_hand() -> None:
    label = torch.tensor([1])  # the teacher gives it 0.3, and 0.6 to another class, which is left out of L_mcd
    terms = terms_of(RLD(), STUDENT, TEACHER, label, weights_of([1.0]))
    assert float(terms["scd"]) == pytest.approx(0.6 * log(0.6 / 0.5) + 0.4 * log(0.4 / 0.5))
    assert float(terms["mcd"]) == 0  # one class is left: nothing to compare
    four = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64).log()
    ours = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64).log()
    terms = terms_of(RLD(), ours, four, label, weights_of([1.0]))
    assert float(terms["mcd"]) == pytest.approx(2 / 3 * log((2 / 3) / (3 / 7)) + 1 / 3 * log((1 / 3) / (4 / 7)))


def test_rld_has_a_temperature_of_its_own_for_the_confidence() -> None:
    one = terms_of(RLD(1, 0, scd_T=1), OURS, THEIRS, LABELS, weights_of([4.0]))
    assert float(one["loss"]) == pytest.approx(loss_of(RLD(1, 0), OURS, THEIRS, LABELS, T=1))


# ---------------------------------------------------------------- WSLD


def test_wslds_weights_by_hand() -> None:
    w = 1 - exp(-log(0.2) / log(0.6))
    soft = -(0.6 * log(0.2) + 0.3 * log(0.5) + 0.1 * log(0.3))
    assert loss_of(WSLD(), STUDENT, TEACHER, FIRST) == pytest.approx(w * soft, rel=1e-6)
    torch.testing.assert_close(
        gradient_of(WSLD(), STUDENT, TEACHER, FIRST), w * (STUDENT.exp() - TEACHER.exp()), rtol=1e-6, atol=0
    )


def test_wsld_weighs_nothing_where_the_student_knows_the_label_and_all_where_only_the_teacher_does() -> None:
    sure = 1e3 * torch.nn.functional.one_hot(LABELS, C).double()
    assert loss_of(WSLD(), sure, THEIRS, LABELS, T=2) == 0
    assert loss_of(WSLD(), OURS, sure, LABELS, T=2) == pytest.approx(loss_of(SoftTargets(), OURS, sure, LABELS, T=2))


# ---------------------------------------------------------------- without a teacher


def test_a_made_up_teacher_at_temperature_1_is_label_smoothing() -> None:
    correct, alpha, beta = 0.9, 0.7, 0.4
    made = terms_of(
        TeacherFree(correct), leaf := OURS.clone().requires_grad_(), None, LABELS, weights_of([1.0], 0.7, 0.4)
    )
    (ours,) = torch.autograd.grad(made["loss"].sum(), leaf)
    smoothing = (1 - correct) * C / (C - 1) * alpha / (alpha + beta)
    torch.testing.assert_close(ours, gradient_of(LabelSmoothing(smoothing), OURS, None, LABELS, beta=alpha + beta))


def test_a_made_up_teachers_probabilities_are_softened_by_hand() -> None:
    T = 3.0
    q = torch.tensor([0.8, 0.1, 0.1], dtype=torch.float64) ** (1 / T)
    q, p = q / q.sum(), losses.soften(STUDENT, T=T)[0]
    by_hand = T**2 * float((q * (q / p).log()).sum())
    assert loss_of(TeacherFree(0.8), STUDENT, None, FIRST, T=T) == pytest.approx(by_hand)


# ---------------------------------------------------------------- standardised logits


def test_standardised_logits_have_mean_0_and_deviation_1() -> None:
    for found in standardised(OURS, THEIRS):
        torch.testing.assert_close(found.mean(-1), torch.zeros(B, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(found.std(-1), torch.ones(B, dtype=torch.float64))


@pytest.mark.parametrize("kind", [SoftTargets, DKD, NKD, DIST, TTM, RLD, WSLD])
def test_a_standardised_loss_does_not_see_shift_and_scale_of_either_models_logits(kind: type) -> None:
    method = kind(standardise=True)
    same = loss_of(method, 5 * OURS - 3, 0.5 * THEIRS + 7, LABELS, T=2)
    assert same == pytest.approx(loss_of(method, OURS, THEIRS, LABELS, T=2), rel=1e-9)
    assert same != pytest.approx(loss_of(kind(), OURS, THEIRS, LABELS, T=2), rel=1e-3)


def test_the_label_term_sees_the_students_own_logits() -> None:
    ours = terms_of(SoftTargets(standardise=True), OURS, THEIRS, LABELS, weights_of([2.0], alpha=0, beta=1))
    assert float(ours["loss"]) == pytest.approx(float(losses.hard_cross_entropy(OURS, LABELS)))


@pytest.mark.parametrize("classes", [10, 100, 1000])
def test_standardised_the_surest_teacher_is_no_surer_than_the_square_root_of_the_classes_allows(classes: int) -> None:
    sure = torch.zeros(1, classes, dtype=torch.float64)
    sure[0, 3] = 50
    found = losses.soften(standardised(sure, sure)[1], T=2.0)
    top = exp(math.sqrt(classes) / 2)
    assert float(found.max()) == pytest.approx(top / (top + classes - 1))  # 0.35 for 10 classes
