"""A data set of Hugging Face on disk: Parquet files as on the Hub, or Arrow files as `save_to_disk` writes them."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kd_cli.data.folders import as_reading, check_test_fraction, of_parts, take, too_few
from kd_cli.data.pictures import FACTS, Reading, decode_content, notes, shown
from kd_cli.data.source import Source, Split
from kd_cli.data.splits import set_aside_by_class
from kd_cli.data.tree import part_of
from kd_cli.errors import DataError, first_line

ENDINGS = (".parquet", ".arrow")


@dataclass(frozen=True)
class Schema:
    """The columns of pictures and of labels, and the names of the classes where the file has them."""

    image: str
    label: str
    names: tuple[str, ...] | None
    notes: tuple[str, ...]


def huggingface(
    *,
    data_dir: str | Path,
    path: str,
    image_size: int,
    image: str | None = None,
    label: str | None = None,
    test_fraction: float = 0.2,
    channels: int = 3,
    background: str | Sequence[int] = "white",
) -> Source:
    """The pictures and labels of a Hugging Face data set in the file or folder `path`, read without its library.

    Files are parts by their names or folders (train-00000-of-00002.parquet, test/data-00000-of-00001.arrow). `image`
    and `label` name the columns; without them, the only column of each kind is taken, by the features that the file
    describes. Without a test part, the share `test_fraction` of each class tests. Pictures are scaled and cropped as
    those of `imagefolder`. Raises DataError.
    """
    reading = as_reading(image_size, channels, background)
    check_test_fraction(test_fraction)
    place = place_of(path, Path(data_dir).expanduser())
    parts = parts_of(place)
    tables = {part: [Table(file) for file in files] for part, files in parts.items()}
    schema = schema_of(next(iter(tables.values()))[0], image, label)
    read = {part: [table.rows(schema) for table in some] for part, some in tables.items()}
    names = schema.names or named_classes(read)
    said = list(schema.notes)
    splits, facts = {}, []
    for part, rows in read.items():
        splits[part], own = split_of(part, [pair for some in rows for pair in some], names, reading, schema)
        facts.append(own)
    said += notes(np.concatenate(facts), reading)
    train = splits["train"]
    if "test" not in splits:
        count = round(len(train) * test_fraction)
        held, kept = set_aside_by_class(train.labels, count)
        if count in (0, len(train)) or not len(held):
            raise too_few(shown(place.name), len(train), test_fraction, "picture")
        splits |= {"train": take(train, kept), "test": take(train, held)}
        said.append(
            f"{shown(place.name)} has no test part: {len(held)} of its {len(train)} pictures test, the same "
            "share of each class"
        )
    return of_parts(place, names, splits["train"], splits["test"], splits.get("val"), said)


def place_of(path: str, data_dir: Path) -> Path:
    """The file or folder, in the working directory or in `data_dir`. Raises DataError."""
    asked = Path(path).expanduser()
    for place in (asked, data_dir / asked):
        if place.exists():
            return place.resolve()
    raise DataError(
        f"dataset.path is {path}, and there is no file or folder {asked.absolute()} nor {data_dir / asked}",
        hint="a folder of Parquet files, one Parquet file, or what Dataset.save_to_disk has written",
    )


def parts_of(place: Path) -> dict[str, list[Path]]:
    """The data files of each part: train, and where there are any test and val. Raises DataError."""
    if place.is_file():
        if place.suffix not in ENDINGS:
            raise DataError(f"{shown(place)} is neither Parquet nor Arrow", hint="a file *.parquet or *.arrow")
        return {"train": [place]}
    files = sorted(
        file
        for file in place.rglob("*")
        if file.suffix in ENDINGS
        and not any(name.startswith(".") for name in file.relative_to(place).parts)
        and not file.name.startswith("cache-")  # which the library leaves beside what it has saved
    )
    if not files:
        raise DataError(f"{shown(place)} holds no Parquet or Arrow file", hint="a folder of *.parquet or *.arrow files")
    parts: dict[str, list[Path]] = {}
    for file in files:
        parts.setdefault(named_part(file, place), []).append(file)
    for part, some in parts.items():
        if len(folders := {file.parent for file in some}) > 1:
            shown_folders = ", ".join(sorted(shown(folder.relative_to(place)) for folder in folders))
            raise DataError(
                f"{shown(place)} has the part {part} in several folders: {shown_folders}",
                hint="dataset.path= with the folder of one configuration",
            )
    if "train" not in parts:
        raise DataError(f"{shown(place)} has no training part, only {', '.join(parts)}")
    return parts


def named_part(file: Path, place: Path) -> str:
    """The part that a file belongs to, by its name or its folder; train where they name none."""
    folders = reversed(file.relative_to(place).parts[:-1])
    for name in (re.split(r"[-_.]", file.name)[0], *folders):
        if (part := part_of(name)) is not None:
            return part
    return "train"


class Table:
    """One file of rows, read by pyarrow. Raises DataError."""

    def __init__(self, file: Path) -> None:
        self.file = file
        try:
            if file.suffix == ".parquet":
                self.schema = importlib.import_module("pyarrow.parquet").read_schema(file)
            else:
                with importlib.import_module("pyarrow").memory_map(str(file)) as stream:
                    self.schema = importlib.import_module("pyarrow.ipc").open_stream(stream).schema
        except ModuleNotFoundError as error:
            raise DataError(
                f"{file.name}: reading it needs pyarrow, which is not installed", hint="pip install 'kd-cli[tables]'"
            ) from error
        except Exception as error:  # pyarrow's errors for a damaged file have no common class
            raise DataError(f"{shown(file)} cannot be read: {first_line(error)}") from error
        described = (self.schema.metadata or {}).get(b"huggingface")
        features = json.loads(described)["info"]["features"] if described else {}
        self.features: Mapping[str, Any] = {k: v for k, v in features.items() if isinstance(v, dict)}

    def rows(self, schema: Schema) -> list[tuple[Any, Any]]:
        """The pairs of a picture, as it is stored, and its label."""
        try:
            if self.file.suffix == ".parquet":
                read = importlib.import_module("pyarrow.parquet").read_table
                table = read(self.file, columns=[schema.image, schema.label])
            else:
                with importlib.import_module("pyarrow").memory_map(str(self.file)) as stream:
                    table = importlib.import_module("pyarrow.ipc").open_stream(stream).read_all()
            columns = [table.column(name).to_pylist() for name in (schema.image, schema.label)]
        except Exception as error:
            raise DataError(f"{shown(self.file)} cannot be read: {first_line(error)}") from error
        return list(zip(*columns, strict=True))


def schema_of(table: Table, image: str | None, label: str | None) -> Schema:
    """Which columns hold pictures and labels. Raises DataError."""
    kinds = {name: table.features.get(name, {}).get("_type") for name in table.schema.names}
    bytes_like = [field.name for field in table.schema if "binary" in str(field.type)]  # bytes, or a record with them
    images = [name for name, kind in kinds.items() if kind == "Image"] or bytes_like
    simple = [f.name for f in table.schema if str(f.type).startswith(("int", "uint", "string", "large_string"))]
    labels = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    labels = labels or [name for name in simple if name in ("label", "labels", "class", "target")] or simple
    chosen_image = chosen(table, "image", image, images)
    chosen_label = chosen(table, "label", label, labels)
    names = table.features.get(chosen_label, {}).get("names")
    said = []
    if (image, label) != (chosen_image, chosen_label):
        others = [name for name in table.schema.names if name not in (chosen_image, chosen_label)]
        left = f"; not used: {', '.join(others)}" if others else ""
        said.append(f"pictures are the column {chosen_image}, labels the column {chosen_label}{left}")
    return Schema(chosen_image, chosen_label, tuple(map(str, names)) if names else None, tuple(said))


def chosen(table: Table, key: str, given: str | None, found: Sequence[str]) -> str:
    """The column that is given, or the only one of its kind. Raises DataError."""
    names = ", ".join(table.schema.names)
    if given is not None:
        if given not in table.schema.names:
            raise DataError(
                f"dataset.{key} is {given}, and {table.file.name} has no such column", hint=f"it has {names}"
            )
        return given
    if len(found) != 1:
        what = f"several columns for it: {', '.join(found)}" if found else f"none that is one, among {names}"
        raise DataError(
            f"{table.file.name}: dataset.{key} is not given, and there are {what}", hint=f"dataset.{key}=NAME"
        )
    return found[0]


def named_classes(read: Mapping[str, list[list[tuple[Any, Any]]]]) -> tuple[str, ...]:
    """The classes of labels that no feature names: the texts in order, or the numbers from 0 to the largest."""
    labels = {label for tables in read.values() for rows in tables for _, label in rows if label is not None}
    if all(isinstance(label, int) for label in labels):
        return tuple(str(c) for c in range(max(labels, default=-1) + 1))
    return tuple(sorted(str(label) for label in labels))


def split_of(
    part: str, rows: Sequence[tuple[Any, Any]], names: tuple[str, ...], reading: Reading, schema: Schema
) -> tuple[Split, np.ndarray]:
    """One part's pictures decoded, with labels, and the facts on their decoding [N]. Raises DataError."""
    images = torch.empty(len(rows), reading.channels, reading.size, reading.size, dtype=torch.uint8)
    facts, labels = np.zeros(len(rows), dtype=FACTS), torch.empty(len(rows), dtype=torch.int64)
    place, files = {name: c for c, name in enumerate(names)}, []
    for i, (content, name, label) in enumerate(contents(part, rows, schema)):
        images[i], facts[i] = decode_content(content, name, reading)
        number = label if isinstance(label, int) else place.get(str(label), -1)
        if not 0 <= number < len(names):
            raise DataError(
                f"{name}: its label is {label!r}, and there are {len(names)} classes",
                hint="a part without labels cannot train or test; move its files away",
            )
        labels[i] = number
        files.append(name)
    return Split(images, labels, tuple(files)), facts


def contents(part: str, rows: Sequence[tuple[Any, Any]], schema: Schema) -> Iterator[tuple[bytes, str, Any]]:
    """The content of each picture's file, a name for it, and its label. Raises DataError for one that is elsewhere."""
    for i, (stored, label) in enumerate(rows):
        name, content = f"{part} row {i}", stored
        if isinstance(stored, dict):
            content = stored.get("bytes")
            name = f"{name} ({shown(stored['path'])})" if stored.get("path") else name
        if not isinstance(content, bytes):
            raise DataError(
                f"{name}: the column {schema.image} does not hold the picture itself",
                hint="Dataset.save_to_disk puts pictures into its files, and Dataset.to_parquet does not",
            )
        yield content, name, label
