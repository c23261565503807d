"""The base of methods that learn from the teacher's logits: `alpha * L_soft + beta * L_hard`.

Shapes: S students, B examples, C classes.
"""

from __future__ import annotations

import copy
import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from kd_cli import losses
from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Method, Setting, Terms, Weights
from kd_cli.learn.outputs import Outputs
from kd_cli.numeric import is_number

TARGETS = ("label", "teacher")
# A standard deviation of logits counts as this where it is less; a student's also as this share of the teacher's.
FLATTEST = 0.1


class NumericKeys(Method):
    """A method whose numeric keys may differ between the students of a stack: buffers [S] named in `stackable`."""

    def number(self, name: str, value: float, *, least: float = 0.0, most: float = math.inf) -> None:
        """Register a numeric key as a buffer [1]. Raises ConfigError for a value that is not between the bounds."""
        if not is_number(value) or not least <= value <= most:
            allowed = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
            raise ConfigError(f"method.{name} is {value!r}; it must be a number, {allowed}")
        # float64 holds the configured number exactly; it is no part of a training's state
        self.register_buffer(name, torch.tensor([value], dtype=torch.float64), persistent=False)

    def own_weights(self) -> Mapping[str, float]:
        return {"alpha": 1.0} | {name: float(self.get_buffer(name)[0]) for name in self.stackable}

    @classmethod
    def stack(cls, methods: Sequence[Self]) -> Self:
        stacked = copy.deepcopy(methods[0])
        for name in cls.stackable:
            setattr(stacked, name, torch.cat([getattr(method, name) for method in methods]))
        return stacked


class LogitMethod(NumericKeys):
    """`alpha * L_soft + beta * L_hard`, where `soft` computes `L_soft` from both models' logits.

    With `standardise`, `L_soft` sees logits without mean and with standard deviation 1 in each example (Sun et al.
    2024, logit standardisation); `L_hard` sees the student's own.
    """

    recordable = True

    def __init__(self, standardise: bool = False) -> None:
        super().__init__()
        self.standardise = standardise
        if standardise:
            self.published = ()  # of logits as they are; a method with published weights of both sets them

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        if self.standardise and setting.classes < 3:
            raise ConfigError(
                f"method.standardise needs 3 classes or more, and the data have {setting.classes}: standardised, two "
                "logits are always 0.71 and -0.71",
                hint="method.standardise=false",
            )

    @abstractmethod
    def soft(self, student: Tensor, teacher: Tensor, labels: Tensor, weights: Weights) -> tuple[Tensor, Terms]:
        """`L_soft`, [S], and the terms that it consists of, before weighting.

        `student` are [S,B,C], `teacher` [1,B,C] or [S,B,C], `labels` [S,B].
        """

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        assert teacher is not None
        ours, theirs = student.logits, teacher.logits
        if self.standardise:
            ours, theirs = standardised(ours, theirs)
        soft, terms = self.soft(ours, theirs, batch.labels, weights)
        hard = self.hard_loss(student.logits, batch.labels)
        return {"loss": weights.alpha * soft + weights.beta * hard, **terms, "hard": hard}


class TargetMethod(LogitMethod):
    """A method with one target class in each example: the label, or the teacher's likeliest class."""

    min_classes = 3

    def __init__(self, target: str = "label", standardise: bool = False) -> None:
        super().__init__(standardise)
        if target not in TARGETS:
            raise ConfigError(f"method.target is {target!r}; it must be {' or '.join(TARGETS)}")
        self.target = target
        self.needs_labels = target == "label"

    def targets(self, teacher: Tensor, labels: Tensor) -> Tensor:
        """The target class of each example, [S,B]."""
        return labels if self.target == "label" else teacher.argmax(-1).expand(labels.shape)


def standardised(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Logits of student and teacher less each row's mean, over its standard deviation (with C - 1): [...,B,C] both.

    A deviation counts as 0.1 where it is less, the student's also as a tenth of the teacher's: the gradient of a row of
    equal logits, which a zero-initialised last layer gives, would be infinite.
    """
    ours, theirs = (
        logits - logits.mean(-1, keepdim=True)
        for logits in (losses.at_temperature(student, 1.0), losses.at_temperature(teacher, 1.0))
    )
    of_ours, of_theirs = (logits.square().sum(-1, keepdim=True) / (logits.shape[-1] - 1) for logits in (ours, theirs))
    of_theirs = of_theirs.clamp(min=FLATTEST**2)
    # The roots are of the larger squares: the root of 0 has no gradient.
    of_ours = torch.maximum(of_ours, FLATTEST**2 * of_theirs.clamp(min=1.0))
    return ours / of_ours.sqrt(), theirs / of_theirs.sqrt()


# ---------------------------------------------------------------- groups of classes


def target_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """The labelled class's logit less the log of the others' summed exponentials: [...,B] of [...,B,C] and [...,B].

    The labelled class's probability is the sigmoid of it. The log of a sum of probabilities would have a nan gradient
    where that sum underflows.
    """
    return logits.gather(-1, labels[..., None])[..., 0] - without_target(logits, labels).logsumexp(-1)


def without_target(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits of all classes but the labelled one: [...,B,C-1] of [...,B,C] and [...,B]."""
    others = torch.arange(logits.shape[-1] - 1, device=logits.device)
    return logits.gather(-1, others + (others >= labels[..., None]))


def divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p) of log probabilities: [...] of [...,K]. A class with q = 0 contributes nothing."""
    log_q = log_q.clamp(min=torch.finfo(log_q.dtype).min)
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def binary_divergence(teacher_margin: Tensor, student_margin: Tensor) -> Tensor:
    """KL of two distributions over two classes, of the margins whose sigmoids they are."""

    def log_p(margin: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid(torch.stack([margin, -margin], -1))

    return divergence(log_p(teacher_margin), log_p(student_margin))
