"""Columns of a table: what they hold, and their encoding as a network's input, fitted on the training part only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kd_cli.data.sentences import listed, sentence
from kd_cli.errors import DataError
from kd_cli.nearest import did_you_mean
from kd_cli.numeric import is_number

# The spellings of a missing value that spreadsheets, pandas and R write; NaN is one in every case.
MISSING = frozenset({"", "NA", "N/A", "#N/A", "<NA>", "n/a", "null", "NULL", "None", "?"})


def is_missing(cell: str) -> bool:
    """Whether a cell's text stands for a missing value."""
    return cell in MISSING or cell.lower() == "nan"


def number(cell: str) -> float | None:
    """The number that a cell's text is, also an infinite one; None for any other text."""
    try:
        return float(cell) if "_" not in cell else None  # Python reads 1_000 as a number, a spreadsheet does not
    except ValueError:
        return None


@dataclass(frozen=True)
class Column:
    """A column of a table as it was read: of numbers, or of categories, whose values [N] count in `categories`.

    A missing value is NaN in both.
    """

    name: str
    categories: tuple[str, ...] | None = None


@dataclass(frozen=True)
class EncodedColumn:
    """How one column becomes features.

    A column of numbers is one feature, `(value - mean) / std`, 0 where the value is missing. A column of categories is
    one feature for each category of the training part, 1 for the row's own and 0 for the others. With `missing`, a
    last feature is 1 where the value is missing.
    """

    name: str
    mean: float = 0.0
    std: float = 1.0
    categories: tuple[str, ...] | None = None
    missing: bool = False

    @property
    def features(self) -> int:
        return (1 if self.categories is None else len(self.categories)) + self.missing

    def encode(self, values: Tensor) -> Tensor:
        """Numbers, or positions in `categories` (-1: another one), NaN where missing, [N] float64 -> [N,features]."""
        lacking = values.isnan()
        if self.categories is None:
            features = ((values - self.mean) / self.std).masked_fill(lacking, 0.0)[:, None]
        else:
            features = (values[:, None] == torch.arange(len(self.categories), dtype=torch.float64)).double()
        return torch.cat([features, lacking.double()[:, None]], 1) if self.missing else features


@dataclass(frozen=True)
class Encoding:
    """The encoding of a table's rows, in the order of its columns; columns that the training part shows constant are
    left out."""

    columns: tuple[EncodedColumn, ...]

    @property
    def features(self) -> int:
        return sum(column.features for column in self.columns)

    def encode_read(self, rows: Tensor, columns: Sequence[Column]) -> tuple[Tensor, dict[str, dict[str, int]]]:
        """Rows [N,columns] as they were read -> [N,features] float32; by column, how many rows have `unknown`
        categories, or are `missing` where no training row is."""
        place = {column.name: i for i, column in enumerate(columns)}
        parts, unseen = [torch.zeros(len(rows), 0, dtype=torch.float64)], {}
        for column in self.columns:
            i = place[column.name]
            values, counts = rows[:, i], {}
            if column.categories is not None:
                own = {name: float(c) for c, name in enumerate(column.categories)}
                codes = torch.tensor([own.get(name, -1.0) for name in columns[i].categories or ()], dtype=torch.float64)
                lacking = values.isnan()
                values = codes[values.nan_to_num().long()].masked_fill(lacking, math.nan)
                counts["unknown"] = int((values == -1).sum())
            counts["missing"] = 0 if column.missing else int(values.isnan().sum())
            if any(counts.values()):
                unseen[column.name] = counts
            parts.append(column.encode(values))
        return torch.cat(parts, 1).float(), unseen

    def encode(self, rows: Sequence[Mapping[str, Any]], *, allow_unknown: bool = False) -> Tensor:
        """Rows by column name -> a network's input [N,features], float32.

        Values are numbers or texts; None, NaN and an empty text are missing. Raises DataError for a row without one of
        the columns, for what is no number in a column of numbers, and for a category that no training row has, unless
        `allow_unknown`: it is then encoded as in test data, as none of the categories.
        """
        if isinstance(rows, Mapping) or not all(isinstance(row, Mapping) for row in rows):
            raise DataError("rows must be a list of mappings from a column's name to its value", hint="[{'age': 31}]")
        columns = [torch.zeros(len(rows), 0, dtype=torch.float64)]
        for column in self.columns:
            values = [_value(column, row, i, allow_unknown) for i, row in enumerate(rows)]
            columns.append(column.encode(torch.tensor(values, dtype=torch.float64)))
        return torch.cat(columns, 1).float()

    def record(self) -> list[dict[str, Any]]:
        """Plain values for a file."""
        return [asdict(column) for column in self.columns]

    @classmethod
    def from_record(cls, record: Sequence[Mapping[str, Any]]) -> Encoding:
        """The encoding of a file. Raises TypeError or ValueError for other values."""
        columns = []
        for values in record:
            categories = values["categories"]
            columns.append(EncodedColumn(**{**values, "categories": None if categories is None else tuple(categories)}))
            if not is_number(columns[-1].mean) or not is_number(columns[-1].std) or columns[-1].std <= 0:
                raise ValueError(f"the column {columns[-1].name} has no usable mean and deviation")
        return cls(tuple(columns))


def _value(column: EncodedColumn, row: Mapping[str, Any], i: int, allow_unknown: bool) -> float:
    """The value of one column in row i: a number, or the position of a category, NaN if it is missing."""
    if column.name not in row:
        raise DataError(f"row {i} has no column {column.name!r}", hint=did_you_mean(column.name, map(str, row)))
    value = row[column.name]
    text = "" if value is None else str(value).strip()
    if is_missing(text):
        return math.nan
    if column.categories is None:
        found = number(text)
        if found is None or not math.isfinite(found):
            raise DataError(f"row {i}, column {column.name!r}: {value!r} is no finite number", hint="None if unknown")
        return found
    if text in column.categories:
        return float(column.categories.index(text))
    if allow_unknown:
        return -1.0
    raise DataError(
        f"row {i}, column {column.name!r}: no training row has {text!r}; they have {listed(column.categories)}",
        hint="None if unknown; allow_unknown=True encodes it as none of the categories",
    )


def fit_encoding(columns: Sequence[Column], rows: Tensor) -> tuple[Encoding, list[str]]:
    """The encoding that the training rows [N,columns] give, and notes. DataError if no column tells rows apart."""
    found, constant, filled = [], [], []
    for column, values in zip(columns, rows.unbind(1), strict=True):
        present = values[~values.isnan()]
        missing = len(present) < len(values)
        if column.categories is None:
            mean = float(present.mean()) if len(present) else 0.0
            std = float(present.std(correction=0)) if len(present) else 0.0
            varies, encoded = std > 1e-12 * abs(mean), EncodedColumn(column.name, mean, std or 1.0, None, missing)
            if varies and missing:
                filled.append(column.name)
        else:
            names = tuple(column.categories[int(c)] for c in present.unique().tolist())
            varies, encoded = len(names) > 1, EncodedColumn(column.name, categories=names, missing=missing)
        if varies or (missing and len(present)):
            found.append(encoded)
        else:
            constant.append(column.name)
    notes = []
    if constant:
        text = "{n} {columns} {has} the same value in every training row and {is} left out: {names}"
        notes.append(sentence(text, len(constant), names=listed(constant)))
    if filled:
        text = "{n} {columns} of numbers {has} missing values, which are the training mean and marked by a feature: "
        notes.append(sentence(text, len(filled)) + listed(filled))
    if not found:
        raise DataError("every column has the same value in all training rows: there is nothing to learn from")
    return Encoding(tuple(found)), notes


def notes_on_unseen(unseen: Mapping[str, Mapping[str, int]], part: str) -> list[str]:
    """Sentences on values of a part that no training row has."""
    notes = []
    for name, counts in unseen.items():
        if n := counts.get("unknown"):
            text = "{n} {part} {rows} {has} a category of {name} that no training row has: encoded as none of them"
            notes.append(sentence(text, n, part=part, name=name))
        if n := counts["missing"]:
            text = "{n} {part} {rows} {has} no value of {name}, which no training row lacks: encoded as {as_what}"
            as_what = "none of its categories" if "unknown" in counts else "the training mean"
            notes.append(sentence(text, n, part=part, name=name, as_what=as_what))
    return notes
