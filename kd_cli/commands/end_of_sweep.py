"""The end of a sweep: its table, its files, the jobs that did not complete."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_cli.errors import first_line

NAMED = 20  # failed jobs that are listed


def swept() -> Path | None:
    """Return the directory of the sweep that this process has run, None without one that has jobs."""
    from kd_cli.sweeps.sweep_folder import SweepNotes

    return SweepNotes.folder if SweepNotes.folder and any(SweepNotes.folder.glob("*/.hydra")) else None


def end_sweep(error: BaseException | None = None) -> None:
    """Print the table of a sweep and write its files; exits with 1 when a job failed.

    Returns when the error that ended the sweep is no job's own, or when no sweep has begun.
    """
    from kd_cli.report.pages import write_report
    from kd_cli.sweeps.sweep_folder import FAILED, SweepNotes, leave_nothing

    folder = swept()
    if folder is None:
        if error is not None and SweepNotes.folder is not None and SweepNotes.new:
            leave_nothing(SweepNotes.folder, begun=True)
        return
    (folder / FAILED).unlink(missing_ok=True)
    if SweepNotes.new and (causes := refused(folder)):
        leave_nothing(folder, begun=True)
        fail([f"  {name}: {cause}" for name, cause in causes], len(causes))
    written = write_report([folder], folder)
    print(f"\n{written.table}\n\nwritten to {os.path.relpath(folder)}: sweep.csv, sweep.html")
    draw_after(folder)
    bad = [run for run in written.runs if run.status not in ("completed", "pruned")]
    if not bad:
        return
    lines = []
    for run in bad:
        cause = (run.cause or "").rpartition(f"{run.path.name}: ")[2]
        lines.append(f"  {os.path.relpath(run.path)}: {run.status}{f', {cause}' if cause else ''}")
    own = [run.cause for run in bad if run.cause]
    ends = error is None or isinstance(error, SystemExit) or any(_caused(error, cause) for cause in own)
    fail(lines, len(written.runs), exits=ends)


def fail(lines: Sequence[str], jobs: int, *, exits: bool = True) -> None:
    """Print which jobs did not complete, a line for each; exit with 1."""
    more = [f"  and {len(lines) - NAMED} more"] if len(lines) > NAMED else []
    text = "\n".join([f"\nerror: {len(lines)} of {jobs} jobs did not complete", *lines[:NAMED], *more])
    if exits:
        sys.exit(text)
    print(text + "\n", file=sys.stderr)


def refused(folder: Path) -> list[tuple[str, str]]:
    """Return (job, cause) for each job of a sweep whose configurations were all refused; empty where one began."""
    from kd_cli.report.read import collect

    runs: list[Any] = collect([folder])[0]
    for run in runs:
        begun = [path for path in run.path.iterdir() if path.name not in (".hydra", "run.log", "run.json")]
        log = run.path / "run.log"
        if begun or not run.cause or (log.is_file() and "Traceback (most recent" in log.read_text(errors="replace")):
            return []
    return [(run.path.name, str(run.cause).rpartition(f"{run.path.name}: ")[2]) for run in runs]


def draw_after(folder: Path) -> None:
    """Draw what the configuration wants drawn from a sweep's runs."""
    from kd_cli.config.build import build
    from kd_cli.sweeps.sweep_folder import SweepNotes

    if SweepNotes.after is not None:
        files = build(SweepNotes.after, folder, where="after_sweep")
        print("and " + ", ".join(os.path.relpath(file) for file in files))


def _caused(error: BaseException, cause: str) -> bool:
    """Whether a job's log ends with this error."""
    return not str(error) or first_line(error) in cause
