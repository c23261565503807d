"""The contract of a distillation method.

A method turns the outputs of S students and of their teacher into the loss that is minimised and the named terms that
are logged. It is a `torch.nn.Module`: parameters that it registers in `setup` (projections, learned temperatures) are
trained with the student's, moved to its device and kept in the training's state; they are no part of the student that
a run ships. Your own method is one class in one Python file and one YAML file in `method/` that names it under
`_target_`; `PerModelMethod` is the simpler base where each student's loss depends on that student alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.outputs import Outputs
from kd_cli.losses import hard_cross_entropy

if TYPE_CHECKING:
    from kd_cli.learn.blocks import Cut

UNUSUAL = 3.0  # how many times a published weight must be exceeded, or fall short of, to be named

Terms = Mapping[str, Tensor]  # "loss" and what else is logged, [S] each


@dataclass(frozen=True)
class Weights:
    """The temperature and the loss weights of S models: [S] each."""

    T: Tensor
    alpha: Tensor
    beta: Tensor


@dataclass(frozen=True)
class Setting:
    """The sizes of a training and the shapes of its outputs, which a method receives before the training begins.

    `student` and `teacher` are outputs for two examples in eval mode, `[1,2,...]`, whose shapes and types are those
    of the training; `teacher` is None for a method without one. `smallest_batch` and `examples` count examples.
    """

    classes: int
    examples: int
    smallest_batch: int
    student: Outputs
    teacher: Outputs | None
    multilabel: bool = False  # whether the data have independent labels, whose number is `classes`


class Published(NamedTuple):
    """The smallest and the largest weight in published recipes, for a weight of 1 on the labels.

    `key` is the number that alpha is multiplied with: a key of the method's own, or "alpha" for none.
    """

    key: str
    least: float
    most: float


def is_temperature(term: str) -> bool:
    """Whether a term is a temperature, which is logged with the losses and is none."""
    return term == "T" or term.endswith("_T")


class Method(nn.Module, ABC):
    """A loss of S students, `[S]`, from their outputs, the teacher's, and the labels.

    The class attributes are what the rest of the program asks of a method; an instance may set them for itself in
    its constructor.
    """

    needs_teacher: bool = True
    needs_labels: bool = True  # False where the loss does without labels once beta is 0
    has_T: bool = True  # whether the loss depends on the temperature
    learns_T: bool = False  # whether the temperature is a parameter of the method; the run's T is then its first value
    changes_T: bool = False  # whether the loss is taken at other temperatures than the run's
    has_alpha: bool = True  # whether the loss depends on alpha
    min_classes: int = 2
    min_batch: int = 1  # examples
    student_features: Sequence[str] = ()  # module paths whose outputs the loss reads
    teacher_features: Sequence[str] = ()
    chooses_layers: bool = False  # whether `choose_layers` sets these paths, from the networks
    notes: Sequence[str] = ()  # what the method chose by itself: sentences for the run's log and summary
    published: Sequence[Published] = ()  # smallest and largest published weights; see `unusual_weights`
    stackable: Sequence[str] = ()  # constructor's keys that may differ between the students of a stack
    multilabel: bool = False  # whether logits and labels are [S,B,L], of independent labels, and not of classes
    extends_student: bool = False  # whether the method adds parts to the student that are shipped with it
    replaces_modules: bool = (
        False  # whether the student is trained inside the teacher's network, see learn/replacement.py
    )
    couples_models: bool = False  # whether a student's loss depends on the other students
    teacher_joins: bool = False  # whether the trained teacher is one more of these students, and learns on
    refresh_every: int = 1  # steps after which the weights whose answers the other students see are renewed
    couples_examples: bool = False  # whether an example's part of the loss depends on the other examples of its batch
    class_weights: Tensor | None = None  # of the labels' loss, [C], or [2,L] of independent labels; set before training
    recordable: bool = False  # whether a step can be replayed without Python: nothing in forward changes but tensors

    @property
    def title(self) -> str:
        """The method's name in messages."""
        return type(self).__name__

    def choose_layers(self, student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
        """Set `student_features` and `teacher_features` from the networks, in a method that `chooses_layers`.

        It is called before `setup` with a few images `[B,...]` on the networks' device, several times in a run: the
        choice must depend on the architectures alone, not on weights or random numbers.
        """

    def extension(self, student: nn.Module, teacher: nn.Module, images: Tensor) -> Mapping[str, Any]:
        """Plain values from which `kd_cli.models.extended` builds the student, in a method that `extends_student`.

        They must depend on the architectures alone. Raises ConfigError.
        """
        raise NotImplementedError(f"{self.title} extends the student and does not say how")

    def cut(self, student: nn.Module, teacher: nn.Module, images: Tensor) -> tuple[Cut, Cut]:
        """Both networks in as many blocks, in a method that `replaces_modules`; it sets `notes`. Raises ConfigError."""
        raise NotImplementedError(f"{self.title} replaces modules and does not say which")

    def probability(self, progress: float) -> float:
        """The probability that a block is the student's after this share of all steps, where modules are replaced."""
        return 1.0

    def adopt(self, student: nn.Module, teacher: nn.Module) -> None:
        """Copy weights of the trained teacher to the extended student, before it is trained."""

    def setup(self, setting: Setting) -> None:
        """Create the parameters that the outputs' shapes ask for, and raise ConfigError for what cannot be trained.

        It is called once before training, under a generator of its own. An override calls `super().setup(setting)`.
        """
        name = self.title
        if setting.multilabel and not self.multilabel:
            raise ConfigError(
                f"{name} learns which of several classes an example has, and the data have independent labels",
                hint="method=binary, or method=binary_hard without a teacher",
            )
        if self.multilabel and not setting.multilabel:
            raise ConfigError(
                f"{name} learns independent labels, and the data have {setting.classes} classes",
                hint="method=soft_targets; or dataset.positive=NAME, which makes one class a label",
            )
        if setting.classes < self.min_classes:
            raise ConfigError(f"{name} needs {self.min_classes} classes or more, and the data have {setting.classes}")
        if setting.smallest_batch < self.min_batch:
            raise ConfigError(
                f"{name} needs batches of {self.min_batch} examples or more, and the smallest has "
                f"{setting.smallest_batch}",
                hint="a larger training.batch_size",
            )

    def check_temperature(self, T: float) -> None:
        """Raise ConfigError for a run's T that the method cannot do with; called before anything is trained."""

    def undecayed(self) -> list[nn.Parameter]:
        """Those of the method's parameters that weight decay must not reach."""
        return []

    def of_teacher_alone(self, teacher: Outputs, batch: Batch, weights: Weights) -> Tensor | None:
        """The part of the loss that does not depend on the student, [S]: what a student equal to the teacher leaves.

        A learned temperature needs it: the loss less this part tells how far student and teacher disagree at a T. It
        is 0 for a divergence, and None where the method does not say.
        """
        return None if self.has_T else torch.zeros_like(weights.T)

    @classmethod
    def stack(cls, methods: Sequence[Self]) -> Self:
        """One method for S students from S methods that differ in the `stackable` keys at most."""
        return methods[0]

    @abstractmethod
    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        """Return `loss`, [S], which is minimised, and the terms to log beside it, [S] each, before weighting.

        `student.logits` are [S,B,C], `teacher.logits` [1,B,C] or [S,B,C] (None without a teacher), `batch.labels` and
        `batch.index` [S,B]. Losses are means over the examples. A term `name` becomes the column `name_loss` of
        metrics.jsonl; a temperature, `T` or `name_T`, keeps its name.
        """

    def weighted_terms(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        """The terms of the loss times their weights, [S] each, whose sum is the loss; shapes as in `forward`.

        `soft` is the loss with beta = 0, `hard` what beta adds to it. A method that is made of several overrides this.
        """
        without_labels = replace(weights, beta=torch.zeros_like(weights.beta))
        soft = self(student, teacher, batch, without_labels)["loss"]
        return {"soft": soft, "hard": self(student, teacher, batch, weights)["loss"] - soft}

    def hard_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The cross entropy with the labels at T = 1, [S] of [S,B,C] and [S,B]; by class where classes have weights."""
        return hard_cross_entropy(logits, labels, self.class_weights)

    def weigh_classes(self, weights: Tensor) -> None:
        """Weigh the labels' loss, by class [C] or by absence and presence of each label [2,L], in all of its parts."""
        for part in self.modules():
            if isinstance(part, Method):
                part.class_weights = weights

    def own_weights(self) -> Mapping[str, float]:
        """The numbers that the method multiplies alpha with, by their keys; "alpha" is 1, for methods without such."""
        return {"alpha": 1.0}

    def unusual_weights(self, *, alpha: float, beta: float) -> list[str]:
        """A sentence for each weight less than a third of the `published` ones, or more than three times as much.

        A weight of 0 is meant and not named.
        """
        found = []
        for key, least, most in self.published:
            weight = self.own_weights()[key] * alpha / beta if beta > 0 else 0.0
            if weight > 0 and not least / UNUSUAL <= weight <= most * UNUSUAL:
                name = "alpha / beta" if key == "alpha" else f"method.{key} * alpha / beta"
                recipes = f"{least:.2g}" if least == most else f"{least:.2g} to {most:.2g}"
                found.append(f"{self.title}: {name} = {weight:.3g} is unusual; published recipes have {recipes}")
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Terms:
        terms: Terms = super().__call__(*args, **kwargs)
        return terms
