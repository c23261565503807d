"""Training that was interrupted goes on: its state, written at epoch ends, under the fingerprint of what is trained.

Two states are kept, the last and the one before it. Each file is the checksum of what follows, then tensors and plain
values that torch reads without unpickling code.
"""

from __future__ import annotations

import hashlib
import io
import logging
import time
from pathlib import Path
from typing import Any

from kd_cli.errors import ConfigError
from kd_cli.runs.files import replacing, storage

log = logging.getLogger(__name__)

DIGEST = 16  # bytes
FORGOTTEN = 30 * 24 * 3600.0  # seconds after which a state that nobody came back for is removed


def interval(given: Any) -> tuple[int, float]:
    """`checkpoint.every` as epochs and seconds, one of them 0: 5 is every 5 epochs, `30s` every 30 seconds."""
    text = str(given)
    try:
        if text.endswith("s"):
            seconds = float(text[:-1])
            if seconds >= 0:
                return 0, seconds
        elif int(text) >= 1:
            return int(text), 0.0
    except ValueError:
        pass
    raise ConfigError(
        f"checkpoint.every is {given!r}; it must be a number of epochs or of seconds",
        hint="checkpoint.every=5 or checkpoint.every=30s",
    )


class TrainingState:
    """The state of one training, a model's or a stack's, in a file of its own."""

    def __init__(self, path: Path, *, every: tuple[int, float]) -> None:
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
        payload = buffer.getvalue()
        with storage(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as temporary:
            temporary.write_bytes(hashlib.blake2b(payload, digest_size=DIGEST).digest() + payload)
            if self.path.exists():
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
            return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
        return None

    def remove(self) -> None:
        """Call it when what was trained has been kept elsewhere."""
        for path in (self.path, self.previous):
            path.unlink(missing_ok=True)


def forget(folder: Path) -> None:
    """Remove states that nobody came back for in a month."""
    for path in folder.glob("*"):
        try:
            if time.time() - path.stat().st_mtime > FORGOTTEN:
                path.unlink()
        except FileNotFoundError:  # another process was faster
            continue
