"""Every shipped experiment runs, on small data and for an epoch."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from process import Ran

from kd_cli.config.options import conf_dir

EXPERIMENTS = sorted(file.stem for file in (conf_dir() / "experiment").glob("*.yaml"))
SMALL = ("dataset=digits", "teacher.hidden=[8]", "training.epochs=1", "teacher_training.epochs=1")
FEWER = {  # of what an experiment sweeps
    "gradient_sizes": ["T=1,5", "seed=0"],
    "high_temperature_limit": ["T=1,20", "seed=0"],
    "hinton_mnist_losses": ["seed=0"],
    "hinton_mnist_regulariser": ["seed=0"],
    "hinton_mnist_temperature": ["T=1,8", "student.hidden=[4],[8]", "seed=0"],
    "hinton_mnist_ensemble": ["teacher.members=2"],
    "hinton_mnist_best": ["teacher.members=2"],
}


@pytest.fixture(scope="module")
def paper() -> ModuleType:
    """scripts/paper.py."""
    file = Path(__file__).resolve().parents[1] / "scripts" / "paper.py"
    spec = importlib.util.spec_from_file_location("paper", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["paper"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_papers_page_has_every_experiment(paper: ModuleType) -> None:
    assert sorted(part.name for part in paper.PARTS) == EXPERIMENTS


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_and_is_told(
    name: str, kd_run: Callable[..., Ran], tmp_path: Path, paper: ModuleType
) -> None:
    (part,) = (part for part in paper.PARTS if part.name == name)
    own = [] if name == "hinton_mnist_temperature" else ["student.hidden=[8]"]
    more = [word for word in part.more if not word.startswith("seed=")]
    where = [f"hydra.sweep.dir={tmp_path / 'paper' / name}"]
    ran = kd_run("-m", f"experiment={name}", *more, *SMALL, *own, *FEWER.get(name, []), *where)
    assert ran.code == 0, ran.err
    assert list(tmp_path.rglob("summary.json"))

    page = tmp_path / "docs" / "RESULTS.md"
    page.parent.mkdir()
    paper.write_results(tmp_path / "paper", page)
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", page.read_text(), re.M | re.S))
    assert len(sections) == len(paper.PARTS)
    assert [title for title, text in sections.items() if "Not yet run." not in text] == [part.title]
    rows = [line for line in sections[part.title].splitlines() if line.startswith("| ")]
    assert len(rows) > 3
    assert all(row.count("|") == rows[0].count("|") for row in rows)
    assert all(re.search(r"\d", row) for row in rows[2:]), rows
    for figure in re.findall(r"\(figures/(.*?)\)", sections[part.title]):
        assert (page.parent / "figures" / figure).read_text().startswith("<svg ")
    if name == "high_temperature_limit":
        (page,) = tmp_path.rglob("limit.html")
        assert "cosine" in page.read_text()
    if name == "gradient_sizes":
        (page,) = tmp_path.rglob("sweep.html")
        assert "Sizes of the gradients" in page.read_text()
