"""Writing reports: the table, CSV file and page of runs that are compared, and the page of a single run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kd_cli.report.compare import compare
from kd_cli.report.read import Run, collect
from kd_cli.report.run_page import run_page
from kd_cli.report.sweep_page import sweep_page
from kd_cli.report.tables import sweep_csv, sweep_table
from kd_cli.storage.files import storage, tidy, write_text
from kd_cli.storage.run_dir import REPORT as REPORT


@dataclass(frozen=True)
class Written:
    """What `write_report` made: the table for the terminal, two files, notes on what could not be read, the runs."""

    table: str
    csv: Path
    html: Path
    notes: tuple[str, ...]
    runs: tuple[Run, ...]


def write_report(
    paths: Iterable[str | Path], out_dir: str | Path, *, name: str = "sweep", unfinished: bool = False
) -> Written:
    """Compare the runs in and under the paths; write NAME.csv and NAME.html into out_dir, which is made if missing.

    With `unfinished`, runs without a result are listed one by one. Raises DataError as `collect` does, StorageError
    where out_dir cannot be written.
    """
    runs, notes = collect(paths)
    comparisons = compare(runs, unfinished=unfinished)
    out = Path(out_dir)
    with storage(out):
        out.mkdir(parents=True, exist_ok=True)
    write_text(out / f"{name}.csv", sweep_csv(comparisons, out))
    write_text(out / f"{name}.html", sweep_page(comparisons, out, name=name, notes=notes))
    return Written(sweep_table(comparisons), out / f"{name}.csv", out / f"{name}.html", tuple(notes), tuple(runs))


def write_run_page(run_dir: str | Path, out_dir: str | Path | None = None) -> Path:
    """Write a run's report.html into out_dir, by default the run directory, and return its path."""
    out = Path(run_dir if out_dir is None else out_dir)
    with storage(out):
        out.mkdir(parents=True, exist_ok=True)
    tidy(out)  # of a page that a killed process was writing
    write_text(out / REPORT, run_page(run_dir, out))
    return out / REPORT
