"""The `kd-predict` command: classes of files, by a run's student or an exported .onnx file."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kd_cli.commands import cores
from kd_cli.commands.endings import short_endings
from kd_cli.commands.output import allow_any_text

if TYPE_CHECKING:
    from kd_cli.export.predict import Prediction, Predictor


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `kd-predict`. After a user's mistake, prints it without a traceback and exits with 1."""
    allow_any_text()
    options = arguments(argv)
    if "torch" not in sys.modules:  # which reads them when it is imported
        cores.share(os.environ)
    sys.path.append(os.getcwd())  # a user's own models
    with short_endings():
        from kd_cli.export.predict import confusion, predictions, predictor_of

        model = predictor_of(options.model, trust=options.trust)
        found = list(predictions(model, options.paths, batch=options.batch))
        write([row_of(one, model, options.top) for one in found], options.format)
        matrix = confusion(found, len(model.classes))
        if matrix is not None:  # beside the predictions, which programs may read
            errors = len(found) - int(matrix.trace())
            print(f"\n{errors:,} of {len(found):,} are wrong", file=sys.stderr)
            print(matrix_text(matrix.tolist(), model.classes), file=sys.stderr)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="kd-predict",
        description="Predict pictures or recordings, folders of them, rows of CSV files. Where folders have the names "
        "of classes, errors and a confusion matrix follow on stderr.",
    )
    parser.add_argument("model", metavar="MODEL", type=Path, help="the directory of a completed run, or a .onnx file")
    parser.add_argument(
        "paths", metavar="PATH", type=Path, nargs="+", help="a picture, a recording, a folder or a CSV file"
    )
    parser.add_argument("--format", choices=("table", "csv", "json"), default="table", help="json: an object per line")
    parser.add_argument("--top", type=int, default=3, metavar="K", help="how many classes to show (%(default)s)")
    parser.add_argument("--batch", type=int, default=128, metavar="N", help="examples at once (%(default)s)")
    parser.add_argument("--trust", action="store_true", help="import and run the run's own model")
    options = parser.parse_args(argv)
    if options.top < 1 or options.batch < 1:
        parser.error("--top and --batch must be 1 or more")
    return options


def row_of(one: Prediction, model: Predictor, top: int) -> dict[str, Any]:
    """One prediction as plain values: of independent labels, the class is every label of probability above one half."""
    order = one.probabilities.argsort(descending=True, stable=True)[:top].tolist()
    best = int(one.probabilities.argmax())
    labels = [name for name, p in zip(model.classes, one.probabilities.tolist(), strict=True) if p > 0.5]
    return {
        "file": one.name,
        "class": ";".join(labels) if model.multilabel else model.classes[best],
        "probability": round(float(one.probabilities[best]), 6),
        "top": {model.classes[i]: round(float(one.probabilities[i]), 6) for i in order},
    }


def write(rows: Sequence[dict[str, Any]], form: str) -> None:
    """Print predictions as a table, CSV or JSON lines."""
    if form == "json":
        for row in rows:
            print(json.dumps(row, ensure_ascii=False))
        return
    cells = [
        [
            row["file"],
            row["class"],
            f"{row['probability']:.6f}",
            " ".join(f"{k}={p:.4f}" for k, p in row["top"].items()),
        ]
        for row in rows
    ]
    heads = ["file", "class", "probability", "top"]
    if form == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows([heads, *cells])
        return
    widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads))]
    for line in [heads, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def matrix_text(matrix: Sequence[Sequence[int]], names: Sequence[str]) -> str:
    """A confusion matrix: true classes down, predicted ones across."""
    width = max(len(str(cell)) for cell in (*names, *(n for row in matrix for n in row))) + 2
    lines = [" " * width + "".join(f"{name:>{width}}" for name in names)]
    lines += [
        f"{name:<{width}}" + "".join(f"{n:>{width}}" for n in row) for name, row in zip(names, matrix, strict=True)
    ]
    return "true class down, predicted class across\n" + "\n".join(lines)


if __name__ == "__main__":
    main()
