"""scripts/check_docs.py: tables found on pages, spreads, and the command above a table run anew."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from process import Ran

ROOT = Path(__file__).resolve().parents[1]
SMALL = "training.epochs=1 teacher_training.epochs=1 teacher.hidden=[16] student.hidden=[8]"
PRINTED = """\
    T  student.hidden    val accuracy  test errors           vs alone   gap  n
    1         [30,30]  87.36 ± 1.47%   76.4 ± 4.6  +15.0 ± 5.5 harms  -18%  5
    4   [300,300] *    91.24 ± 0.35%   49.0 ± 2.3   -9.9 ± 3.3 helps   37%  5
    teacher                                    41                           1
"""


@pytest.fixture
def check_docs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("check_docs")


def page(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "README.md"
    file.write_text(text, encoding="utf-8")
    return file


def test_a_printed_table_is_read_by_its_columns(check_docs: ModuleType) -> None:
    rows = check_docs.printed_rows(PRINTED.splitlines())
    assert list(rows) == ["1  [30,30]", "4  [300,300]", "teacher"]
    assert rows["4  [300,300]"]["test errors"] == "49.0 ± 2.3"
    assert rows["1  [30,30]"]["gap"] == "-18%"
    assert rows["1  [30,30]"]["vs alone"] == "+15.0 ± 5.5 harms"
    assert rows["teacher"] == {"test errors": "41", "n": "1"}


@pytest.mark.parametrize(
    ("cell", "now", "column", "same"),
    [
        ("76.4 ± 4.6", "80.9 ± 8.0", "errors", True),
        ("76.4 ± 4.6", "81.3 ± 4.6", "errors", False),  # the mean is further away than the deviation
        ("76.4 ± 4.6", "76.4 ± 9.9", "errors", False),  # the deviation is more than twice as large
        ("76.4 ± 4.6", "76.4", "errors", False),
        ("1,010", "1,111", "errors", True),  # 10 % as the page says
        ("1,010", "1,200", "errors", False),
        ("30%", "54%", "gap", True),
        ("30%", "56%", "gap", False),
        ("-5%", "19%", "gap", True),
        ("10", "9", "n", False),  # a count
        ("+0.4 ± 1.0 unclear", "-0.3 ± 0.9 unclear", "vs alone", True),
        ("-2.4 ± 2.1 helps", "-2.0 ± 2.1 unclear", "vs alone", False),
        ("", "1", "gap", False),
    ],
)
def test_numbers_may_differ_as_far_as_the_page_says(
    cell: str, now: str, column: str, same: bool, check_docs: ModuleType
) -> None:
    spread = check_docs.Spread.stated("numbers without ± may\ndiffer by 10 %, the gap by 25 points.")
    assert check_docs.alike(cell, now, column, spread) is same


def test_a_share_for_all_numbers_holds_where_it_is_more_than_the_deviation(check_docs: ModuleType) -> None:
    spread = check_docs.Spread.stated("their numbers may differ by 2 %, or by their ±")
    assert check_docs.alike("0.9995 ± 0.0000", "0.9991 ± 0.0005", "cosine", spread)
    assert not check_docs.alike("0.9995 ± 0.0000", "0.9700 ± 0.0005", "cosine", spread)
    assert check_docs.alike("0.0015 ± 0.0004", "0.0018 ± 0.0003", "size", spread)


def test_without_a_stated_spread_a_number_must_be_the_same(check_docs: ModuleType) -> None:
    spread = check_docs.Spread.stated("")
    assert check_docs.alike("0.0300", "0.0300", "cosine", spread)
    assert not check_docs.alike("0.0300", "0.0301", "cosine", spread)


@pytest.mark.parametrize(
    ("words", "word"), [("", "differs"), ("Made at commit `5bf3c90`.", "not run"), ("commit of old", "differs")]
)
def test_an_expensive_table_must_name_its_commit(words: str, word: str, tmp_path: Path, check_docs: ModuleType) -> None:
    command = "    kd-run -m experiment=hinton_mnist 'seed=range(3)'"
    text = f"# Page\n\n## A\n\n{command}\n\n{words}\n\n| | errors |\n|---|---|\n| a | 1 |\n"
    (table,) = check_docs.tables(page(tmp_path, text))
    assert check_docs.check(table, check_docs.Spread(), tmp_path, {})[0] == word


def test_every_page_names_the_commits_of_its_expensive_tables(check_docs: ModuleType) -> None:
    found = [table for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")) for table in check_docs.tables(page)]
    assert len(found) >= 15
    assert [f"{t.page.name}:{t.line}" for t in found if check_docs.EXPENSIVE.search(t.command) and not t.commit] == []


@pytest.mark.parametrize("preset", sorted((ROOT / "conf" / "experiment").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_presets_comment_has_the_numbers_of_the_page(preset: Path) -> None:
    comment = " ".join(line for line in preset.read_text(encoding="utf-8").splitlines() if line.startswith("# paper"))
    page = (ROOT / "docs" / "RESULTS.md").read_text(encoding="utf-8")
    for number in re.findall(r"[\d.]+ ± [\d.]*\d(?![\d.]| %)", comment.partition("ours")[2]):
        assert number in page


@pytest.mark.slow
def test_the_script_runs_the_command_above_a_table_and_compares(kd_run: Callable[..., Ran], tmp_path: Path) -> None:
    words = f"-m T=1,2 seed=0,1 {SMALL}"
    printed = kd_run(*words.split()).out
    block = "\n".join(f"    {line}" if line else "" for line in printed.splitlines())
    folder = tmp_path / "pages"
    folder.mkdir()
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(ROOT / "scripts" / "check_docs.py"), "--root", str(folder)]

    page(folder, f"# Page\n\n    kd-run {words}\n\n{block}\n")
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("ok ")

    errors = next(line for line in printed.splitlines() if line.startswith("teacher  ")).split()[1]
    page(folder, f"# Page\n\n    kd-run {words}\n\n{block.replace(f' {errors} ', ' 999 ')}\n")
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert "differs  README.md:" in done.stdout
    assert "999 on the page" in done.stdout
