"""Run the commands above the tables of README.md and docs/*.md and compare every number: python scripts/check_docs.py

    python scripts/check_docs.py                        # every page: about ten minutes on two quiet cores
    python scripts/check_docs.py --only README RESULTS  # some pages
    python scripts/check_docs.py --work DIR             # keep the store and the runs, to look at them

A table belongs to the last command above it in its section. Prints one line per table, `ok`, `differs` or `not run`,
and exits with 1 when one differs. A mean and its standard deviation may each differ by the standard deviation that the
page states. A number without one must be the same, unless the page says "numbers without ± may differ by 10 %", with
"the gap by 25 points" for a column that has a spread of its own. "numbers may differ by 2 %" also holds for means and
deviations, where that is more than the deviation. Times are not compared.

Tables of other data than the digits, and those made by scripts, take too long to be made anew or need a package index:
they are not run, and their section, or the page's first lines, must name the commit that they were made at.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import paper

from kd_cli.report.read import collect

ROOT = Path(__file__).resolve().parents[1]
COMMAND = re.compile(r"^ {4}((?:kd-run|python scripts/)\S*.*)$")
INLINE = re.compile(r"`(?:python )?((?:kd-run -m|scripts/\w+\.py)[^`]*)`")
# Presets that train many models.
PRESETS = "methods_|speech|specialists|omniglot|privileged|teacher_assistant|born_again|theseus|smoothed|pruned"
EXPENSIVE = re.compile(rf"scripts/|hinton_mnist|experiment=(?:{PRESETS})|dataset=(?!digits)")
COMMIT = re.compile(r"\bcommit `?([0-9a-f]{7,40})\b")
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")
LOOSE = re.compile(r"numbers\s+(without\s+±\s+)?may\s+differ\s+by\s+(\d+)\s+%")
POINTS = re.compile(r"\bthe\s+(\w+)\s+by\s+(\d+)\s+points")
CELL = re.compile(r"\S+(?: \S+)*")
TIMES = ("seconds", "seconds each")
COUNTS = ("n", "epochs", "parameters", "MFLOPs")  # the same on every machine

Rows = dict[str, dict[str, str]]  # by a row's first cell, then by column


@dataclass(frozen=True)
class Table:
    """A table of a page, with the command above it and the commit that its section or page names."""

    page: Path
    line: int
    command: str
    rows: Rows
    commit: str | None


@dataclass(frozen=True)
class Spread:
    """How far numbers may differ: by a share (with a standard deviation too if `every`), by points of a column."""

    share: float = 0.0
    every: bool = False
    points: dict[str, float] = field(default_factory=dict)

    @classmethod
    def stated(cls, text: str) -> Spread:
        found = LOOSE.search(text)
        points = {name: float(by) for name, by in POINTS.findall(text)}
        return cls(int(found[2]) / 100, found[1] is None, points) if found else cls(points=points)


# ---------------------------------------------------------------- pages


def tables(page: Path) -> Iterator[Table]:
    """The tables of a page that have a command above them in their section."""
    lines = page.read_text(encoding="utf-8").splitlines()
    starts = [0, *(k for k, line in enumerate(lines) if line.startswith("## ")), len(lines)]
    top = COMMIT.search(" ".join(lines[: starts[1]]))
    for start, end in itertools.pairwise(starts):
        commit = COMMIT.search(" ".join(lines[start:end])) or top
        command, k = "", start
        while k < end:
            stop = k + 1
            if found := COMMAND.match(lines[k]) or INLINE.search(lines[k]):
                command = found[1].partition("#")[0].strip()
            elif lines[k].startswith("|") or is_printed_table(lines[k]):
                while stop < end and lines[stop].startswith(lines[k][:1]):
                    stop += 1
                rows = markdown_rows(lines[k:stop]) if lines[k].startswith("|") else printed_rows(lines[k:stop])
                made = command and (lines[k].startswith(" ") or makes_markdown(command))
                if made and any(NUMBER.search(cell) for row in rows.values() for cell in row.values()):
                    yield Table(page, k + 1, command, rows, commit[1] if commit else None)
            k = stop


def makes_markdown(command: str) -> bool:
    """Whether a Markdown table below the command has its results; other tables explain what is above or below them."""
    return EXPENSIVE.search(command) is not None or any(part.command == command for part in paper.PARTS)


def is_printed_table(line: str) -> bool:
    """Whether a line has the heads of a table that kd-run or kd-report prints."""
    return re.search(r"val accuracy +test errors|errors +accuracy +NLL", line) is not None


def markdown_rows(lines: Sequence[str]) -> Rows:
    """A Markdown table's cells; the second line is the rule below the heads."""
    cells = [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines]
    return {row[0]: dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[2:]}


def printed_rows(lines: Sequence[str]) -> Rows:
    """The cells of a table in plain text, whose columns are two spaces apart and aligned on the right."""
    lines = textwrap.dedent("\n".join(lines)).splitlines()
    heads = list(CELL.finditer(lines[0]))
    settings = [head for head in heads if head.start() < lines[0].index("errors") and "accuracy" not in head[0]]
    boundary = max((head.end() for head in settings if "errors" not in head[0]), default=1)
    rows: Rows = {}
    for line in lines[1:]:
        cells = list(CELL.finditer(line))
        labels = [cell[0] for cell in cells if cell.start() < boundary]
        name = "  ".join(labels).removesuffix(" *")  # the mark of the best
        ends = {cell.end(): cell[0] for cell in cells[len(labels) :]}
        rows[name] = {nearest_head(heads, end): cell for end, cell in ends.items()}
    return rows


def nearest_head(heads: Sequence[re.Match[str]], end: int) -> str:
    return min(heads, key=lambda head: abs(head.end() - end))[0]


# ---------------------------------------------------------------- commands


def made_anew(command: str, work: Path, done: dict[str, str]) -> list[Rows]:
    """The tables that a command makes; it runs once, `done` has what earlier commands printed."""
    part = next((part for part in paper.PARTS if part.command == command), None)
    if part is not None:
        folder = work / part.name
        if command not in done and not paper.run(part, folder, ()):
            raise RuntimeError("the experiment failed")
        done[command] = ""
        return [markdown_rows(paper.markdown(part.finding(collect([folder])[0]).table).splitlines())]
    if command not in done:
        where = f"{'sweep' if '-m' in shlex.split(command) else 'run'}.dir={work / f'run{len(done)}'}"
        words = [*shlex.split(command)[1:], f"hydra.{where}"]
        ran = subprocess.run([sys.executable, "-m", "kd_cli", *words], cwd=work, stdout=subprocess.PIPE, text=True)
        if ran.returncode:
            raise RuntimeError(f"exit status {ran.returncode}")
        done[command] = ran.stdout
    lines = done[command].splitlines()
    return [
        printed_rows(list(itertools.takewhile(str.strip, lines[k:])))
        for k, line in enumerate(lines)
        if is_printed_table(line)
    ]


# ---------------------------------------------------------------- comparison


def differences(page: Rows, anew: Rows, spread: Spread) -> Iterator[str]:
    """A sentence for each cell of the page that the command does not give within its spread."""
    for name, row in page.items():
        if name not in anew:
            yield f"{name}: no such row"
            continue
        for column, cell in row.items():
            now = anew[name].get(column, "")
            if column not in TIMES and not alike(cell, now, column, spread):
                yield f"{name}, {column}: {cell or 'nothing'} on the page, {now or 'nothing'} now"


def alike(cell: str, now: str, column: str, spread: Spread) -> bool:
    """Whether two cells have the same words, and numbers within the spread of the first."""
    before, after = numbers(cell), numbers(now)
    if NUMBER.sub("", cell) != NUMBER.sub("", now) or len(before) != len(after):
        return False
    for k, (value, unit) in enumerate(before):
        if "±" in cell:
            allowed = max(before[1][0] + unit, spread.share * abs(before[0][0]) if spread.every else 0.0)
        else:
            share = 0.0 if column in COUNTS else spread.share
            allowed = spread.points.get(column, share * abs(value) + (unit if share else 0.0))
        if abs(value - after[k][0]) > allowed + 1e-9:
            return False
    return True


def numbers(cell: str) -> list[tuple[float, float]]:
    """The numbers of a cell, each with the size of its last digit."""
    found = NUMBER.findall(cell)
    return [(float(text.replace(",", "")), 10.0 ** -len(text.partition(".")[2].partition("e")[0])) for text in found]


# ---------------------------------------------------------------- the script


def check(table: Table, spread: Spread, work: Path, done: dict[str, str]) -> tuple[str, list[str]]:
    """`ok`, `differs` or `not run` for a table, with the sentences that say why."""
    if EXPENSIVE.search(table.command):
        if table.commit is None:
            return "differs", ["neither the section nor the page's first lines name the commit that it was made at"]
        return "not run", [f"made at commit {table.commit}"]
    try:
        found = [list(differences(table.rows, rows, spread)) for rows in made_anew(table.command, work, done)]
    except RuntimeError as error:
        return "differs", [str(error)]
    why = min(found, key=len, default=["the command prints no table"])
    cells = sum(len(numbers(cell)) for row in table.rows.values() for cell in row.values())
    return ("differs", why) if why else ("ok", [f"{cells} numbers"])


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare the numbers of README.md and docs/*.md with their commands.")
    parser.add_argument("--only", nargs="+", metavar="PAGE", help="pages by name: README RESULTS")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs (%(default)s)")
    parser.add_argument("--work", type=Path, help="folder of the store and the runs (a temporary one)")
    args = parser.parse_args()
    pages = [args.root / "README.md", *sorted((args.root / "docs").glob("*.md"))]
    if args.only and (unknown := set(args.only) - {page.stem for page in pages}):
        parser.error(f"no such page: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        os.environ["KD_STORE"] = str(work / "store")
        done: dict[str, str] = {}
        words = []
        for page in pages:
            spread = Spread.stated(page.read_text(encoding="utf-8"))
            for table in tables(page) if not args.only or page.stem in args.only else ():
                word, why = check(table, spread, work, done)
                words.append(word)
                print(f"{word:8} {page.name}:{table.line}  {table.command}: {'; '.join(why)}", flush=True)
    print(", ".join(f"{words.count(word)} {word}" for word in ("ok", "differs", "not run")))
    return int("differs" in words)


if __name__ == "__main__":
    sys.exit(main())
