"""The pages in a browser: no errors, sorting by mouse and keyboard, links that lead somewhere, text that fits."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import made_run

from kd_cli.report.pages import write_report, write_run_page
from kd_cli.runs.pictures import pictures

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is here")

FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars"),
)
# Runs before the page's own script and notes what goes wrong; what the test asks for is written into the page.
WATCH = """<script>window.wrong = [];
addEventListener("error", e => wrong.push(String(e.message || e.target.src)), true);
const log = console.error; console.error = (...words) => { wrong.push(words.join(" ")); log(...words); };</script>"""
ASK = """<script>addEventListener("load", () => { let found;
try { found = (() => { %s })(); } catch (e) { wrong.push(String(e)); }
const out = document.createElement("pre"); out.id = "found"; out.textContent = JSON.stringify({ found, wrong });
document.body.append(out); });</script>"""


def ask(page: Path, script: str, tmp_path: Path, *, width: int = 1200) -> Any:
    """What the script returns in the page, opened in a browser of this width; the page must raise no error."""
    probe = page.with_name("probe.html")
    text = page.read_text().replace("<head>", f"<head>{WATCH}", 1).replace("</body>", f"{ASK % script}</body>", 1)
    probe.write_text(text)
    profile = tmp_path / "profile"
    command = [str(BROWSER), *FLAGS, f"--user-data-dir={profile}", f"--window-size={width},900", "--dump-dom"]
    done = subprocess.run([*command, probe.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    answer = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert answer is not None, done.stderr[-2000:]
    result = json.loads(html.unescape(answer[1]))
    assert result["wrong"] == []
    return result["found"]


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """The page of a sweep of ten temperatures, one of them diverged."""
    for i in range(10):
        status = "diverged" if i == 4 else "completed"
        made_run(tmp_path / "sweep" / str(i), T=float(i + 1), student=20 + 7 * i % 10, val=0.9 - i / 100, status=status)
    write_run_page(tmp_path / "sweep/0")
    return write_report([tmp_path / "sweep"], tmp_path / "sweep").html


COLUMN = """
const table = [...document.querySelectorAll("table.sortable")].at(-1);
const heads = [...table.tHead.rows[0].cells], at = name => heads.findIndex(head => head.innerText.trim() == name);
const column = name => [...table.tBodies[0].rows].map(row => row.cells[at(name)].innerText.trim());
"""


def test_a_click_sorts_by_number_and_another_turns_it_round(sweep: Path, tmp_path: Path) -> None:
    script = """
    const head = heads[at("T")], seen = [column("T")];
    head.querySelector("button").click(); seen.push(column("T"), head.getAttribute("aria-sort"));
    head.querySelector("button").click(); seen.push(column("T"), head.getAttribute("aria-sort"));
    return seen;"""
    before, up, word_up, down, word_down = ask(sweep, COLUMN + script, tmp_path)
    numbers = [str(i + 1) for i in range(10)]  # 10 after 9, not after 1
    assert (before, up, down) == (numbers, numbers, numbers[::-1])
    assert (word_up, word_down) == ("ascending", "descending")


def test_empty_cells_come_last_either_way(sweep: Path, tmp_path: Path) -> None:
    script = """
    const button = heads[at("test errors")].querySelector("button"), seen = [];
    button.click(); seen.push(column("test errors")); button.click(); seen.push(column("test errors"));
    return [...seen, heads.filter(head => head.hasAttribute("aria-sort")).length];"""
    up, down, sorted_heads = ask(sweep, COLUMN + script, tmp_path)
    errors = sorted((20 + 7 * i % 10 for i in range(10) if i != 4), key=int)
    assert up == [*map(str, errors), ""]
    assert down == [*map(str, errors[::-1]), ""]
    assert sorted_heads == 1


def test_headings_are_reached_by_keyboard(sweep: Path, tmp_path: Path) -> None:
    script = """
    const button = heads[at("T")].querySelector("button"); button.focus();
    return [document.activeElement === button, button.tabIndex, button.tagName, button.type];"""
    assert ask(sweep, COLUMN + script, tmp_path) == [True, 0, "BUTTON", "button"]


def test_links_lead_to_files_that_are_there(sweep: Path, tmp_path: Path) -> None:
    links = ask(sweep, "return [...document.links].map(a => a.getAttribute('href'));", tmp_path)
    assert "0/report.html" in links
    assert len(links) == 12  # ten runs, one with a page of its own, and the CSV
    assert all((sweep.parent / link).exists() for link in links)


@pytest.mark.parametrize("width", [1200, 500])
def test_charts_can_be_read_and_the_page_does_not_scroll_sideways(sweep: Path, tmp_path: Path, width: int) -> None:
    script = """
    const letters = [...document.querySelectorAll("svg.chart text")].filter(e => !e.hasAttribute("transform"));
    const sizes = letters.map(e => e.getBoundingClientRect().height);
    return [letters.length, Math.min(...sizes), document.documentElement.scrollWidth <= innerWidth, innerWidth];"""
    count, smallest, fits, inside = ask(sweep, script, tmp_path, width=width)
    assert inside == width
    assert count > 10
    assert smallest > 9  # pixels
    assert fits


OUTSIDE = """
const out = [...document.querySelectorAll("svg[role=img] text")].filter(text => {
  const own = text.getBoundingClientRect(), all = text.closest("svg").getBoundingClientRect();
  return own.left < all.left - 0.5 || own.right > all.right + 0.5;
});
return out.map(text => text.textContent);"""


def test_no_text_is_cut_off_at_the_edge_of_its_chart(tmp_path: Path) -> None:
    names = ["MMMMWWWWMMMM", "Wohnmobil", "a very long name of a class", "犬と猫と鳥と魚と牛"]
    page = write_run_page(run_with_pictures(tmp_path / "run", names))
    assert ask(page, OUTSIDE, tmp_path) == []
    for i, name in enumerate(names):
        made_run(tmp_path / "sweep" / str(i), choices={"student": name}, **{"student.hidden": [i + 1]})
        made_run(tmp_path / "other" / str(i), T=float(i), beta=(12345.678, 1.0)[i % 2], student=150 + i)
    assert ask(write_report([tmp_path / "sweep"], tmp_path / "sweep").html, OUTSIDE, tmp_path) == []
    assert ask(write_report([tmp_path / "other"], tmp_path / "other").html, OUTSIDE, tmp_path) == []


def test_the_answer_and_the_chart_are_on_the_first_screen(sweep: Path, tmp_path: Path) -> None:
    script = """
    const top = element => element.getBoundingClientRect().top;
    return [top(document.querySelector(".headline")), top(document.querySelector("svg.chart"))];"""
    headline, chart = ask(sweep, script, tmp_path)
    assert 0 < headline < 200
    assert chart < 700


def run_with_pictures(path: Path, names: list[str]) -> Path:
    """A run of 40 random test examples of these classes, as many as there are."""
    generator = torch.Generator().manual_seed(0)
    made_run(path)
    classes = len(names)
    labels = torch.randint(0, classes, (40,), generator=generator)
    teacher, student, alone = torch.randn(3, 40, classes, generator=generator)
    images = torch.randint(0, 256, (40, 3, 12, 12), generator=generator).to(torch.uint8)
    found = pictures(images, labels, teacher, student, names, T=2, alone_logits=alone)
    (path / "examples.json").write_text(json.dumps(found))
    return path


@pytest.mark.parametrize("width", [1200, 500])
def test_the_page_of_a_run_shows_its_pictures(tmp_path: Path, width: int) -> None:
    path = run_with_pictures(tmp_path / "run", ["cat", "dog", "cow", "<b>"])
    script = """
    const images = [...document.images].map(image => image.complete && image.naturalWidth);
    const fits = document.documentElement.scrollWidth <= innerWidth;
    return [images, document.querySelectorAll("figure svg").length, fits];"""
    sizes, panels, fits = ask(write_run_page(path), script, tmp_path, width=width)
    assert sizes == [12] * 8
    assert panels == 8 * 5
    assert fits
