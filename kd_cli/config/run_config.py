"""What a run is in configuration: the schema, the checks, and plain values for all that lies below.

Imports no torch: `kd-run --help`, completion and the start of a sweep come through here.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import inspect
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError

from kd_cli.errors import ConfigError, first_line
from kd_cli.nearest import did_you_mean
from kd_cli.shipped import is_shipped
from kd_cli.storage.training_state import interval

PRECISIONS = ("float32", "tf32", "bfloat16", "float64")
COMBINE = ("geometric", "arithmetic")  # how an ensemble's distributions are averaged
AUTO_T = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 8.0, 10.0, 20.0)  # what T=auto tries
AUTO_ALPHA = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # what alpha=auto tries
LEAST_T, MOST_T = 1e-3, 1e4  # where soft targets are right to 0.1 % of the gradient in float32
FORMAT = 3  # raised when trained weights of an older version of this code must not be reused


# ---------------------------------------------------------------- schema: what Hydra checks while composing


@dataclass
class Training:
    epochs: int = 30
    batch_size: int = 128
    jitter: int = 0
    crop: int = 0
    flip: bool = False
    rotate: float = 0.0
    shear: float = 0.0
    scale: float = 0.0
    keep: str = "last"


@dataclass
class TeacherTraining(Training):
    seed: int = 0


@dataclass
class Checkpoint:
    every: Any = "30s"


@dataclass
class Transfer:
    omit: list[Any] = field(default_factory=list)
    only: list[Any] = field(default_factory=list)
    fraction: float = 1.0
    labels: bool = True
    data: Any = None
    correct_bias: bool = True


@dataclass
class Schema:
    """The top-level keys and their types. T, alpha and beta are checked here, where the message can teach."""

    teacher: Any = None
    student: Any = None
    dataset: Any = None
    method: Any = None
    T: Any = 2.0
    alpha: Any = 1.0
    beta: Any = 0.5
    seed: int = 0
    device: str = "auto"
    precision: str = "float32"
    data_dir: str | None = None
    store_dir: str | None = None
    resume: str | None = None
    dry_run: bool = False
    fail_fast: bool = False
    cuda_graphs: bool = True
    diagnostics: bool = False
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    transfer: Transfer = field(default_factory=Transfer)
    training: Training = field(default_factory=Training)
    optimizer: Any = None
    schedule: Any = None
    teacher_training: TeacherTraining = field(default_factory=TeacherTraining)
    teacher_optimizer: Any = None
    teacher_schedule: Any = None
    loss: Any = None
    experiment: Any = None
    after_sweep: Any = None


# ---------------------------------------------------------------- plain values


Node = dict[str, Any]  # a `_target_` and its arguments


@dataclass(frozen=True)
class TrainSpec:
    """A model and how it is trained; with the data, all that its weights depend on."""

    name: str  # the option's name: bigmlp
    model: Node
    epochs: int
    batch_size: int
    augment: dict[str, Any]
    optimizer: Node
    schedule: Node
    seed: int
    precision: str
    keep: str = "last"

    def identity(self, data: str) -> dict[str, Any]:
        """The facts that a fingerprint is made of; `data` is the data set's own fingerprint."""
        facts = dataclasses.asdict(self)
        del facts["name"]  # what it is called changes nothing
        if self.keep == "last":
            del facts["keep"]  # said only where it is not the default
        code = [code_version(node["_target_"]) for node in (self.model, self.optimizer, self.schedule)]
        return {**facts, "data": data, "format": FORMAT, "code": code}


@dataclass(frozen=True)
class TransferSpec:
    """What the student is taught with; the default is all of the training data with its labels."""

    omit: tuple[int | str, ...] = ()
    only: tuple[int | str, ...] = ()
    fraction: float = 1.0
    labels: bool = True
    data: Node | None = None
    correct_bias: bool = True

    def examples(self) -> dict[str, Any]:
        """The facts that say which examples these are; none for all of the training data."""
        facts = {"omit": self.omit, "only": self.only, "fraction": self.fraction, "data": self.data}
        return {key: value for key, value in facts.items() if value not in ((), 1.0, None)}


@dataclass(frozen=True)
class RunConfig:
    """One run, checked, as plain values."""

    teacher: TrainSpec
    checkpoint: str | None
    members: int
    combine: str
    student: TrainSpec
    transfer: TransferSpec
    diagnostics: bool
    cuda_graphs: bool
    dataset: Node
    val_fraction: float
    method_name: str
    method: Node
    T: float | str  # "auto": chosen on validation data
    alpha: float | str
    beta: float
    device: str
    precision: str
    data_dir: Path
    store_dir: Path
    every: tuple[int, float] = (1, 0.0)  # epochs or seconds between two saved states
    resume: bool = False  # a finished run in the directory is taken as it is, an unfinished one is made again
    record: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # what run.json keeps for reports

    def bench_key(self) -> str:
        """Runs with equal keys have the same data on the same device, and one store."""
        return fingerprint(
            [
                *(self.dataset, self.val_fraction, self.device, self.precision, self.cuda_graphs),
                *(str(self.data_dir), str(self.store_dir)),
            ]
        )

    def settings(self) -> list[tuple[float, float]]:
        """The temperatures and soft weights to train: one pair, or the grid to choose from."""
        temperatures = AUTO_T if isinstance(self.T, str) else (self.T,)
        alphas = AUTO_ALPHA if isinstance(self.alpha, str) else (self.alpha,)
        return [(T, alpha) for T in temperatures for alpha in alphas]


def run_config(cfg: DictConfig, choices: Mapping[str, Any]) -> RunConfig:
    """Check a composed configuration and turn it into plain values; `choices` are the groups' option names.

    Raises ConfigError before any data is read.
    """
    try:
        values = OmegaConf.to_container(cfg, resolve=True)
    except InterpolationToMissingValueError:
        values = OmegaConf.to_container(cfg)
    assert isinstance(values, dict)
    if missing := sorted(_missing(values, "")):
        raise ConfigError(f"{missing[0]} has no value", hint=f"give it: {missing[0]}=...")
    v: dict[str, Any] = {str(key): value for key, value in values.items()}
    known = [f.name for f in dataclasses.fields(Schema)]
    for key in v:
        if key not in known:  # added with +
            raise ConfigError(f"there is no key {key!r}", hint=did_you_mean(key, known) or "see kd-run --help")
    for part in dataclasses.fields(Schema):
        if dataclasses.is_dataclass(part.default_factory):
            keys = [f.name for f in dataclasses.fields(part.default_factory)]
            for key in v[part.name]:
                if key not in keys:  # added with ++
                    raise ConfigError(f"there is no key '{part.name}.{key}'", hint=did_you_mean(key, keys))
    if v["experiment"] is not None:
        raise ConfigError(f"there is no option experiment={v['experiment']}", hint="see kd-run --help")
    for group in ("teacher", "student", "dataset", "method", "optimizer", "schedule"):
        if not isinstance(v[group], dict) or "_target_" not in v[group]:
            raise ConfigError(f"{group} is {v[group]!r}; it needs an option of its group", hint="see kd-run --help")
    T = "auto" if v["T"] == "auto" else temperature(v["T"])
    alpha = "auto" if v["alpha"] == "auto" else not_negative("alpha", v["alpha"])
    beta = not_negative("beta", v["beta"])
    if alpha == 0 and beta == 0:
        raise ConfigError("alpha and beta are both 0: there is nothing to learn from", hint="set one of them above 0")
    if v["precision"] not in PRECISIONS:
        raise ConfigError(f"precision is {v['precision']!r}; it must be one of {', '.join(PRECISIONS)}")
    for section in ("training", "teacher_training"):
        if v[section]["keep"] not in ("last", "best"):
            raise ConfigError(f"{section}.keep is {v[section]['keep']!r}; it must be last or best")
        for key, least in (("epochs", 1), ("batch_size", 1), ("jitter", 0), ("crop", 0)):
            at_least(f"{section}.{key}", v[section][key], least)
    at_least("seed", v["seed"], 0)
    at_least("teacher_training.seed", v["teacher_training"]["seed"], 0)
    for key in ("optimizer", "teacher_optimizer"):
        if "lr" in v[key]:
            positive(f"{key}.lr", v[key]["lr"])

    refuse_infinite(v, "")
    teacher, dataset = dict(v["teacher"]), dict(v["dataset"])
    checkpoint = teacher.pop("checkpoint", None)
    members, combine = teacher.pop("members", 1), teacher.pop("combine", COMBINE[0])
    if isinstance(members, bool) or not isinstance(members, int) or members < 1:
        raise ConfigError(f"teacher.members is {members!r}; it must be a whole number, 1 or more")
    if combine not in COMBINE:
        raise ConfigError(f"teacher.combine is {combine!r}; it must be {' or '.join(COMBINE)}")
    if members > 1 and checkpoint is not None:
        raise ConfigError("teacher.checkpoint is one model's weights, and teacher.members is more than 1")
    if checkpoint is not None and not Path(checkpoint).expanduser().is_file():
        raise ConfigError(f"teacher.checkpoint is {checkpoint}, and there is no such file")
    val_fraction = not_negative("dataset.val_fraction", dataset.pop("val_fraction", 0.1))
    if val_fraction >= 1:
        raise ConfigError(f"dataset.val_fraction is {val_fraction}; it must be below 1")
    if val_fraction == 0 and "best" in (v["training"]["keep"], v["teacher_training"]["keep"]):
        raise ConfigError(
            "training.keep=best chooses on validation data, and dataset.val_fraction is 0",
            hint="dataset.val_fraction=0.1",
        )
    if val_fraction == 0 and "auto" in (T, alpha):
        raise ConfigError(
            "T=auto and alpha=auto choose on validation data, and dataset.val_fraction is 0",
            hint="dataset.val_fraction=0.1",
        )

    def spec(role: str, model: Node, prefix: str) -> TrainSpec:
        training = dict(v[f"{prefix}training"])
        return TrainSpec(
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
        )

    return RunConfig(
        teacher=spec("teacher", teacher, "teacher_"),
        checkpoint=checkpoint,
        members=members,
        combine=combine,
        student=spec("student", dict(v["student"]), ""),
        transfer=transfer_spec(v["transfer"], alpha),
        diagnostics=v["diagnostics"],
        cuda_graphs=v.get("cuda_graphs", True),  # which an older record lacks
        dataset=dataset,
        val_fraction=val_fraction,
        method_name=option_name("method", v["method"], choices),
        method=v["method"],
        T=T,
        alpha=alpha,
        beta=beta,
        device=v["device"],
        precision=v["precision"],
        data_dir=folder(v["data_dir"], "KD_DATA", "data"),
        store_dir=folder(v["store_dir"], "KD_STORE", ""),
        every=interval(v["checkpoint"]["every"]),
        resume=v["resume"] is not None,
    )


def transfer_spec(values: dict[str, Any], alpha: float | str) -> TransferSpec:
    """The transfer set, checked as far as it can be without the data."""
    if values["omit"] and values["only"]:
        raise ConfigError("transfer.omit and transfer.only are both given", hint="give one of them")
    for key in ("omit", "only"):
        if any(isinstance(c, bool) or not isinstance(c, int | str) for c in values[key]):
            raise ConfigError(f"transfer.{key} is {values[key]}; it must be a list of classes, by number or name")
    if not 0 < values["fraction"] <= 1:
        raise ConfigError(f"transfer.fraction is {values['fraction']}; it must be above 0 and at most 1")
    data = values["data"]
    if data is not None and (not isinstance(data, dict) or "_target_" not in data):
        raise ConfigError(f"transfer.data is {data!r}; it must be the name of a data set", hint="transfer.data=kmnist")
    if alpha == 0 and (data is not None or not values["labels"]):
        raise ConfigError("the transfer set has no labels and alpha is 0: there is nothing to learn from")
    return TransferSpec(
        omit=tuple(values["omit"]),
        only=tuple(values["only"]),
        fraction=float(values["fraction"]),
        labels=values["labels"] and data is None,
        data=data,
        correct_bias=values["correct_bias"],
    )


def refuse_infinite(value: Any, key: str) -> None:
    """ConfigError for a number anywhere that is not finite: it could be neither used nor recorded."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} is {value}; it must be a finite number")
    if isinstance(value, dict):
        for name, item in value.items():
            refuse_infinite(item, f"{key}.{name}" if key else str(name))
    if isinstance(value, list):
        for item in value:
            refuse_infinite(item, key)


def option_name(group: str, node: Node, choices: Mapping[str, Any]) -> str:
    """The name of a group's chosen option, else the last part of its target."""
    return str(choices.get(group) or node["_target_"].rpartition(".")[2])


def folder(value: str | None, variable: str, name: str) -> Path:
    """A folder from its key, else its environment variable, else the user's cache."""
    if value or os.environ.get(variable):
        return Path(value or os.environ[variable]).expanduser().absolute()
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser().absolute() / "kd-cli" / name


def number(key: str, value: Any, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{key} is {value!r}; it must be {allowed}", hint=f"for example {key}=2")
    return float(value)


def positive(key: str, value: Any) -> float:
    checked = number(key, value, "a number above 0")
    if checked <= 0:
        raise ConfigError(f"{key} is {value}; it must be above 0", hint=f"for example {key}=2")
    return checked


def temperature(value: Any) -> float:
    T = positive("T", value)
    if T < LEAST_T:
        raise ConfigError(f"T is {value}; it must be at least {LEAST_T:g}", hint="from there on targets are one-hot")
    if T > MOST_T:
        raise ConfigError(
            f"T is {value}; it must be at most {MOST_T:g}: float32 cannot tell the probabilities apart",
            hint="method=logits is the exact limit of a high temperature",
        )
    return T


def not_negative(key: str, value: Any) -> float:
    checked = number(key, value, "a number, 0 or more")
    if checked < 0:
        raise ConfigError(f"{key} is {value}; it must be 0 or more")
    return checked


def at_least(key: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{key} is {value}; it must be at least {least}")


def _missing(node: Any, path: str) -> Iterator[str]:
    """Keys without a value; OmegaConf.missing_keys asks each node whether it is one, at ten times the cost."""
    if isinstance(node, str):
        if node == "???":
            yield path
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from _missing(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from _missing(value, f"{path}[{i}]")


def augmentation(training: Node) -> Node:
    """The augmentation among a training's keys; what came later is said only where it is used, as in fingerprints."""
    later = ("rotate", "shear", "scale")
    now = {key: training[key] for key in ("jitter", "crop", "flip")}
    return now | {key: training[key] for key in later if training.get(key)}  # which an older record lacks


# ---------------------------------------------------------------- objects from nodes


def locate(target: str) -> Any:
    """The function or class that a `_target_` names. ConfigError if there is none."""
    if not isinstance(target, str) or not target:
        raise ConfigError(f"_target_ is {target!r}; it must be the full name of a function or class")
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
                continue  # there is no such module: the rest of the path may be attributes
            raise
        try:
            return functools.reduce(getattr, parts[cut:], found)
        except AttributeError as error:
            close = did_you_mean(parts[-1], [name for name in dir(found) if not name.startswith("_")])
            raise ConfigError(f"_target_ is {target}, and {name} has no {parts[-1]}", hint=close) from error
    raise ConfigError(
        f"_target_ is {target}, and no module of that name can be imported",
        hint="own modules are found in the working directory and on PYTHONPATH",
    )


def build(node: Node, *args: Any, where: str = "", **kwargs: Any) -> Any:
    """Call a node's `_target_` with its arguments and those given; nested nodes are built first.

    ConfigError names an argument that the target does not have, with the nearest one that it has.
    """
    target = locate(node["_target_"])
    if not callable(target):
        raise ConfigError(f"_target_ is {node['_target_']}, which is a {type(target).__name__} and cannot be called")
    own = {key: built(value) for key, value in node.items() if key != "_target_"}
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):  # a builtin that does not tell
        return _call(target, node, where, *args, **own, **kwargs)
    names = [name for name, p in signature.parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
        for key in own:
            if key not in names:
                hint = did_you_mean(key, names) or f"it has {', '.join(names)}"
                raise ConfigError(f"{where + '.' if where else ''}{key}: {node['_target_']} has no such key", hint=hint)
    try:
        signature.bind(*args, **own, **kwargs)
    except TypeError as error:
        raise ConfigError(f"{where or node['_target_']}: {node['_target_']}: {error}") from error
    return _call(target, node, where, *args, **own, **kwargs)


def _call(target: Any, node: Node, where: str, *args: Any, **kwargs: Any) -> Any:
    """Call a target. Where it is no code of the user's, a wrong value is the configuration's mistake: ConfigError."""
    try:
        return target(*args, **kwargs)
    except (TypeError, ValueError, OverflowError, MemoryError, RuntimeError) as error:
        unfit = not isinstance(error, RuntimeError) or re.search("memory|overflow|too large", str(error))
        if not unfit or isinstance(error, NotImplementedError) or not is_shipped(node["_target_"]):
            raise
        raise ConfigError(f"{where or node['_target_']}: {node['_target_']}: {first_line(error)}") from error


def built(value: Any) -> Any:
    if isinstance(value, dict):
        return build(value) if "_target_" in value else {key: built(item) for key, item in value.items()}
    if isinstance(value, list):
        return [built(item) for item in value]
    return value


# ---------------------------------------------------------------- fingerprints


def fingerprint(facts: Any) -> str:
    """16 bytes of BLAKE2b over the facts as canonical JSON, in hexadecimal."""
    text = json.dumps(facts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


@functools.cache
def code_version(target: str) -> str:
    """What a fingerprint knows of a target's code: its name, and for a user's own module the file's contents.

    So a teacher is trained again after an edit of the user's network. Code of this package stands under `FORMAT`, code
    of installed libraries under its name.
    """
    if is_shipped(target):
        return target
    found = locate(target)
    try:
        file = inspect.getsourcefile(found)
    except TypeError:
        file = None
    if file is None or "site-packages" in Path(file).parts:
        return target
    return target + ":" + hashlib.blake2b(Path(file).read_bytes(), digest_size=16).hexdigest()
