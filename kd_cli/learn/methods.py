"""What the student is taught by. A method turns logits into the loss and its two terms.

A method is any callable with the signature of `Method.__call__` and an attribute `needs_teacher`; one with a teacher
but no temperature says `has_T = False`. Your own is one class in one Python file and one YAML file in `method/` that
names it under `_target_`; autograd finds the loss's gradient on the student's logits. A method that knows it in closed
form, and whose terms are means over examples, also has `gradient`, as those here do: it saves a small network a good
part of its step. A method with numbers of its own that may differ within a stack names them in `stackable`
and has a classmethod `stack`, as `LabelSmoothing` shows.

Shapes: S models, B examples, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kd_cli import losses
from kd_cli.errors import ConfigError


@dataclass(frozen=True)
class Weights:
    """The temperature and the loss weights, one of each for each of the S models: [S]."""

    T: Tensor
    alpha: Tensor
    beta: Tensor
    _factors: dict[Any, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def factor(self, of: Callable[[Weights], Tensor], batch: int) -> Tensor:
        """What a residual is multiplied with to be a gradient: a weight [S] over the examples of the batch, [S,1,1].

        A step of a small network feels every call, so each factor is computed once.
        """
        found = self._factors.get((of, batch))
        if found is None:
            found = self._factors[of, batch] = (of(self) / batch)[:, None, None]
        return found


@dataclass(frozen=True)
class Terms:
    """The loss that is minimised and the two terms it is made of, before weighting: [S]. `soft` may be missing."""

    loss: Tensor
    soft: Tensor | None
    hard: Tensor


class Method(Protocol):
    """What the engine asks of a method."""

    needs_teacher: bool

    def __call__(self, student_SBC: Tensor, teacher: Tensor | None, labels_SB: Tensor, weights: Weights) -> Terms:
        """The loss of each of the S students.

        `teacher` holds the teacher's logits, [S,B,C] or [B,C]; None if `needs_teacher` is false.
        """
        ...


@functools.cache
def has_closed_form(kind: type) -> bool:
    """Whether `gradient` speaks for `__call__`: not where a subclass has changed the one without the other."""
    owner = next(base for base in kind.__mro__ if {"__call__", "gradient"} & vars(base).keys())
    return {"__call__", "gradient"} <= vars(owner).keys()


class SoftTargets:
    """`alpha * T^2 * L_soft + beta * L_hard`; Hinton, Vinyals & Dean 2015, section 2.

    `square_T=False` leaves the factor T^2 out, to show what it is for.
    """

    needs_teacher = True

    def __init__(self, square_T: bool = True) -> None:
        self.square_T = square_T

    def __call__(self, student_SBC: Tensor, teacher: Tensor | None, labels_SB: Tensor, weights: Weights) -> Terms:
        assert teacher is not None
        soft = losses.soft_cross_entropy(student_SBC, teacher, T=weights.T)
        hard = losses.hard_cross_entropy(student_SBC, labels_SB)
        return Terms(self._alpha(weights) * soft + weights.beta * hard, soft, hard)

    def gradient(self, student_SBC: Tensor, teacher: Tensor | None, labels_SB: Tensor, weights: Weights) -> Tensor:
        assert teacher is not None
        soft = losses.soft_residual(student_SBC, teacher, T=weights.T)
        hard = losses.hard_residual(student_SBC, labels_SB)
        over = _alpha_T if self.square_T else _alpha_over_T
        return weigh(weights, (soft, over), (hard, _beta))

    def _alpha(self, weights: Weights) -> Tensor:
        return weights.alpha * weights.T**2 if self.square_T else weights.alpha


class Logits:
    """`alpha * 1/2 * sum (z - v)^2 + beta * L_hard`: matching logits (Bucilua et al. 2006, Ba & Caruana 2014).

    It has no temperature. With `center`, each example's mean logit is taken out first: the softmax does not see it,
    and the result is the exact high-temperature limit of the soft targets' gradient, times the number of classes.
    """

    needs_teacher = True
    has_T = False

    def __init__(self, center: bool = True) -> None:
        self.center = center

    def __call__(self, student_SBC: Tensor, teacher: Tensor | None, labels_SB: Tensor, weights: Weights) -> Terms:
        assert teacher is not None
        soft = losses.logit_matching(student_SBC, teacher, center=self.center)
        hard = losses.hard_cross_entropy(student_SBC, labels_SB)
        return Terms(weights.alpha * soft + weights.beta * hard, soft, hard)

    def gradient(self, student_SBC: Tensor, teacher: Tensor | None, labels_SB: Tensor, weights: Weights) -> Tensor:
        assert teacher is not None
        matched = losses.logit_residual(student_SBC, teacher, center=self.center)
        hard = losses.hard_residual(student_SBC, labels_SB)
        return weigh(weights, (matched, _alpha), (hard, _beta))


class Hard:
    """`beta * L_hard`: the true labels and nothing else. No teacher."""

    needs_teacher = False

    def __call__(self, student_SBC: Tensor, teacher: Tensor | None, labels_SB: Tensor, weights: Weights) -> Terms:
        hard = losses.hard_cross_entropy(student_SBC, labels_SB)
        return Terms(weights.beta * hard, None, hard)

    def gradient(self, student_SBC: Tensor, teacher: Tensor | None, labels_SB: Tensor, weights: Weights) -> Tensor:
        return weigh(weights, (losses.hard_residual(student_SBC, labels_SB), _beta))


class LabelSmoothing:
    """`beta * ((1 - smoothing) * L_hard + smoothing * L_uniform)`: soft targets without a teacher.

    Szegedy et al. 2016, section 7. `soft` is the cross entropy with the uniform distribution.
    """

    needs_teacher = False
    stackable = ("smoothing",)

    def __init__(self, smoothing: float = 0.1) -> None:
        if not 0 <= smoothing < 1:
            raise ConfigError(f"method.smoothing is {smoothing}; it must be at least 0 and below 1")
        self.smoothing: float | Tensor = smoothing

    @classmethod
    def stack(cls, methods: Sequence[LabelSmoothing]) -> LabelSmoothing:
        """One method for S models, each with a smoothing of its own."""
        stacked = cls()
        stacked.smoothing = torch.tensor([method.smoothing for method in methods])
        return stacked

    def __call__(self, student_SBC: Tensor, teacher: Tensor | None, labels_SB: Tensor, weights: Weights) -> Terms:
        hard = losses.hard_cross_entropy(student_SBC, labels_SB)
        uniform = losses.uniform_cross_entropy(student_SBC)
        share = self._share(hard)
        return Terms(weights.beta * ((1 - share) * hard + share * uniform), uniform, hard)

    def gradient(self, student_SBC: Tensor, teacher: Tensor | None, labels_SB: Tensor, weights: Weights) -> Tensor:
        hard = losses.hard_residual(student_SBC, labels_SB)
        share = self._share(hard)
        if isinstance(share, Tensor):
            share = share[:, None, None]
        return weigh(weights, (hard.lerp_(losses.uniform_residual(student_SBC), share), _beta))

    def _share(self, like: Tensor) -> float | Tensor:
        if isinstance(self.smoothing, Tensor):
            self.smoothing = self.smoothing.to(like)
        return self.smoothing


def weigh(weights: Weights, *terms: tuple[Tensor, Callable[[Weights], Tensor]]) -> Tensor:
    """The sum of residuals [S,B,C], each times its weight, over the B examples; it takes the first one's place."""
    (total, of), *others = terms
    batch = total.shape[1]
    total.mul_(weights.factor(of, batch))
    for residual, its in others:
        total.addcmul_(residual, weights.factor(its, batch))
    return total


def _alpha(weights: Weights) -> Tensor:
    return weights.alpha


def _beta(weights: Weights) -> Tensor:
    return weights.beta


def _alpha_T(weights: Weights) -> Tensor:  # alpha T^2, over the T of the gradient
    return weights.alpha * weights.T


def _alpha_over_T(weights: Weights) -> Tensor:
    return weights.alpha / weights.T


def stack_methods(methods: Sequence[Method]) -> Method:
    """One method for S models: their common one, or what its class makes of S with different numbers."""
    first = methods[0]
    if len(methods) > 1 and hasattr(first, "stack"):
        return first.stack(methods)
    return first
