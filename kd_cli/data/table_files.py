"""A table's cells as texts, read from a CSV or a Parquet file."""

from __future__ import annotations

import csv
import importlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_cli.data.columns import number
from kd_cli.errors import DataError, first_line

DELIMITERS = (",", ";", "\t", "|")
OTHERS = {".xlsx": "excel", ".xls": "excel", ".feather": "feather", ".json": "json", ".orc": "orc"}


@dataclass(frozen=True)
class Cells:
    """The texts of a table, by column, and where each row is: line 7 of a CSV file, row 6 of another."""

    file: str
    columns: dict[str, list[str]]
    places: Sequence[str]
    notes: tuple[str, ...] = ()

    def rows(self, keep: Sequence[int]) -> Cells:
        """Those rows only."""
        columns = {name: [cells[i] for i in keep] for name, cells in self.columns.items()}
        return Cells(self.file, columns, [self.places[i] for i in keep], self.notes)


def find_table(file: str, data_dir: Path) -> tuple[Path, list[str]]:
    """Where a file is, in the working directory or in `data_dir`, and a note if it is the latter. Raises DataError."""
    asked = Path(file).expanduser()
    for path in (asked, data_dir / asked):
        if path.is_file():
            return path, [] if path == asked else [f"there is no file {file} here: the table is {path}"]
    places = str(asked) if asked.is_absolute() else f"{asked.absolute()} nor {data_dir / asked}"
    raise DataError(f"dataset.file is {file}, and there is no file {places}", hint="dataset.file=table.csv")


def read_table(path: Path, *, number_names: bool = False) -> Cells:
    """The cells of a CSV file whose first line names the columns, or of a Parquet file. Raises DataError.

    A first line of numbers only is refused, as data without names, unless `number_names`.
    """
    ending = path.suffix.lower()
    if ending in OTHERS:
        raise DataError(
            f"{path.name} cannot be read: a table is CSV or Parquet",
            hint=f"pandas.read_{OTHERS[ending]}({path.name!r}).to_csv({path.with_suffix('.csv').name!r}, index=False)",
        )
    cells = _read_parquet(path) if ending in (".parquet", ".pq") else _read_csv(path)
    if not number_names and all(number(name) is not None for name in cells.columns):
        shown = ", ".join(list(cells.columns)[:4])
        raise DataError(f"the first line of {path.name} holds numbers: {shown}", hint="it must name the columns")
    if not cells.places:
        raise DataError(f"{path.name} has column names and no rows")
    if "" not in cells.columns:
        return cells
    columns = {name: column for name, column in cells.columns.items() if name}
    note = f"a column of {path.name} has no name and is left out, as the row numbers that pandas writes"
    return Cells(cells.file, columns, cells.places, (*cells.notes, note))


def _read_csv(path: Path) -> Cells:
    rows, places = [], []
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            stream.seek(0)
            delimiter = max(DELIMITERS, key=first.count)  # the first of them where the line has none
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            header = [name.strip() for name in next(reader, [])]
            _check_header(path, header)
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"{path.name}, line {reader.line_num}: {len(row)} values for {len(header)} columns",
                        hint=f"columns are separated by {delimiter!r}; a value that holds it must be quoted",
                    )
                rows.append([cell.strip() for cell in row])
                places.append(f"line {reader.line_num}")
    except UnicodeDecodeError as error:
        raise DataError(f"{path.name} is not UTF-8: {error.reason}", hint="save it as CSV UTF-8") from error
    except (csv.Error, OSError) as error:
        raise DataError(f"{path.name} cannot be read as CSV: {error}") from error
    columns = map(list, zip(*rows, strict=True)) if rows else ([] for _ in header)
    notes = () if delimiter == "," else (f"the columns of {path.name} are separated by {delimiter!r}",)
    return Cells(path.name, dict(zip(header, columns, strict=True)), places, notes)


def _read_parquet(path: Path) -> Cells:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
        types = importlib.import_module("pyarrow.types")
    except ModuleNotFoundError as error:
        hint = "pip install 'kd-cli[tables]'; or save the table as CSV"
        raise DataError(f"{path.name}: reading Parquet needs pyarrow, which is not installed", hint=hint) from error
    try:
        table = parquet.ParquetFile(path).read()
    except Exception as error:  # pyarrow's errors for a damaged file have no common class
        raise DataError(f"{path.name} cannot be read as Parquet: {first_line(error)}") from error
    _check_header(path, table.column_names)
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if types.is_nested(column.type) or types.is_binary(column.type):
            raise DataError(
                f"{path.name}, column {name!r}: {column.type} is neither numbers nor texts",
                hint=f"write the file without it: pandas.read_parquet(...).drop(columns=[{name!r}])",
            )
        columns[name] = ["" if value is None else str(value).strip() for value in column.to_pylist()]
    return Cells(path.name, columns, [f"row {i}" for i in range(1, table.num_rows + 1)])


def _check_header(path: Path, header: Sequence[str]) -> None:
    """DataError for a table without names for its columns, or with one name for several."""
    if not any(header):
        raise DataError(f"{path.name} is empty, or its first line is", hint="the first line names the columns")
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        shown = ", ".join(repr(name) for name in twice[:3])
        raise DataError(f"{path.name} has several columns called {shown}", hint="each column needs its own name")
