"""Pictures in folders: which files belong to which class and part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from kd_cli.data.pictures import decode_all
from kd_cli.data.source import Source
from kd_cli.data.splits import set_aside
from kd_cli.errors import ConfigError, DataError
from kd_cli.numeric import is_number, is_whole

PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def imagefolder(
    *, data_dir: str | Path, root: str, image_size: int, test_fraction: float = 0.2, channels: int = 3
) -> Source:
    """Pictures in a folder per class, under `root` or under its `train` and `test`; square, `image_size` pixels wide.

    The shorter side of a picture is scaled to `image_size` and its centre kept. Where `root` has no `test`, the first
    `test_fraction` of the recorded permutation is the test part. A relative `root` is looked for in the working
    directory, then in `data_dir`. Raises DataError, which names the picture that cannot be read.
    """
    if not is_whole(image_size) or image_size < 1:
        raise ConfigError(f"image_size is {image_size!r}; it must be a whole number, 1 or more")
    if channels not in (1, 3):
        raise ConfigError(f"channels is {channels!r}; it must be 3 (colour) or 1 (grey)")
    if not is_number(test_fraction) or not 0 < test_fraction < 1:
        raise ConfigError(f"test_fraction is {test_fraction!r}; it must be a number above 0 and below 1")
    folder = _picture_root(root, Path(data_dir).expanduser())
    if (folder / "train").is_dir() and (folder / "test").is_dir():
        train, test = _pictures_by_class(folder / "train"), _pictures_by_class(folder / "test")
        if list(train) != list(test):
            only = sorted(set(train) ^ set(test))
            raise DataError(
                f"{folder}: train and test must have the same classes; only one of them has {_listed(only)}",
                hint="make the missing class folders, or take the others away",
            )
        images, labels = decode_all(train, image_size, channels)
        return Source(folder.name, images, labels, *decode_all(test, image_size, channels), class_names=tuple(train))

    pictures = _pictures_by_class(folder)
    images, labels = decode_all(pictures, image_size, channels)
    count = round(len(labels) * test_fraction)
    if count in (0, len(labels)):
        raise DataError(
            f"{folder} has {len(labels)} pictures, and test_fraction={test_fraction} makes {count} the test part",
            hint="it needs some to test on and some to train on: more pictures, or another test_fraction",
        )
    held, kept = set_aside(len(labels), count)
    return Source(folder.name, images[kept], labels[kept], images[held], labels[held], class_names=tuple(pictures))


def _picture_root(root: str, data_dir: Path) -> Path:
    asked = Path(root).expanduser()
    for folder in (asked, data_dir / asked):
        if folder.is_dir():
            return folder.resolve()
    places = f"{asked}" if asked.is_absolute() else f"{asked.absolute()} nor {data_dir / asked}"
    raise DataError(
        f"root is {root}, and there is no folder {places}", hint="give the folder that holds one folder per class"
    )


def _pictures_by_class(folder: Path) -> dict[str, list[Path]]:
    """The classes in `folder`, sorted, and their pictures, sorted: the same on every machine."""
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if "train" in classes and set(classes) <= {"train", "val", "valid", "validation"}:
        raise DataError(
            f"{folder} has a folder train and no folder test", hint="call the held-out pictures' folder test"
        )
    if len(classes) < 2:
        raise DataError(
            f"{folder} has {len(classes)} class folders; it must have two or more",
            hint="put each class's pictures into a folder of its own: cat/1.jpg, dog/1.jpg",
        )
    pictures = {name: sorted(_pictures(folder / name)) for name in classes}
    for name, found in pictures.items():
        if not found:
            raise DataError(
                f"{folder / name} has no pictures, and so the class {name} has no examples",
                hint=f"pictures end in {_listed(sorted(PICTURES))}; remove the folder if it is no class",
            )
    return pictures


def _pictures(folder: Path) -> Iterator[Path]:
    for file in folder.rglob("*"):
        if file.suffix.lower() in PICTURES and not file.name.startswith(".") and file.is_file():
            yield file


def _listed(names: Sequence[str], most: int = 10) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
