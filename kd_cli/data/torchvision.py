"""The data sets that torchvision downloads: MNIST, FashionMNIST, KMNIST, CIFAR10 and CIFAR100."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_cli.data.source import Source
from kd_cli.data.splits import first_positions
from kd_cli.errors import ConfigError, DataError
from kd_cli.locks import lock
from kd_cli.numeric import is_whole
from kd_cli.vision import import_torchvision, network_timeout

log = logging.getLogger(__name__)

IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
LAYOUTS = {  # where torchvision keeps each data set below its root: the folder it reads, the archives it downloads
    name: (f"{name}/raw", tuple(f"{name}/raw/{part}-ubyte.gz" for part in IDX))
    for name in ("MNIST", "FashionMNIST", "KMNIST")
} | {
    "CIFAR10": ("cifar-10-batches-py", ("cifar-10-python.tar.gz",)),
    "CIFAR100": ("cifar-100-python", ("cifar-100-python.tar.gz",)),
}


def torchvision_dataset(*, data_dir: str | Path, name: str, examples: int | None = None) -> Source:
    """One of torchvision's data sets, read from `data_dir` in torchvision's layout, or downloaded to that folder.

    With `examples`, the training part has only so many, the first of the recorded permutation (`kd_cli.data.splits`).
    Raises DataError if the files are missing and cannot be downloaded, or are damaged.
    """
    if name not in LAYOUTS:
        raise ConfigError(f"name is {name!r}; it must be one of {', '.join(LAYOUTS)}")
    kind = getattr(import_torchvision().datasets, name)
    root = Path(data_dir).expanduser()
    parts = _read(kind, root)
    if parts is None:
        _download(kind, root)
        parts = _read(kind, root)
    if parts is None:
        raise DataError(
            f"{name} was downloaded to {root} and is gone again", hint="does another program clear that folder?"
        )
    train, test = parts
    images, labels = _image_tensors(train)
    notes = []
    if examples is not None:
        if not is_whole(examples) or not 1 <= examples <= len(labels):
            raise ConfigError(f"examples is {examples!r}; it must be a whole number from 1 to {len(labels):,}, or null")
        chosen = first_positions(len(labels), examples)
        images, labels = images[chosen], labels[chosen]
        notes.append(f"{examples:,} of {len(train.targets):,} training images are used, and the others are not")
    return Source(
        name.lower(),
        images,
        labels,
        *_image_tensors(test),
        notes=notes,
        class_names=tuple(str(c) for c in train.classes),
        by_class=False,  # the classes are large, and published results stand on this rule
    )


def _read(kind: Callable[..., Any], root: Path) -> tuple[Any, Any] | None:
    """The training and the test part as torchvision reads them, or None if files are missing.

    CIFAR's files are pickles. torchvision's constructors compare each file with its published MD5 before they unpickle
    it, so no foreign code runs. Never read these files without going through the constructor.
    """
    name = kind.__name__
    try:
        return kind(root, train=True), kind(root, train=False)
    except Exception as error:  # none of our code runs in here, and a damaged file can raise anything
        if isinstance(error, RuntimeError) and "download=True" in str(error):
            return None
        folder = root / LAYOUTS[name][0]
        raise DataError(
            f"{name} in {folder} cannot be read: {error or type(error).__name__}",
            hint="a file is damaged; remove that folder to have it downloaded again",
        ) from error


def _download(kind: Callable[..., Any], root: Path) -> None:
    """Download a data set into `root`: whole files only, by one process at a time. Raises DataError.

    torchvision unpacks straight into the folder that it later reads without a checksum. A process killed there would
    leave half a file that passes for a whole one. So the download goes to a folder beside it; whole files are moved.
    """
    name = kind.__name__
    folder, archives = LAYOUTS[name]
    staging = root / f".downloading-{name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with lock(root / f".{name}.lock", waiting=lambda seconds: None):
            if _read(kind, root) is not None:  # another process has downloaded it in the meantime
                return
            log.info("downloading %s to %s", name, root)
            shutil.rmtree(staging, ignore_errors=True)
            try:
                _reuse_archives(root, staging, archives)
                with network_timeout(), contextlib.redirect_stdout(io.StringIO()):
                    for train in (True, False):
                        kind(staging, train=train, download=True)
                (root / folder).mkdir(parents=True, exist_ok=True)
                for file in sorted((staging / folder).iterdir()):
                    if file.suffix != ".gz":
                        os.replace(file, root / folder / file.name)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except DataError:
        raise
    except Exception as error:  # the network, the disk, an archive that is not the published one
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{name} is missing or incomplete in {root / folder}, and could not be downloaded: {reason}",
            hint="dataset=digits needs no download; data_dir=DIR or KD_DATA names a folder that has it",
        ) from error


def _reuse_archives(root: Path, staging: Path, archives: tuple[str, ...]) -> None:
    """Copy archives that the user has put into `root`; torchvision takes them if their MD5 is the published one."""
    for archive in archives:
        if (root / archive).is_file():
            (staging / archive).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / archive, staging / archive)


def _image_tensors(part: Any) -> tuple[Tensor, Tensor]:
    """torchvision's [N,H,W] tensor or [N,H,W,C] array, and its labels -> [N,C,H,W] uint8 and [N] int64."""
    images = torch.as_tensor(part.data)
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.as_tensor(part.targets, dtype=torch.int64)
