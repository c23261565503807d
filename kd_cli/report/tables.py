"""Run directories to tables a person reads. Reads what runs left on disk; neither torch nor Hydra is imported.

Runs are compared on one data set at a time. Keys of the configuration that differ between them are swept; seeds are
what is averaged over; a setting is a value for each other swept key. A setting is chosen on validation data alone.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import os
import re
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from kd_cli.errors import DataError
from kd_cli.storage.run_dir import METRICS, SUMMARY, intact, verified_summary

AVERAGED = ("seed", "teacher_training.seed")
# Where, under what name and with what company a run ran; not what it was.
NO_SETTING = (
    *("device", "cuda_graphs", "data_dir", "store_dir", "experiment", "diagnostics"),
    *("resume", "dry_run", "fail_fast"),
)
FIRST = ("T", "alpha", "beta", "method", "student", "teacher")  # the order in which keys are shown; the rest follow
LOG = "run.log"
ROLES = ("teacher", "student_alone", "student")
MEASURES = ("errors", "accuracy", "nll", "ece", "agreement")

PART = re.compile(r"\w+:.*\n([ -].*\n)*\Z")  # of a configuration as it is written
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class Run:
    """A run directory as found. Status: completed, diverged, failed (its log ends with an error) or unfinished."""

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

    def test(self, role: str, measure: str) -> float | None:
        """A test result of the teacher, the student_alone or the student; None where there is none."""
        report = self.summary.get(role)
        value = report["test"].get(measure) if report else None
        return None if value is None else float(value)

    def validation(self, measure: str) -> float | None:
        """The student's val_accuracy or val_nll in the epoch that was kept; None without validation data."""
        rows = self.history.get("student", [])
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
    """Whether the directory is one run's."""
    return (path / SUMMARY).is_file() or (path / ".hydra").is_dir()


def collect(paths: Iterable[str | Path]) -> tuple[list[Run], list[str]]:
    """The runs in and under the paths, each once, and a note for each that could not be read.

    Raises DataError for a path that does not exist and when there is no run at all.
    """
    given = [Path(path) for path in paths]
    for path in given:
        if not path.is_dir():
            kind = "is not a directory" if path.exists() else "does not exist"
            raise DataError(
                f"{path} {kind}", hint="give run directories, or folders of them such as multirun/DATE/TIME"
            )
    runs: dict[Path, Run] = {}
    notes: list[str] = []
    for folder in sorted({found for path in given for found in _run_folders(path)}, key=_natural):
        if (resolved := folder.resolve()) in runs:
            continue
        try:
            runs[resolved] = read_run(folder, notes)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            notes.append(f"{folder} is left out: {reason[:200]}")
    if not runs:
        why = "".join(f"\n{note}" for note in notes)
        raise DataError(
            f"no run in {', '.join(map(str, given))}{why}",
            hint="a run directory holds .hydra/ and, when it has ended, summary.json",
        )
    return list(runs.values()), notes


def read_run(path: Path, notes: list[str] | None = None) -> Run:
    """One run directory. Raises ValueError, with the file's name, for a file that is not what it should be."""
    summary: dict[str, Any] = {}
    if (path / SUMMARY).is_file():
        summary = _parsed(path / SUMMARY, verified_summary)
        for key in ("status", "dataset", *ROLES):
            if key not in summary:
                raise ValueError(f"{SUMMARY} has no {key!r}; another program's?")
    if (path / ".hydra" / "config.yaml").is_file():
        config = _flat(_parsed(path / ".hydra" / "config.yaml", _read_yaml))
        if not {"T", "alpha", "beta", "seed"} <= config.keys():
            raise ValueError(".hydra/config.yaml is not a kd-run configuration")
    elif summary:  # hydra.output_subdir=null leaves no configuration
        config = {key: summary[key] for key in ("T", "alpha", "beta", "seed", "method", "precision") if key in summary}
    else:
        raise ValueError(".hydra/config.yaml is missing: stopped before it began?")
    choices = _choices(path / ".hydra" / "hydra.yaml")
    named = {
        role: summary[key]["name"] for role, key in (("teacher", "teacher"), ("student", "student")) if summary.get(key)
    }
    if summary:
        named |= {"dataset": summary["dataset"]["name"], "method": summary["method"]}
    cause = summary.get("cause") if summary else _last_error(path / LOG)
    status = summary.get("status") or ("failed" if cause else "unfinished")
    return Run(path, status, config, {**choices, **named}, summary, _history(path / METRICS, notes), cause)


def _run_folders(path: Path) -> Iterable[Path]:
    for folder, below, _ in os.walk(path):
        if is_run(Path(folder)):
            yield Path(folder)
            below.clear()
        below[:] = [name for name in below if not name.startswith(".")]


def _parsed(path: Path, read: Any) -> dict[str, Any]:
    try:
        value = read(path)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path.name} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no mapping")
    return value


def _read_yaml(path: Path) -> Any:
    """The values of a YAML file, not to be changed.

    Read in parts, each a key with what is indented below it: most are the same in all runs of a sweep.
    """
    text = path.read_text(encoding="utf-8")
    parts = re.split(r"^(?=[A-Za-z_])", text, flags=re.M)
    try:
        if parts[0] or len(parts) == 1 or not all(PART.match(part) for part in parts[1:]):
            raise ValueError("not the form that kd-run writes")
        values: dict[str, Any] = {}
        for part in parts[1:]:
            (pair,) = _plain_values(part).items()
            if pair[0] in values:
                raise ValueError(f"{pair[0]} is there twice")
            values |= [pair]
        return values
    except (ValueError, AttributeError, yaml.YAMLError):
        return yaml.load(text, Loader=_Loader)


@functools.lru_cache(1024)
def _plain_values(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)  # a safe loader: it builds plain values only


def _choices(path: Path) -> dict[str, str]:
    """Which option of each group was composed. Read by hand: parsing the whole file takes longer than all else."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return {}
    block = re.search(r"^( +)choices:\n((?:\1 +.*\n?)+)", text, re.M)
    pairs = (line.strip().split(": ", 1) for line in block[2].splitlines()) if block else ()
    return {
        pair[0]: pair[1].strip("'\"") for pair in pairs if len(pair) == 2 and "/" not in pair[0] and pair[1] != "null"
    }


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
    entries = re.findall(r"^\[\d{4}-[^\]]*\]\[[^\]]*\]\[([A-Z]+)\] (.*)$", text, re.M)
    return entries[-1][1] if entries and entries[-1][0] in ("ERROR", "CRITICAL") else None


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= _flat(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _natural(path: Path) -> list[Any]:
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", str(path))]


# ---------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Stat:
    """Mean, standard deviation (n - 1 in the denominator; None for one value) and n."""

    mean: float
    std: float | None
    n: int


def stat(values: Iterable[float | None]) -> Stat | None:
    """The Stat of the values that are there; None when none is."""
    there = [value for value in values if value is not None]
    if not there:
        return None
    return Stat(statistics.fmean(there), statistics.stdev(there) if len(there) > 1 else None, len(there))


@dataclass(frozen=True)
class Setting:
    """The runs that differ in their seeds alone.

    `gap_closed` is of the mean errors over the runs that have all three roles (`gap_n` of them), not the mean of
    the runs' own shares: a share divides by a difference that can be near nothing in one run, and such a run would
    decide the mean. `saved` is the mean of the runs' own differences, student alone less student.
    """

    values: dict[str, Any]
    runs: tuple[Run, ...]  # those that count: completed, repeats left out
    student: dict[str, Stat]  # measure -> Stat; val_accuracy, val_nll and val_errors (a share) among them
    student_alone: dict[str, Stat]
    teacher: dict[str, Stat]
    saved: Stat | None
    gap_closed: float | None
    gap_n: int
    diverged: int
    failed: int
    unfinished: int
    repeats: int

    @property
    def n(self) -> int:
        return len(self.runs)

    @property
    def label(self) -> str:
        return label(self.values)


@dataclass(frozen=True)
class Comparison:
    """The runs on one data set, the keys swept among them, a Setting for each value, and the best by validation."""

    dataset: str
    runs: tuple[Run, ...]
    keys: tuple[str, ...]
    settings: tuple[Setting, ...]
    best: Setting | None

    @functools.cached_property
    def telling(self) -> list[str]:
        """The keys that tell the settings apart."""
        return telling(self.keys, [setting.values for setting in self.settings])

    def size(self, split: str) -> int | None:
        """Number of examples in train, val or test; None while no run has ended."""
        return next((run.summary["dataset"][split] for run in self.runs if run.summary), None)

    @property
    def alike(self) -> list[Setting]:
        """Settings that validation does not tell from the best: their means within its standard deviation."""
        if self.best is None or (top := self.best.student["val_accuracy"]).std is None:
            return []
        stats = ((s, s.student.get("val_accuracy")) for s in self.settings if s is not self.best)
        return [s for s, other in stats if other is not None and top.mean - other.mean <= top.std]


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """The runs sorted into data sets and, in each, into settings."""
    comparisons = []
    for dataset, group in _by_data(runs).items():
        keys = swept_keys(group)
        found = settings(group, keys)
        comparisons.append(Comparison(dataset, tuple(group), tuple(keys), tuple(found), best(found)))
    return comparisons


def swept_keys(runs: Sequence[Run]) -> list[str]:
    """The keys in which the runs' settings differ.

    Keys under a group (`student.hidden`) are told by the group's option (`student`) where that says it all.
    Seeds, the data set, and where a run ran are left out.
    """
    skip = (*AVERAGED, *NO_SETTING)
    names = {key for run in runs for key in run.config if key not in skip and not key.startswith("dataset.")}
    differ = {key for key in names if _varies(runs, key)}
    for group in sorted({name for run in runs for name in run.choices} - {"dataset", "experiment"}):
        inside = {key for key in differ if key.startswith(f"{group}.")}
        by_option: dict[str | None, list[Run]] = {}
        for run in runs:
            by_option.setdefault(run.choices.get(group), []).append(run)
        if inside and len(by_option) > 1:
            varied = {key for key in inside if any(_varies(some, key) for some in by_option.values())}
            differ = (differ - inside) | varied | {group}
    return sorted(differ, key=lambda key: (FIRST.index(key) if key in FIRST else len(FIRST), key))


def value_of(run: Run, key: str) -> Any:
    """A run's value of a swept key: of the configuration, or the option of a group."""
    return run.config[key] if key in run.config else run.choices.get(key)


def settings(runs: Sequence[Run], keys: Sequence[str]) -> list[Setting]:
    """One Setting for each combination of the keys' values, in the order of the values."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps([value_of(run, key) for key in keys], default=str), []).append(run)
    made = [_setting({key: value_of(group[0], key) for key in keys}, group) for group in groups.values()]
    return sorted(made, key=lambda setting: [order(value) for value in setting.values.values()])


def order(value: Any) -> tuple[int, float, str]:
    """A sorting key for values of any kind: numbers first, by size."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 0, float(value), ""
    return 1, 0.0, show(value)


def best(settings: Sequence[Setting]) -> Setting | None:
    """The setting with the highest mean validation accuracy; of equal ones that with the lowest validation NLL.

    Test results play no part. Settings in which a run diverged are passed over while another is left: the mean of
    the survivors flatters them. None when no setting has validation results.
    """
    candidates = [setting for setting in settings if "val_accuracy" in setting.student]
    candidates = [setting for setting in candidates if not setting.diverged] or candidates

    def rank(setting: Setting) -> tuple[float, float]:
        nll = setting.student.get("val_nll")
        return -round(setting.student["val_accuracy"].mean, 12), nll.mean if nll else float("inf")

    return min(candidates, key=rank, default=None)


def share_closed(teacher: float, alone: float, student: float) -> float | None:
    """`kd_cli.metrics.gap_closed` without its torch: None when the teacher is no better than the student alone."""
    return None if teacher >= alone else (alone - student) / (alone - teacher)


def _setting(values: dict[str, Any], group: Sequence[Run]) -> Setting:
    counted: dict[Any, Run] = {}  # the same configuration and seeds run twice is no new evidence: the later one counts
    completed = [run for run in group if run.status == "completed"]
    for run in completed:
        counted[run.fingerprint or run.path] = run
    runs = tuple(counted.values())
    student = {
        **{measure: stat(run.test("student", measure) for run in runs) for measure in MEASURES},
        **{measure: stat(run.validation(measure) for run in runs) for measure in ("val_accuracy", "val_nll")},
    }
    triples = [tuple(run.test(role, "errors") for role in ROLES) for run in runs]
    whole = [[float(x) for x in triple if x is not None] for triple in triples if None not in triple]
    saved = [alone - errors for _, alone, errors in triples if alone is not None and errors is not None]
    return Setting(
        values=values,
        runs=runs,
        student={measure: value for measure, value in student.items() if value is not None},
        student_alone=_results(models_of(runs, "student_alone"), "student_alone"),
        teacher=_results(models_of(runs, "teacher"), "teacher"),
        saved=stat(saved),
        gap_closed=share_closed(*map(statistics.fmean, zip(*whole, strict=True))) if whole else None,
        gap_n=len(whole),
        diverged=sum(run.status == "diverged" for run in group),
        failed=sum(run.status == "failed" for run in group),
        unfinished=sum(run.status not in ("completed", "diverged", "failed") for run in group),
        repeats=len(completed) - len(runs),
    )


def _varies(runs: Iterable[Run], key: str) -> bool:
    return len({json.dumps(run.config.get(key, "(not set)"), default=str) for run in runs}) > 1


def _by_data(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each data set under a name that tells it from the others; equal data whatever its path is one set."""
    described = {
        id(run): json.dumps({k: v for k, v in run.config.items() if k.startswith("dataset.")}, default=str)
        for run in runs
    }
    known: dict[str, str] = {}
    for run in runs:
        if run.summary:
            known[described[id(run)]] = run.summary["dataset"]["fingerprint"]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        mark = (
            run.summary["dataset"]["fingerprint"] if run.summary else known.get(described[id(run)], described[id(run)])
        )
        groups.setdefault(mark, []).append(run)
    names = [group[0].choices.get("dataset", "data") for group in groups.values()]
    named: dict[str, list[Run]] = {}
    for (mark, group), name in zip(groups.items(), names, strict=True):
        if names.count(name) > 1:
            rivals = [other[0] for other, same in zip(groups.values(), names, strict=True) if same == name]
            apart = [key for key in group[0].config if key.startswith("dataset.") and _varies(rivals, key)]
            name += f" ({', '.join(f'{key[8:]}={show(group[0].config[key])}' for key in apart) or mark[:6]})"
        named[name if name not in named else f"{name} {mark[:6]}"] = group
    return named


# ---------------------------------------------------------------- words and numbers


def show(value: Any) -> str:
    """A configuration value as one would type it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False) if isinstance(value, list) else str(value)


def label(values: Mapping[str, Any]) -> str:
    """A setting in words: T=2, beta=0.5."""
    return ", ".join(f"{key}={show(value)}" for key, value in values.items())


def plus_minus(value: Stat | None, form: str = ",.1f") -> str:
    """Mean ± std; the mean alone when there is one value, and nothing when there is none."""
    if value is None:
        return ""
    if value.std is None:
        return f"{value.mean:{',.0f' if form == ',.1f' and value.mean == int(value.mean) else form}}"
    mean, std = f"{value.mean:{form}}", f"{value.std:{form}}"
    return f"{mean.removesuffix('%')} ± {std}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}".replace("-0%", "0%")


def one_setting(comparison: Comparison) -> str:
    """What all runs of a comparison without swept keys have in common."""
    run = comparison.runs[0]
    parts = {key: run.config.get(key) for key in ("T", "alpha", "beta")}
    return f"{run.choices.get('method', '')} with {label(parts)}".removeprefix(" with ")


def name_of(setting: Setting, comparison: Comparison) -> str:
    """A setting by the values that tell it from the others; the tables have the rest."""
    return label({key: setting.values[key] for key in comparison.telling}) or one_setting(comparison)


def telling(keys: Sequence[str], values: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that tell the values apart: those of one value go, then what others determine, from the last on.

    T, alpha and beta stay wherever they differ.
    """

    def apart(some: Sequence[str]) -> int:
        return len({tuple(show(value[key]) for key in some) for value in values})

    kept = [key for key in keys if apart([key]) > 1]
    for key in reversed([key for key in kept if key not in FIRST[:3]]):
        fewer = [other for other in kept if other != key]
        if apart(fewer) == apart(kept):
            kept = fewer
    return kept


def answer(comparison: Comparison) -> tuple[str, str]:
    """What the runs say: which setting, and what it was worth on the test set. A headline and its sentences."""
    setting = comparison.best
    head = f"best by validation: {name_of(setting, comparison)}" if setting else ""
    if len(comparison.settings) == 1:
        setting = comparison.settings[0]
        head = name_of(setting, comparison)
    if setting is None:
        finished = any(s.n for s in comparison.settings)
        if finished:
            return (
                "no setting is chosen",
                "There are no validation results to choose by, and the test set is not for choosing.",
            )
        return "nothing to compare yet", f"{tally(comparison.runs)}."
    if not setting.n:
        return head, f"No run has completed: {tally(comparison.runs)}."
    errors = plus_minus(setting.student["errors"])
    told = [f"{errors} errors on {comparison.size('test'):,} test examples ({seeds(setting.n)})"]
    if alone := setting.student_alone.get("errors"):
        told.append(f"the student alone {plus_minus(alone)} (n = {alone.n})")
    if teacher := setting.teacher.get("errors"):
        told.append(f"the teacher {plus_minus(teacher)} (n = {teacher.n})")
    text = ", ".join(told)
    if setting.gap_closed is not None and setting.gap_closed <= 0:
        text += f"; on average no better than alone ({percent(setting.gap_closed)} of the gap to the teacher closed)."
    elif setting.gap_closed is not None:
        text += f": {percent(setting.gap_closed)} of the gap to the teacher closed."
    elif setting.gap_n:
        text += "; the teacher is no better than the student alone, so there is no gap to close."
    else:
        text += "; without a teacher, there is no gap to speak of."
    if setting.n == 1:
        text += " One seed cannot tell a difference from chance; add seeds, e.g. 'seed=range(5)'."
    elif comparison.alike:
        names = [name_of(other, comparison) for other in comparison.alike]
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        text += f" Validation does not tell it from {'; '.join(names[:4])}{more} (within one standard deviation)."
    return head, text


def seeds(n: int) -> str:
    return "one seed" if n == 1 else f"mean ± std, n = {n} seeds"


def tally(runs: Sequence[Run]) -> str:
    """How many runs there are, by status."""
    counts = Counter(run.status for run in runs)
    return f"{len(runs):,} {'run' if len(runs) == 1 else 'runs'}: " + ", ".join(f"{n:,} {s}" for s, n in counts.items())


# ---------------------------------------------------------------- tables


def align(rows: Sequence[Sequence[str]]) -> str:
    """Rows of words as a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def sweep_table(comparisons: Sequence[Comparison]) -> str:
    """The table that a sweep ends with."""
    return "\n\n".join(map(_comparison_table, comparisons))


def _comparison_table(comparison: Comparison) -> str:
    head = f"{comparison.dataset}: {sizes(comparison)}{tally(comparison.runs)}; mean ± std over n seeds"
    names = [name_of(setting, comparison) for setting in comparison.settings]
    corner = ""
    if len(comparison.keys) > 1:  # a column for each key is narrower than its name in every row
        values = [[show(value) for value in setting.values.values()] for setting in comparison.settings]
        corner, *names = align([comparison.keys, *values]).splitlines()
    rows = [[corner, "val accuracy", "test errors", "accuracy", "agrees", "NLL", "ECE", "gap", "n"]]
    for name, setting in zip(names, comparison.settings, strict=True):
        mark = " *" if setting is comparison.best and len(comparison.settings) > 1 else ""
        rows.append([name + mark, *_measures(setting.student), percent(setting.gap_closed), counts(setting)])
    for role, word in (("student_alone", "student alone"), ("teacher", "teacher")):
        for which, stats in baselines(comparison, role):
            name = f"{word} ({which})" if which else word
            rows.append([name, *_measures(stats), "", str(stats["errors"].n)])
    fit(rows, width=120)
    title, text = answer(comparison)
    star = "* " if comparison.best and len(comparison.settings) > 1 else ""
    return f"{head}\n\n{align(rows)}\n\n{star}{title}\n{wrap(text)}"


def sizes(comparison: Comparison) -> str:
    """How many examples chose and tested: 200 validation, 597 test examples; nothing while no run has ended."""
    there = [(comparison.size(split), word) for split, word in (("val", "validation"), ("test", "test"))]
    told = ", ".join(f"{size:,} {word}" for size, word in there if size)
    return f"{told} examples; " if told else ""


def counts(setting: Setting) -> str:
    """n, and what else there was: 3 (1 diverged)."""
    lost = [f"{k} {word}" for word in ("diverged", "failed", "unfinished") if (k := getattr(setting, word))]
    return f"{setting.n} ({', '.join(lost)})" if lost else str(setting.n)


def families(settings: Iterable[Setting], role: str) -> list[tuple[list[Setting], dict[str, Stat]]]:
    """The distinct teachers, or students alone: the settings that share models, and the results of all those models.

    A setting with fewer seeds than its neighbours shares their models as far as it has them.
    """
    found: list[tuple[list[Setting], dict[str, Run]]] = []
    for setting in settings:
        members, models = [setting], models_of(setting.runs, role)
        if not models:
            continue
        for other in [other for other in found if other[1].keys() & models.keys()]:
            found.remove(other)
            members, models = [*other[0], *members], {**other[1], **models}
        found.append((members, models))
    return [(members, _results(models, role)) for members, models in found]


def models_of(runs: Iterable[Run], role: str) -> dict[str, Run]:
    """The distinct models of a role by fingerprint, each with a run that tells its results."""
    return {run.summary[role]["fingerprint"]: run for run in runs if run.summary.get(role)}


def _results(models: Mapping[str, Run], role: str) -> dict[str, Stat]:
    return {m: s for m in MEASURES if (s := stat(run.test(role, m) for run in models.values()))}


def baselines(comparison: Comparison, role: str) -> list[tuple[str, dict[str, Stat]]]:
    """The distinct teachers, or students alone, each with the keys that tell it from the others."""
    told, found = [], families(comparison.settings, role)
    for group, stats in found:
        same = {k: v for k, v in group[0].values.items() if all(show(s.values[k]) == show(v) for s in group)}
        theirs = {k: v for k, v in same.items() if _matters(role, k)} or same
        told.append((label(theirs) if len(found) > 1 else "", stats))
    return told


def _matters(role: str, key: str) -> bool:
    """Whether a key can make a difference to a teacher or a student alone."""
    if role == "teacher":
        return key.startswith("teacher") or key == "precision"
    return not key.startswith(("teacher", "method")) and key not in ("T", "alpha", "beta")


def fit(rows: list[list[str]], *, width: int) -> None:
    """Take away columns that are empty and, while the table is too wide, those one misses least; sweep.csv has all."""
    empty = [name for i, name in enumerate(rows[0]) if i and not any(row[i] for row in rows[1:])]
    for name in (*empty, "accuracy", "ECE", "NLL", "agrees"):
        if name in rows[0] and (name in empty or len(align(rows).splitlines()[0]) > width):
            column = rows[0].index(name)
            for row in rows:
                del row[column]


def wrap(text: str, width: int = 110) -> str:
    import textwrap

    return textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False)


def _measures(stats: Mapping[str, Stat]) -> list[str]:
    forms = (
        ("val_accuracy", ".2%"),
        ("errors", ",.1f"),
        ("accuracy", ".2%"),
        ("agreement", ".1%"),
        ("nll", ".3f"),
        ("ece", ".3f"),
    )
    return [plus_minus(stats.get(measure), form) for measure, form in forms]


def sweep_csv(comparisons: Sequence[Comparison], root: Path) -> str:
    """One row for each run, with all swept keys and all results; `counted` says whether the means contain it."""
    keys = list(dict.fromkeys(key for comparison in comparisons for key in comparison.keys))
    keys = [*(key for key in FIRST[:4] if key not in keys), *keys]  # what one always asks for
    automatic = any(run.config.get(key) == "auto" for c in comparisons for run in c.runs for key in ("T", "alpha"))
    rows = []
    for comparison in comparisons:
        counted = {id(run) for setting in comparison.settings for run in setting.runs}
        chosen = {id(run) for run in comparison.best.runs} if comparison.best else set()
        for run in comparison.runs:
            row: dict[str, Any] = {"run": relative(run.path, root), "status": run.status, "dataset": comparison.dataset}
            row |= {key: show(value_of(run, key)) for key in keys}
            if automatic:
                row |= {f"{key}_used": show(run.summary.get(key, "")) for key in ("T", "alpha")}
            row |= {key: show(run.config.get(key)) for key in AVERAGED}
            row |= {"counted": int(id(run) in counted), "best_by_validation": int(id(run) in chosen)}
            row |= {measure: run.validation(measure) for measure in ("val_accuracy", "val_nll")}
            for role in reversed(ROLES):
                report = run.summary.get(role) or {}
                row[f"{role}_name"] = report.get("name", run.choices.get(role, ""))
                row |= {f"{role}_{measure}": report.get("test", {}).get(measure) for measure in ("total", *MEASURES)}
                row |= {
                    f"{role}_{fact}": report.get(fact)
                    for fact in ("parameters", "flops", "epochs", "seconds", "fingerprint")
                }
            row |= {"gap_closed": run.summary.get("gap_closed"), "cause": run.cause}
            rows.append(row)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def relative(path: Path, root: Path) -> str:
    """The path as seen from root, with forward slashes; absolute where there is no way (another drive)."""
    try:
        return Path(os.path.relpath(path.resolve(), root.resolve())).as_posix()
    except ValueError:
        return path.resolve().as_posix()


def run_table(summary: dict[str, Any]) -> str:
    """The table that a run ends with."""
    data = summary["dataset"]
    head = (
        f"{data['name']}: {data['train']:,} training, {data['val']:,} validation, {data['test']:,} test examples, "
        f"{data['classes']} classes; {summary['device']}, {summary['precision']}, seed {summary['seed']}"
    )
    return f"\n{head}\n\n{align(role_rows(summary))}\n\n{verdict(summary)}"


def role_rows(summary: dict[str, Any]) -> list[list[str]]:
    """A heading and a row for the teacher, the student alone and the student, as far as the run has them."""
    rows = [["", "errors", "accuracy", "NLL", "ECE", "agrees", "parameters", "MFLOPs", "seconds"]]
    by = f" by {summary['method']}"
    for role, name in (("teacher", "teacher"), ("student_alone", "student alone"), ("student", "student" + by)):
        report = summary[role]
        if report is None:
            continue
        test = report["test"]
        agree = test.get("agreement")
        rows.append(
            [
                f"{name} ({report['name']})",
                f"{test['errors']:,}",
                f"{test['accuracy']:.2%}",
                "" if test["nll"] is None else f"{test['nll']:.4f}",
                "" if test["ece"] is None else f"{test['ece']:.4f}",
                "" if agree is None else f"{agree:.2%}",
                f"{report['parameters']:,}",
                f"{report['flops'] / 1e6:,.2f}",
                "stored" if report["from_store"] else f"{report['seconds']:.1f}",
            ]
        )
    return rows


def verdict(summary: dict[str, Any]) -> str:
    """In a sentence, what distillation was worth in this run."""
    if summary["status"] == "diverged":
        return f"diverged: {summary.get('cause', 'a loss is not a finite number')}"
    if summary["teacher"] is None:
        return f"{summary['method']} has no teacher; T = {show(summary['T'])} is not used"
    weights = ", ".join(f"{key} = {show(summary[key])}" for key in ("T", "alpha", "beta"))
    if "auto" in summary:
        weights += f" ({' and '.join(summary['auto']['keys'])} chosen on validation data)"
    if summary["student"] is None or summary["student_alone"] is None:
        return f"{weights}: there is no result to compare"
    alone, student = (summary[role]["test"]["errors"] for role in ("student_alone", "student"))
    if summary["gap_closed"] is None:
        return f"{weights}: {alone} errors alone, {student} distilled; the teacher is no better than the student alone"
    share = f"{summary['gap_closed']:.0%} of the gap to the teacher closed"
    return f"{weights}: {alone} errors alone, {student} distilled, {share}"
