"""What the student is taught by. A method turns logits into the loss and its two terms.

A method is any callable with the signature of `Method.__call__` and an attribute `needs_teacher`; one with a teacher
but no temperature says `has_T = False`. Your own is one class in one Python file and one YAML file in `method/` that
names it under `_target_`; autograd finds the loss's gradient on the student's logits. A method that knows it in closed
form, and whose terms are means over examples, also has `gradient` and `target`, as those here do: it saves a small
network a good part of its step. `target(like, teacher, labels, weights)`, [S,N,...], is what the gradient needs beside
the student, for many batches at once; `gradient(student, target, weights)`, [S,B,C], is that of a batch. A method with
numbers of its own that may differ within a stack names them in `stackable` and has a classmethod `stack`, as
`LabelSmoothing` shows.

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
    _softened: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def factor(self, of: Callable[[Weights], Tensor], batch: int) -> Tensor:
        """What a term's part of a gradient is multiplied with: a weight [S] over the examples of the batch, [S,1,1].

        A step of a small network feels every call, so each factor is computed once.
        """
        found = self._factors.get((of, batch))
        if found is None:
            found = self._factors[of, batch] = (of(self) / batch)[:, None, None]
        return found

    def soften(self, teacher: Tensor) -> Tensor:
        """The teacher's probabilities at T, [S,B,C]; of the same logits as the last time, what was found then."""
        if teacher.requires_grad:
            return losses.soften(teacher, T=self.T)
        if not self._softened or self._softened[0] is not teacher or self._softened[1] != teacher._version:
            self._softened[:] = teacher, teacher._version, losses.soften(teacher, T=self.T)
        found: Tensor = self._softened[2]
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
    """Whether `gradient` speaks for `__call__`: not where a subclass has changed one of them without the others."""
    together = {"__call__", "gradient", "target"}
    owner = next(base for base in kind.__mro__ if together & vars(base).keys())
    return together <= vars(owner).keys()


class SoftTargets:
    """`alpha * T^2 * L_soft + beta * L_hard`; Hinton, Vinyals & Dean 2015, section 2.

    `square_T=False` leaves the factor T^2 out, to show what it is for.
    """

    needs_teacher = True

    def __init__(self, square_T: bool = True) -> None:
        self.square_T = square_T

    def __call__(self, student_SBC: Tensor, teacher: Tensor | None, labels_SB: Tensor, weights: Weights) -> Terms:
        assert teacher is not None
        soft = losses.cross_entropy(student_SBC, weights.soften(teacher), T=weights.T)
        hard = losses.hard_cross_entropy(student_SBC, labels_SB)
        return Terms(self._alpha(weights) * soft + weights.beta * hard, soft, hard)

    def target(self, like: Tensor, teacher: Tensor | None, labels_SB: Tensor, weights: Weights) -> Tensor:
        assert teacher is not None
        return targets(like, weights, labels_SB, (weights.soften(teacher), self._over))

    def gradient(self, student_SBC: Tensor, target_SBC: Tensor, weights: Weights) -> Tensor:
        soft = losses.soften(student_SBC / weights.factor(_T, 1), T=1.0)
        hard = losses.soften(student_SBC, T=1.0)
        return weigh(weights, target_SBC, (soft, self._over), (hard, _beta))

    @property
    def _over(self) -> Callable[[Weights], Tensor]:
        return _alpha_T if self.square_T else _alpha_over_T

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

    def target(self, like: Tensor, teacher: Tensor | None, labels_SB: Tensor, weights: Weights) -> Tensor:
        """The teacher's logits, and the labels beside them: z - v comes first, it is exact where they are close."""
        assert teacher is not None
        return torch.cat([teacher.to(like.dtype).expand(*labels_SB.shape, -1), targets(like, weights, labels_SB)], -1)

    def gradient(self, student_SBC: Tensor, target_SBC: Tensor, weights: Weights) -> Tensor:
        logits, labels = target_SBC.chunk(2, -1)
        difference = student_SBC - logits
        if self.center:
            difference -= difference.mean(-1, keepdim=True)
        return weigh(weights, labels, (difference, _alpha), (losses.soften(student_SBC, T=1.0), _beta))


class Hard:
    """`beta * L_hard`: the true labels and nothing else. No teacher."""

    needs_teacher = False

    def __call__(self, student_SBC: Tensor, teacher: Tensor | None, labels_SB: Tensor, weights: Weights) -> Terms:
        hard = losses.hard_cross_entropy(student_SBC, labels_SB)
        return Terms(weights.beta * hard, None, hard)

    def target(self, like: Tensor, teacher: Tensor | None, labels_SB: Tensor, weights: Weights) -> Tensor:
        return targets(like, weights, labels_SB)

    def gradient(self, student_SBC: Tensor, target_SBC: Tensor, weights: Weights) -> Tensor:
        return weigh(weights, target_SBC, (losses.soften(student_SBC, T=1.0), _beta))


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

    def target(self, like: Tensor, teacher: Tensor | None, labels_SB: Tensor, weights: Weights) -> Tensor:
        share = self._share(like)
        if isinstance(share, Tensor):
            share = share[:, None, None]
        hard = targets(like, weights, labels_SB)
        uniform = weights.beta.to(like.dtype)[:, None, None] / like.shape[-1]
        return hard.mul_(1 - share).add_(share * uniform)

    def gradient(self, student_SBC: Tensor, target_SBC: Tensor, weights: Weights) -> Tensor:
        return weigh(weights, target_SBC, (losses.soften(student_SBC, T=1.0), _beta))

    def _share(self, like: Tensor) -> float | Tensor:
        if isinstance(self.smoothing, Tensor):
            self.smoothing = self.smoothing.to(like)
        return self.smoothing


def targets(
    like: Tensor, weights: Weights, labels_SB: Tensor, *terms: tuple[Tensor, Callable[[Weights], Tensor]]
) -> Tensor:
    """The true labels, times beta, and further targets [S,B,C], each times its weight; of the type of `like`, with as
    many classes, and laid out as it is."""
    size, batch, classes = *labels_SB.shape, like.shape[-1]
    across = losses.examples_last(like)
    found = like.new_zeros(size, classes, batch).mT if across else like.new_zeros(size, batch, classes)
    for target, of in terms:
        found.addcmul_(target.to(like.dtype), of(weights).to(like.dtype)[:, None, None])
    beta = weights.beta.to(like.dtype)[:, None, None].expand(*labels_SB.shape, 1)
    return found.scatter_add_(-1, labels_SB.unsqueeze(-1), beta)


def weigh(weights: Weights, target: Tensor, *terms: tuple[Tensor, Callable[[Weights], Tensor]]) -> Tensor:
    """The sum of terms [S,B,C], each times its weight, less the target, over the B examples; it takes the first one's
    place."""
    (total, of), *others = terms
    batch = total.shape[1]
    total.mul_(weights.factor(of, batch))
    for term, its in others:
        total.addcmul_(term, weights.factor(its, batch))
    return total.add_(target, alpha=-1 / batch)


def _T(weights: Weights) -> Tensor:
    return weights.T


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
