"""Models that are trained once and used by many runs: teachers and students alone, under their fingerprints.

    <store>/<fingerprint>/weights.safetensors    the state dict
                          outputs.safetensors    logits at T = 1: `test`, for teachers also `train`
                          entry.json             its report and history, and checksums of all three files

An entry is written in a temporary folder and renamed, so it is complete or absent. One process makes it while the
others wait for its lock.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kd_cli.config.fingerprint import fingerprint as fingerprint_of
from kd_cli.locks import Held, allow_open_files, lock, tidy_locks
from kd_cli.storage.files import checksum, making, read_json, storage, tidy, write_json, write_tensors

log = logging.getLogger(__name__)

KINDS = {
    "answers": "answers",
    "alone": "student alone",
    "checkpoint": "from a file",
}  # how a listing names the kinds of facts
IN_USE = 3600.0  # seconds for which an entry that was looked up may still be read


@dataclass(frozen=True)
class Entry:
    """One trained model as the store keeps it."""

    fingerprint: str
    path: Path
    report: dict[str, Any]  # parameters, flops, epochs, seconds, test{...}
    history: list[dict[str, Any]]

    def weights(self) -> dict[str, Any]:
        """The state dict, on the CPU."""
        from safetensors.torch import load_file

        return load_file(self.path / "weights.safetensors")

    def outputs(self) -> dict[str, Any]:
        """Logits at T = 1 by name: `test` [M,C], for teachers also `train` [N,C]."""
        from safetensors.torch import load_file

        return load_file(self.path / "outputs.safetensors")


@dataclass(frozen=True)
class Listed:
    """What a listing of the store says of one of its folders: an entry, or a damaged one that was moved away."""

    path: Path
    kind: str  # teacher, student alone, from a file, damaged
    name: str  # the option's name: bigmlp
    data: str  # the first digits of the data's fingerprint
    bytes: int
    used: float  # when a run last took it, in seconds since 1970


class Store:
    """A folder of entries, safe for concurrent use."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, fingerprint: str) -> Entry | None:
        """The entry, or None. A damaged one is moved to a folder named damaged-..., and None is returned."""
        path = self.root / fingerprint
        if not path.exists():
            return None
        try:
            entry = read_json(path / "entry.json")
            if entry.pop("checksum") != fingerprint_of(entry):
                raise ValueError("entry.json was changed since it was written")
            if entry["fingerprint"] != fingerprint:
                raise ValueError(f"it is the entry {entry['fingerprint']}")
            for name, expected in entry["checksums"].items():
                if checksum(path / name) != expected:
                    raise ValueError(f"{name} was changed since it was written")
            with contextlib.suppress(OSError):  # a store that may only be read
                os.utime(path / "entry.json")  # when it was last used, for `entries`
            return Entry(fingerprint, path, entry["report"], entry["history"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            self._set_aside(path, error)
            return None

    @contextlib.contextmanager
    def lock(self, fingerprints: Iterable[str], stopping: Callable[[], None] = lambda: None) -> Iterator[None]:
        """Hold the locks of entries while making them; other processes wait.

        Locks are taken in sorted order, which rules out deadlocks. `stopping` is called while waiting, and may raise.
        """
        said = False

        def waiting(seconds: float) -> None:
            nonlocal said
            stopping()
            if seconds > 2 and not said:
                log.info("waiting for another process that trains the same model for %s", self.root)
                said = True

        with contextlib.ExitStack() as stack:
            with storage(self.root):
                folder = self.root / "locks"
                folder.mkdir(parents=True, exist_ok=True)
                wanted = sorted(set(fingerprints))
                allow_open_files(2 * len(wanted))
                for fingerprint in wanted:
                    stack.enter_context(lock(folder / f"{fingerprint}.lock", waiting=waiting))
            yield

    def entries(self) -> list[Listed]:
        """All entries, and the damaged ones that were moved away; the least recently used first."""
        found = []
        for path in self.root.glob("*"):
            damaged = path.name.startswith("damaged-")
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # another folder, or just removed
                facts = {} if damaged else read_json(path / "entry.json")
                found.append(
                    Listed(
                        path,
                        "damaged" if damaged else KINDS.get(facts["facts"]["kind"], facts["facts"]["kind"]),
                        "" if damaged else str(facts["report"]["name"]),
                        "" if damaged else str(facts["facts"]["data"])[:8],
                        sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
                        (path if damaged else path / "entry.json").stat().st_mtime,
                    )
                )
        return sorted(found, key=lambda one: one.used)

    def prune(self, *, unused: float) -> list[Listed]:
        """Remove entries that no run has used for `unused` seconds, an hour at least, and damaged ones; return them.

        What another process makes at this moment stays.
        """
        removed = []
        for one in self.entries():
            if time.time() - one.used < max(unused, IN_USE):
                continue
            with storage(self.root), contextlib.suppress(Held):
                (self.root / "locks").mkdir(exist_ok=True)
                with lock(self.root / "locks" / f"{one.path.name}.lock"), making(self.root) as folder:
                    one.path.rename(folder / one.path.name)  # it is gone at once for those who look it up
                removed.append(one)
        return removed

    def tidy(self) -> None:
        """Remove the temporary files and locks that killed processes left behind."""
        tidy(self.root)
        tidy_locks(self.root / "locks")

    def put(
        self,
        fingerprint: str,
        *,
        weights: Mapping[str, Any],
        outputs: Mapping[str, Any],
        report: dict[str, Any],
        history: list[dict[str, Any]],
        facts: dict[str, Any],
    ) -> Entry:
        """Write a new entry, whose lock the caller holds. `facts` are the values that the fingerprint was made of."""
        final = self.root / fingerprint
        with storage(final):
            self.root.mkdir(parents=True, exist_ok=True)
            with making(self.root) as folder:
                write_tensors(folder / "weights.safetensors", weights)
                write_tensors(folder / "outputs.safetensors", outputs)
                names = ("weights.safetensors", "outputs.safetensors")
                entry = {
                    "fingerprint": fingerprint,
                    "report": report,
                    "facts": facts,
                    "checksums": {name: checksum(folder / name) for name in names},
                    "history": history,
                }
                write_json(folder / "entry.json", {**entry, "checksum": fingerprint_of(entry)})
                folder.chmod(0o755)
                if final.exists():  # it is damaged, and could not be moved away
                    shutil.rmtree(final)
                folder.rename(final)
        return Entry(fingerprint, final, report, history)

    def _set_aside(self, path: Path, cause: Exception) -> None:
        if not path.exists():  # another process did it first
            return
        with storage(path):
            aside = Path(tempfile.mkdtemp(dir=self.root, prefix=f"damaged-{path.name}-"))
            with contextlib.suppress(FileNotFoundError):
                path.rename(aside / path.name)
        log.warning("store: %s is damaged (%s); it was moved to %s and is trained again", path.name, cause, aside)
