"""A user's own table as a data set: a CSV or Parquet file with a column of classes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_cli.data.columns import Column, is_missing, number
from kd_cli.data.sentences import listed, sentence
from kd_cli.data.source import Source
from kd_cli.data.splits import set_aside_by_class
from kd_cli.data.table_files import Cells, find_table, read_table
from kd_cli.data.tree import part_of
from kd_cli.errors import ConfigError, DataError
from kd_cli.nearest import did_you_mean
from kd_cli.numeric import is_number

MOST_CATEGORIES = 1000  # of one column; each is a feature
FREE_TEXT = 20  # rows above which a column with another text in every row describes rows and no categories


def table(
    *,
    data_dir: str | Path,
    file: str,
    target: str,
    split: str | None = None,
    key: str | None = None,
    categorical: Sequence[str] = (),
    ignore: Sequence[str] = (),
    missing: Sequence[str | float] = (),
    test_fraction: float = 0.2,
) -> Source:
    """The rows of a CSV or Parquet file; `target` is the column of classes.

    A column of numbers is numeric unless it is among `categorical`; any other is categorical, and left out if every row
    has another text. `missing` are further spellings of a missing value. `split` is a column of train, val and test,
    `key` one of the rows' names, which no two share and which are not learned from.
    Without it, or where it names no test rows, the share `test_fraction` of each class is the test part. A relative
    `file` is looked for in the working directory, then in `data_dir`. The rows are encoded by `kd_cli.data.prepare`, as
    fitted on the training part. Raises DataError, which names the line or the column, and ConfigError for a column that
    is not there.
    """
    if not is_number(test_fraction) or not 0 < test_fraction < 1:
        raise ConfigError(f"test_fraction is {test_fraction!r}; it must be a number above 0 and below 1")
    path, notes = find_table(file, Path(data_dir).expanduser())
    cells = read_table(path)
    total = len(cells.places)
    uses = {"target": target, "split": split, "key": key, "categorical": categorical, "ignore": ignore}
    _check_columns(list(cells.columns), uses)
    names = _names(cells, key)
    cells = _with_missing(cells, missing)
    given, (cells, said) = torch.tensor(_labelled(cells, target)), _with_target(cells, target)
    labels, class_names = _classes(cells.columns[target], target)
    columns, rows, on_columns = _read_columns(cells, {target, split, key, *ignore}, categorical)
    if not columns:
        raise DataError(f"{path.name} has no column beside {target} to learn from")
    parts, on_parts = _parts(cells, split, labels, test_fraction)

    def part(name: str) -> tuple[Tensor, Tensor]:
        return rows[parts[name]], labels[parts[name]]

    def names_of(name: str) -> tuple[str, ...]:
        return tuple(names[i] for i in given[parts[name]].tolist()) if names else ()

    val_rows, val_labels = part("val") if len(parts["val"]) else (None, None)
    return Source(
        path.stem,
        *part("train"),
        *part("test"),
        class_names,
        val_images=val_rows,
        val_labels=val_labels,
        train_names=names_of("train"),
        val_names=names_of("val"),
        test_names=names_of("test"),
        columns=columns,
        train_rows=given[parts["train"]],
        test_rows=given[parts["test"]],
        rows=total,
        notes=[*notes, *cells.notes, *said, *on_parts, *on_columns],
    )


def _check_columns(names: list[str], keys: Mapping[str, Any]) -> None:
    """ConfigError for a key that names a column which is not there, or one that has another use."""
    uses = {}
    for key, given in keys.items():
        if key in ("categorical", "ignore") and isinstance(given, str):
            raise ConfigError(f"dataset.{key} is {given!r}; it must be a list of columns", hint=f"[{given}]")
        uses[key] = [] if given is None else [given] if isinstance(given, str) else list(given)
        for name in uses[key]:
            if name not in names:
                hint = did_you_mean(str(name), names) or f"the table has {listed(names)}"
                raise ConfigError(f"dataset.{key} is {name!r}, and the table has no such column", hint=hint)
    for key in ("split", "key", "categorical", "ignore"):
        if keys["target"] in uses[key]:
            raise ConfigError(f"dataset.target and dataset.{key} both name the column {keys['target']!r}")


def _names(cells: Cells, key: str | None) -> tuple[str, ...]:
    """The rows' names. DataError for one that two rows have."""
    if key is None:
        return ()
    places: dict[str, str] = {}
    for name, place in zip(cells.columns[key], cells.places, strict=True):
        if name in places:
            raise DataError(f"{cells.file}, {place}: {name!r} in column {key!r} is also the key of {places[name]}")
        places[name] = place
    return tuple(places)


# ---------------------------------------------------------------- its columns


def _with_missing(cells: Cells, missing: Sequence[str | float]) -> Cells:
    """The cells with the user's spellings of a missing value emptied."""
    if isinstance(missing, str):
        raise ConfigError(f"dataset.missing is {missing!r}; it must be a list of values", hint=f"[{missing}]")
    words = {str(value) for value in missing}
    numbers = {float(value) for value in missing if is_number(value)}
    if not words:
        return cells

    def emptied(cell: str) -> str:
        return "" if cell in words or (numbers and number(cell) in numbers) else cell

    columns = {name: [emptied(cell) for cell in column] for name, column in cells.columns.items()}
    before, after = (Counter(cell for column in c.values() for cell in column)[""] for c in (cells.columns, columns))
    note = sentence("{n} {values} {is} missing by dataset.missing", after - before)
    return Cells(cells.file, columns, cells.places, (*cells.notes, note))


def _labelled(cells: Cells, target: str) -> list[int]:
    """The numbers of the rows that have a class."""
    return [i for i, cell in enumerate(cells.columns[target]) if not is_missing(cell)]


def _with_target(cells: Cells, target: str) -> tuple[Cells, list[str]]:
    """The rows that have a class, and a note on the others."""
    given, keep = cells.columns[target], _labelled(cells, target)
    missing = len(given) - len(keep)
    if not missing:
        return cells, []
    spelt = sorted({repr(cell) if cell else "nothing" for cell in given if is_missing(cell)})
    text = "{n} {rows} of {name} {is} left out, where {target} is missing ({spelt})"
    return cells.rows(keep), [sentence(text, missing, name=cells.file, target=target, spelt=listed(spelt))]


def _classes(cells: list[str], target: str) -> tuple[Tensor, tuple[str, ...]]:
    """Labels [N] and the classes' names: in the order of numbers if they are numbers, else of the alphabet."""
    names = set(cells)
    if len(names) < 2:
        found = f"one class only, {next(iter(names))!r}" if names else "no values"
        raise DataError(f"dataset.target={target} has {found}; there must be two or more classes")
    if len(names) > max(20, len(cells) // 5):
        raise DataError(
            f"dataset.target={target} has {len(names):,} different values in {len(cells):,} rows, too many for classes",
            hint="kd-run distils classifiers: divide a quantity into classes first",
        )
    numbers = {name: number(name) for name in names}
    if None in numbers.values():
        ordered = tuple(sorted(names))
    else:
        ordered = tuple(sorted(names, key=lambda name: (numbers[name], name)))
    place = {name: c for c, name in enumerate(ordered)}
    return torch.tensor([place[cell] for cell in cells]), ordered


def _read_columns(
    cells: Cells, others: set[str | None], categorical: Sequence[str]
) -> tuple[tuple[Column, ...], Tensor, list[str]]:
    """The columns to learn from, their values [N,columns] in float64, and notes; free text is left out."""
    columns, values, free = [], [], []
    for name in cells.columns:
        if name in others:
            continue
        if name not in categorical and _is_numeric(cells, name):
            columns.append(Column(name))
            values.append(_numbers(cells, name))
            continue
        given = cells.columns[name]
        names = sorted({cell for cell in given if not is_missing(cell)})
        present = sum(not is_missing(cell) for cell in given)
        if name not in categorical and (len(names) > MOST_CATEGORIES or len(names) == present > FREE_TEXT):
            free.append(f"{name} ({len(names):,} texts in {present:,} rows)")
            continue
        place = {category: float(c) for c, category in enumerate(names)}
        columns.append(Column(name, tuple(names)))
        values.append(torch.tensor([place.get(cell, math.nan) for cell in given], dtype=torch.float64))
    notes = []
    if unequal := [column.name for column in columns if column.categories is not None]:
        notes.append(sentence("{n} {columns} {is} categorical: {names}", len(unequal), names=listed(unequal)))
    if free:
        text = "{n} {columns} of free text {is} left out: {names}; dataset.categorical takes them in"
        notes.append(sentence(text, len(free), names=listed(free)))
    return tuple(columns), torch.stack(values, 1) if values else torch.zeros(0), notes


def _is_numeric(cells: Cells, name: str) -> bool:
    """Whether a column holds numbers. DataError for one that is meant to, and has a few values that are none."""
    given = [
        (cell, place) for cell, place in zip(cells.columns[name], cells.places, strict=True) if not is_missing(cell)
    ]
    words = [(cell, place) for cell, place in given if number(cell) is None]
    if words and all(re.fullmatch(r"[+-]?\d+,\d+", cell) for cell, _ in words):
        cell, place = words[0]
        raise DataError(
            f"{cells.file}, {place}: column {name!r} has decimal commas: {cell}",
            hint="write numbers with a point: 3.5, not 3,5",
        )
    if words and len(words) <= 0.1 * len(given):
        cell, place = words[0]
        found = sentence("{n} of {all:,} {values} {is} no number", len(words), all=len(given))
        raise DataError(
            f"{cells.file}, {place}: column {name!r} has {cell!r} among numbers; {found}",
            hint=f"dataset.missing=[{cell!r}] if it means that the value is unknown, dataset.categorical=[{name}] if "
            "the numbers name categories",
        )
    return not words


def _numbers(cells: Cells, name: str) -> Tensor:
    values = []
    for cell, place in zip(cells.columns[name], cells.places, strict=True):
        value = math.nan if is_missing(cell) else number(cell)
        if value is None or math.isinf(value):
            raise DataError(
                f"{cells.file}, {place}: column {name!r} has {cell}, no finite number",
                hint="leave the cell empty if the value is unknown",
            )
        values.append(value)
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------- its parts


def _parts(
    cells: Cells, split: str | None, labels: Tensor, test_fraction: float
) -> tuple[dict[str, Tensor], list[str]]:
    """The positions of the rows in train, val and test, and notes. DataError if none are left for one of them."""
    named = ["train" if split is None else _part(cells, split, i) for i in range(len(labels))]
    parts = {
        part: torch.tensor([i for i, own in enumerate(named) if own == part], dtype=torch.int64)
        for part in ("train", "val", "test")
    }
    if not len(parts["train"]):
        raise DataError(f"column {split!r} of {cells.file} names no row for training")
    if len(parts["test"]):
        return parts, []
    rows = parts["train"]
    held, kept = set_aside_by_class(labels[rows], round(len(rows) * test_fraction))
    if not len(held) or not len(kept):
        raise DataError(
            f"{cells.file} has {len(rows)} rows to train on, and test_fraction={test_fraction} leaves {len(held)} to "
            "test on",
            hint="more rows, or another dataset.test_fraction",
        )
    note = f"{cells.file} has no test part: {len(held)} of its {len(rows)} rows test, the same share of each class"
    return parts | {"train": rows[kept], "test": rows[held]}, [note]


def _part(cells: Cells, split: str, i: int) -> str:
    cell = cells.columns[split][i]
    found = part_of(cell)
    if found is None:
        raise DataError(
            f"{cells.file}, {cells.places[i]}: {cell!r} in column {split!r} names no part",
            hint="each row is train, val or test",
        )
    return found
