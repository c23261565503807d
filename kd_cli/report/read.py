"""Reading run directories, also those of earlier versions. Neither torch nor Hydra is imported."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kd_cli.config.schema import StudentKeys, TeacherKeys, TeacherTraining, Training, Transfer
from kd_cli.errors import DataError, first_line
from kd_cli.roles import ROLES
from kd_cli.storage.files import read_json
from kd_cli.storage.run_dir import BEGUN, METRICS, SUMMARY, chosen_options, flat, intact, verified_summary

LOG = "run.log"
_ENTRY = re.compile(r"^\[\d{4}-[^\]]*\]\[[^\]]*\]\[([A-Z]+)\] (.*)$", re.M)  # of run.log: its level and message


@dataclass(frozen=True)
class Run:
    """A run directory as found.

    Status: completed, diverged, pruned (ended early by a search), failed (its log ends with an error) or unfinished.
    """

    path: Path
    status: str
    config: dict[str, Any]  # dotted key -> value
    choices: dict[str, str]  # configuration group -> option
    summary: dict[str, Any]  # empty when there is none yet
    history: dict[str, list[dict[str, Any]]] = field(repr=False)  # role -> rows by epoch
    cause: str | None = None  # why it did not complete, where that is known

    @property
    def seed(self) -> Any:
        return self.config.get("seed")

    @property
    def ended(self) -> bool:
        """Whether there is a summary: the run completed, diverged or was pruned."""
        return bool(self.summary)

    def test(self, role: str, measure: str) -> float | None:
        """A test result of the teacher, the student_alone or the student; None where there is none."""
        report = self.summary.get(role)
        value = report["test"].get(measure) if report and report["test"] else None
        return None if value is None else float(value)

    def validation(self, measure: str) -> float | None:
        """The student's val_accuracy or val_nll in the epoch whose weights were kept; None without validation data."""
        if self.status == "pruned":  # no weights were kept
            return None
        rows = [row for row in self.history.get("student", []) if not row.get("member")]  # of peers, the first
        if self.config.get("training.keep") == "best":
            seen = [row for row in rows if row.get("val_accuracy") is not None and row.get("val_nll") is not None]
            kept = min(seen, key=lambda row: (-row["val_accuracy"], row["val_nll"]), default=None)
        else:
            kept = rows[-1] if rows else None
        value = kept.get(measure) if kept else None
        return None if value is None else float(value)

    @property
    def fingerprint(self) -> str | None:
        report = self.summary.get("student")
        return report.get("fingerprint") if report else None


def is_run(path: Path) -> bool:
    """Whether the directory is a run's."""
    return (path / SUMMARY).is_file() or (path / BEGUN).is_file() or (path / ".hydra").is_dir()


def collect(paths: Iterable[str | Path]) -> tuple[list[Run], list[str]]:
    """The runs in and under the paths, each once, and a note for each that could not be read.

    Raises DataError for a path that does not exist and when there is no run at all.
    """
    folders = [Path(path) for path in paths]
    for path in folders:
        if not path.is_dir():
            kind = "is not a directory" if path.exists() else "does not exist"
            raise DataError(
                f"{path} {kind}", hint="give run directories, or folders of them such as multirun/DATE/TIME"
            )
    runs: dict[Path, Run] = {}
    notes: list[str] = []
    for folder in sorted({found for path in folders for found in _run_folders(path)}, key=_natural):
        if (resolved := folder.resolve()) in runs:
            continue
        try:
            runs[resolved] = read_run(folder, notes)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            notes.append(f"{folder} is left out: {reason[:200]}")
    if not runs:
        why = "".join(f"\n{note}" for note in notes)
        raise DataError(
            f"no run in {', '.join(map(str, folders))}{why}",
            hint="a run directory holds run.json and, when the run has ended, summary.json",
        )
    return list(runs.values()), notes


def read_run(path: Path, notes: list[str] | None = None) -> Run:
    """Read a run directory; notes on damaged files are added to `notes`.

    Raises ValueError, which names the file, for a file that is not what a run writes.
    """
    summary: dict[str, Any] = {}
    if (path / SUMMARY).is_file():
        summary = _mapping(path / SUMMARY, verified_summary)
        for key in ("status", "dataset", *ROLES):
            if key not in summary:
                raise ValueError(f"{SUMMARY} has no {key!r}; another program's?")
    config, choices = _configuration(path, summary)
    if summary:
        choices |= {role: summary[role]["name"] for role in ("teacher", "student") if summary[role]}
        choices |= {"dataset": summary["dataset"]["name"], "method": summary["method"]}
    names = {role: config.get(f"{role}.name") for role in ("teacher", "student")}  # torchvision's resnet18
    choices |= {role: name for role, name in names.items() if isinstance(name, str) and name}
    cause = summary.get("cause") if summary else _last_error(path / LOG)
    status = summary.get("status") or ("failed" if cause else "unfinished")
    return Run(path, status, config, choices, summary, _history(path / METRICS, notes), cause)


def _configuration(path: Path, summary: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration by dotted key and the option of each group, as the run noted them."""
    begun: dict[str, Any] = {}
    if (path / BEGUN).is_file():
        try:
            begun = _mapping(path / BEGUN, read_json)
        except ValueError:
            if not (path / ".hydra" / "config.yaml").is_file():
                raise
    if "config" in begun:
        config, choices = dict(begun["config"]), dict(begun["choices"])
        source = BEGUN
    else:
        config, choices = _hydra_configuration(path / ".hydra")
        source = ".hydra/config.yaml"
    if not config and summary:  # hydra.output_subdir=null, by an earlier version
        config = {key: summary[key] for key in ("T", "alpha", "beta", "seed", "method", "precision") if key in summary}
    elif not config:
        raise ValueError(f"{source} is missing: stopped before it began?")
    if not {"T", "alpha", "beta", "seed"} <= config.keys():
        raise ValueError(f"{source} is not a kd-run configuration")
    return values_before() | config, choices


@functools.cache
def values_before() -> dict[str, Any]:
    """What keys meant before they existed, by dotted key: a run of an earlier version compares with one of today's."""
    sections: dict[str, Any] = {
        "training": Training(batchnorm="running"),
        "teacher_training": TeacherTraining(batchnorm="running"),
        "transfer": Transfer(),
        "teacher": TeacherKeys(),
        "student": StudentKeys(),
    }
    return {
        f"{section}.{key}": value
        for section, keys in sections.items()
        for key, value in dataclasses.asdict(keys).items()
    }


def _hydra_configuration(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The same from Hydra's own files: runs of earlier versions did not note it."""

    import yaml

    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # that of yaml.safe_load, ten times as fast in C

    def read(path: Path) -> Any:
        try:
            return yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
        except yaml.YAMLError as error:
            raise ValueError(first_line(error)) from error

    if not (folder / "config.yaml").is_file():
        return {}, {}
    config = flat(_mapping(folder / "config.yaml", read))
    try:
        choices = chosen_options(_mapping(folder / "hydra.yaml", read)["hydra"]["runtime"]["choices"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # the options are names only; values come above
        choices = {}
    return config, choices


def _mapping(path: Path, read: Callable[[Path], Any]) -> dict[str, Any]:
    try:
        value = read(path)
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no mapping")
    return value


def _run_folders(path: Path) -> Iterable[Path]:
    for folder, below, _ in os.walk(path):
        if is_run(Path(folder)):
            yield Path(folder)
            below.clear()
        below[:] = [name for name in below if not name.startswith(".")]


def _history(path: Path, notes: list[str] | None) -> dict[str, list[dict[str, Any]]]:
    roles: dict[str, list[dict[str, Any]]] = {}
    if not path.is_file():
        return roles
    if not intact(path) and notes is not None:
        notes.append(f"{path} is not what the run wrote: its curves may be wrong")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for i, line in enumerate(lines):
        try:
            row = json.loads(line)
            roles.setdefault(row["role"], []).append(row)
        except (ValueError, KeyError, TypeError):
            if i + 1 < len(lines) and notes is not None:  # a torn last line is how a killed run ends
                notes.append(f"{path}: line {i + 1} cannot be read and is left out")
    return roles


def _last_error(path: Path) -> str | None:
    """The error that a log ends with; None when the run went on after it, or never had one."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 65536, 0))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return None
    entries = _ENTRY.findall(text)
    return entries[-1][1] if entries and entries[-1][0] in ("ERROR", "CRITICAL") else None


def _natural(path: Path) -> list[Any]:
    """A sorting key: numbers in a path by size, so that run 10 comes after run 9."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", str(path))]
