"""The `kd-report` command: tables and pages of runs that are on disk, finished or not."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kd_cli.commands.endings import short_endings
from kd_cli.commands.output import allow_any_text
from kd_cli.report.pages import write_report, write_run_page
from kd_cli.report.read import collect, is_run, read_run
from kd_cli.report.tables import run_table

EPILOG = """examples:
  kd-report multirun/2026-11-21/10-00-00     one sweep: its table, sweep.csv and sweep.html beside the runs
  kd-report multirun outputs --out compare   everything of several days on one page, in compare/
  kd-report outputs/2026-11-21/10-00-00      one run: its table and its report.html
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `kd-report`. After a user's mistake, prints it without a traceback and exits with 1."""
    allow_any_text()
    with short_endings():
        report(arguments(argv))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="kd-report",
        description="Compare runs that are on disk: mean ± std over seeds for each setting, the best by validation.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", metavar="PATH", nargs="+", type=Path, help="a run directory, or a folder of them")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="where to write; by default the sweep's own folder, or for several paths kd-report.csv and .html here",
    )
    parser.add_argument("--runs", action="store_true", help="also write the report.html of every run")
    parser.add_argument("--unfinished", action="store_true", help="list runs without a result one by one")
    version = f"kd-cli {importlib.metadata.version('kd-cli')}"
    parser.add_argument("--version", action="version", version=version, help="print the version of kd-cli")
    return parser.parse_args(argv)


def report(options: argparse.Namespace) -> None:
    """Write and print the report that the options ask for."""
    if len(options.paths) == 1 and is_run(options.paths[0]):
        page = write_run_page(options.paths[0], options.out)
        if summary := read_run(options.paths[0]).summary:
            print(run_table(summary))
        print(f"\nwritten: {os.path.relpath(page)}")
        return
    out, name = destination(options.paths, options.out)
    pages = 0
    if options.runs:  # first, so that the sweep's page links to them
        for run in collect(options.paths)[0]:
            write_run_page(run.path)
            pages += 1
    written = write_report(options.paths, out, name=name, unfinished=options.unfinished)
    print(f"\n{written.table}")
    for note in written.notes:
        print(f"note: {note}", file=sys.stderr)
    also = f" and {pages:,} report.html" if pages else ""
    print(f"\nwritten: {os.path.relpath(written.csv)}, {os.path.relpath(written.html)}{also}")


def destination(paths: Sequence[Path], out: Path | None) -> tuple[Path, str]:
    """The folder and the name of the files: a sweep's beside its runs, others in the current folder."""
    if out is not None:
        return out, "sweep"
    if len(paths) == 1 and paths[0].is_dir() and is_sweep(paths[0]):
        return paths[0], "sweep"
    return Path(), "kd-report"


def is_sweep(path: Path) -> bool:
    """Whether the folder is a sweep's: Hydra's multirun.yaml is there, or runs lie directly in it."""
    return (path / "multirun.yaml").is_file() or any(is_run(folder) for folder in path.iterdir() if folder.is_dir())


if __name__ == "__main__":
    main()
