"""A user's own pictures as a data set: a folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kd_cli.data.keep import read_pictures
from kd_cli.data.picture_lists import named_parts, read_list
from kd_cli.data.pictures import Reading, shown
from kd_cli.data.sentences import sentence
from kd_cli.data.source import Source, Split
from kd_cli.data.splits import set_aside_by_class
from kd_cli.data.stored import Images, selected
from kd_cli.data.tree import PICTURE, Classes, Search, Tree, read_tree
from kd_cli.errors import ConfigError, DataError
from kd_cli.numeric import is_number, is_whole


def imagefolder(
    *,
    data_dir: str | Path,
    root: str,
    image_size: int,
    files: str | None = None,
    test_fraction: float = 0.2,
    channels: int = 3,
    background: str | Sequence[int] = "white",
    keep: str = "auto",
) -> Source:
    """Pictures in a folder per class, under `root` or under its parts; square, `image_size` pixels wide.

    Parts are called train, test and, if there is one, val, in the usual spellings. If `root` has none, the share
    `test_fraction` of each class is the test part. The shorter side of a picture is scaled to `image_size` and its
    centre kept; transparent pixels show `background`. `files` is a CSV file of `path,label` or `path,label,split` in
    place of class folders, in the working directory or in `root`. A relative `root` is looked for in the working
    directory, then in `data_dir`. A folder without class folders gives unlabelled pictures. `keep` is where decoded
    pictures are kept, as `kd_cli.data.keep` reads it. Raises DataError, which names the picture or the line that cannot
    be read.
    """
    reading = as_reading(image_size, channels, background)
    check_test_fraction(test_fraction)
    data_dir = Path(data_dir).expanduser()
    folder = folder_of(root, data_dir, hint="give the folder that holds one folder per class")
    if files is not None:
        return _listed(files, folder, reading, data_dir, test_fraction, keep)
    tree = read_tree(folder)
    found = files_of(tree)
    images, read = read_pictures(folder, found, reading, data_dir, keep)
    names = tuple(shown(file.relative_to(folder)) for file in found)
    said = [*tree.notes, *read]
    if folder != Path(root).expanduser().resolve():
        said.insert(0, f"there is no folder {root} here: the pictures are read from {shown(folder)}")
    return source_of(folder, tree, images, names, test_fraction=test_fraction, said=said)


def source_of(
    folder: Path,
    tree: Tree,
    images: Images,
    names: tuple[str, ...],
    *,
    test_fraction: float,
    said: list[str],
    noun: str = "picture",
) -> Source:
    """The data set of the examples of a folder, `images` [N,C,H,W] in the order of the tree's files.

    Where the folder has no parts, `test_fraction` of each class tests. Raises DataError.
    """
    if tree.unlabelled:
        everything = Split(images, torch.zeros(len(names), dtype=torch.int64), names)
        return of_parts(folder, (), everything, Split(selected(images, slice(0)), everything.labels[:0]), None, said)
    splits, start = {}, 0
    for part, classes in tree.parts.items():
        labels = _labels(classes)
        end = start + len(labels)
        splits[part] = Split(selected(images, slice(start, end)), labels, names[start:end])
        start = end
    class_names = tuple(next(iter(tree.parts.values())))
    if "all" not in splits:
        return of_parts(folder, class_names, splits["train"], splits["test"], splits.get("val"), said)
    train, test = _test_part(folder, splits["all"], test_fraction, noun)
    said.append(
        f"{shown(folder.name)} has no test part: {len(test)} of its {len(names)} {noun}s test, the same share of each "
        "class"
    )
    return of_parts(folder, class_names, train, test, None, said)


def files_of(tree: Tree) -> list[Path]:
    """The files of a folder's examples, part after part and class after class."""
    return [*tree.unlabelled, *(file for classes in tree.parts.values() for part in classes.values() for file in part)]


def check_test_fraction(test_fraction: float) -> None:
    """Raise ConfigError for a share that is none."""
    if not is_number(test_fraction) or not 0 < test_fraction < 1:
        raise ConfigError(f"test_fraction is {test_fraction!r}; it must be a number above 0 and below 1")


def _listed(files: str, folder: Path, reading: Reading, data_dir: Path, test_fraction: float, keep: str) -> Source:
    """The pictures below a folder that a list names, one label each."""
    asked = Path(files).expanduser()
    path = asked if asked.is_file() else folder / asked
    lines = read_list(path, folder, several=False, key="dataset.files")
    class_names = tuple(sorted({label for line in lines for label in line.labels}))
    images, said = read_pictures(folder, [line.file for line in lines], reading, data_dir, keep)
    place = {name: c for c, name in enumerate(class_names)}
    labels = torch.tensor([place[label] for line in lines for label in line.labels])
    everything = Split(images, labels, tuple(shown(line.file.relative_to(folder)) for line in lines))
    listed = {line.file for line in lines}
    if others := sum(file.resolve() not in listed for file in Search(PICTURE).files(folder)):
        said.insert(
            0,
            sentence(
                "{n} {pictures} of {name} {is} not in {list}, and not used", others, name=folder.name, list=path.name
            ),
        )
    if (parts := named_parts(lines, shown(path))) is not None:
        splits = {part: take(everything, positions) for part, positions in parts.items()}
        return of_parts(folder, class_names, splits["train"], splits["test"], splits.get("val"), said)
    train, test = _test_part(folder, everything, test_fraction, "picture")
    said.append(
        f"{path.name} names no test part: {len(test)} of its {len(lines)} pictures test, the same share of each class"
    )
    return of_parts(folder, class_names, train, test, None, said)


def of_parts(
    folder: Path, class_names: tuple[str, ...], train: Split, test: Split, val: Split | None, said: list[str]
) -> Source:
    """The data set of a folder's parts."""
    return Source(
        name=shown(folder.name),
        train_images=train.images,
        train_labels=train.labels,
        test_images=test.images,
        test_labels=test.labels,
        class_names=class_names,
        val_images=None if val is None else val.images,
        val_labels=None if val is None else val.labels,
        train_names=train.names,
        val_names=() if val is None else val.names,
        test_names=test.names,
        channels_first=True,
        notes=said,
    )


def _test_part(folder: Path, everything: Split, test_fraction: float, noun: str) -> tuple[Split, Split]:
    """The training and the test part of examples that have none. DataError if one of them would be empty."""
    total = len(everything)
    count = round(total * test_fraction)
    held, kept = set_aside_by_class(everything.labels, count)
    if count in (0, total) or not len(held):
        raise too_few(shown(folder), total, test_fraction, noun)
    return take(everything, kept), take(everything, held)


def too_few(where: str, total: int, test_fraction: float, noun: str) -> DataError:
    """Why a share of so many examples cannot be the test part."""
    return DataError(
        f"{where} has {total} {noun}s, and test_fraction={test_fraction} makes {round(total * test_fraction)} the test "
        "part",
        hint=f"it needs some to test on and some to train on: more {noun}s, or another test_fraction",
    )


def take(split: Split, positions: Tensor) -> Split:
    """The examples at some positions, with their names."""
    names = tuple(split.names[i] for i in positions.tolist())
    return Split(selected(split.images, positions), split.labels[positions], names)


def _labels(classes: Classes) -> Tensor:
    counts = torch.tensor([len(pictures) for pictures in classes.values()])
    return torch.repeat_interleave(torch.arange(len(classes)), counts)


def folder_of(root: str, data_dir: Path, *, hint: str) -> Path:
    """The folder `root`, in the working directory or in `data_dir`. Raises DataError with the hint."""
    asked = Path(root).expanduser()
    for folder in (asked, data_dir / asked):
        if folder.is_dir():
            return folder.resolve()
    places = f"{asked}" if asked.is_absolute() else f"{asked.absolute()} nor {data_dir / asked}"
    raise DataError(f"root is {root}, and there is no folder {places}", hint=hint)


def as_reading(image_size: int, channels: int, background: str | Sequence[int]) -> Reading:
    """How pictures are decoded, from the keys of a data set. Raises ConfigError."""
    return Reading(_positive(image_size), _channels(channels), _colour(background))


def _positive(image_size: int) -> int:
    if not is_whole(image_size) or image_size < 1:
        raise ConfigError(f"image_size is {image_size!r}; it must be a whole number, 1 or more")
    return image_size


def _channels(channels: int) -> int:
    if channels not in (1, 3):
        raise ConfigError(f"channels is {channels!r}; it must be 3 (colour) or 1 (grey)")
    return channels


def _colour(background: str | Sequence[int]) -> tuple[int, int, int]:
    from PIL import ImageColor

    try:
        numbers = ImageColor.getrgb(background) if isinstance(background, str) else tuple(background)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) != 3 or not all(isinstance(n, int) and 0 <= n <= 255 for n in numbers):
        raise ConfigError(
            f"background is {background!r}; it must be a colour",
            hint="a name (white, black), or red, green and blue from 0 to 255: background=[255,255,255]",
        )
    red, green, blue = numbers
    return red, green, blue
