"""The only writer of a run directory.

.hydra/                  the composed configuration and the overrides
run.log                  the log, with dates
run.json                 the command that started the run, its configuration, the run's random identity, the
                         fingerprints of what it trained
metrics.jsonl            a JSON object per epoch and role
student.safetensors      the distilled student's weights
student.json             what `load_student` rebuilds it from: model, shapes, normalisation, class names
examples.json            what report.html shows: test examples, disagreements, reliability
report.html              a page with the charts of this run
.checksums.json          checksums of the finished run's files, to detect damage
summary.json             the result; written last and atomically: its presence means done
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_cli import processes
from kd_cli.errors import StorageError
from kd_cli.locks import Held, lock
from kd_cli.roles import TRAINED
from kd_cli.storage.files import (
    checksum,
    checksum_of,
    json_text,
    read_json,
    storage,
    tidy,
    write_json,
    write_tensors,
    write_text,
)

BEGUN = "run.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
WEIGHTS = "student.safetensors"
STUDENT = "student.json"
EXAMPLES = "examples.json"
PREDICTIONS = "predictions.json"  # the class of each test example, by the student and by the student alone
REPORT = "report.html"
STACKS = ".stacks.json"  # while a run or sweep is unfinished: which models were trained together
CLAIM = ".lock"  # while a process works there
SUMS = ".checksums.json"
SUMMED = (METRICS, WEIGHTS, STUDENT, EXAMPLES, PREDICTIONS)


def refuse_other_run(path: Path) -> None:
    """StorageError when the directory holds the results of a run."""
    for name in (SUMMARY, METRICS):
        if (path / name).exists():
            raise StorageError(
                f"{path} already holds a run ({name})", hint="choose another hydra.run.dir; nothing is overwritten"
            )


def note_command(path: Path, command: str) -> str:
    """Write run.json, the first file of a run, and return the random identity that the run receives."""
    identity = secrets.token_hex(8)
    with storage(path):
        path.mkdir(parents=True, exist_ok=True)
    write_json(path / BEGUN, {"command": command, "identity": identity, "trained": []})
    return identity


class RunDir:
    """One run's directory. Refuses a directory that already holds a run.

    `again` removes the files of an unfinished run first.
    """

    def __init__(self, path: Path, *, again: bool = False) -> None:
        self.path = path
        with storage(path):
            path.mkdir(parents=True, exist_ok=True)
            if again and not (path / SUMMARY).exists():
                tidy(path)
                for name in (*SUMMED, SUMS):
                    (path / name).unlink(missing_ok=True)
        refuse_other_run(path)

    def begin(self, command: str, record: Mapping[str, Any] | None = None) -> str:
        """Record the command of the run; return the recorded one where the run was started before.

        `record` is what reports show of the configuration, as `configuration_record` makes it.
        """
        self.record = dict(record or {})
        together, before = processes.count(), None
        if together > 1:
            self.record["processes"] = together
        try:
            noted = read_json(self.path / BEGUN)
            self.command, self.trained = str(noted["command"]), set(noted["trained"])
            self.identity = str(noted["identity"])
            before = noted.get("processes", 1 if "config" in noted else None)
        except (OSError, ValueError, KeyError, TypeError):
            self.command, self.trained, self.identity = command, set(), secrets.token_hex(8)
        if before is not None and before != together:
            raise StorageError(
                f"{self.path} was begun by {number(before)}, and this is {number(together)}",
                hint=f"go on with {number(before)}, or start the run anew",
            )
        self._note()
        return self.command

    def will_train(self, fingerprint: str) -> None:
        """Record that this run trains a model for the store, so that it says so when it is resumed, too."""
        self.trained.add(fingerprint)
        self._note()

    def _note(self) -> None:
        noted = {"command": self.command, "identity": self.identity, "trained": sorted(self.trained)}
        write_json(self.path / BEGUN, noted | self.record)

    def append_metrics(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows to metrics.jsonl; a number that is not finite becomes null, which JSON can hold."""
        lines = "".join(finite_json(dict(row)) + "\n" for row in rows)
        path = self.path / METRICS
        with storage(path), path.open("a", encoding="utf-8") as file:
            file.write(lines)

    def write_student(self, weights: Mapping[str, Any], rebuild: dict[str, Any], folder: str = "") -> None:
        """Write a student's weights, and the values from which `load_student` rebuilds its module.

        `folder`, below the run's directory, is for students beside the run's own.
        """
        path = self.path / folder
        with storage(path):
            path.mkdir(parents=True, exist_ok=True)
        write_tensors(path / WEIGHTS, weights)
        write_json(path / STUDENT, {**rebuild, "checksum": checksum(path / WEIGHTS)})

    def write_pictures(self, examples: dict[str, Any]) -> None:
        """Write what report.html shows of single test examples."""
        write_text(self.path / EXAMPLES, finite_json(examples) + "\n")  # one line keeps it small; programs read it

    def write_predictions(self, classes: Mapping[str, Sequence[int]]) -> None:
        """Write the number of the predicted class of each test example, by role."""
        write_text(self.path / PREDICTIONS, json.dumps(classes, separators=(",", ":")) + "\n")

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Write the summary, the last file of a run, and before it the checksums that detect later damage."""
        self._order_metrics()
        files = [self.path / name for name in SUMMED]
        text = json_text(finite(summary))
        sums = {file.name: checksum(file) for file in files if file.exists()} | {SUMMARY: checksum_of(text)}
        write_json(self.path / SUMS, sums)
        write_text(self.path / SUMMARY, text)

    def _order_metrics(self) -> None:
        """Sort the rows by role, member and epoch and keep one of each, whatever order the run trained them in."""
        path = self.path / METRICS
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        rows = {_place(json.loads(line)): line for line in text.splitlines(keepends=True)}
        ordered = "".join(rows[place] for place in sorted(rows))
        if ordered != text:
            write_text(path, ordered)


def number(processes: int) -> str:
    """In words, how many processes train together."""
    return f"{processes} processes under torchrun" if processes > 1 else "one process"


def _place(row: dict[str, Any]) -> tuple[int, int, int]:
    return TRAINED.index(row["role"]), row.get("member", 0), row["epoch"]


def configuration_record(config: Mapping[str, Any], choices: Mapping[str, Any]) -> dict[str, Any]:
    """What run.json holds of a composed configuration: its values by dotted key, and the option of each group."""
    return {"config": flat(config), "choices": chosen_options(choices)}


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted key; values are those of JSON, whatever is something else is text."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            out |= flat(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = _plain(value)
    return out


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)


def chosen_options(choices: Mapping[str, Any]) -> dict[str, str]:
    """The option of each configuration group, Hydra's own groups and empty ones left out."""
    return {
        str(group): str(option) for group, option in choices.items() if option is not None and "/" not in str(group)
    }


def verified_summary(path: Path) -> dict[str, Any]:
    """The summary in a file. ValueError when the file was changed since it was written."""
    summary = read_json(path)
    if not isinstance(summary, dict):
        raise ValueError("it holds no mapping")
    if not intact(path):
        raise ValueError("it was changed since it was written")
    return summary


def intact(path: Path) -> bool:
    """Whether a file of a finished run has its recorded checksum; true for runs without recorded checksums."""
    try:
        sums = read_json(path.parent / SUMS)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        return False
    return isinstance(sums, dict) and (path.name not in sums or checksum(path) == sums[path.name])


def read_summary(path: Path) -> dict[str, Any] | None:
    """The summary of a run directory, None while there is none. StorageError when it is damaged."""
    try:
        summary = verified_summary(path / SUMMARY)
        if not isinstance(summary["status"], str):
            raise ValueError("status is not a string")
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise StorageError(
            f"{path / SUMMARY} cannot be read: {reason}", hint="remove it to make this run again"
        ) from error
    return summary


def read_identity(path: Path) -> str:
    """The random identity of a run; empty where run.json is missing or damaged."""
    try:
        return str(read_json(path / BEGUN)["identity"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Keep other processes out of the directory of a run or a sweep. StorageError when one works there already."""
    with contextlib.ExitStack() as stack:
        with storage(folder):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                stack.enter_context(lock(folder / CLAIM))
            except Held as error:
                raise StorageError(
                    f"another process is at work in {folder}", hint="wait until it ends, or choose another directory"
                ) from error
            tidy(folder)
        yield


def finite_json(value: Any) -> str:
    """The value as JSON in one line, with null for numbers that are not finite."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:  # rare, and replacing values takes longer than writing them
        return json.dumps(finite(value), ensure_ascii=False, allow_nan=False)


def finite(value: Any) -> Any:
    """The value with every nan and infinity replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
