"""Predict files: with a run's student or an exported .onnx file, as training's evaluation sees them."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_cli.data.audio import SOUNDS
from kd_cli.data.audiofolder import RECORDING, SoundReading
from kd_cli.data.folders import as_reading
from kd_cli.data.pictures import decode_all, is_picture, shown
from kd_cli.errors import DataError
from kd_cli.export.forms import check_packages, run_onnx
from kd_cli.export.load import load_student
from kd_cli.export.run_data import background_of, sound_of
from kd_cli.numeric import is_number

WHITE = "white"  # as in conf/dataset/imagefolder.yaml


@dataclass(frozen=True)
class Predictor:
    """A model with what its input must look like; `logits` takes bytes or floats [B, *input_shape].

    `sound` says how recordings become its input; None for a model that takes none.
    """

    logits: Callable[[Tensor], Tensor]
    input_shape: tuple[int, ...]
    classes: tuple[str, ...]
    multilabel: bool
    background: str | Sequence[int]
    sound: SoundReading | None = None

    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities [B, classes]; independent labels have their own."""
        logits = self.logits(images)
        return logits.sigmoid() if self.multilabel else logits.softmax(-1)


@dataclass(frozen=True)
class Prediction:
    """One file or row: its name, the label that its folder gives it, and probabilities by class."""

    name: str
    label: int | None
    probabilities: Tensor


def predictor_of(model: Path, *, trust: bool = False) -> Predictor:
    """The predictor of a run's directory or of a .onnx file that kd-export wrote. Raises DataError for other files."""
    if model.is_dir():
        student = load_student(model, trust=trust)
        background, sound = background_of(model) or WHITE, reading_of_sounds(sound_of(model))
        return Predictor(student, student.input_shape, student.classes, student.multilabel, background, sound)
    if model.suffix != ".onnx" or not model.is_file():
        raise DataError(f"{model} is neither the directory of a run nor a .onnx file")
    check_packages()
    import onnx

    try:
        found = {entry.key: entry.value for entry in onnx.load(model).metadata_props}
        shape, classes = tuple(json.loads(found["input_shape"])[1:]), tuple(json.loads(found["classes"]))
    except Exception as error:  # protobuf's errors have no common class
        raise DataError(f"{model} is not a file that kd-export wrote") from error
    predict, takes_bytes = run_onnx(model), found["values"] == "bytes"

    def logits(images: Tensor) -> Tensor:
        is_bytes = images.dtype == torch.uint8
        if takes_bytes and not is_bytes:
            raise DataError(f"{model} takes bytes, and the input holds floats")
        return predict(images.float() / 255 if is_bytes and not takes_bytes else images)

    multilabel = json.loads(found.get("multilabel", "false"))
    sound = reading_of_sounds(json.loads(found.get("sound", "null")))
    return Predictor(logits, shape, classes, multilabel, background_in(found), sound)


def reading_of_sounds(fields: Mapping[str, Any] | None) -> SoundReading | None:
    return None if fields is None else SoundReading(**fields)


def background_in(metadata: Mapping[str, str]) -> str | Sequence[int]:
    """The colour, by name or by its numbers, on which an exported file's metadata says pictures are laid."""
    said = metadata.get("background", WHITE)
    found: str | list[int] = json.loads(said) if said.startswith("[") else said
    return found


@torch.no_grad()
def predictions(model: Predictor, paths: Sequence[Path], *, batch: int) -> Iterator[Prediction]:
    """Predictions of pictures or recordings, of all in folders, and of the rows of CSV files.

    A model of `dataset=audiofolder` takes recordings, any other pictures. Raises DataError for other files.
    """
    noun, of_files = ("pictures", of_pictures) if model.sound is None else ("recordings", of_sounds)
    files = []
    for path in paths:
        if path.suffix.lower() == ".csv":
            yield from of_rows(model, path, batch)
        elif path.is_dir():
            found = [file for file in sorted(path.rglob("*")) if file.is_file() and is_input(model, file)]
            if not found:
                raise DataError(f"{path} holds no {noun}")
            files += found
        elif path.is_file() and is_input(model, path):
            files.append(path)
        else:
            sound = model.sound is None and path.suffix.lower() in SOUNDS
            raise DataError(
                f"{path} is none of the {noun} that the model takes, no folder and no CSV file"
                if path.exists()
                else f"{path} does not exist",
                hint="recordings are for students of dataset=audiofolder" if sound else None,
            )
    if files:
        yield from of_files(model, files, batch)


def is_input(model: Predictor, file: Path) -> bool:
    """Whether a file is a recording, or for a model of pictures a picture."""
    return is_picture(file) if model.sound is None else RECORDING.holds(file)


def of_pictures(model: Predictor, files: Sequence[Path], batch: int) -> Iterator[Prediction]:
    """Predictions of picture files, which are cropped and scaled as dataset=imagefolder does."""
    if len(model.input_shape) != 3 or model.input_shape[1] != model.input_shape[2]:
        raise DataError(f"the model takes {list(model.input_shape)}, and pictures are read as squares with channels")
    reading = as_reading(model.input_shape[1], model.input_shape[0], model.background)
    return of_batches(model, files, batch, lambda part: decode_all(part, reading)[0])


def of_sounds(model: Predictor, files: Sequence[Path], batch: int) -> Iterator[Prediction]:
    """Predictions of recordings, which are resampled, and cut or filled, as dataset=audiofolder does."""
    reading = model.sound
    assert reading is not None
    return of_batches(
        *(model, files, batch), lambda part: torch.stack([reading.spectrogram(reading.sound(file)) for file in part])
    )


def of_batches(
    model: Predictor, files: Sequence[Path], batch: int, read: Callable[[Sequence[Path]], Tensor]
) -> Iterator[Prediction]:
    """Predictions of files, `batch` of them at a time; `read` makes the model's input of them."""
    numbers = {name: i for i, name in enumerate(model.classes)}
    for start in range(0, len(files), batch):
        part = files[start : start + batch]
        for file, row in zip(part, model.probabilities(read(part)), strict=True):
            label = None if model.multilabel else numbers.get(file.parent.name)
            yield Prediction(shown(file), label, row)


def of_rows(model: Predictor, path: Path, batch: int) -> Iterator[Prediction]:
    """Predictions of a CSV file's rows of numbers; a first row that holds other text is a heading."""
    if len(model.input_shape) != 1:
        raise DataError(f"{path}: the model takes {list(model.input_shape)}, and a row of a table is one of numbers")
    with path.open(newline="", encoding="utf-8-sig") as file:
        lines = [(number, row) for number, row in enumerate(csv.reader(file), 1) if row]
    rows = [(number, [as_number(cell) for cell in row]) for number, row in lines]
    if rows and all(value is None for value in rows[0][1]):
        del rows[0]
    for number, row in rows:
        if len(row) != model.input_shape[0] or None in row:
            raise DataError(f"{path}, line {number}: the model takes {model.input_shape[0]} numbers in a row")
    for start in range(0, len(rows), batch):
        part = rows[start : start + batch]
        found = model.probabilities(torch.tensor([row for _, row in part]))
        for (number, _), probabilities in zip(part, found, strict=True):
            yield Prediction(f"{shown(path)}:{number}", None, probabilities)


def as_number(cell: str) -> float | None:
    """The finite number in a cell, or None."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if is_number(value) and math.isfinite(value) else None


def confusion(found: Sequence[Prediction], classes: int) -> Tensor | None:
    """How often examples of a class (rows) are put in another (columns): [classes, classes]; None without labels."""
    if not found or any(one.label is None for one in found):
        return None
    matrix = torch.zeros(classes, classes, dtype=torch.int64)
    for one in found:
        matrix[one.label, int(one.probabilities.argmax())] += 1
    return matrix
