"""The losses of distillation: pure functions of logits.

Logits are `[..., B, C]` and labels `[..., B]`; a leading axis is an axis of models, and what lacks it (the one
teacher of many students) broadcasts. The temperature `T` is a number or a tensor of the leading shape. Every loss
sums over classes, takes the mean over examples and returns the leading shape: a scalar for `[B, C]`, `[S]` for
`[S, B, C]`; half-precision logits are computed with in float32. None contains the factor T^2; whoever adds the terms up
writes `alpha * T**2 * soft + beta * hard`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "at_temperature",
    "balanced_label_weights",
    "balanced_weights",
    "binary_cross_entropy",
    "binary_divergence",
    "cross_entropy",
    "hard_cross_entropy",
    "kl_divergence",
    "log_soften",
    "logit_matching",
    "soft_cross_entropy",
    "soften",
    "uniform_cross_entropy",
]


def soften(logits: Tensor, *, T: float | Tensor) -> Tensor:
    """Probabilities at temperature T, `q_i = exp(z_i / T) / sum_j exp(z_j / T)` (Hinton et al. 2015, eq. 1).

    `[..., B, C]` to `[..., B, C]`; a vector `T` of shape `[S]` makes `[S, B, C]` of `[B, C]`.
    """
    return _over_classes(torch.softmax, at_temperature(logits, T))


def single_precision(x: Tensor) -> Tensor:
    """Logits or features in float32 at least, in which losses and metrics are computed.

    float16 ends at 65,504, which logits over a small T soon are, and it and bfloat16 have few digits.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def at_temperature(logits: Tensor, T: float | Tensor) -> Tensor:
    """Logits over T, `[..., B, C]`, in float32 at least; a vector `T` of shape `[S]` makes `[S, B, C]` of `[B, C]`."""
    logits = single_precision(logits)
    if isinstance(T, Tensor):
        return logits / T.to(logits.dtype)[..., None, None]  # a float64 vector would make everything float64
    return logits if T == 1 else logits / T


def log_soften(logits: Tensor, *, T: float | Tensor = 1.0) -> Tensor:
    """Log probabilities at temperature T, `[..., B, C]`; finite where the probabilities themselves underflow."""
    return _over_classes(torch.log_softmax, at_temperature(logits, T))


def soft_cross_entropy(student: Tensor, teacher: Tensor, *, T: float | Tensor) -> Tensor:
    """Cross entropy of the student with the soft targets, `-sum_i q_i log p_i`, both at temperature T.

    The gradient on a student logit is `(p_i - q_i) / T`, over B for the mean over examples.
    In float32 `p_i - q_i` loses digits as T grows: its relative error is about 1e-7 * T for logits of size 1, so from
    T = 1e4 upward `logit_matching`, its exact limit, is the better function.
    """
    return cross_entropy(student, soften(teacher, T=T), T=T)


def cross_entropy(student: Tensor, targets: Tensor, *, T: float | Tensor = 1.0) -> Tensor:
    """Cross entropy of the student at temperature T with probabilities, `-sum_i q_i log p_i`, `[..., B, C]` both."""
    return -_mean_of_sums(targets * log_soften(student, T=T))


def kl_divergence(student: Tensor, teacher: Tensor, *, T: float | Tensor) -> Tensor:
    """Divergence `KL(q || p) = sum_i q_i (log q_i - log p_i)` of the student p from the teacher q, at temperature T.

    It is `soft_cross_entropy` less the teacher's entropy: the same gradient, and zero when the two agree.
    Teacher logits may be -inf (a class that cannot be); 0 log 0 = 0.
    """
    log_q = log_soften(teacher, T=T)
    # -inf would make 0 * inf of a class without probability, in the value and in the gradient.
    log_q = log_q.clamp(min=torch.finfo(log_q.dtype).min)
    # The sum is written out because F.kl_div has no batching rule under vmap.
    return _mean_of_sums(log_q.exp() * (log_q - log_soften(student, T=T)))


def hard_cross_entropy(student: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    """Cross entropy with the true labels at T = 1; labels are int64, `[B]` or `[..., B]`.

    With `class_weights` [C] each example counts with its class's weight: `mean(w[y] * l)`. It is not divided by the sum
    of the batch's weights, so that a weight means the same in every batch.
    """
    log_p = log_soften(student, T=1.0)
    labels, _ = torch.broadcast_tensors(labels, log_p[..., 0])
    log_p = log_p.expand(*labels.shape, -1)
    loss = -log_p.gather(-1, labels.unsqueeze(-1))
    if class_weights is not None:
        loss = loss * class_weights.to(loss)[labels].unsqueeze(-1)
    return loss.mean((-2, -1))


def balanced_weights(labels: Tensor, classes: int) -> Tensor:
    """Class weights `n / (K n_c)` of labels [n], of which K classes occur: [classes]; their mean over examples is 1."""
    counts = labels.bincount(minlength=classes).double()
    present = counts > 0
    return torch.where(present, len(labels) / (present.sum() * counts.clamp(min=1)), 0.0)


def balanced_label_weights(labels: Tensor) -> Tensor:
    """Weights of the absence and the presence of each of L labels, [2,L] of labels [n,L] of 0 and 1.

    Each label by itself as a class and its absence are in `balanced_weights`: `n / (2 n_1)` where it is present, `n /
    (2 n_0)` where it is not.
    """
    return torch.stack([balanced_weights(column, 2) for column in labels.long().unbind(-1)], 1)


def logit_matching(student: Tensor, teacher: Tensor, *, center: bool = True) -> Tensor:
    """Half the squared distance of the logits, `1/2 sum_i (z_i - v_i)^2` (Ba & Caruana 2014).

    With `center` each example's mean logit is removed first (a softmax does not see it), and this is C times the limit
    of `T^2 * soft_cross_entropy` for large T, as far as gradients go. For with C classes and centred logits,
    `exp(z_i / T) -> 1 + z_i / T` gives `p_i -> (1 + z_i / T) / C`, hence

        T^2 * (p_i - q_i) / T  ->  T^2 * (z_i - v_i) / (C T^2)  =  (z_i - v_i) / C    (Hinton et al. 2015, section 2.1)

    while the gradient here is `z_i - v_i`.
    """
    return _mean_of_sums(_difference(student, teacher, center).square()) / 2


def uniform_cross_entropy(student: Tensor) -> Tensor:
    """Cross entropy with the uniform distribution, `-(1/C) sum_i log p_i`, at T = 1: label smoothing's soft part."""
    return -log_soften(student, T=1.0).mean((-2, -1))


# ---------------------------------------------------------------- independent labels


def binary_cross_entropy(student: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Binary cross entropy with labels of 0 and 1 at T = 1, summed over the labels: `[..., B, L]` both.

    With `weights` [2,L] the absence and the presence of each label count as often as its own weight says.
    """
    logits = single_precision(student)
    true = labels.to(logits.dtype)
    absent, present = (1.0, 1.0) if weights is None else weights.to(logits)
    return -_mean_of_sums(present * true * F.logsigmoid(logits) + absent * (1 - true) * F.logsigmoid(-logits))


def binary_divergence(student: Tensor, teacher: Tensor, *, T: float | Tensor) -> Tensor:
    """Divergence of each label's `sigmoid(z / T)` from the teacher's `sigmoid(v / T)`, summed over the labels.

    `q log(q / p) + (1 - q) log((1 - q) / (1 - p))`, `[..., B, L]` both; that of two classes with the logits z and 0.
    """
    ours, theirs = at_temperature(student, T), at_temperature(teacher, T)
    present = theirs.sigmoid() * (F.logsigmoid(theirs) - F.logsigmoid(ours))
    absent = (-theirs).sigmoid() * (F.logsigmoid(-theirs) - F.logsigmoid(-ours))
    return _mean_of_sums(present + absent)


# ---------------------------------------------------------------- decisions


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether each example is decided correctly, `[..., B]`: by its likeliest class, for labels `[..., B]`.

    For independent labels `[..., B, L]`, as many axes as the logits have, whether all of them are.
    """
    if labels.dim() == logits.dim():
        return ((logits > 0) == labels.bool()).all(-1)
    return likeliest(logits) == labels


# ---------------------------------------------------------------- how logits lie in memory

FEW = 64  # classes up to which losses are quicker on a CPU when examples lie side by side


def examples_last(logits: Tensor) -> bool:
    """Whether `[..., B, C]` is a view of `[..., C, B]`, as a stack of fully connected networks makes it."""
    return logits.stride(-1) > 1 and logits.mT.is_contiguous()


def likeliest(logits: Tensor) -> Tensor:
    """The class with the largest logit, the first of equals: `[..., B]` of `[..., B, C]`. As argmax."""
    classes = logits.shape[-1]
    if logits.device.type != "cpu" or classes > FEW or not examples_last(logits):
        return logits.argmax(-1)
    # argmax takes examples that lie side by side one by one: 20 times the time of this for 16 models of 10 classes.
    top = logits.amax(-1, keepdim=True)
    behind, number = logits - top, torch.arange(classes, dtype=logits.dtype)
    first = torch.sub(number, behind, alpha=torch.finfo(logits.dtype).max).amin(-1, keepdim=True)
    first = first.nan_to_num(0).clamp(0, classes - 1).long()
    if not torch.equal(logits.gather(-1, first), top):  # infinite, nan, or too close for the type
        return logits.argmax(-1)
    return first.squeeze(-1)


def _difference(student: Tensor, teacher: Tensor, center: bool) -> Tensor:
    difference = at_temperature(student, 1.0) - at_temperature(teacher, 1.0)
    return difference - difference.mean(-1, keepdim=True) if center else difference


def _over_classes(softmax: Callable[..., Tensor], logits: Tensor) -> Tensor:
    # On a CPU PyTorch takes rows shorter than a vector register one number at a time. Across examples it is
    # vectorised: 5 times faster for 30 models of 10 classes (0.05 ms for 0.3 ms). Longer rows are best as they lie.
    if logits.device.type == "cpu" and (logits.shape[-1] <= 16 or examples_last(logits)):
        return softmax(logits.mT, dim=-2).mT
    return softmax(logits, dim=-1)


def _mean_of_sums(terms: Tensor) -> Tensor:
    return terms.sum((-2, -1)) / terms.shape[-2]
