"""The options and keys that a command can name: those of the shipped YAML and of a user's own folders.

Imports neither torch nor Hydra, so that `kd-run --help` answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from kd_cli.config.schema import DATASET_KEYS, OWN_KEYS
from kd_cli.config.yaml_comments import Default, Key, defaults_list, keys, package
from kd_cli.errors import ConfigError
from kd_cli.nearest import did_you_mean

PRIMARY = "config.yaml"

# One YAML file serves two roles: the group on the left offers its own files and those of the group on the right.
SHARED_OPTIONS = {
    "teacher": "model",
    "student": "model",
    "teacher_training": "training",
    "teacher_optimizer": "optimizer",
    "teacher_schedule": "schedule",
}

# What the help page says of the keys that kd-run adds to every option of a role.
OWN_COMMENTS = {
    "teacher.checkpoint": "file of trained weights for this architecture, of torch or safetensors; null trains it",
    "teacher.checkpoint_key": "which of several weights in that file, by a part of their names: model, ema",
    "teacher.normalize": "how its input was normalised: data (as the student's), imagenet, none, {mean: 0.5, std: 0.5}",
    "teacher.input": "what it sees of an example: null is all, {size: 7} images, {channels: grey}, {columns: [0, 1]}",
    "student.input": "what it sees of an example, as for the teacher, which may see more",
    "teacher.members": "networks that answer together, trained alike but for their seeds",
    "teacher.combine": "how members' probabilities are averaged: geometric or arithmetic",
    "teacher.chain": "assistants between teacher and student, by name: [mediummlp], [{model: smallmlp, hidden: [300]}]",
    "teacher.generations": "students of the same architecture, each taught by the one before; the last is the run's",
    "student.prune": "share of its hidden units or channels removed while it is trained: 0.5; see docs/PRUNING.md",
    "student.quantise": "int8 trains it as kd-export --int8 ships it: weights and inputs of its layers are of 8 bits",
}

Options = Mapping[str, Mapping[str, Path]]  # group -> option -> file


def conf_dir() -> Path:
    """Return the folder of shipped YAML: inside the installed package, else beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def groups(conf_dirs: Sequence[Path]) -> dict[str, dict[str, Path]]:
    """Return every group with the file of each of its options, shared ones included; earlier folders win."""
    found: dict[str, dict[str, Path]] = {}
    for root in conf_dirs:
        for file in sorted(root.glob("*/**/*.yaml")):
            group = file.parent.relative_to(root).as_posix()
            found.setdefault(group, {}).setdefault(file.stem, file)
    for group, source in SHARED_OPTIONS.items():
        if options := found.get(source, {}) | found.get(group, {}):
            found[group] = options
    return found


def shared_nodes(conf_dirs: Sequence[Path]) -> list[tuple[str, str, dict[str, Any]]]:
    """Return (group, option, node) for each option that a role takes from another group; Hydra's store needs them."""
    available = groups(conf_dirs)
    nodes = []
    for group, source in SHARED_OPTIONS.items():
        for name in available.get(source, {}):
            if available[group][name].parent.name != group:  # else the role has a file of that name itself
                nodes.append(
                    (group, name, {"defaults": [f"/{source}/{name}@_here_", "_self_"], **OWN_KEYS.get(group, {})})
                )
    return nodes


def refuse_shadowed(conf_dirs: Sequence[Path], overrides: Sequence[str]) -> None:
    """ConfigError where an option is chosen whose file in the user's folder has the name of a shipped file.

    Hydra looks into the shipped folder first and would never read the user's.
    """
    shipped, *own = conf_dirs
    defaults = yaml.safe_load((shipped / PRIMARY).read_text(encoding="utf-8"))["defaults"]
    chosen = set(re.findall(r"[\w-]+", " ".join([*overrides, *(str(entry) for entry in defaults)])))
    for root in own:
        for file in sorted(root.glob("*/**/*.yaml")):
            other = shipped / file.relative_to(root)
            if file.stem in chosen and other.is_file() and other.read_bytes() != file.read_bytes():
                group = file.parent.relative_to(root).as_posix()
                raise ConfigError(
                    f"{file} would not be read: kd-run has a {group} called {file.stem} itself",
                    hint=f"give the file another name, e.g. {group}/my_{file.stem}.yaml, and choose that",
                )


def no_such_option(group: str, name: str, names: Iterable[str]) -> ConfigError:
    """Return the error for an option that its group does not have."""
    names = sorted(names)
    close = did_you_mean(name, names)
    hints = [close, f"{group} can be {', '.join(names)}"]
    if group == "dataset" and ("/" in name or Path(name).expanduser().is_dir()):
        hints = [f"dataset=imagefolder dataset.root={name} reads a folder of pictures"]
    elif close is None and "torchvision" in names:
        hints.append(f"; {group}=torchvision {group}.name={name} where torchvision has a model of that name")
    hint = " ".join(filter(None, hints)).replace(" ;", ";")
    return ConfigError(f"there is no option {group}={name}", hint=hint)


def data_node(value: Any, conf_dirs: Sequence[Path], like: Mapping[str, Any] | None = None) -> Any:
    """Return the node of a data set that is named by its option, alone or with keys of its own.

    The size of its images is that of the run's data set, `like`, where both have such a key.
    """
    own = {"name": value} if isinstance(value, str) else value
    if not isinstance(own, dict) or "_target_" in own:
        return own
    known = groups(conf_dirs)["dataset"]
    name = own.get("name")
    if name not in known:
        raise ConfigError(
            f"transfer.data is {name!r}, and there is no such data set",
            hint=" ".join(filter(None, (did_you_mean(str(name), known), f"it can be {', '.join(sorted(known))}"))),
        )
    node = yaml.safe_load(known[name].read_text(encoding="utf-8"))
    for key in DATASET_KEYS:
        node.pop(key, None)
    size = {key: item for key, item in (like or {}).items() if key in ("image_size", "channels") and key in node}
    return node | size | {key: item for key, item in own.items() if key != "name"}


def named_models(key: str, given: Sequence[Any], conf_dirs: Sequence[Path]) -> list[tuple[str, Any]]:
    """Return the names with the nodes of the models that they are options of; `key` is where they are given.

    A model is named by its option, `smallmlp`, or with keys of its own, `{model: smallmlp, hidden: [300]}`.
    """
    known = groups(conf_dirs)["student"]
    found = []
    for one in given:
        own = dict(one) if isinstance(one, Mapping) else {"model": one}
        name = own.pop("model", None)
        if name not in known:
            close = did_you_mean(str(name), known)
            hint = " ".join(filter(None, (close, f"it can be {', '.join(sorted(known))}")))
            raise ConfigError(f"{key} names {name!r}, and there is no such model", hint=hint)
        node = yaml.safe_load(known[name].read_text(encoding="utf-8"))
        if "defaults" in node:
            raise ConfigError(f"{key} names {name}, whose file has a defaults list: write its keys out to use it there")
        found.append((name, node | own))
    return found


# ---------------------------------------------------------------- what a command composes


@dataclass
class Composition:
    """The keys of a command's configuration: config.yaml with the options that the command chooses."""

    available: Options
    chosen: dict[str, Default]  # group -> entry of the defaults list, with the command's choice
    named: set[str]  # groups whose option the command names
    settings: dict[str, Key]  # dotted name -> key
    origin: dict[str, str]  # section -> the option that it is from: teacher=bigmlp

    def picked(self, entry: Default) -> tuple[str, ...]:
        """Return an entry's options; `${dataset}` stands for the option that is chosen for that group."""
        followed = follows(entry)
        return self.chosen[followed].options if followed in self.chosen else entry.options


def follows(entry: Default) -> str:
    """Return the group whose choice an entry repeats (`${dataset}`), else an empty string."""
    match = re.fullmatch(r"\$\{([\w/]+)\}", " ".join(entry.options))
    return match[1] if match else ""


def compose(conf_dirs: Sequence[Path], overrides: Iterable[str] = ()) -> Composition:
    """Compose config.yaml, which the first folder holds, with its default options or those of the overrides.

    config.yaml's keys come first and its comments stand, whichever file has the last word on the value.
    ConfigError for an option that does not exist.
    """
    available = groups(conf_dirs)
    text = (conf_dirs[0] / PRIMARY).read_text(encoding="utf-8")
    defaults = [entry for entry in defaults_list(text) if not entry.override]
    choices, values = _choices(overrides, available)
    for file in (available[group][name] for group, names in choices.items() for name in names):
        choices = _overridden(file, available) | choices
    for group in choices:
        if not any(entry.group == group for entry in defaults):
            defaults.append(Default(group, choices[group], group.replace("/", "."), ""))
    defaults = [e._replace(options=choices[e.group]) if e.group in choices else e for e in defaults]
    primary = {key.name: key for key in keys(text) if key.name.partition(".")[0] != "hydra"}
    found = Composition(available, {e.group: e for e in defaults if e.group}, set(choices), dict(primary), {})
    after_self = False
    for entry in defaults:
        after_self |= entry.options == ("_self_",)
        for option in found.picked(entry):
            if option in available.get(entry.group, {}):
                _add(found, entry, option, primary, after_self)
    for name, value in values.items():
        if name in found.settings and found.settings[name].value is not None:
            found.settings[name] = found.settings[name]._replace(value=value)
    return found


def key_names(conf_dirs: Sequence[Path], overrides: Iterable[str] = ()) -> list[str]:
    """Return the dotted name of every key that the overrides' composition has, sections included, and every group."""
    try:
        found = compose(conf_dirs, overrides)
    except ConfigError:  # an override names an option that does not exist
        found = compose(conf_dirs)
    return [*found.settings, *found.chosen]


def _add(found: Composition, entry: Default, option: str, primary: Mapping[str, Key], after_self: bool) -> None:
    """Add the keys of an option to a composition."""
    file = found.available[entry.group][option]
    where = package(file) or entry.package
    where = "" if where == "_global_" else where
    own = own_keys(entry.group) if file.parent.name != entry.group else []
    for key in [*_option_keys(file, found.available), *own]:
        name = f"{where}.{key.name}" if where else key.name
        known, before = primary.get(name), found.settings.get(name)
        value = key.value if after_self or known is None else known.value
        comment = (known.comment if known else "") or (before.comment if before else "") or key.comment
        found.settings[name] = Key(name, value, comment)
    if where:
        found.origin[where.partition(".")[0]] = f"{entry.group}={option}"


def own_keys(group: str) -> list[Key]:
    """Return the keys that kd-run adds to every option of a group, as they would stand in its YAML file."""
    values = OWN_KEYS.get(group, {})
    return [
        Key(name, "null" if value is None else str(value), OWN_COMMENTS.get(f"{group}.{name}", ""))
        for name, value in values.items()
    ]


def _choices(overrides: Iterable[str], available: Options) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Return the options that overrides choose for groups, several of them in a sweep, and the values of keys."""
    choices: dict[str, tuple[str, ...]] = {}
    values: dict[str, str] = {}
    for override in overrides:
        name, _, value = override.lstrip("+").partition("=")
        group = name.partition("@")[0]
        if group not in available or group.startswith("hydra"):
            values[name] = value
            continue
        options = tuple(value.split(","))
        for option in options:
            if option not in (*available[group], "null", ""):
                raise no_such_option(group, option, available[group])
        choices[group] = tuple(option for option in options if option in available[group])
    return choices, values


def _overridden(file: Path, available: Options) -> dict[str, tuple[str, ...]]:
    """Return the options that a file's defaults list sets for other groups, as experiments do."""
    found: dict[str, tuple[str, ...]] = {}
    for entry in defaults_list(file.read_text(encoding="utf-8")):
        if entry.override:
            found[entry.group] = entry.options
        elif (base := _named_file(file, entry, available)) is not None:
            found = _overridden(base, available) | found
    return {group: options for group, options in found.items() if group in available and not group.startswith("hydra")}


def _option_keys(file: Path, available: Options) -> list[Key]:
    """Return the keys of an option's file and of the files that its own defaults list names."""
    text = file.read_text(encoding="utf-8")
    found: dict[str, Key] = {}
    for entry in defaults_list(text):
        if entry.options == ("_self_",):
            found |= {key.name: key for key in keys(text)}
        elif not entry.override and (base := _named_file(file, entry, available)) is not None:
            found |= {key.name: key for key in _option_keys(base, available)}
    return list(found.values())


def _named_file(file: Path, entry: Default, available: Options) -> Path | None:
    """Return the file that an entry of another file's defaults list names, None where there is none."""
    named = "/".join(filter(None, (entry.group, *entry.options)))
    group, _, name = named.rpartition("/")
    base = available.get(group, {}).get(name) or file.with_name(f"{named}.yaml")
    return base if named != "_self_" and base.is_file() and base != file else None
