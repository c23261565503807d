"""A user's own pictures with independent labels: a list of files, each with any number of labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kd_cli.data.folders import as_reading, check_test_fraction, folder_of, of_parts, take, too_few
from kd_cli.data.keep import read_pictures
from kd_cli.data.picture_lists import Line, named_parts, read_list
from kd_cli.data.pictures import shown
from kd_cli.data.sentences import listed
from kd_cli.data.source import Source, Split
from kd_cli.data.splits import set_aside
from kd_cli.errors import DataError


def imagelist(
    *,
    data_dir: str | Path,
    root: str,
    list: str = "labels.csv",
    image_size: int,
    test_fraction: float = 0.2,
    channels: int = 3,
    background: str | Sequence[int] = "white",
    keep: str = "auto",
) -> Source:
    """Pictures under `root` that `list`, a CSV file, names with their labels; square, `image_size` pixels wide.

    The list has a head with the columns `path` (below `root`), `labels` (separated by ";", none where it is empty) and,
    if the parts are chosen, `split` (train, test and val in the usual spellings). Without `split`, the share
    `test_fraction` of all pictures is the test part. The labels are those that occur, in alphabetical order. Raises
    DataError, which names the line that cannot be read.
    """
    reading = as_reading(image_size, channels, background)
    check_test_fraction(test_fraction)
    data_dir = Path(data_dir).expanduser()
    folder = folder_of(root, data_dir, hint="give the folder that the paths of the list start in")
    lines = read_list(folder / list, folder, several=True, key="dataset.list")
    names = sorted(set().union(*(line.labels for line in lines)))
    if not names:
        raise DataError(f"{shown(folder / list)} gives no picture a label", hint="labels are separated by ;")
    images, read = read_pictures(folder, [line.file for line in lines], reading, data_dir, keep)
    labels = torch.tensor([[int(name in line.labels) for name in names] for line in lines])
    everything = Split(images, labels, tuple(shown(line.file.relative_to(folder)) for line in lines))
    parts, said = _parts(lines, test_fraction, shown(folder / list))
    splits = {part: take(everything, positions) for part, positions in parts.items()}
    said = [f"independent labels: {listed(names)}", *said, *read]
    return of_parts(folder, tuple(names), splits["train"], splits["test"], splits.get("val"), said)


def _parts(lines: Sequence[Line], test_fraction: float, where: str) -> tuple[dict[str, Tensor], Sequence[str]]:
    """The positions of each part, and a note where the test part was drawn. Raises DataError for an empty part."""
    if (named := named_parts(lines, where)) is not None:
        return named, []
    total = len(lines)
    count = round(total * test_fraction)
    if count in (0, total):
        raise too_few(where, total, test_fraction, "picture")
    test, train = set_aside(total, count)
    return {"train": train, "test": test}, [
        f"{where} names no test part: {count} of its {total} pictures test, drawn without regard to their labels"
    ]
