"""Files of answers: CSV, Parquet, npy and safetensors, read without running code of theirs."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd_cli.data.columns import number
from kd_cli.data.sentences import listed
from kd_cli.data.table_files import read_table
from kd_cli.errors import ConfigError, DataError, first_line
from kd_cli.nearest import did_you_mean

ENDINGS = (".csv", ".tsv", ".txt", ".parquet", ".pq", ".npy", ".safetensors")


@dataclass(frozen=True)
class AnswerFile:
    """The answers [N,columns] in a file, by part where it names parts, and the keys of the rows if it has any."""

    name: str
    checksum: str
    values: dict[str, Tensor]
    columns: tuple[str, ...] | None = None  # None: in the order of the classes
    keys: tuple[str, ...] | None = None


def read_answers(file: str, *, key: str, where: str) -> AnswerFile:
    """The answers in a file of any of ENDINGS; `key` is the column of keys of a table. Raises DataError."""
    path = Path(file).expanduser()
    ending = path.suffix.lower()
    if not path.is_file():
        raise ConfigError(f"{where} is {file}, and there is no such file")
    if ending not in ENDINGS:
        raise ConfigError(f"{where} is {file}; it must be a file of {', '.join(ENDINGS)}")
    checksum = hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()
    if ending == ".npy":
        return AnswerFile(path.name, checksum, {"train": _array(path, where)})
    if ending == ".safetensors":
        return AnswerFile(path.name, checksum, _tensors(path, where))
    cells = read_table(path, number_names=True)
    columns = [name for name in cells.columns if name != key]
    rows = []
    for name in columns:
        values = [number(cell) for cell in cells.columns[name]]
        for value, cell, place in zip(values, cells.columns[name], cells.places, strict=True):
            if value is None or not math.isfinite(value):
                hint = None if name == columns[0] else "a column for each class, and one called key at most"
                raise DataError(f"{where}: {path.name}, {place}: column {name!r} has {cell!r}, no number", hint=hint)
        rows.append(torch.tensor(values, dtype=torch.float64))
    if not rows:
        raise DataError(f"{where}: {path.name} has no columns of answers beside {key!r}")
    keys = tuple(cells.columns[key]) if key in cells.columns else None
    return AnswerFile(path.name, checksum, {"train": torch.stack(rows, 1)}, tuple(columns), keys)


def in_order_of(file: AnswerFile, class_names: Sequence[str], where: str) -> dict[str, Tensor]:
    """The values [N,C] with their columns in the order of the classes. DataError if they are of other classes."""
    if file.columns is not None:
        if unknown := [name for name in file.columns if name not in class_names]:
            hint = did_you_mean(unknown[0], class_names) or f"the classes are {listed(class_names)}"
            raise DataError(f"{where}: {file.name} has a column {unknown[0]!r}, which is no class", hint=hint)
        if lacking := [name for name in class_names if name not in file.columns]:
            raise DataError(f"{where}: {file.name} has no column for the class {lacking[0]!r}")
        order = [file.columns.index(name) for name in class_names]
        return {part: values[:, order] for part, values in file.values.items()}
    for values in file.values.values():
        if values.shape[1] != len(class_names):
            raise DataError(
                f"{where}: {file.name} has answers for {values.shape[1]} classes, and the data have {len(class_names)}"
            )
    return file.values


def _array(path: Path, where: str) -> Tensor:
    try:
        values = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"{where}: {path.name} cannot be read: {first_line(error)}", hint="np.save(FILE, array)"
        ) from error
    if not isinstance(values, np.ndarray) or values.dtype.kind != "f":
        raise DataError(f"{where}: {path.name} holds {getattr(values, 'dtype', 'no array')}; it must hold floats")
    return _checked(torch.from_numpy(values.astype(np.float64)), path, where)


def _tensors(path: Path, where: str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        found = load(path.read_bytes())
    except SafetensorError as error:
        raise DataError(f"{where}: {path.name} cannot be read: {first_line(error)}") from error
    if len(found) == 1:
        found = {"train": next(iter(found.values()))}
    if "train" not in found or not set(found) <= {"train", "test"}:
        raise DataError(
            f"{where}: {path.name} holds tensors called {listed(sorted(found))}",
            hint="one tensor, or one called train and test",
        )
    return {part: _checked(values, path, where) for part, values in found.items()}


def _checked(values: Tensor, path: Path, where: str) -> Tensor:
    if values.dim() != 2 or not values.is_floating_point() or not values.numel():
        raise DataError(
            f"{where}: {path.name} holds {values.dtype} {list(values.shape)}; it must hold floats [N, classes]",
            hint="a number for each example and class: labels alone are no soft targets" if values.dim() == 1 else None,
        )
    return values.double()
