"""A user's own pictures with independent labels: a list of files, each with any number of labels."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kd_cli.data.decoded import decoded
from kd_cli.data.folders import as_reading, folder_of
from kd_cli.data.pictures import notes, shown
from kd_cli.data.sentences import listed
from kd_cli.data.source import Source, Split
from kd_cli.data.splits import set_aside
from kd_cli.data.tree import part_of
from kd_cli.errors import ConfigError, DataError
from kd_cli.nearest import did_you_mean
from kd_cli.numeric import is_number

COLUMNS = ("path", "labels", "split")


@dataclass(frozen=True)
class Line:
    """One picture of a list: its file, its labels, and the part it belongs to, "" where the list names none."""

    file: Path
    labels: frozenset[str]
    part: str


def imagelist(
    *,
    data_dir: str | Path,
    root: str,
    list: str = "labels.csv",
    image_size: int,
    test_fraction: float = 0.2,
    channels: int = 3,
    background: str | Sequence[int] = "white",
) -> Source:
    """Pictures under `root` that `list`, a CSV file, names with their labels; square, `image_size` pixels wide.

    The list has a head with the columns `path` (below `root`), `labels` (separated by ";", none where it is empty) and,
    if the parts are chosen, `split` (train, test and val in the usual spellings). Without `split`, the share
    `test_fraction` of all pictures is the test part. The labels are those that occur, in alphabetical order. Raises
    DataError, which names the line that cannot be read.
    """
    reading = as_reading(image_size, channels, background)
    if not is_number(test_fraction) or not 0 < test_fraction < 1:
        raise ConfigError(f"test_fraction is {test_fraction!r}; it must be a number above 0 and below 1")
    data_dir = Path(data_dir).expanduser()
    folder = folder_of(root, data_dir, hint="give the folder that the paths of the list start in")
    lines = read_list(folder / list, folder)
    names = sorted(set().union(*(line.labels for line in lines)))
    if not names:
        raise DataError(f"{shown(folder / list)} gives no picture a label", hint="labels are separated by ;")
    images, facts, kept = decoded(folder, [line.file for line in lines], reading, data_dir)
    labels = torch.tensor([[int(name in line.labels) for name in names] for line in lines])
    files = tuple(shown(line.file.relative_to(folder)) for line in lines)
    parts, said = _parts(lines, test_fraction, shown(folder / list))

    def split(positions: Tensor) -> Split:
        return Split(images[positions], labels[positions], tuple(files[i] for i in positions.tolist()))

    train, test = split(parts["train"]), split(parts["test"])
    val = split(parts["val"]) if "val" in parts else None
    return Source(
        name=shown(folder.name),
        train_images=train.images,
        train_labels=train.labels,
        test_images=test.images,
        test_labels=test.labels,
        class_names=tuple(names),
        val_images=None if val is None else val.images,
        val_labels=None if val is None else val.labels,
        train_names=train.names,
        val_names=() if val is None else val.names,
        test_names=test.names,
        channels_first=True,
        notes=[f"independent labels: {listed(names)}", *said, *notes(facts, reading), *kept],
    )


def read_list(path: Path, root: Path) -> Sequence[Line]:
    """The lines of a list of pictures below `root`. Raises DataError with the number of a line that is wrong."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"there is no list {shown(path)}", hint="dataset.list=NAME.csv, below dataset.root") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{shown(path)} cannot be read: {error}", hint="a CSV file in UTF-8") from error
    rows = csv.DictReader(text.splitlines())
    heads = [head.strip() for head in rows.fieldnames or ()]
    rows.fieldnames = heads
    if missing := [head for head in COLUMNS[:2] if head not in heads]:
        raise DataError(
            f"{shown(path)} has no column {missing[0]}; its first line is {','.join(heads)!r}",
            hint="the first line must be path,labels or path,labels,split",
        )
    found: dict[Path, Line] = {}
    for row in rows:
        where = f"{shown(path)}, line {rows.line_num}"
        if None in row or None in row.values():
            raise DataError(
                f"{where}: it has not as many fields as the first line", hint='labels are separated by ";", not by ","'
            )
        line = _line(row, root, where)
        if line.file in found:
            raise DataError(f"{where}: {row['path']} is listed twice")
        found[line.file] = line
    if not found:
        raise DataError(f"{shown(path)} lists no pictures")
    return tuple(found.values())


def _line(row: dict[str, str], root: Path, where: str) -> Line:
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
    return Line(file, frozenset(filter(None, (name.strip() for name in row["labels"].split(";")))), part)


def _parts(lines: Sequence[Line], test_fraction: float, where: str) -> tuple[dict[str, Tensor], Sequence[str]]:
    """The positions of each part, and a note where the test part was drawn. Raises DataError for an empty part."""
    named = {line.part for line in lines}
    if named == {""}:
        total = len(lines)
        count = round(total * test_fraction)
        if count in (0, total):
            raise DataError(
                f"{where} has {total} pictures, and test_fraction={test_fraction} makes {count} the test part",
                hint="it needs some to test on and some to train on: more pictures, or another test_fraction",
            )
        test, train = set_aside(total, count)
        return {"train": train, "test": test}, [
            f"{where} names no test part: {count} of its {total} pictures test, drawn without regard to their labels"
        ]
    if "" in named:
        first = next(i for i, line in enumerate(lines) if not line.part)
        raise DataError(f"{where}: {shown(lines[first].file)} has no split, and other pictures have one")
    if lacking := sorted({"train", "test"} - named):
        raise DataError(f"{where} has no picture with the split {lacking[0]}", hint="it needs train and test")
    return {part: torch.tensor([i for i, line in enumerate(lines) if line.part == part]) for part in named}, []
