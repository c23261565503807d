"""Methods written for one student: plain `[B,C]` shapes, as published losses have them."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Method, Terms, Weights
from kd_cli.learn.outputs import Outputs


class PerModelMethod(Method):
    """A method whose `loss` sees one student: logits [B,C], features [B,...], labels [B], scalar weights."""

    @abstractmethod
    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Tensor | Terms:
        """The loss, a scalar; or a dictionary with `loss` and the terms to log beside it."""

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        found = [
            self._terms(
                self.loss(
                    _of_model(student, s),
                    None if teacher is None else _of_model(teacher, s),
                    replace(batch, index=_row(batch.index, s), labels=_row(batch.labels, s)),
                    Weights(_row(weights.T, s), _row(weights.alpha, s), _row(weights.beta, s)),
                )
            )
            for s in range(len(student.logits))
        ]
        return {name: torch.stack([terms[name] for terms in found]) for name in found[0]}

    def _terms(self, loss: Tensor | Terms) -> Terms:
        terms = loss if isinstance(loss, Mapping) else {"loss": loss}
        if "loss" not in terms:
            raise ConfigError(f"{self.title}: the loss returned {sorted(terms)}, and no 'loss' among them")
        for name, term in terms.items():
            if not isinstance(term, Tensor) or term.dim() != 0:
                found = f"of shape {list(term.shape)}" if isinstance(term, Tensor) else f"a {type(term).__name__}"
                raise ConfigError(
                    f"{self.title}: {name!r} of one student is {found}; it must be a tensor without dimensions",
                    hint="take the mean over the examples, and let no .item() or float() make a number of it",
                )
        return terms


class FunctionMethod(PerModelMethod):
    """A plain function as a method: `f(student, teacher, labels)`, [B,C], [B,C] and [B] -> a scalar or a dictionary.

    It also gets those of `T`, `alpha` and `beta` that it has parameters for, and the keys of its YAML file.
    """

    def __init__(self, function: Callable[..., Any], **keys: Any) -> None:
        super().__init__()
        self.function, self.keys = function, keys
        self.parameters_taken = set(inspect.signature(function).parameters) - keys.keys()  # a key fixes its parameter
        self.needs_teacher = "teacher" in self.parameters_taken
        self.has_T, self.has_alpha = "T" in self.parameters_taken, "alpha" in self.parameters_taken
        self.needs_labels = "labels" in self.parameters_taken

    @property
    def title(self) -> str:
        return self.function.__name__

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Tensor | Terms:
        values = {"labels": batch.labels, "T": weights.T, "alpha": weights.alpha, "beta": weights.beta}
        if teacher is not None:
            values["teacher"] = teacher.logits
        taken = {name: value for name, value in values.items() if name in self.parameters_taken}
        found: Tensor | Terms = self.function(student.logits, **taken, **self.keys)
        return found


def is_loss_function(target: Any) -> bool:
    """Whether this is a plain function of `student` and more, to be used as a method."""
    if not inspect.isfunction(target):
        return False
    names = list(inspect.signature(target).parameters)
    return names[:1] == ["student"] and bool({"teacher", "labels"} & set(names))


def _of_model(outputs: Outputs, s: int) -> Outputs:
    return Outputs(_row(outputs.logits, s), {path: _row(x, s) for path, x in outputs.features.items()})


def _row(x: Tensor, s: int) -> Tensor:
    return x[0] if len(x) == 1 else x[s]
