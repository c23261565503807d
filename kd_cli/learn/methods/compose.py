"""Methods made of methods: a weighted sum, and weights and temperatures that change during training."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Method, Setting, Terms, Weights
from kd_cli.learn.methods.per_model import FunctionMethod, is_loss_function
from kd_cli.learn.methods.ramps import Factors, Ramp
from kd_cli.learn.outputs import Outputs
from kd_cli.nearest import did_you_mean


class Composite(Method):
    """A method that calls other methods, its `parts`, and has factors for them. It needs what any of them needs."""

    def __init__(self, parts: Mapping[str, Any], factors: Sequence[Factors]) -> None:
        super().__init__()
        methods = [as_method(name, part) for name, part in parts.items()]
        if extending := [method.title for method in methods if method.extends_student]:
            raise ConfigError(
                f"{extending[0]} makes the student another network, and cannot be a part of another method",
                hint="method=simkd by itself",
            )
        if replacing := [method.title for method in methods if method.replaces_modules]:
            raise ConfigError(
                f"{replacing[0]} trains the student inside its teacher, and cannot be a part of another method",
                hint="method=theseus by itself",
            )
        if any(method.teacher_joins for method in methods):
            raise ConfigError(
                "method.with_teacher=true makes the teacher a peer, and cannot be a part of another method",
                hint="method=mutual by itself",
            )
        self.names = list(parts)
        self.parts, self.factors = nn.ModuleList(methods), nn.ModuleList(factors)
        self.needs_teacher = any(m.needs_teacher for m in methods)
        self.needs_labels = any(m.needs_labels for m in methods)
        self.has_T = any(m.has_T for m in methods)
        self.has_alpha = any(m.has_alpha for m in methods)
        self.min_classes = max(m.min_classes for m in methods)
        self.min_batch = max(m.min_batch for m in methods)
        self.couples_models = any(m.couples_models for m in methods)
        refresh = {m.refresh_every for m in methods if m.couples_models}
        if len(refresh) > 1:
            raise ConfigError(
                f"the methods renew the peers' answers every {sorted(refresh)} steps; it must be one number"
            )
        self.refresh_every = max(refresh, default=1)
        self.couples_examples = any(m.couples_examples for m in methods)
        self.multilabel = all(m.multilabel for m in methods)
        self.learns_T = any(m.learns_T for m in methods) or self.learns_T
        self.changes_T = any(m.changes_T for m in methods) or self.changes_T
        self.chooses_layers = any(m.chooses_layers for m in methods)
        self._collect_features()
        self.recordable = all(m.recordable for m in [*methods, *factors])

    @property
    def methods(self) -> list[Method]:
        """The parts, typed."""
        return [part for part in self.parts if isinstance(part, Method)]

    def factors_at(self, progress: float) -> list[Tensor]:
        """The factors at this share of the training, [S] each."""
        return [factor(progress) for factor in self.factors]

    def choose_layers(self, student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
        for method in self.methods:
            if method.chooses_layers:
                method.choose_layers(student, teacher, images)
        self._collect_features()

    def _collect_features(self) -> None:
        methods = self.methods
        self.student_features = list(dict.fromkeys(str(path) for m in methods for path in m.student_features))
        self.teacher_features = list(dict.fromkeys(str(path) for m in methods for path in m.teacher_features))

    def check_temperature(self, T: float) -> None:
        for method in self.methods:
            method.check_temperature(T)

    def undecayed(self) -> list[nn.Parameter]:
        return [parameter for method in self.methods for parameter in method.undecayed()]

    def setup(self, setting: Setting) -> None:
        for method in self.methods:
            student, teacher = seen_by(method, setting.student, setting.teacher)
            method.setup(replace(setting, student=student, teacher=teacher))
        super().setup(setting)
        self.notes = list(dict.fromkeys(note for method in self.methods for note in method.notes))

    @classmethod
    def stack(cls, methods: Sequence[Any]) -> Any:
        stacked = copy.deepcopy(methods[0])
        stacked.parts = stacks_of(method.parts for method in methods)
        stacked.factors = stacks_of(method.factors for method in methods)
        return stacked


class Sum(Composite):
    """`sum_k w_k L_k + beta * L_hard`: methods, each with its `alpha` and T, times its weight; one term of the labels.

    `weights` gives a part's weight by the part's name, a number or a `Ramp`; it is 1 where it is not given. The parts
    are called with beta = 0, so that the labels count once. A part that learns from labels only (`hard`,
    `label_smoothing`) is the term of the labels, in place of `beta * L_hard`, and keeps its beta.
    """

    stackable = ("weights",)

    def __init__(self, weights: Mapping[str, float | Ramp] | None = None, **parts: Any) -> None:
        if not parts:
            raise ConfigError("method=sum has no methods to sum", hint="method@method.first=soft_targets")
        weights = weights or {}
        for name in weights:
            if name not in parts:
                raise ConfigError(
                    f"method.weights.{name} is the weight of no method in the sum",
                    hint=did_you_mean(name, list(parts)) or f"it has {', '.join(parts)}",
                )
        super().__init__(parts, [Factors.of(weights.get(name, 1.0), f"weights.{name}") for name in parts])
        self.multilabel = False  # the sum's own term of the labels is that of classes
        self.of_labels = [not (method.has_alpha or method.needs_teacher) for method in self.methods]

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        hard = self.hard_loss(student.logits, batch.labels)
        loss = torch.zeros_like(hard) if any(self.of_labels) else weights.beta * hard
        terms: dict[str, Tensor] = {}
        for name, factor, found in self._parts(student, teacher, batch, weights):
            loss = loss + factor.to(loss) * found["loss"]
            terms |= {f"{name}_{term}": value for term, value in found.items() if term not in ("loss", "hard")}
        return {"loss": loss, **terms, "hard": hard}

    def weighted_terms(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        """The parts of the sum by their names, and the term of the labels as `hard`."""
        terms = {
            name: factor.to(found["loss"]) * found["loss"]
            for name, factor, found in self._parts(student, teacher, batch, weights)
        }
        if not any(self.of_labels):
            labels = "hard" if "hard" not in terms else "labels"
            terms[labels] = weights.beta * self.hard_loss(student.logits, batch.labels)
        return terms

    def unusual_weights(self, *, alpha: float, beta: float) -> list[str]:
        """The sentences of the parts, each with alpha times its weight at the end of the training."""
        return [
            sentence if weight == 1 else f"{sentence} (alpha is times method.weights.{name} = {weight:g})"
            for name, method, factor in zip(self.names, self.methods, self.factors_at(1.0), strict=True)
            for weight in [float(factor[0])]
            for sentence in method.unusual_weights(alpha=alpha * weight, beta=beta)
        ]

    def of_teacher_alone(self, teacher: Outputs, batch: Batch, weights: Weights) -> Tensor | None:
        total = torch.zeros_like(weights.T)
        for method, factor in zip(self.methods, self.factors_at(batch.progress), strict=True):
            if (part := method.of_teacher_alone(teacher, batch, weights)) is None:
                return None
            total = total + factor.to(part) * part
        return total

    def _parts(
        self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights
    ) -> Iterator[tuple[str, Tensor, Terms]]:
        """Each part's name, factor [S] and terms."""
        without_labels = replace(weights, beta=torch.zeros_like(weights.beta))
        factors = self.factors_at(batch.progress)
        for name, method, of_labels, factor in zip(self.names, self.methods, self.of_labels, factors, strict=True):
            own = weights if of_labels else without_labels
            yield name, factor, method(*seen_by(method, student, teacher), batch, own)


class Scheduled(Composite):
    """A method whose weights and temperature are multiplied by factors that may change during training.

    `of` is the method; `alpha`, `beta` and `T` are factors on the run's alpha, beta and T: numbers, or a `Ramp`.
    """

    stackable = ("alpha", "beta", "T")

    def __init__(self, of: Any, alpha: float | Ramp = 1.0, beta: float | Ramp = 1.0, T: float | Ramp = 1.0) -> None:
        factors = [Factors.of(T, "T", above_zero=True), Factors.of(alpha, "alpha"), Factors.of(beta, "beta")]
        super().__init__({"of": of}, factors)
        self.changes_T = self.changes_T or T != 1

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        return self.methods[0](student, teacher, batch, self.scheduled(weights, batch))

    def weighted_terms(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        return self.methods[0].weighted_terms(student, teacher, batch, self.scheduled(weights, batch))

    def unusual_weights(self, *, alpha: float, beta: float) -> list[str]:
        """The sentences of the method, with its weights at the end of the training."""
        of_alpha, of_beta = (float(factor[0]) for factor in self.factors_at(1.0)[1:])
        found = self.methods[0].unusual_weights(alpha=alpha * of_alpha, beta=beta * of_beta)
        return found if of_alpha == of_beta == 1 else [f"{sentence} (at the end of the schedule)" for sentence in found]

    def of_teacher_alone(self, teacher: Outputs, batch: Batch, weights: Weights) -> Tensor | None:
        return self.methods[0].of_teacher_alone(teacher, batch, self.scheduled(weights, batch))

    def scheduled(self, weights: Weights, batch: Batch) -> Weights:
        """The weights at the batch's share of the training."""
        T, alpha, beta = (factor.to(weights.T) for factor in self.factors_at(batch.progress))
        return Weights(weights.T * T, weights.alpha * alpha, weights.beta * beta)


def stacks_of(lists: Iterable[nn.ModuleList]) -> nn.ModuleList:
    """The modules of several lists, those at the same place as one for several students."""
    places: Iterable[tuple[Any, ...]] = zip(*lists, strict=True)
    return nn.ModuleList(type(modules[0]).stack(modules) for modules in places)


def as_method(name: str, part: Any) -> Method:
    """A part as a method: a `Method`, or a plain loss function of `student`, `teacher`, `labels` as a partial."""
    if isinstance(part, functools.partial) and is_loss_function(part.func):
        return FunctionMethod(part.func, **part.keywords)
    if not isinstance(part, Method):
        raise ConfigError(f"method.{name} is {part!r}, which is no method", hint=f"method@method.{name}=soft_targets")
    return part


def seen_by(method: Method, student: Outputs, teacher: Outputs | None) -> tuple[Outputs, Outputs | None]:
    """Outputs with the features that this method reads, and no others."""

    def own(outputs: Outputs, paths: Sequence[str]) -> Outputs:
        return Outputs(outputs.logits, {str(path): outputs.features[str(path)] for path in paths}, outputs.shown)

    return own(student, method.student_features), None if teacher is None else own(teacher, method.teacher_features)
