from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kd_cli import losses
from kd_cli.losses import (
    hard_cross_entropy,
    kl_divergence,
    logit_matching,
    soft_cross_entropy,
    soften,
    uniform_cross_entropy,
)

Loss = Callable[..., Tensor]
B, C, S = 6, 10, 3
SHAPES = [(5, 2), (6, 10), (4, 16), (4, 17), (3, 1000)]  # 16 | 17: short rows take another way through the softmax


def logits(*shape: int, seed: int = 0, scale: float = 3.0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) * scale


def labels(*shape: int, classes: int = C, seed: int = 9) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def gradient(loss: Loss, student: Tensor, *args: float | Tensor, **kwargs: float | Tensor) -> Tensor:
    student = student.clone().requires_grad_()
    (result,) = torch.autograd.grad(loss(student, *args, **kwargs).sum(), student)
    return result


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# --- the worked example: cat, dog, donkey, horse -------------------------------------------------------------------

STUDENT = torch.tensor([[-5.0, 2.0, 7.0, 9.0]])
SOFT_TARGETS = torch.tensor([[0.0006, 0.0171, 0.0466, 0.9375]])


def test_the_worked_examples_student_is_almost_certain_at_temperature_1() -> None:
    expected = torch.tensor([[0.0, 0.0008, 0.119, 0.880]])
    torch.testing.assert_close(soften(STUDENT, T=1), expected, atol=6e-4, rtol=0)


def test_the_worked_examples_student_at_temperature_3() -> None:
    expected = torch.tensor([[0.0058, 0.0599, 0.3170, 0.6174]])
    torch.testing.assert_close(soften(STUDENT, T=3), expected, atol=5.1e-5, rtol=0)


def test_the_worked_examples_hard_loss() -> None:
    assert hard_cross_entropy(STUDENT, torch.tensor([3])).item() == pytest.approx(-math.log(0.88), abs=1e-3)


def test_the_worked_examples_soft_loss() -> None:
    # The printed soft targets sum to 1.0018; as logits they become a distribution, so the loss is that much smaller.
    teacher = 3 * SOFT_TARGETS.log()
    printed = -(
        0.0006 * math.log(0.0058) + 0.0171 * math.log(0.0599) + 0.0466 * math.log(0.3170) + 0.9375 * math.log(0.6174)
    )
    assert soft_cross_entropy(STUDENT, teacher, T=3).item() == pytest.approx(printed / 1.0018, abs=1e-4)


def test_the_worked_examples_teacher_from_whole_logits() -> None:
    # Logits -10, 0, 3, 12 give the first three printed targets exactly, and 0.9357 where 0.9375 is printed.
    q = soften(torch.tensor([[-10.0, 0.0, 3.0, 12.0]]), T=3)
    torch.testing.assert_close(q[:, :3], SOFT_TARGETS[:, :3], atol=5.1e-5, rtol=0)
    assert q[0, 3].item() == pytest.approx(0.9357, abs=5.1e-5)


# --- temperature ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("T", [1, 2.0, 20.0])
def test_softening_is_the_softmax_of_logits_over_the_temperature(shape: tuple[int, int], T: float) -> None:
    z = logits(*shape)
    e = (z / T).exp()
    torch.testing.assert_close(soften(z, T=T), e / e.sum(-1, keepdim=True))


def test_a_low_temperature_is_one_hot_and_a_high_one_is_uniform() -> None:
    z = logits(B, C)
    torch.testing.assert_close(soften(z, T=1e-4), F.one_hot(z.argmax(-1), C).to(z.dtype))
    torch.testing.assert_close(soften(z, T=1e8), torch.full_like(z, 1 / C))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("loss", [soft_cross_entropy, kl_divergence])
@pytest.mark.parametrize("T", [0.5, 1, 4.0])
def test_the_soft_gradient_is_p_minus_q_over_the_temperature(loss: Loss, shape: tuple[int, int], T: float) -> None:
    student, teacher = logits(*shape), logits(*shape, seed=1)
    p, q = torch.softmax(student / T, -1), torch.softmax(teacher / T, -1)
    torch.testing.assert_close(gradient(loss, student, teacher, T=T), (p - q) / T / shape[0])


@pytest.mark.parametrize("loss", [soft_cross_entropy, kl_divergence])
def test_the_soft_gradient_shrinks_as_one_over_t_squared_and_the_factor_keeps_its_size(loss: Loss) -> None:
    student, teacher = logits(B, C), logits(B, C, seed=1)
    at_50 = gradient(loss, student, teacher, T=50.0).norm()
    at_100 = gradient(loss, student, teacher, T=100.0).norm()
    assert at_100 / at_50 == pytest.approx(1 / 4, rel=0.02)
    assert (100**2 * at_100) / (50**2 * at_50) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("classes", [2, 10, 100])
@pytest.mark.parametrize("center", [True, False])
def test_a_high_temperature_is_logit_matching_over_the_number_of_classes(classes: int, center: bool) -> None:
    student, teacher = logits(B, classes), logits(B, classes, seed=1)
    if not center:  # without centring the limit holds for logits that are centred already
        student, teacher = student - student.mean(-1, keepdim=True), teacher - teacher.mean(-1, keepdim=True)
    limit = gradient(logit_matching, student, teacher, center=center) / classes
    gaps = []
    for T in (10.0, 100.0, 1e3, 1e4):
        soft = T**2 * gradient(soft_cross_entropy, student, teacher, T=T)
        gaps.append(distance(soft, limit))
    cosine = F.cosine_similarity(soft.flatten(), limit.flatten(), dim=0).item()
    assert cosine == pytest.approx(1, abs=1e-6)
    assert (soft.norm() / limit.norm()).item() == pytest.approx(1, abs=1e-3)
    assert all(later < earlier / 5 for earlier, later in pairwise(gaps)), gaps


def test_logit_matching_is_half_the_squared_distance() -> None:
    student, teacher = torch.tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 0.0]]), torch.zeros(2, 3)
    assert logit_matching(student, teacher, center=False).item() == (1 + 4 + 36) / 2 / 2
    assert logit_matching(student, teacher).item() == (4 + 1 + 9) / 2 / 2


def test_centred_logit_matching_does_not_see_what_a_softmax_does_not_see() -> None:
    student, teacher = logits(B, C), logits(B, C, seed=1)
    moved = student + torch.arange(B).unsqueeze(-1)
    torch.testing.assert_close(logit_matching(moved, teacher), logit_matching(student, teacher))
    assert not torch.isclose(
        logit_matching(moved, teacher, center=False), logit_matching(student, teacher, center=False)
    )


# --- divergence and entropy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 3.0, 20.0])
def test_divergence_and_cross_entropy_differ_by_the_teachers_entropy_and_pull_alike(T: float) -> None:
    student, teacher = logits(B, C), logits(B, C, seed=1)
    q = torch.softmax(teacher / T, -1)
    entropy = -(q * q.log()).sum(-1).mean()
    torch.testing.assert_close(
        soft_cross_entropy(student, teacher, T=T) - kl_divergence(student, teacher, T=T), entropy
    )
    torch.testing.assert_close(
        gradient(soft_cross_entropy, student, teacher, T=T), gradient(kl_divergence, student, teacher, T=T)
    )


def test_divergence_is_the_librarys_and_zero_between_equals() -> None:
    student, teacher, T = logits(B, C), logits(B, C, seed=1), 2.5
    expected = F.kl_div(
        (student / T).log_softmax(-1), (teacher / T).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(kl_divergence(student, teacher, T=T), expected)
    assert kl_divergence(teacher, teacher, T=T).item() == 0


def test_divergence_points_from_the_teacher_to_the_student() -> None:
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3), 0.0]])
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert kl_divergence(student, teacher, T=1).item() == pytest.approx(expected, abs=1e-6)


def test_divergence_lets_the_gradient_reach_the_teacher() -> None:
    student, teacher = logits(2, 4), logits(2, 4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: kl_divergence(student, t, T=2.0), teacher)


@pytest.mark.parametrize("shape", SHAPES)
def test_hard_and_uniform_cross_entropy_are_the_librarys(shape: tuple[int, int]) -> None:
    z, y = logits(*shape), labels(shape[0], classes=shape[1])
    torch.testing.assert_close(hard_cross_entropy(z, y), F.cross_entropy(z, y))
    torch.testing.assert_close(gradient(hard_cross_entropy, z, y), gradient(F.cross_entropy, z, y))
    torch.testing.assert_close(
        0.9 * hard_cross_entropy(z, y) + 0.1 * uniform_cross_entropy(z), F.cross_entropy(z, y, label_smoothing=0.1)
    )


# --- sum over classes, mean over examples, one number a model -------------------------------------------------------

SOFT: list[Loss] = [
    lambda s, t, y, T: soft_cross_entropy(s, t, T=T),
    lambda s, t, y, T: kl_divergence(s, t, T=T),
]
ALL: list[Loss] = [
    *SOFT,
    lambda s, t, y, T: hard_cross_entropy(s, y),
    lambda s, t, y, T: logit_matching(s, t),
    lambda s, t, y, T: logit_matching(s, t, center=False),
    lambda s, t, y, T: uniform_cross_entropy(s),
]
ALL_NAMES = ["soft", "kl", "hard", "matching", "matching-raw", "uniform"]
every_loss = pytest.mark.parametrize("loss", ALL, ids=ALL_NAMES)


@every_loss
def test_a_loss_is_a_mean_over_examples_so_that_repeating_the_batch_changes_nothing(loss: Loss) -> None:
    student, teacher, y = logits(B, C), logits(B, C, seed=1), labels(B)
    once = loss(student, teacher, y, 2.0)
    assert once.shape == ()
    torch.testing.assert_close(loss(student.repeat(3, 1), teacher.repeat(3, 1), y.repeat(3), 2.0), once)
    each = torch.stack([loss(student[i : i + 1], teacher[i : i + 1], y[i : i + 1], 2.0) for i in range(B)])
    torch.testing.assert_close(each.mean(), once)


def test_a_loss_is_a_sum_over_classes() -> None:
    uniform = torch.zeros(B, 1000)
    assert soft_cross_entropy(uniform, uniform, T=5.0).item() == pytest.approx(math.log(1000), rel=1e-5)
    assert hard_cross_entropy(uniform, labels(B)).item() == pytest.approx(math.log(1000), rel=1e-5)
    # A pair of classes that neither model believes in adds nothing, where a mean over classes would halve the loss.
    student, teacher = torch.tensor([[1.0, -1.0]]), torch.tensor([[-2.0, 2.0]])
    for loss in (soft_cross_entropy, kl_divergence):
        torch.testing.assert_close(
            loss(F.pad(student, (0, 2), value=-80.0), F.pad(teacher, (0, 2), value=-80.0), T=1),
            loss(student, teacher, T=1),
        )
    apart = logit_matching(torch.tensor([[1.0, -1.0]]), torch.zeros(1, 2))
    assert logit_matching(torch.tensor([[1.0, -1.0, 1.0, -1.0]]), torch.zeros(1, 4)).item() == 2 * apart.item()


@every_loss
@pytest.mark.parametrize("own_teacher", [False, True], ids=["one teacher", "a teacher each"])
@pytest.mark.parametrize("own_labels", [False, True], ids=["one set of labels", "labels each"])
@pytest.mark.parametrize("classes", [10, 40])
def test_models_on_a_leading_axis_have_the_losses_they_have_one_by_one(
    loss: Loss, own_teacher: bool, own_labels: bool, classes: int
) -> None:
    student = logits(S, B, classes)
    teacher = logits(S, B, classes, seed=1) if own_teacher else logits(B, classes, seed=1)
    y = labels(S, B) if own_labels else labels(B)
    T = torch.tensor([1.0, 4.0, 20.0], dtype=torch.float64)

    def one(z: Tensor, s: int) -> Tensor:
        return loss(z, teacher[s] if own_teacher else teacher, y[s] if own_labels else y, T[s].item())

    stacked = loss(student, teacher, y, T)
    assert stacked.shape == (S,)
    torch.testing.assert_close(stacked, torch.stack([one(student[s], s) for s in range(S)]))
    torch.testing.assert_close(
        gradient(loss, student, teacher, y, T),
        torch.stack([gradient(lambda z, s=s: one(z, s), student[s]) for s in range(S)]),
    )


@every_loss
@pytest.mark.parametrize("classes", [10, 40])
def test_a_loss_works_under_vmap_and_grad(loss: Loss, classes: int) -> None:
    student, teacher, y = logits(S, B, classes), logits(B, classes, seed=1), labels(B)
    T = torch.tensor([1.0, 4.0, 20.0], dtype=torch.float64)
    step = torch.func.vmap(torch.func.grad_and_value(loss), in_dims=(0, None, None, 0))
    grads, values = step(student, teacher, y, T)
    torch.testing.assert_close(values, loss(student, teacher, y, T))
    torch.testing.assert_close(grads, gradient(loss, student, teacher, y, T))


def test_hard_cross_entropy_works_under_vmap_with_labels_each() -> None:
    student, y = logits(S, B, C), labels(S, B)
    values = torch.func.vmap(hard_cross_entropy)(student, y)
    torch.testing.assert_close(values, hard_cross_entropy(student, y))
    torch.testing.assert_close(values[1], F.cross_entropy(student[1], y[1]))


def test_two_leading_axes_work_too() -> None:
    student, teacher, T = logits(2, S, B, C), logits(B, C, seed=1), torch.full((2, S), 3.0)
    for loss in (soft_cross_entropy, kl_divergence):
        values = loss(student, teacher, T=T)
        assert values.shape == (2, S)
        torch.testing.assert_close(values[1, 2], loss(student[1, 2], teacher, T=3.0))


def test_one_model_at_many_temperatures_is_a_loss_for_each() -> None:
    student, teacher = logits(B, C), logits(B, C, seed=1)
    values = soft_cross_entropy(student, teacher, T=torch.tensor([2.0, 5.0]))
    torch.testing.assert_close(values[1], soft_cross_entropy(student, teacher, T=5.0))


def test_the_temperatures_type_leaves_the_losses_type_alone() -> None:
    student, teacher = logits(S, B, C, dtype=torch.float32), logits(B, C, dtype=torch.float32)
    T = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert soft_cross_entropy(student, teacher, T=T).dtype == torch.float32
    assert kl_divergence(student, teacher, T=T.to(torch.int64)).dtype == torch.float32


# --- extremes, in float32 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [soft_cross_entropy, kl_divergence])
@pytest.mark.parametrize("T", [1e-3, 1.0, 20.0, 1e6])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("shape", SHAPES)
def test_single_precision_is_near_double_precision_at_every_scale(
    loss: Loss, T: float, scale: float, shape: tuple[int, int]
) -> None:
    student = logits(*shape, scale=scale).float()
    teacher = logits(*shape, scale=scale, seed=1).float()
    truth = loss(student.double(), teacher.double(), T=T)
    assert truth.isfinite()
    assert loss(student, teacher, T=T).item() == pytest.approx(truth.item(), rel=1e-5, abs=2e-6)
    # A gradient is (p - q) / T: what float32 keeps of p - q is compared, so at T = 1e6 only its being small and finite.
    expected = gradient(loss, student.double(), teacher.double(), T=T).float()
    torch.testing.assert_close(gradient(loss, student, teacher, T=T), expected, atol=1e-6 / T, rtol=1e-3)


@pytest.mark.parametrize("T", [1e-3, 1.0, 20.0])
def test_a_teacher_certain_of_everything_is_a_label(T: float) -> None:
    y = labels(B)
    teacher = F.one_hot(y, C) * 1e4
    student = logits(B, C, dtype=torch.float32)
    expected = F.cross_entropy(student / T, y)
    for loss in (soft_cross_entropy, kl_divergence):
        torch.testing.assert_close(loss(student, teacher.float(), T=T), expected)
        torch.testing.assert_close(
            gradient(loss, student, teacher.float(), T=T), gradient(lambda z: F.cross_entropy(z / T, y), student)
        )


@pytest.mark.parametrize("classes", [10, 40])
@pytest.mark.parametrize("impossible", [-1e4, -math.inf])
def test_zero_times_log_zero_is_zero_for_classes_the_teacher_rules_out(classes: int, impossible: float) -> None:
    teacher = logits(B, classes, dtype=torch.float32)
    teacher[:, 3:] = impossible
    teacher.requires_grad_()
    student = logits(B, classes, seed=1, dtype=torch.float32).requires_grad_()
    value = kl_divergence(student, teacher, T=2.0)
    q = torch.softmax(teacher.detach()[:, :3] / 2, -1)
    expected = (q * (q.log() - torch.log_softmax(student.detach() / 2, -1)[:, :3])).sum(-1).mean()
    torch.testing.assert_close(value.detach(), expected)
    value.backward()
    assert student.grad is not None
    assert teacher.grad is not None
    assert student.grad.isfinite().all()
    assert teacher.grad.isfinite().all()
    assert soft_cross_entropy(student, teacher, T=2.0).isfinite()


@every_loss
def test_a_student_far_off_has_a_finite_loss_and_gradient(loss: Loss) -> None:
    y = torch.zeros(B, dtype=torch.int64)
    student, teacher = torch.zeros(B, C), torch.zeros(B, C)
    student[:, 1], student[:, 0], teacher[:, 0] = 1e4, -1e4, 1e4
    for T in (1e-3, 1.0, 1e6):
        assert loss(student, teacher, y, T).isfinite()
        assert gradient(loss, student, teacher, y, T).isfinite().all()
    assert hard_cross_entropy(student, y).item() == 2e4
    assert soft_cross_entropy(student, teacher, T=1e-3).item() == pytest.approx(2e7)


def test_a_temperature_is_not_rounded_to_the_logits_precision() -> None:
    student, teacher, T = logits(S, B, C), logits(B, C, seed=1), torch.full((S,), 20.3)
    half = soft_cross_entropy(student.bfloat16(), teacher.bfloat16(), T=T)
    single = soft_cross_entropy(student.bfloat16().float(), teacher.bfloat16().float(), T=T)
    assert torch.equal(half, single)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(2, 10, 50), (3, 1, 7), (1, 64, 5), (2, 100, 5), (10, 6)], ids=str)
def test_likeliest_is_argmax_however_the_logits_lie(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, dtype=dtype)
    logits.flatten()[::3] = logits.flatten()[::3].round()  # some are equal
    logits[0] = 0.25
    logits[-1] *= 1e-38  # apart by less than float32's normal numbers
    logits.flatten()[5::11] = math.inf
    logits.flatten()[7::13] = -math.inf
    assert torch.equal(losses.likeliest(logits.mT), logits.argmax(-2))
    assert torch.equal(losses.likeliest(logits), logits.argmax(-1))
    logits.flatten()[3] = math.nan
    assert torch.equal(losses.likeliest(logits.mT), logits.argmax(-2))


def test_losses_are_the_same_however_the_logits_lie() -> None:
    student, teacher, labels = (
        torch.randn(3, 20, 40).double(),
        torch.randn(3, 20, 40).double(),
        torch.randint(20, (3, 40)),
    )
    for loss in (losses.soft_cross_entropy, losses.kl_divergence):
        across = loss(student.mT, teacher.mT, T=2.0)
        torch.testing.assert_close(across, loss(student.mT.contiguous(), teacher.mT.contiguous(), T=2.0))
    torch.testing.assert_close(
        losses.hard_cross_entropy(student.mT, labels), losses.hard_cross_entropy(student.mT.contiguous(), labels)
    )
