"""Teachers that are answers and no module: built from the configuration, refused where only a network can teach."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from kd_cli.answers.base import Answers, Given
from kd_cli.config.build import build, locate
from kd_cli.config.fingerprint import code_of, code_version
from kd_cli.config.values import RunConfig, TrainSpec
from kd_cli.data.source import Dataset
from kd_cli.errors import ConfigError
from kd_cli.learn.methods import Method
from kd_cli.runs.summary import Report, results_on_test

PATHS = ("answers", "test_answers")  # of files whose contents count, wherever they lie


def is_answers(spec: TrainSpec) -> bool:
    """Whether a teacher's spec is one of answers."""
    target = locate(spec.model["_target_"])
    return isinstance(target, type) and issubclass(target, Answers)


def make_answers(config: RunConfig) -> Answers:
    """The teacher of a configuration. Raises ConfigError or DataError."""
    own = {} if config.checkpoint is None else {"checkpoint": config.checkpoint}
    made = build(config.teacher.model, where="teacher", **own)
    assert isinstance(made, Answers)
    return made


def check_answering(config: RunConfig, method: Method, *, augmented: bool) -> None:
    """ConfigError where the student must be taught by a network: on augmented images, on others, by its features."""
    name = f"teacher={config.teacher.name}"
    if method.teacher_features or method.chooses_layers or method.extends_student:
        raise ConfigError(
            f"method={config.method_name} reads the teacher's features, and {name} has answers only",
            hint="method=soft_targets, dkd or another of logits",
        )
    if method.replaces_modules:
        raise ConfigError(
            f"method={config.method_name} puts modules of the teacher into the student, and {name} has answers only",
            hint="method=soft_targets, dkd or another of logits",
        )
    if augmented:
        keys = [f"training.{key}={str(value).lower()}" for key, value in config.student.augment.items() if value]
        off = " ".join(f"{key.partition('=')[0]}={'false' if key.endswith('true') else 0}" for key in keys)
        raise ConfigError(
            f"{name} answers for the images as they are, and the students' are augmented ({', '.join(keys)})", hint=off
        )
    if config.transfer.data is not None:
        raise ConfigError(f"{name} answers for the training data, and transfer.data is given")
    if config.members > 1:
        raise ConfigError(f"{name} is one teacher, and teacher.members is {config.members}")


def facts_of(answers: Answers, config: RunConfig, data: str) -> dict[str, Any]:
    """What the answers' fingerprint is made of; `data` is that of the data set."""
    named = config.teacher.model.get("estimator")
    code: Mapping[str, str] = code_version(config.teacher.model)
    if isinstance(named, str) and "." in named:
        code = {**code, **code_of(named)}
    return {
        "kind": "answers",
        "by": {key: value for key, value in config.teacher.model.items() if key not in PATHS},
        "data": data,
        "normalize": config.teacher.normalize,
        "seed": config.teacher.seed,
        "code": dict(code),
        **answers.facts(),
    }


def answered(answers: Answers, spec: TrainSpec, dataset: Dataset) -> tuple[dict[str, Tensor], Report]:
    """Logits of the parts by name, and what a summary says of the teacher; `test` is None where it is not known."""
    started = time.perf_counter()
    given: Given = answers.answer(dataset, seed=spec.seed, normalize=spec.normalize)
    outputs = {"train": given.train} | ({} if given.test is None else {"test": given.test})
    return outputs, {
        "name": answers.title,
        "parameters": None,
        "flops": None,
        "epochs": None,
        "seconds": round(time.perf_counter() - started, 3),
        "val": None,
        "test": None if given.test is None else results_on_test(given.test, dataset),
        "notes": list(given.notes),
    }
