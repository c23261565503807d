"""`teacher=sklearn`: any classifier with `fit` and `predict_proba`, fitted on the data's training part."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd_cli.answers.base import Answers, Given, as_logits, network_input
from kd_cli.data.source import Dataset, Split
from kd_cli.errors import ConfigError, first_line
from kd_cli.nearest import did_you_mean


class SklearnAnswers(Answers):
    """The probabilities of a classifier that is fitted on the training part: images [N, features], one class each.

    `estimator` is a class of scikit-learn by its name, any class by its full name (`xgboost.XGBClassifier`), or an
    object; `options` are the arguments of a class.
    """

    pending = "to fit"

    def __init__(self, *, estimator: Any, options: Mapping[str, Any] | None = None) -> None:
        self.estimator = _made(estimator, dict(options or {}))
        self.title = type(self.estimator).__name__
        if not all(callable(getattr(self.estimator, name, None)) for name in ("fit", "predict_proba")):
            raise ConfigError(
                f"teacher.estimator is {self.title}, which has no predict_proba to teach with",
                hint="teacher.estimator=LogisticRegression; CalibratedClassifierCV gives others probabilities",
            )

    def facts(self) -> dict[str, Any]:
        kind = type(self.estimator)
        package = importlib.import_module(kind.__module__.partition(".")[0])
        parameters = sorted((name, repr(value)) for name, value in self._parameters().items())
        version = str(getattr(package, "__version__", ""))
        return {"estimator": f"{kind.__module__}.{kind.__qualname__}", "parameters": parameters, "version": version}

    def check(self, dataset: Dataset) -> None:
        if dataset.multilabel:
            raise ConfigError(
                "teacher=sklearn answers with one class for each example, and the data have independent labels"
            )

    def answer(self, dataset: Dataset, *, seed: int, normalize: Any) -> Given:
        if self._parameters().get("random_state", 0) is None:
            self.estimator.set_params(random_state=seed)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                self.estimator.fit(_features(dataset.train, dataset), dataset.train.labels.numpy())
                train, test = (self._probabilities(split, dataset) for split in (dataset.train, dataset.test))
            except (ValueError, TypeError, MemoryError) as error:
                raise ConfigError(f"{self.title} cannot be fitted to {dataset.name}: {first_line(error)}") from error
        notes = list(dict.fromkeys(f"{self.title}: {str(one.message).splitlines()[0]}" for one in caught))
        logits, said = as_logits(train, kind="probabilities", multilabel=False, where=self.title)
        return Given(
            logits, as_logits(test, kind="probabilities", multilabel=False, where=self.title)[0], (*notes, *said)
        )

    def _parameters(self) -> dict[str, Any]:
        found = self.estimator.get_params() if callable(getattr(self.estimator, "get_params", None)) else {}
        return dict(found)

    def _probabilities(self, split: Split, dataset: Dataset) -> Tensor:
        """[N,C]; 0 for a class that the training part does not have."""
        found = np.asarray(self.estimator.predict_proba(_features(split, dataset)), dtype=np.float64)
        classes = np.asarray(getattr(self.estimator, "classes_", np.unique(dataset.train.labels.numpy()))).astype(int)
        if found.shape != (len(split), len(classes)):
            raise ConfigError(
                f"{self.title}.predict_proba gave {found.shape} for {len(split)} examples of {len(classes)} classes"
            )
        probabilities = torch.zeros(len(split), dataset.classes, dtype=torch.float64)
        probabilities[:, torch.from_numpy(classes)] = torch.from_numpy(found)
        return probabilities


def _features(split: Split, dataset: Dataset) -> Any:
    return network_input(split, dataset).flatten(1).numpy()


def _made(estimator: Any, options: dict[str, Any]) -> Any:
    """The estimator with its options. ConfigError for a name that is no class, and for options that it refuses."""
    if not isinstance(estimator, str):
        if options:
            raise ConfigError("teacher.options are for an estimator that is named; give this one's in its own node")
        return estimator
    kind = _named(estimator)
    try:
        return kind(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"teacher.options do not suit {kind.__name__}: {first_line(error)}") from error


def _named(name: str) -> type:
    if "." not in name:
        try:
            from sklearn.utils import all_estimators
        except ModuleNotFoundError as error:
            raise ConfigError(
                "teacher=sklearn needs scikit-learn, which is not installed", hint="pip install 'kd-cli[sklearn]'"
            ) from error
        known = dict(all_estimators(type_filter="classifier"))
        if name not in known:
            hint = did_you_mean(name, known) or "a class by its full name: xgboost.XGBClassifier"
            raise ConfigError(f"teacher.estimator is {name!r}, which is no classifier of scikit-learn", hint=hint)
        found: Any = known[name]
        return found
    module, _, last = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), last, None)
    except ModuleNotFoundError as error:
        if error.name is None or not (module == error.name or module.startswith(error.name + ".")):
            raise
        raise ConfigError(f"teacher.estimator is {name}, and there is no module {error.name}") from error
    if not isinstance(found, type):
        raise ConfigError(f"teacher.estimator is {name}, and {module} has no class {last}")
    return found
