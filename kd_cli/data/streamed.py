"""Pictures decoded by worker processes, in any order, ahead of their use.

The workers are those of PyTorch's DataLoader: they end with the process that started them.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kd_cli.data.pictures import FACTS, Reading, decode, formats, notes, shown
from kd_cli.data.room import cores
from kd_cli.data.stored import PIECE, StoredImages
from kd_cli.errors import DataError

AHEAD = 4  # requests that each worker holds ready
IN_PROCESS = 0.25  # seconds of decoding below which starting workers does not pay
A_PICTURE, A_BYTE = 1.5e-4, 5e-8  # seconds to open and scale a picture, and for each byte of a compressed file


class PictureFiles:
    """The files of pictures, how they are decoded, and their sizes and times of change when they were found."""

    def __init__(self, files: Sequence[Path], reading: Reading) -> None:
        self.reading = reading
        names = [os.fsencode(file) for file in files]
        self.names = np.array(names, dtype=bytes)  # one array: what workers do not change stays shared with them
        self.sizes, self.changed, self.since = (np.empty(len(names), dtype=np.int64) for _ in range(3))
        for i, name in enumerate(names):
            about = _stat(os.fsdecode(name))
            self.sizes[i], self.changed[i], self.since[i] = about.st_size, about.st_mtime_ns, about.st_ctime_ns
        self.facts = np.zeros(len(files), dtype=FACTS)  # of those that were decoded

    def __len__(self) -> int:
        return len(self.names)

    def stamp(self, root: Path) -> str:
        """What changes when a file below `root` does, a copy that keeps the time of its last change included."""
        start = len(os.fsencode(root))
        names = b"\n".join(repr(name[start:]).encode() for name in self.names.tolist())
        digest = hashlib.blake2b(names, digest_size=16)
        for numbers in (self.sizes, self.changed, self.since):
            digest.update(numbers.data)
        return digest.hexdigest()

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one picture, decoded."""
        return (self.reading.channels, self.reading.size, self.reading.size)

    def decode(self, positions: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """The pictures of these positions [n,C,H,W] and the facts of what was done to them [n].

        Raises DataError for a picture that cannot be read, or is not what it was when it was found.
        """
        from PIL import Image

        images = torch.empty(len(positions), *self.shape, dtype=torch.uint8)
        facts = np.zeros(len(positions), dtype=FACTS)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # PIL's remarks on odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            for k, position in enumerate(positions.tolist()):
                file = os.fsdecode(self.names[position])
                self.check(position, file)
                images[k], facts[k] = decode(file, self.reading)
        return images, facts

    def check(self, position: int, file: str) -> None:
        """Raise DataError for a file that was changed or taken away since it was found."""
        about = _stat(file)
        if (about.st_size, about.st_mtime_ns) != (self.sizes[position], self.changed[position]):
            raise DataError(
                f"the picture {shown(file)} was changed while this run used it",
                hint="start again when the folder is complete; a resumed run needs the pictures that it began with",
            )

    def seconds(self, positions: np.ndarray) -> float:
        """About how long one process decodes these pictures."""
        return len(positions) * A_PICTURE + float(self.sizes[positions].sum()) * A_BYTE

    def decoded(self, parts: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """For each part, its pictures by their positions: [n,C,H,W], decoded ahead by worker processes if that pays."""
        parts = list(parts)
        if sum(map(self.seconds, parts)) < IN_PROCESS:
            for part in parts:
                images, facts = self.decode(part)
                self.facts[part] = facts
                yield images
            return
        size = max(1, PIECE // int(np.prod(self.shape)))
        requests = [[part[first : first + size] for first in range(0, max(len(part), 1), size)] for part in parts]
        answers = _answers(self, [request for part in requests for request in part])
        try:
            for pieces in requests:
                found = []
                for request in pieces:
                    answer = next(answers)
                    if isinstance(answer, DataError):
                        raise answer
                    images, self.facts[request] = answer
                    found.append(images)
                yield found[0] if len(found) == 1 else torch.cat(found)
        finally:
            del answers  # its workers end now; when garbage is collected they would be waited for, 5 s each


class StreamedImages(StoredImages):
    """Pictures that are decoded from their files whenever they are used."""

    def __init__(self, files: PictureFiles, positions: np.ndarray) -> None:
        super().__init__(files.shape, positions)
        self.files = files
        self.kept = "decoded from their files in every epoch"

    def select(self, positions: slice | Tensor) -> StreamedImages:
        index = positions if isinstance(positions, slice) else positions.numpy()
        return StreamedImages(self.files, self.positions[index])

    def read(self, positions: np.ndarray) -> Tensor:
        return next(self.files.decoded([positions]))

    def parts(self, parts: Iterable[np.ndarray]) -> Iterator[Tensor]:
        return self.files.decoded(self.positions[part] for part in parts)

    def notes(self) -> list[str]:
        return notes(self.files.facts, self.files.reading)


class _Requests(Dataset[Any]):
    """Requests answered in a worker: the pictures and facts, or the error as a value, which keeps its own words."""

    def __init__(self, files: PictureFiles) -> None:
        self.files = files

    def __getitem__(self, positions: np.ndarray) -> tuple[Tensor, np.ndarray] | DataError:
        try:
            return self.files.decode(positions)
        except DataError as error:
            return error


def _answers(files: PictureFiles, requests: Sequence[np.ndarray]) -> Iterator[Any]:
    """The answers to requests in their order; the workers begin now."""
    formats()  # PIL imports its decoders here, and not in each worker
    loader = DataLoader(
        _Requests(files),
        batch_size=None,
        sampler=requests,
        num_workers=min(cores(), len(requests)),
        prefetch_factor=AHEAD,
        collate_fn=_as_it_is,
        worker_init_fn=functools.partial(_begin, os.getpid()),
        generator=torch.Generator(),  # else the loader takes a number from the global one, which dropout uses
        # A fork starts at once; a fork server's workers would not notice the end of this process.
        multiprocessing_context="fork" if sys.platform == "linux" else None,
    )
    with warnings.catch_warnings():
        # Python from 3.12 on warns of forks beside threads; these workers use no lock that another thread may hold.
        warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
        return iter(loader)


def _as_it_is(answer: Any) -> Any:
    return answer


def _begin(parent: int, worker: int) -> None:
    """A worker leaves Ctrl-C to the process that started it, and ends when it is asked to or `parent` is gone."""
    if os.getppid() != parent:  # the loader's own watch begins later
        os._exit(1)
    gc.freeze()  # a collection would write to every object of the parent, and so copy its memory
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stat(file: str) -> os.stat_result:
    try:
        return os.stat(file)
    except OSError as error:
        raise DataError(f"the picture {shown(file)} cannot be used: {error.strerror}") from error
