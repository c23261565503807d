"""The state of a training, saved at the end of an epoch, from which an interrupted training continues.

The last two states are kept. A file holds the checksum of its remaining bytes, a line of JSON with the paths of the
results that make the state obsolete once they exist, and tensors and plain values that torch reads without unpickling
code.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_cli.storage.files import DIGEST, digest, replacing, storage, tidy

log = logging.getLogger(__name__)

FORGOTTEN = 30 * 24 * 3600.0  # seconds after which the state of an abandoned training is removed


class TrainingState:
    """The saved state of the training of one model or one stack; `results` are the files that this training writes."""

    def __init__(self, path: Path, *, every: tuple[int, float], results: Sequence[Path] = ()) -> None:
        self.results = results
        self.path, self.previous = path, path.with_suffix(".previous")
        self.epochs, self.seconds = every
        self.saved = time.monotonic()

    def due(self, epoch: int) -> bool:
        """Whether to save the state after this epoch."""
        return epoch % self.epochs == 0 if self.epochs else time.monotonic() - self.saved >= self.seconds

    def save(self, state: dict[str, Any]) -> None:
        """Write the state and keep the previous one beside it."""
        import torch

        buffer = io.BytesIO()
        torch.save(state, buffer)
        payload = json.dumps([str(path) for path in self.results]).encode() + b"\n" + buffer.getvalue()
        with storage(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:
            temporary.write_bytes(digest(payload) + payload)
            with contextlib.suppress(FileNotFoundError):
                self.path.replace(self.previous)
        self.saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The newest undamaged state, or None."""
        import torch

        for path in (self.path, self.previous):
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue
            payload = content[DIGEST:]
            if digest(payload) != content[:DIGEST]:
                log.warning("%s is damaged and is not used", path)
                continue
            return torch.load(io.BytesIO(payload.partition(b"\n")[2]), map_location="cpu", weights_only=True)
        return None

    def remove(self) -> None:
        """Remove both states, once the results of the training are stored."""
        for path in (self.path, self.previous):
            path.unlink(missing_ok=True)


def forget(folder: Path) -> None:
    """Remove states whose results exist, states that are older than a month, and temporary files."""
    tidy(folder)
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):  # another process removed it first
            if time.time() - path.stat().st_mtime > FORGOTTEN or _obsolete(path):
                path.unlink()


def _obsolete(path: Path) -> bool:
    """Whether all results of the training exist: it was killed before it removed its state."""
    if path.name.startswith("."):
        return False
    with path.open("rb") as file:
        file.seek(DIGEST)
        line = file.readline(1 << 20)
    try:
        results = json.loads(line)
        return bool(results) and all(os.path.exists(result) for result in results)
    except (ValueError, TypeError):
        return False  # damaged: `load` warns about it
