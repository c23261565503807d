"""Checks a composed configuration against the schema. Every error is raised before any data is read."""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kd_cli.config.ranges import check_number, input_view, interval, normalisation
from kd_cli.config.schema import (
    NODES,
    Allowed,
    DatasetKeys,
    OptimizerKeys,
    Pruning,
    Schema,
    StudentKeys,
    TeacherKeys,
)
from kd_cli.errors import ConfigError
from kd_cli.nearest import did_you_mean
from kd_cli.numeric import is_number, is_whole

# What the former group `loss` had, and the option of `preset` that it has become.
MOST_PEERS = 100
FORMER_LOSSES = {
    "full": "soft_and_hard",
    "soft_only": "soft_only",
    "without_T2": "without_T2",
    "logits": "logits_only",
    "label_smoothing": "label_smoothing_only",
    "hard": "hard_only",
}


def check_config(values: dict[str, Any]) -> dict[str, Any]:
    """Return the values of all keys, with the default of each one that a record of an older version lacks.

    Raises ConfigError for the first key that is unknown, missing or not allowed, and for keys that exclude each other.
    """
    refuse_missing(values)
    refuse_former_loss(values)
    checked = check_section(values, Schema)
    refuse_infinite(values)
    for group in ("experiment", "preset"):
        if checked[group] is not None:
            raise ConfigError(f"there is no option {group}={checked[group]}", hint="see kd-run --help")
    for group in NODES:
        if not isinstance(checked[group], dict) or "_target_" not in checked[group]:
            raise ConfigError(
                f"{group} is {checked[group]!r}; it needs an option of its group", hint="see kd-run --help"
            )
    checked["teacher"] = check_own_keys(checked["teacher"], TeacherKeys, "teacher")
    checked["student"] = check_own_keys(checked["student"], StudentKeys, "student")
    checked["dataset"] = check_own_keys(checked["dataset"], DatasetKeys, "dataset")
    for group in ("optimizer", "teacher_optimizer"):
        if "lr" in checked[group]:
            check_own_keys(checked[group], OptimizerKeys, group)
    check_transfer(checked["transfer"], checked["alpha"])
    check_peers(checked["peers"], with_teacher=checked["method"].get("with_teacher") is True)
    check_chain(checked["teacher"]["chain"], checked)
    for section in ("training", "teacher_training"):
        checked[section]["lr_factors"] = check_lr_factors(section, checked[section]["lr_factors"])
    check_together(checked)
    return checked


# ---------------------------------------------------------------- one key


def check_section(values: Any, section: type, path: str = "") -> dict[str, Any]:
    """Return a section's values, checked field by field. ConfigError names a key that the section does not have."""
    if not isinstance(values, dict):
        raise ConfigError(f"{path} is {values!r}; it must be a section of keys")
    fields = dataclasses.fields(section)
    names = [f.name for f in fields]
    prefix = f"{path}." if path else ""
    for name in values:
        if name not in names:  # added with + or ++
            hint = did_you_mean(str(name), names) or (None if path else "kd-run --help lists every key")
            raise ConfigError(f"there is no key {prefix + str(name)!r}", hint=hint)
    return check_fields(values, section, path)


def check_own_keys(node: dict[str, Any], section: type, path: str) -> dict[str, Any]:
    """Return a group's node with those of its keys checked that kd-run reads itself; the others are its target's."""
    return node | check_fields(node, section, path)


def check_fields(values: Mapping[str, Any], section: type, path: str) -> dict[str, Any]:
    """Return the value of each field of a section: as given, checked, else the field's default."""
    kinds = _kinds(section)
    defaults = section()
    checked = {}
    for f in dataclasses.fields(section):
        name = f"{path}.{f.name}" if path else f.name
        kind = kinds[f.name]
        if dataclasses.is_dataclass(kind):
            checked[f.name] = check_section(values.get(f.name, {}), typing.cast(type, kind), name)
        else:
            value = values.get(f.name, getattr(defaults, f.name))
            checked[f.name] = check_value(name, value, kind, f.metadata.get("allowed"))
    return checked


_kinds = functools.cache(typing.get_type_hints)  # evaluates the annotations of a section, once a process


def check_value(name: str, value: Any, kind: Any, allowed: Allowed | None) -> Any:
    """Return the value of one key. ConfigError says what is allowed instead."""
    if allowed is None:
        if kind is Any or isinstance(value, kind):
            return value
        words = {bool: "true or false", str: "a text"}.get(kind, "a text, or null")
        raise ConfigError(f"{name} is {value!r}; it must be {words}")
    if allowed.auto and value == "auto":
        return value
    if value is None and type(None) in typing.get_args(kind):
        return None
    if allowed.choices:
        if value not in allowed.choices:
            names = [*allowed.choices, *(["null"] if type(None) in typing.get_args(kind) else [])]
            joined = " or ".join(names) if len(names) == 2 else "one of " + ", ".join(names)
            raise ConfigError(
                f"{name} is {value!r}; it must be {joined}", hint=did_you_mean(str(value), allowed.choices)
            )
        return value
    if allowed.classes:
        if not isinstance(value, list) or not all(is_whole(item) or isinstance(item, str) for item in value):
            raise ConfigError(f"{name} is {value!r}; it must be a list of classes, by number or name")
        return value
    if allowed.interval:
        interval(name, value)
        return value
    if allowed.view:
        return input_view(name, value)
    if allowed.pruning:
        return check_pruning(name, value)
    if allowed.normalisation:
        return normalisation(name, value)
    return check_number(name, value, allowed)


def check_pruning(name: str, value: Any) -> dict[str, Any] | None:
    """Return how a student is pruned, all keys of it; a number is the share of its units. Raises ConfigError."""
    if value is None:
        return None
    if not isinstance(value, dict):
        value = {"amount": check_value(name, value, float, Allowed(above=0, below=1, example="0.5"))}
    found = check_section(value, Pruning, name)
    if found["begin"] >= found["end"]:
        raise ConfigError(
            f"{name}.begin is {found['begin']:g} and {name}.end {found['end']:g}; pruning must begin before it ends",
            hint=f"'{name}={{amount: {found['amount']:g}, begin: 0.1, end: 0.5}}'",
        )
    return found


# ---------------------------------------------------------------- keys together


def check_transfer(transfer: dict[str, Any], alpha: float | str) -> None:
    """ConfigError for a transfer set that cannot be, as far as that shows without the data."""
    if transfer["omit"] and transfer["only"]:
        raise ConfigError("transfer.omit and transfer.only are both given", hint="give one of them")
    data = transfer["data"]
    if data is not None and (not isinstance(data, dict) or "_target_" not in data):
        raise ConfigError(f"transfer.data is {data!r}; it must be the name of a data set", hint="transfer.data=kmnist")
    if alpha == 0 and (data is not None or not transfer["labels"]):
        raise ConfigError("the transfer set has no labels and alpha is 0: there is nothing to learn from")


def check_peers(peers: Any, *, with_teacher: bool = False) -> None:
    """ConfigError for a number or list of peers that cannot be; a teacher that learns on is one more."""
    if peers is None:
        return
    n = len(peers) if isinstance(peers, list) else peers
    if not is_whole(n) or n > MOST_PEERS:
        raise ConfigError(
            f"peers is {peers!r}; it must be a whole number from 2 to {MOST_PEERS}, or a list of models",
            hint="peers=3, or peers=[smallmlp,cnn]",
        )
    if n < (1 if with_teacher else 2):
        raise ConfigError(f"peers is {peers!r}: peers learn from each other, and it takes two", hint="peers=2")


def check_chain(chain: Any, v: dict[str, Any]) -> None:
    """ConfigError for assistants between teacher and student that cannot be."""
    if (chain is not None or v["teacher"]["generations"] > 1) and "auto" in (v["T"], v["alpha"]):
        raise ConfigError(
            "T=auto and alpha=auto choose for the run's student, and teacher.chain and teacher.generations train "
            "other models before it",
            hint="give T and alpha, or sweep over them: kd-run -m T=1,2,4",
        )
    if chain is None:
        return
    if not isinstance(chain, list) or not chain:
        raise ConfigError(
            f"teacher.chain is {chain!r}; it must be a list of one model or more",
            hint="teacher.chain=[smallmlp], or null for a student that the teacher itself teaches",
        )
    if v["teacher"]["generations"] > 1:
        raise ConfigError("teacher.chain and teacher.generations are both given", hint="give one of them")


def check_lr_factors(section: str, factors: Any) -> dict[str, float] | None:
    """Return factors of the learning rate by the paths of modules. ConfigError for what are no numbers above 0."""
    if factors is None:
        return None
    sound = isinstance(factors, dict) and factors
    if not sound or not all(is_number(factor) and factor > 0 for factor in factors.values()):
        raise ConfigError(
            f"{section}.lr_factors is {factors!r}; it must give modules numbers above 0",
            hint=f"'{section}.lr_factors={{features: 0.1}}'; {section}.freeze does not train a part at all",
        )
    return {str(path): factor for path, factor in factors.items()}  # 0 is a path in nn.Sequential


def check_together(v: dict[str, Any]) -> None:
    """ConfigError for keys whose values exclude each other."""
    if v["alpha"] == 0 and v["beta"] == 0:
        raise ConfigError("alpha and beta are both 0: there is nothing to learn from", hint="set one of them above 0")
    checkpoint = v["teacher"]["checkpoint"]
    if checkpoint is not None and v["teacher"]["members"] > 1:
        raise ConfigError("teacher.checkpoint is one model's weights, and teacher.members is more than 1")
    if checkpoint is not None and not Path(checkpoint).expanduser().is_file():
        raise ConfigError(f"teacher.checkpoint is {checkpoint}, and there is no such file")
    if v["dataset"]["val_fraction"] > 0:
        return
    if "best" in (v["training"]["keep"], v["teacher_training"]["keep"]):
        choice = "training.keep=best chooses"
    elif v["training"]["patience"] or v["teacher_training"]["patience"]:
        choice = "training.patience chooses"
    elif "auto" in (v["T"], v["alpha"]):
        choice = "T=auto and alpha=auto choose"
    else:
        return
    raise ConfigError(f"{choice} on validation data, and dataset.val_fraction is 0", hint="dataset.val_fraction=0.1")


# ---------------------------------------------------------------- everywhere


def refuse_missing(values: Any) -> None:
    """ConfigError for a key without a value."""
    if missing := sorted(missing_keys(values)):
        raise ConfigError(f"{missing[0]} has no value", hint=f"give it: {missing[0]}=...")


def missing_keys(node: Any, path: str = "") -> Iterator[str]:
    """Yield the keys without a value; OmegaConf.missing_keys takes ten times as long."""
    if isinstance(node, str):
        if node == "???":
            yield path
    elif isinstance(node, Mapping):
        for name, value in node.items():
            yield from missing_keys(value, f"{path}.{name}" if path else str(name))
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from missing_keys(value, f"{path}[{i}]")


def refuse_infinite(value: Any, path: str = "") -> None:
    """ConfigError for a number that is not finite, wherever it stands: it could be neither used nor recorded."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{path} is {value}; it must be a finite number")
    if isinstance(value, dict):
        for name, item in value.items():
            refuse_infinite(item, f"{path}.{name}" if path else str(name))
    if isinstance(value, list):
        for item in value:
            refuse_infinite(item, path)


def refuse_former_loss(values: dict[str, Any]) -> None:
    """ConfigError for the former key `loss`, with what to write instead; null, as in older records, is ignored."""
    name = values.get("loss")
    if name is None:
        return
    if isinstance(name, str) and name in FORMER_LOSSES:
        new = FORMER_LOSSES[name]
        raise ConfigError(f"loss={name} is now preset={new}", hint=f"write preset={new}")
    known = ", ".join(f"preset={new}" for new in FORMER_LOSSES.values())
    raise ConfigError(f"there is no option loss={name}", hint=f"the group is called preset: {known}")
