"""Turns a composed configuration into the plain values of one run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError

from kd_cli import processes
from kd_cli.config.check import check_config
from kd_cli.config.moved import with_current_names
from kd_cli.config.ranges import interval, normalisation
from kd_cli.config.schema import BATCHNORM_PARTS, OWN_KEYS, RECIPE, TeacherTraining, Training, Transfer
from kd_cli.config.values import QUANTISED, Node, RunConfig, TrainSpec
from kd_cli.errors import ConfigError

LINK_SEEDS = 1000  # between the seeds of two links of a chain: chains of teachers with seeds 0, 1, 2 share none


def run_config(cfg: DictConfig, choices: Mapping[str, Any], written: dict[str, Any] | None = None) -> RunConfig:
    """Check a composed configuration and return it as plain values; `choices` are the groups' option names.

    `written` is `as_written(cfg)` where the caller has it; its parts become the run's.

    Raises ConfigError before any data is read.
    """
    v = check_config(with_current_names(container(cfg, written)))
    teacher, dataset = dict(v["teacher"]), dict(v["dataset"])
    own = {key: teacher.pop(key) for key in OWN_KEYS["teacher"]}
    val_fraction, positive = dataset.pop("val_fraction"), dataset.pop("positive", None)
    return RunConfig(
        teacher=train_spec(v, "teacher", {**teacher, "input": own["input"]}, choices, normalize=own["normalize"]),
        checkpoint=own["checkpoint"],
        checkpoint_key=own["checkpoint_key"],
        members=own["members"],
        combine=own["combine"],
        student=train_spec(v, "student", v["student"], choices),
        transfer=transfer_set(v["transfer"]),
        diagnostics=v["diagnostics"],
        latency=v["latency"],
        cuda_graphs=v["cuda_graphs"],
        dataset=dataset,
        val_fraction=val_fraction,
        positive=positive,
        method_name=option_name("method", v["method"], choices),
        method=v["method"],
        T=v["T"],
        alpha=v["alpha"],
        beta=v["beta"],
        device=v["device"],
        precision=v["precision"],
        data_dir=folder(v["data_dir"], "KD_DATA", "data"),
        store_dir=folder(v["store_dir"], "KD_STORE", ""),
        every=interval("checkpoint.every", v["checkpoint"]["every"]),
        peers=peers(v, choices),
        chain=assistants(v, own, choices),
        generations=own["generations"],
        resume=v["resume"] is not None,
    )


def frames_around(role: str, context: int, dataset: Node) -> str:
    """The columns of an example of frames that have this context: (2 context + 1) frames of `mels` numbers."""
    whole, width = dataset.get("context"), dataset.get("mels")
    if whole is None or width is None:
        raise ConfigError(
            f"{role}.input.context is {context}, and the data set has no frames with context",
            hint="dataset=spoken_digits has; columns of a table are input.columns",
        )
    if context > whole:
        raise ConfigError(
            f"{role}.input.context is {context}, and dataset.context is {whole}", hint=f"dataset.context={context}"
        )
    return f"{(whole - context) * width}:{(whole + context + 1) * width}"


def as_written(cfg: DictConfig) -> dict[str, Any]:
    """Return a configuration as plain dictionaries and lists, interpolations as they are written."""
    values = OmegaConf.to_container(cfg, enum_to_str=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def container(cfg: DictConfig, written: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a configuration as plain dictionaries and lists, interpolations resolved."""
    if written is not None and "${" not in json.dumps(written, default=str):
        return written
    try:
        values = OmegaConf.to_container(cfg, resolve=True)
    except InterpolationToMissingValueError:
        values = OmegaConf.to_container(cfg)  # the missing value is named by the check
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def train_spec(
    v: dict[str, Any], role: str, model: Node, choices: Mapping[str, Any], *, normalize: Any = "data"
) -> TrainSpec:
    """Return a role's model and how it is trained; `model` has the role's keys `input`, `prune`, `quantise` too."""
    model = dict(model)
    quantise, prune = model.pop("quantise", None), model.pop("prune", None)
    view = dict(model.pop("input", None) or {})
    if "normalize" in view:
        if normalize != "data":
            raise ConfigError(f"{role}.normalize and {role}.input.normalize are both given", hint="give one of them")
        normalize = normalisation(f"{role}.input.normalize", view.pop("normalize"))
    if "context" in view:
        view = {**view, "columns": frames_around(role, view.pop("context"), v["dataset"])}
    prefix = "teacher_" if role == "teacher" else ""
    training = v[f"{prefix}training"]
    kind = TeacherTraining if role == "teacher" else Training
    own = {key: training[key] for key in RECIPE}
    if role == "teacher":
        own["label_smoothing"] = training.get("label_smoothing", 0.0)  # which earlier versions did not have
    spec = TrainSpec(
        name=option_name(role, model, choices),
        model=model,
        epochs=training["epochs"],
        batch_size=training["batch_size"],
        augment=augmentation(training),
        optimizer=v[f"{prefix}optimizer"],
        schedule=v[f"{prefix}schedule"],
        seed=training.get("seed", v["seed"]),
        precision=v["precision"],
        keep=training["keep"],
        batchnorm=training["batchnorm"],
        normalize=normalize,
        prune=prune,
        input=view or None,
        recipe=kind(**own).recipe() | batchnorm_parts(training),
    )
    if quantise is None:
        return spec
    node = {"_target_": QUANTISED, "network": {**model, "_partial_": True}}
    return replace(spec, name=spec.title, model=node)


def batchnorm_parts(training: dict[str, Any]) -> dict[str, int]:
    """Return what a recipe says where each of several processes normalises its part of a batch by itself."""
    n = processes.count()
    return {BATCHNORM_PARTS: n} if n > 1 and not training["sync_batchnorm"] else {}


def peers(v: dict[str, Any], choices: Mapping[str, Any]) -> tuple[TrainSpec, ...]:
    """Return the students that learn from each other, each with a seed of its own, of which the first is the student.

    Named models are there as pairs of their name and their node.
    """
    given = v["peers"]
    if given is None:
        return ()
    student = train_spec(v, "student", v["student"], choices)
    if not isinstance(given, list):
        return tuple(replace(student, seed=student.seed + k) for k in range(given))
    names = [name for name, _ in given]
    if names[0] != student.name:
        raise ConfigError(
            f"peers=[{','.join(names)}] begins with {names[0]}, and the student is {student.name}: the first peer is "
            "the run's student",
            hint=f"student={names[0]}",
        )
    others = [
        replace(student, name=name, model=node, seed=student.seed + k) for k, (name, node) in enumerate(given) if k
    ]
    return (student, *others)


def assistants(v: dict[str, Any], own: Mapping[str, Any], choices: Mapping[str, Any]) -> tuple[TrainSpec, ...]:
    """Return the models between teacher and student, which are trained as the student is.

    Their seeds depend on the teacher's, so that students of several seeds share them. Raises ConfigError.
    """
    student = replace(train_spec(v, "student", v["student"], choices), prune=None)
    named = [(student.name, student.model)] * (own["generations"] - 1)
    if own["chain"] is not None:
        named = [(name, node) for name, node in own["chain"]]
        teacher = {key: value for key, value in v["teacher"].items() if key not in own}
        seen = [("the teacher", teacher), ("the student", student.model)]
        for k, (name, node) in enumerate(named):
            if (other := next((what for what, known in seen if known == node), None)) is not None:
                raise ConfigError(
                    f"teacher.chain loops: its model {k + 1}, {name}, is {other} again",
                    hint="other models or sizes; teacher.generations=3 trains one architecture several times",
                )
            seen.append((f"model {k + 1}", node))
    seed = v["teacher_training"]["seed"]
    return tuple(
        replace(student, name=name, model=node, seed=seed + LINK_SEEDS * k) for k, (name, node) in enumerate(named, 1)
    )


def transfer_set(values: dict[str, Any]) -> Transfer:
    """Return the transfer set; another data set's labels are never used."""
    transfer = Transfer(**values)
    transfer.labels = transfer.labels and transfer.data is None
    return transfer


def augmentation(training: dict[str, Any]) -> Node:
    """Return the augmentation among a training's keys; later keys only where used, so that older fingerprints hold."""
    later = ("rotate", "shear", "scale")
    now = {key: training[key] for key in ("jitter", "crop", "flip")}
    return now | {key: training[key] for key in later if training[key]}


def option_name(group: str, node: Node, choices: Mapping[str, Any]) -> str:
    """Return the name of a group's chosen option, else the last part of its target."""
    return str(choices.get(group) or node["_target_"].rpartition(".")[2])


def folder(value: str | None, variable: str, name: str) -> Path:
    """Return a folder from its key, else from its environment variable, else in the user's cache."""
    if value or os.environ.get(variable):
        return Path(value or os.environ[variable]).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "kd-cli" / name
