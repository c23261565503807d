"""Training that was interrupted goes on: its state, written at epoch ends, under the fingerprint of what is trained.

Two states are kept, the last and the one before it. Each file is the checksum of what follows, a line of JSON that
names the files which make the state obsolete once they are there, then tensors and plain values that torch reads
without unpickling code.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_cli.storage.files import read_json, replacing, storage, tidy, write_json

log = logging.getLogger(__name__)

DIGEST = 16  # bytes
FORGOTTEN = 30 * 24 * 3600.0  # seconds after which a state that nobody came back for is removed


class TrainingState:
    """The state of one training, a model's or a stack's, in a file of its own; `results` are the files it ends with."""

    def __init__(self, path: Path, *, every: tuple[int, float], results: Sequence[Path] = ()) -> None:
        self.results = results
        self.path, self.previous = path, path.with_suffix(".previous")
        self.epochs, self.seconds = every
        self.saved = time.monotonic()

    def exists(self) -> bool:
        return self.path.exists() or self.previous.exists()

    def due(self, epoch: int) -> bool:
        """Whether the state after this epoch is to be saved."""
        return epoch % self.epochs == 0 if self.epochs else time.monotonic() - self.saved >= self.seconds

    def save(self, state: dict[str, Any]) -> None:
        """Write the state; the one before it is kept until then, and beside it."""
        import torch

        buffer = io.BytesIO()
        torch.save(state, buffer)
        payload = json.dumps([str(path) for path in self.results]).encode() + b"\n" + buffer.getvalue()
        with storage(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:
            temporary.write_bytes(hashlib.blake2b(payload, digest_size=DIGEST).digest() + payload)
            with contextlib.suppress(FileNotFoundError):
                self.path.replace(self.previous)
        self.saved = time.monotonic()

    def load(self) -> dict[str, Any] | None:
        """The last state that is whole, or None."""
        import torch

        for path in (self.path, self.previous):
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue
            payload = content[DIGEST:]
            if hashlib.blake2b(payload, digest_size=DIGEST).digest() != content[:DIGEST]:
                log.warning("%s is damaged and is not used", path)
                continue
            return torch.load(io.BytesIO(payload.partition(b"\n")[2]), map_location="cpu", weights_only=True)
        return None

    def remove(self) -> None:
        """Call it when what was trained has been kept elsewhere."""
        for path in (self.path, self.previous):
            path.unlink(missing_ok=True)


def forget(folder: Path) -> None:
    """Remove states whose results are there, those that nobody came back for in a month, and temporary files."""
    tidy(folder)
    for path in folder.glob("*"):
        with contextlib.suppress(OSError):  # another process was faster
            if time.time() - path.stat().st_mtime > FORGOTTEN or _obsolete(path):
                path.unlink()


def _obsolete(path: Path) -> bool:
    """Whether all results of the training are there: it was stopped before it could remove its state."""
    if path.name.startswith("."):
        return False
    with path.open("rb") as file:
        file.seek(DIGEST)
        line = file.readline(1 << 20)
    try:
        results = json.loads(line)
        return bool(results) and all(os.path.exists(result) for result in results)
    except (ValueError, TypeError):
        return False  # damaged: told when it is used


class StackNotes:
    """Which models were trained together, so that those which are left after an interruption have the same company.

    A model's last digit can depend on the size of its stack.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            found = read_json(path)
        except (OSError, ValueError):
            found = {}
        self.known: dict[str, list[list[str]]] = found if isinstance(found, dict) else {}

    def get(self, stage: str) -> list[list[str]]:
        return self.known.get(stage, [])

    def add(self, stage: str, stacks: list[list[str]]) -> None:
        self.known[stage] = self.get(stage) + stacks
        write_json(self.path, self.known)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
