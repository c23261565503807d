"""Read a YAML file with its comments: its keys, its defaults list, the line that describes it.

Imports neither torch nor Hydra, so that `kd-run --help` answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import yaml


class Key(NamedTuple):
    """A key of a YAML file: dotted name, value as written (None: a section) and end-of-line comment."""

    name: str
    value: str | None
    comment: str


class Default(NamedTuple):
    """An entry of a defaults list; `group` is empty where a file is named without one."""

    group: str
    options: tuple[str, ...]
    package: str
    comment: str
    override: bool = False  # `override /group: option`, which changes an entry of another file


def description(file: Path) -> str:
    """Return the first comment line of a YAML file that is not a directive such as `# @package`."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") and not line.startswith("# @"):
            return line.lstrip("# ")
        if line.strip() and not line.startswith("#"):
            break
    return ""


def package(file: Path) -> str | None:
    """Return the package that a YAML file names in its `# @package` line, None without such a line."""
    header = re.search(r"^# @package\s+(\S+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    return header[1] if header else None


def keys(text: str) -> list[Key]:
    """Return the keys of a YAML text in order, a section before its keys; `defaults` is left out."""
    return [key for key in _walk(_compose(text), text.splitlines(), "") if key.name != "defaults"]


def defaults_list(text: str) -> list[Default]:
    """Return the entries of a YAML text's `defaults`; `_self_` is added last where it is missing."""
    lines = text.splitlines()
    entries = []
    for key, value in _pairs(_compose(text)):
        if key.value == "defaults" and isinstance(value, yaml.SequenceNode):
            entries = [_default(node, lines) for node in value.value]
    if not any(entry.options == ("_self_",) for entry in entries):
        entries.append(Default("", ("_self_",), "", ""))
    return entries


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


def _default(node: yaml.Node, lines: Sequence[str]) -> Default:
    if isinstance(node, yaml.ScalarNode):
        group, value, mark = "", node, node.end_mark
    else:
        (key, value), *_ = _pairs(node)
        group, mark = str(key.value), value.end_mark
    override = group.startswith("override ")
    group = group.removeprefix("override ").strip().removeprefix("optional ").strip().lstrip("/")
    group, _, package = group.partition("@")
    nodes = value.value if isinstance(value, yaml.SequenceNode) else [value]
    options = tuple(str(item.value).removesuffix("@_here_").lstrip("/") for item in nodes)
    return Default(
        group, options, package or group.replace("/", "."), _comment(lines, mark.line, mark.column), override
    )
