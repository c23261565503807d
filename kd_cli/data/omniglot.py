"""Omniglot's characters, each drawn by twenty people, split by who drew them."""

from __future__ import annotations

from pathlib import Path

import torch

from kd_cli.data.decoded import decoded
from kd_cli.data.folders import as_reading
from kd_cli.data.pictures import shown
from kd_cli.data.sentences import listed
from kd_cli.data.source import Source
from kd_cli.errors import ConfigError, DataError
from kd_cli.numeric import is_whole

DRAWERS = 20


def omniglot(*, data_dir: str | Path, image_size: int = 28, val_drawers: int = 2, test_drawers: int = 4) -> Source:
    """Characters [N,1,image_size,image_size], ink 255, from `data_dir/omniglot/ALPHABET-CHARACTER/DRAWER.png`.

    The last `test_drawers` of the twenty people test, the `val_drawers` before them validate, the others train. Classes
    are named alphabet-character, in alphabetical order. Raises ConfigError and DataError.
    """
    if not is_whole(val_drawers) or not is_whole(test_drawers) or val_drawers < 1 or test_drawers < 1:
        raise ConfigError(f"val_drawers is {val_drawers!r} and test_drawers {test_drawers!r}; each must be 1 or more")
    if val_drawers + test_drawers >= DRAWERS:
        raise ConfigError(f"val_drawers and test_drawers leave nobody of {DRAWERS} people to train on")
    data_dir = Path(data_dir).expanduser()
    root = data_dir / "omniglot"
    folders = sorted(entry for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else []
    if len(folders) < 2:
        raise DataError(
            f"there is no folder {root} with a folder for each of Omniglot's characters",
            hint="Latin-01/01.png to 20.png, from github.com/brendenlake/omniglot; data_dir=DIR names another data_dir",
        )
    files = [folder / f"{drawer:02}.png" for folder in folders for drawer in range(1, DRAWERS + 1)]
    if missing := [shown(file.relative_to(root)) for file in files if not file.is_file()]:
        raise DataError(f"{root} lacks {listed(missing, 3)}", hint=f"each character has {DRAWERS} drawings")
    images, _, kept = decoded(root, files, as_reading(image_size, 1, "white"), data_dir)
    drawings = (255 - images).unflatten(0, (len(folders), DRAWERS))  # a line of ink is what is there
    labels = torch.arange(len(folders))[:, None].expand(-1, DRAWERS)
    names = tuple(shown(file.relative_to(root)) for file in files)
    ends = [0, DRAWERS - val_drawers - test_drawers, DRAWERS - test_drawers, DRAWERS]
    train, val, test = (slice(ends[k], ends[k + 1]) for k in range(3))

    def files_of(people: slice) -> tuple[str, ...]:
        return tuple(name for k in range(len(folders)) for name in names[k * DRAWERS : (k + 1) * DRAWERS][people])

    return Source(
        name="omniglot",
        train_images=drawings[:, train].flatten(0, 1),
        train_labels=labels[:, train].flatten(),
        test_images=drawings[:, test].flatten(0, 1),
        test_labels=labels[:, test].flatten(),
        class_names=tuple(shown(folder.name) for folder in folders),
        val_images=drawings[:, val].flatten(0, 1),
        val_labels=labels[:, val].flatten(),
        channels_first=True,
        train_names=files_of(train),
        val_names=files_of(val),
        test_names=files_of(test),
        notes=kept,
    )
