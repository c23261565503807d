"""A user's own pictures with independent labels: a list of files, each with any number of labels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kd_cli.data.decoded import decoded
from kd_cli.data.folders import as_reading, folder_of
from kd_cli.data.picture_lists import Line, named_parts, read_list
from kd_cli.data.pictures import notes, shown
from kd_cli.data.sentences import listed
from kd_cli.data.source import Source, Split
from kd_cli.data.splits import set_aside
from kd_cli.errors import ConfigError, DataError
from kd_cli.numeric import is_number


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
    lines = read_list(folder / list, folder, several=True, key="dataset.list")
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


def _parts(lines: Sequence[Line], test_fraction: float, where: str) -> tuple[dict[str, Tensor], Sequence[str]]:
    """The positions of each part, and a note where the test part was drawn. Raises DataError for an empty part."""
    if (named := named_parts(lines, where)) is not None:
        return named, []
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
