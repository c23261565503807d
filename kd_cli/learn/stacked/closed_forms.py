"""The gradients of the shipped methods on the students' logits, in closed form.

A step of a small network feels every call: autograd's graph of a loss costs more than its numbers. What the teacher and
the labels contribute is computed once for a block of batches (`target`), a step's gradient is a softmax and a few
multiplications in place (`gradient`). Each form equals autograd through the method's own `forward`.

Shapes: S models, B examples of a batch, n examples of a block, C classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from kd_cli import losses
from kd_cli.learn.methods import Hard, LabelSmoothing, Logits, Method, SoftTargets, Weights
from kd_cli.learn.objective import Objective

Factor = Callable[[Weights], Tensor]  # a weight [S] of a term


class ClosedForm(ABC):
    """The gradient of one objective on logits [S,B,C]."""

    def __init__(self, objective: Objective) -> None:
        self.method, self.weights = objective.method, objective.weights
        self.factors: dict[tuple[Factor, int], Tensor] = {}

    @abstractmethod
    def target(self, like: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        """What the gradients need beside the students' logits, [S,n,...], from the teacher's logits [1|S,n,C] and
        labels [S,n]; of the type and layout of `like`."""

    @abstractmethod
    def gradient(self, student: Tensor, target: Tensor) -> Tensor:
        """The gradient [S,B,C] of the mean losses on the students' logits."""

    def factor(self, of: Factor, batch: int) -> Tensor:
        """A weight [S] over the examples of the batch, [S,1,1]; computed once, as every call costs in a small step."""
        found = self.factors.get((of, batch))
        if found is None:
            found = self.factors[of, batch] = (of(self.weights) / batch)[:, None, None]
        return found

    def targets(self, like: Tensor, labels: Tensor, *terms: tuple[Tensor, Factor]) -> Tensor:
        """The one-hot labels times beta, and further targets [S,n,C], each times its weight."""
        size, batch, classes = *labels.shape, like.shape[-1]
        across = losses.examples_last(like)
        found = like.new_zeros(size, classes, batch).mT if across else like.new_zeros(size, batch, classes)
        for target, weight in terms:
            found.addcmul_(target.to(like.dtype), weight(self.weights).to(like.dtype)[:, None, None])
        beta = self.weights.beta.to(like.dtype)[:, None, None].expand(*labels.shape, 1)
        return found.scatter_add_(-1, labels.unsqueeze(-1), beta)

    def weigh(self, target: Tensor, *terms: tuple[Tensor, Factor]) -> Tensor:
        """The sum of terms [S,B,C], each times its weight, less the target, over B; written into the first term."""
        (total, factor), *others = terms
        batch = total.shape[1]
        total.mul_(self.factor(factor, batch))
        for term, weight in others:
            total.addcmul_(term, self.factor(weight, batch))
        return total.add_(target, alpha=-1 / batch)


class SoftTargetsForm(ClosedForm):
    """`alpha T (p - q) + beta (p_1 - y)`, over B; alpha / T without the factor T^2."""

    method: SoftTargets

    def target(self, like: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        assert teacher is not None
        return self.targets(like, labels, (losses.soften(teacher, T=self.weights.T), self._soft_weight))

    def gradient(self, student: Tensor, target: Tensor) -> Tensor:
        soft = losses.soften(student / self.factor(_T, 1), T=1.0)
        hard = losses.soften(student, T=1.0)
        return self.weigh(target, (soft, self._soft_weight), (hard, _beta))

    @property
    def _soft_weight(self) -> Factor:
        return _alpha_T if self.method.square_T else _alpha_over_T


class LogitsForm(ClosedForm):
    """`alpha (z - v) + beta (p_1 - y)`, over B; z - v centred or not."""

    method: Logits

    def target(self, like: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        """The teacher's logits, with the labels' targets behind them: z - v is exact where both are close."""
        assert teacher is not None
        return torch.cat([teacher.to(like.dtype).expand(*labels.shape, -1), self.targets(like, labels)], -1)

    def gradient(self, student: Tensor, target: Tensor) -> Tensor:
        logits, labels = target.chunk(2, -1)
        difference = student - logits
        if self.method.center:
            difference -= difference.mean(-1, keepdim=True)
        return self.weigh(labels, (difference, _alpha), (losses.soften(student, T=1.0), _beta))


class HardForm(ClosedForm):
    """`beta (p_1 - y)`, over B."""

    def target(self, like: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        return self.targets(like, labels)

    def gradient(self, student: Tensor, target: Tensor) -> Tensor:
        return self.weigh(target, (losses.soften(student, T=1.0), _beta))


class LabelSmoothingForm(HardForm):
    """`beta (p_1 - (1 - smoothing) y - smoothing / C)`, over B."""

    method: LabelSmoothing

    def target(self, like: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        share = self.method.smoothing.to(like)[:, None, None]
        uniform = self.weights.beta.to(like.dtype)[:, None, None] / like.shape[-1]
        return self.targets(like, labels).mul_(1 - share).add_(share * uniform)


# By the exact class: a subclass may have changed the loss.
FORMS: dict[type[Method], type[ClosedForm]] = {
    SoftTargets: SoftTargetsForm,
    Logits: LogitsForm,
    Hard: HardForm,
    LabelSmoothing: LabelSmoothingForm,
}


def has_closed_form(method: Method) -> bool:
    """Whether the method's gradient is known here."""
    return type(method) in FORMS and not (isinstance(method, SoftTargets) and method.standardise)


def closed_form(objective: Objective) -> ClosedForm | None:
    """The closed form of an objective's gradient, or None where there is none."""
    return FORMS[type(objective.method)](objective) if has_closed_form(objective.method) else None


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
