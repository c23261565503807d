"""A list of pictures: a CSV file with a path, one label or several, and perhaps a part for each."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kd_cli.data.pictures import shown
from kd_cli.data.tree import part_of
from kd_cli.errors import DataError
from kd_cli.nearest import did_you_mean


@dataclass(frozen=True)
class Line:
    """One picture of a list: its file, its labels, and the part it belongs to, "" where the list names none."""

    file: Path
    labels: frozenset[str]
    part: str


def read_list(path: Path, root: Path, *, several: bool, key: str) -> Sequence[Line]:
    """The lines of a list of pictures below `root`: its columns are `path`, `labels` or `label`, and perhaps `split`.

    With `several`, a picture has any number of `labels`, separated by ";"; else it has one `label`. `key` is the key
    that names the list, for a hint. Raises DataError with the number of a line that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"there is no list {shown(path)}", hint=f"{key}=NAME.csv, below dataset.root") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{shown(path)} cannot be read: {error}", hint="a CSV file in UTF-8") from error
    column = "labels" if several else "label"
    rows = csv.DictReader(text.splitlines())
    heads = [head.strip() for head in rows.fieldnames or ()]
    rows.fieldnames = heads
    if missing := [head for head in ("path", column) if head not in heads]:
        raise DataError(
            f"{shown(path)} has no column {missing[0]}; its first line is {','.join(heads)!r}",
            hint=f"the first line must be path,{column} or path,{column},split",
        )
    found: dict[Path, Line] = {}
    for row in rows:
        where = f"{shown(path)}, line {rows.line_num}"
        if None in row or None in row.values():
            hint = 'labels are separated by ";", not by ","' if several else "a value that holds a comma must be quoted"
            raise DataError(f"{where}: it has not as many fields as the first line", hint=hint)
        given = row[column].split(";") if several else [row[column]]
        labels = frozenset(filter(None, (name.strip() for name in given)))
        if not several and not labels:
            raise DataError(f"{where}: {row['path']} has no label", hint="take the line away, or name its class")
        line = _line(row, root, where, labels)
        if line.file in found:
            raise DataError(f"{where}: {row['path']} is listed twice")
        found[line.file] = line
    if not found:
        raise DataError(f"{shown(path)} lists no pictures")
    return tuple(found.values())


def _line(row: dict[str, str], root: Path, where: str, labels: frozenset[str]) -> Line:
    given = row["path"].strip()
    file = (root / given).resolve()
    if not given or not file.is_relative_to(root):
        raise DataError(f"{where}: the path {given!r} does not lie below {shown(root)}")
    if not file.is_file():
        raise DataError(f"{where}: there is no file {shown(file)}")
    named = (row.get("split") or "").strip()
    part = part_of(named) if named else ""
    if part is None:
        hint = did_you_mean(named, ["train", "val", "test"]) or "train, val or test"
        raise DataError(f"{where}: the split {named!r} is no part of a data set", hint=hint)
    return Line(file, labels, part)


def named_parts(lines: Sequence[Line], where: str) -> dict[str, Tensor] | None:
    """The positions of each part that a list names, None where it names none. Raises DataError for an empty part."""
    named = {line.part for line in lines}
    if named == {""}:
        return None
    if "" in named:
        first = next(i for i, line in enumerate(lines) if not line.part)
        raise DataError(f"{where}: {shown(lines[first].file)} has no split, and other pictures have one")
    if lacking := sorted({"train", "test"} - named):
        raise DataError(f"{where} has no picture with the split {lacking[0]}", hint="it needs train and test")
    return {part: torch.tensor([i for i, line in enumerate(lines) if line.part == part]) for part in named}
