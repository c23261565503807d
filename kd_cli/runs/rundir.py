"""The only writer of a run directory.

.hydra/                  the composed configuration and the overrides
run.log                  what happened, dated
run.json                 the command that began it, and what it trained for the store
metrics.jsonl            a JSON object per epoch and role
student.safetensors      the distilled student's weights
student.json             what rebuilds it: model, shapes, normalisation, class names
examples.json            test examples, disagreements, reliability: what report.html shows
report.html              a page with the pictures of this run
summary.json             the result; written last and atomically: its presence means done
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from kd_cli.errors import StorageError
from kd_cli.runs.files import checksum, read_json, storage, write_json, write_tensors

BEGUN = "run.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
WEIGHTS = "student.safetensors"
STUDENT = "student.json"
EXAMPLES = "examples.json"


def refuse_other_run(path: Path) -> None:
    """StorageError when the directory holds the results of a run."""
    for name in (SUMMARY, METRICS):
        if (path / name).exists():
            raise StorageError(
                f"{path} already holds a run ({name})", hint="choose another hydra.run.dir; nothing is overwritten"
            )


class RunDir:
    """One run's directory. Refuses a directory that already holds a run.

    With `again`, what an unfinished run has left there is removed first.
    """

    def __init__(self, path: Path, *, again: bool = False) -> None:
        self.path = path
        with storage(path):
            path.mkdir(parents=True, exist_ok=True)
            if again and not (path / SUMMARY).exists():
                for name in (METRICS, WEIGHTS, STUDENT, EXAMPLES):
                    (path / name).unlink(missing_ok=True)
        refuse_other_run(path)

    def begin(self, command: str) -> str:
        """Note the command that made the run; returns the one that was noted when it was begun before."""
        try:
            noted = read_json(self.path / BEGUN)
            self.command, self.trained = str(noted["command"]), set(noted["trained"])
        except (OSError, ValueError, KeyError, TypeError):
            self.command, self.trained = command, set()
            write_json(self.path / BEGUN, {"command": command, "trained": []})
        return self.command

    def will_train(self, fingerprint: str) -> None:
        """Note that this run is the one to train a model for the store, so that it says so also when it is resumed."""
        self.trained.add(fingerprint)
        write_json(self.path / BEGUN, {"command": self.command, "trained": sorted(self.trained)})

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows to metrics.jsonl; a number that is not finite becomes null, which JSON can hold."""
        lines = "".join(json.dumps(finite(dict(row)), allow_nan=False) + "\n" for row in rows)
        path = self.path / METRICS
        with storage(path), path.open("a", encoding="utf-8") as file:
            file.write(lines)

    def write_student(self, weights: Mapping[str, Any], rebuild: dict[str, Any]) -> None:
        """The distilled student's weights and what rebuilds the module around them."""
        write_tensors(self.path / WEIGHTS, weights)
        write_json(self.path / STUDENT, {**rebuild, "checksum": checksum(self.path / WEIGHTS)})

    def write_pictures(self, examples: dict[str, Any]) -> None:
        """What report.html shows of single test examples."""
        write_json(self.path / EXAMPLES, finite(examples))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """The last file: after it the run is done."""
        write_json(self.path / SUMMARY, finite(summary))


def read_summary(path: Path) -> dict[str, Any] | None:
    """The summary of a run directory, None while there is none. StorageError when it cannot be read."""
    try:
        summary = read_json(path / SUMMARY)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StorageError(
            f"{path / SUMMARY} cannot be read: {error}", hint="remove it to make this run again"
        ) from error
    return summary if isinstance(summary, dict) else {}


def finite(value: Any) -> Any:
    """The value with every nan and infinity replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
