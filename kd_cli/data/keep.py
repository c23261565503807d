"""Where the pictures of a folder are kept while models are trained: in memory, in a file of bytes, or nowhere."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kd_cli.data.decoded import Decoded, in_memory
from kd_cli.data.pictures import Reading, notes, shown
from kd_cli.data.room import available_memory, free_disk, gigabytes
from kd_cli.data.stored import Images, KeptImages
from kd_cli.data.streamed import PictureFiles, StreamedImages
from kd_cli.errors import ConfigError
from kd_cli.nearest import did_you_mean

log = logging.getLogger(__name__)

CHOICES = ("auto", "memory", "disk", "none")
OF_MEMORY = 4  # pictures may take this part of the available memory: setting parts aside copies them for a moment
OF_DISK = 2  # and this part of the free disk


def read_pictures(
    root: Path, files: Sequence[Path], reading: Reading, data_dir: Path, keep: str
) -> tuple[Images, list[str]]:
    """The pictures of files below `root`, and sentences on what was done to them and where they are kept.

    `keep` is one of CHOICES. Raises ConfigError for another, and DataError, which names what cannot be read.
    """
    check_keep(keep)
    found = PictureFiles(files, reading)
    size = len(found) * int(np.prod(found.shape))
    place = Decoded(root, found, data_dir)
    chosen = keep
    if keep == "auto":
        chosen, why = choose(size, memory=available_memory(), disk=free_disk(place.folder))
        log.info("%s pictures of %s take %s, %s", f"{len(found):,}", shown(root), gigabytes(size), why)
    where = f"(dataset.keep={keep})"
    if chosen == "memory":
        images, facts, said = in_memory(place, files)
        return images, [*notes(facts, reading), *said]
    if chosen == "none":
        note = f"the pictures take {gigabytes(size)} and are decoded from their files in every epoch {where}"
        return StreamedImages(found, np.arange(len(found))), [note]
    if (kept := place.load()) is None:
        with place.alone():
            kept = place.load()  # another process may have decoded them meanwhile
            said = [] if kept is None else [place.note]
            file, hashes = place.write() if kept is None else kept
    else:
        said, (file, hashes) = [place.note], kept
    said.append(f"the pictures take {gigabytes(size)} and are read from {shown(place.pixels)} {where}")
    return KeptImages(file, np.arange(len(found)), hashes), [*notes(found.facts, reading), *said]


def choose(size: int, *, memory: int | None, disk: int) -> tuple[str, str]:
    """Where so many bytes of pictures are kept, `memory`, `disk` or `none`, and why.

    `memory` and `disk` are the bytes that are available of both; memory that is not known is taken to be enough.
    """
    if memory is None:
        return "memory", "kept in memory, whose size is not known (dataset.keep=auto)"
    if size * OF_MEMORY <= memory:
        return "memory", f"less than a quarter of the {gigabytes(memory)} of available memory: kept there"
    more = f"more than a quarter of the {gigabytes(memory)} of available memory"
    if size * OF_DISK <= disk:
        return "disk", f"{more}: kept decoded on disk, of which {gigabytes(disk)} are free"
    return "none", f"{more} and than half of the {gigabytes(disk)} free on disk: decoded in every epoch"


def check_keep(keep: str) -> None:
    """Raise ConfigError for a place that is none."""
    if keep not in CHOICES:
        raise ConfigError(
            f"dataset.keep is {keep!r}; it must be one of {', '.join(CHOICES)}", hint=did_you_mean(str(keep), CHOICES)
        )
