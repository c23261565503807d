"""The help page, made from the comments in the configuration files: the one place where options and keys are explained.

Imports neither torch nor Hydra, so that help appears at once.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml

WIDTH = 100
COLUMN = 38  # where descriptions start

# One YAML serves two roles: the group on the left offers its own files and those of the group on the right.
SHARED_OPTIONS = {
    "teacher": "model",
    "student": "model",
    "teacher_training": "training",
    "teacher_optimizer": "optimizer",
    "teacher_schedule": "schedule",
}

INTRODUCTION = """\
{program} trains a teacher, distils it into a student, and measures what the distillation was worth:
the teacher, the same student trained alone, and the distilled student, on the same test data.
Without arguments it runs offline in seconds. Any group=option or key=value below changes it.
"""

EXAMPLES = """\
Examples
  {program} teacher=bigmlp student=smallmlp T=2
      one run
  {program} -m T=1,2,5,10 'seed=range(5)'
      a sweep: every T with five seeds, one table at the end
"""

EXPERIMENT_EXAMPLE = """\
  {program} experiment={name}
      {about}
"""

FLAGS = (
    ("-m, --multirun", "sweep: run every combination of the comma-separated values"),
    ("--cfg job", "print the composed configuration and stop"),
    ("--config-dir DIR", "add the options in your own folder of YAML: DIR/model/mine.yaml is student=mine"),
    ("-sc install=bash", 'tab completion: eval "$({program} -sc install=bash)"; also for zsh and fish'),
    ("--hydra-help", "the flags of Hydra, which composes the configuration"),
)


class Key(NamedTuple):
    """A key of a YAML file: dotted name, default as written (None: a section) and end-of-line comment."""

    name: str
    value: str | None
    comment: str


class Default(NamedTuple):
    """An entry of a defaults list; `group` is empty where a file is named without one."""

    group: str
    options: tuple[str, ...]
    package: str
    comment: str


def conf_dir() -> Path:
    """Return the folder of shipped YAML: inside the installed package, else beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def page(conf_dirs: Sequence[Path], program: str = "kd-run") -> str:
    """Return the help page for the YAML under `conf_dirs`; the first holds config.yaml, the others add options."""
    defaults = defaults_list((conf_dirs[0] / "config.yaml").read_text(encoding="utf-8"))
    examples = EXAMPLES.format(program=program)
    for name, file in list(groups(conf_dirs).get("experiment", {}).items())[:1]:
        examples += EXPERIMENT_EXAMPLE.format(program=program, name=name, about=description(file))
    parts = [
        INTRODUCTION.format(program=program),
        examples,
        "\n".join(["Groups: group=option", *_groups(conf_dirs, defaults)]),
        "\n".join(["Keys: key=value, shown with their defaults", *_keys(conf_dirs, defaults)]),
        "\n".join(["Flags", *(_row(2, flag, text.format(program=program)) for flag, text in FLAGS)]),
    ]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


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


def key_names(conf_dirs: Sequence[Path]) -> list[str]:
    """Return the dotted name of every key of the default composition, sections and groups included."""
    defaults = defaults_list((conf_dirs[0] / "config.yaml").read_text(encoding="utf-8"))
    return [*_settings(conf_dirs, defaults, {}), *groups(conf_dirs)]


def description(file: Path) -> str:
    """Return the first comment line of a YAML file that is not a directive such as `# @package`."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.lstrip("# ")
        if line.strip() and not line.startswith("#"):
            break
    return ""


def keys(text: str) -> list[Key]:
    """Return the keys of a YAML text in order, a section before its keys; `defaults` is left out."""
    return [key for key in _walk(_compose(text), text.splitlines(), "") if key.name != "defaults"]


def defaults_list(text: str) -> list[Default]:
    """Return the entries of a YAML text's `defaults`, without overrides; `_self_` is added last where it is missing."""
    lines = text.splitlines()
    entries = []
    for key, value in _pairs(_compose(text)):
        if key.value == "defaults" and isinstance(value, yaml.SequenceNode):
            entries = [entry for node in value.value if (entry := _default(node, lines))]
    if not any(entry.options == ("_self_",) for entry in entries):
        entries.append(Default("", ("_self_",), "", ""))
    return entries


# Groups


def _groups(conf_dirs: Sequence[Path], defaults: Sequence[Default]) -> Iterator[str]:
    available = groups(conf_dirs)
    chosen = {entry.group: entry for entry in defaults if entry.group}
    known = {*chosen, *SHARED_OPTIONS, *SHARED_OPTIONS.values()}  # conf/model is reached through teacher= and student=
    extra = [group for group in available if group not in known and not group.startswith("hydra/")]
    shown: dict[str, dict[str, Path]] = {}
    for group in [*chosen, *extra]:
        if not (options := available.get(group)):
            continue
        entry = chosen.get(group)
        picked = _picked(entry, chosen) if entry else ()
        left = f"{group}=" if entry else f"+{group}="  # Hydra wants a plus for a group outside the defaults list
        same = next((other for other in shown if shown[other] == options), None)
        notes = [entry.comment] if entry and entry.comment else []
        if entry and (followed := _followed(entry)):
            notes.append(f"follows {followed}= where an option has its name")
        if same:
            notes += [f"the options of {same}=", *(f"default {name}" for name in picked if name in options)]
        yield _row(2, left, "; ".join(notes))
        if not same:
            shown[group] = options
            for name, file in options.items():
                yield _row(4, f"{name} (default)" if name in picked else name, description(file))


def _picked(entry: Default, chosen: Mapping[str, Default]) -> tuple[str, ...]:
    """Return the entry's options; `${dataset}` stands for what is chosen of that group."""
    followed = _followed(entry)
    return chosen[followed].options if followed in chosen else entry.options


def _followed(entry: Default) -> str:
    match = re.fullmatch(r"\$\{([\w/]+)\}", " ".join(entry.options))
    return match[1] if match else ""


# Keys


def _keys(conf_dirs: Sequence[Path], defaults: Sequence[Default]) -> Iterator[str]:
    sections: dict[str, list[Key]] = {"": []}
    origin: dict[str, str] = {}
    settings = _settings(conf_dirs, defaults, origin)
    for key in settings.values():
        if key.value is None and "." not in key.name:
            sections.setdefault(key.name, [])
        elif not key.name.rpartition(".")[2].startswith("_"):
            sections.setdefault(key.name.partition(".")[0] if "." in key.name else "", []).append(key)
    shown: dict[str, list[Key]] = {}
    for section, members in sections.items():
        bare = [key._replace(name=key.name.removeprefix(f"{section}.")) for key in members]
        same = next((other for other in shown if section and shown[other] == bare), None)
        if section and members:
            notes = [settings[section].comment] if section in settings else []
            notes += [f"of {origin[section]}"] if section in origin else []
            notes += [f"the keys and defaults of {same}"] if same else []
            yield ""
            yield _row(2, f"{section}.", "; ".join(filter(None, notes)))
        if not same:
            shown[section] = bare
            for key in members:
                left = f"{key.name}." if key.value is None else f"{key.name}={key.value}"
                yield _row(4 if section else 2, left, key.comment)


def _settings(conf_dirs: Sequence[Path], defaults: Sequence[Default], origin: dict[str, str]) -> dict[str, Key]:
    """Compose config.yaml with its default options; `origin` is told which option a section is of.

    config.yaml's keys come first and its comments stand, whichever file has the last word on the value.
    """
    available = groups(conf_dirs)
    chosen = {entry.group: entry for entry in defaults if entry.group}
    primary = {key.name: key for key in keys((conf_dirs[0] / "config.yaml").read_text(encoding="utf-8"))}
    primary = {name: key for name, key in primary.items() if name.partition(".")[0] != "hydra"}
    settings = dict(primary)
    after_self = False
    for entry in defaults:
        after_self |= entry.options == ("_self_",)
        for option in _picked(entry, chosen):
            if not (file := available.get(entry.group, {}).get(option)):
                continue
            package = _package(file, entry)
            for key in _option_keys(file, available):
                name = f"{package}.{key.name}" if package else key.name
                known = primary.get(name)
                value = key.value if after_self or known is None else known.value
                settings[name] = Key(name, value, (known.comment if known else "") or key.comment)
            if package:
                origin[package.partition(".")[0]] = f"{entry.group}={option}"
    return settings


def _option_keys(file: Path, available: Mapping[str, Mapping[str, Path]]) -> list[Key]:
    """Return the keys of an option's file and of the files its own defaults list names."""
    text = file.read_text(encoding="utf-8")
    found: dict[str, Key] = {}
    for entry in defaults_list(text):
        named = "/".join(filter(None, (entry.group, *entry.options)))
        group, _, name = named.rpartition("/")
        if named == "_self_":
            found |= {key.name: key for key in keys(text)}
        elif (base := available.get(group, {}).get(name) or file.with_name(f"{named}.yaml")).is_file() and base != file:
            found |= {key.name: key for key in _option_keys(base, available)}
    return list(found.values())


def _package(file: Path, entry: Default) -> str:
    header = re.search(r"^# @package\s+(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    package = header[1] if header else entry.package
    return "" if package == "_global_" else package


# YAML with its comments


def _compose(text: str) -> yaml.Node | None:
    return yaml.compose(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def _pairs(node: yaml.Node | None) -> list[tuple[yaml.ScalarNode, yaml.Node]]:
    return node.value if isinstance(node, yaml.MappingNode) else []


def _walk(node: yaml.Node | None, lines: Sequence[str], prefix: str) -> Iterator[Key]:
    for key, value in _pairs(node):
        name = prefix + str(key.value)
        section = isinstance(value, yaml.MappingNode) and not value.flow_style
        if section or (isinstance(value, yaml.SequenceNode) and not value.flow_style):
            mark = key.end_mark  # the value starts on a later line
        else:
            mark = value.end_mark
        yield Key(name, None if section else _source(value, lines), _comment(lines, mark.line, mark.column))
        if section:
            yield from _walk(value, lines, f"{name}.")


def _source(node: yaml.Node, lines: Sequence[str]) -> str:
    """Return a value as it is written, on one line."""
    if isinstance(node, yaml.SequenceNode) and not node.flow_style:
        return "[" + ", ".join(_source(item, lines) for item in node.value) + "]"
    start, end = node.start_mark, node.end_mark
    if start.line == end.line:
        text = lines[start.line][start.column : end.column] if start.line < len(lines) else ""
    else:
        inner = [re.sub(r"\s#.*", "", line).strip() for line in lines[start.line + 1 : end.line]]
        tail = lines[end.line][: end.column].strip() if end.line < len(lines) else ""
        text = " ".join([re.sub(r"\s#.*", "", lines[start.line][start.column :]).strip(), *inner, tail]).strip()
    return text or "null"


def _comment(lines: Sequence[str], line: int, column: int) -> str:
    """Return the comment after a place in the text, with the lines that continue it in the same column."""
    if line >= len(lines) or not (match := re.match(r"[:\s]*#\s*(.*)", lines[line][column:])):
        return ""
    words = [match[1].strip()]
    place = column + match[0].index("#")
    for following in lines[line + 1 :]:
        if not following[:place].isspace() or following[place : place + 1] != "#":
            break
        words.append(following[place + 1 :].strip())
    return " ".join(words)


def _default(node: yaml.Node, lines: Sequence[str]) -> Default | None:
    if isinstance(node, yaml.ScalarNode):
        group, value, mark = "", node, node.end_mark
    else:
        (key, value), *_ = _pairs(node)
        group, mark = str(key.value), value.end_mark
    if group.startswith("override "):
        return None
    group, _, package = group.removeprefix("optional ").strip().lstrip("/").partition("@")
    nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
    options = tuple(str(item.value).removesuffix("@_here_").lstrip("/") for item in nodes)
    return Default(group, options, package or group.replace("/", "."), _comment(lines, mark.line, mark.column))


# Text


def _row(indent: int, left: str, right: str) -> str:
    """Set a term and its description in two columns; a long term has its description below it."""
    start = " " * indent + left
    if not right:
        return start
    margin = " " * COLUMN
    wrapped = textwrap.wrap(right, WIDTH, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)
    if len(start) > COLUMN - 2:
        return "\n".join([start, *wrapped])
    return "\n".join([start.ljust(COLUMN) + wrapped[0].lstrip(), *wrapped[1:]])
