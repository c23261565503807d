"""Every shipped experiment runs, on small data and for an epoch."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from process import Ran

from kd_cli.config.options import conf_dir

pytestmark = pytest.mark.slow

OF_THE_FIELD = {  # of no paper by Hinton: the words that make them small, besides SMALL
    "born_again": [["seed=0", "teacher.hidden=[8]", "student.hidden=[8]"]],
    "cifar100_field": [["-m", "seed=0", "teacher.widths=[4,4,8,8]", "student.widths=[4,4,8,8]"]],
    "methods_digits": [
        ["seed=0,1", "T=4", "alpha=1", "teacher.hidden=[8]", "student.hidden=[8]"],
        ["seed=0", "method=label_smoothing", "method.smoothing=0.1", "T=4", "alpha=1", "student.hidden=[8]"],
    ],
    "methods_cifar10": [
        ["seed=0", "T=4", "alpha=1"],
        ["seed=0", "T=4", "alpha=1", "method=attention,feature,hints,similarity,relational,pkt,crd,review"],
    ],
    "pruned_digits": [["seed=0", "student.hidden=[8],[4]", "student.prune=null,0.5", "teacher.hidden=[8]"]],
    "quantised_cifar10": [["seed=0", "after_sweep=null"]],  # which tests/test_quantised.py runs, with ONNX Runtime
    "quantised_digits": [["seed=0", "after_sweep=null", "student.channels=[4]", "teacher.hidden=[8]"]],
    "teacher_assistant": [["seed=0", "T=4", "teacher.hidden=[8]", "student.hidden=[8]"]],
}
OF_OTHER_DATA = {"speech", "specialists", "specialists_omniglot"}
OF_OTHER_DATA |= {"speech_regulariser", "omniglot_clusters"}
OF_OTHER_DATA |= {"privileged_synthetic", "privileged_mnist", "privileged_mnist_500"}  # run by tests of their own
OF_OTHER_PAPERS = {"theseus_mnist", "theseus_cifar10", "smoothed_teachers"}  # also run by tests of their own
MEASURED = {"flops_against_latency"}  # nothing is trained; run by a test of its own
NOT_HERE = OF_THE_FIELD.keys() | OF_OTHER_PAPERS | MEASURED
ALL = {file.stem for file in (conf_dir() / "experiment").glob("*.yaml")} - NOT_HERE
EXPERIMENTS = sorted(ALL - OF_OTHER_DATA)
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
    sys.path.insert(0, str(file.parent))  # for the modules beside it
    spec = importlib.util.spec_from_file_location("paper", file)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["paper"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_papers_page_has_every_experiment(paper: ModuleType) -> None:
    assert sorted(part.name for part in paper.PARTS) == sorted(ALL)


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


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of pictures of three classes, as CIFAR-10 lies on a disk."""
    random = np.random.default_rng(0)
    for part, count in (("train", 16), ("test", 4)):
        for name in ("cat", "dog", "ship"):
            (tmp_path / "pictures" / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                image.save(tmp_path / "pictures" / part / name / f"{i}.jpg")
    return tmp_path / "pictures"


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, all_ in OF_THE_FIELD.items() for words in all_])
def test_an_experiment_of_the_field_runs(
    name: str, words: list[str], kd_run: Callable[..., Ran], tmp_path: Path, pictures: Path
) -> None:
    small = ["training.epochs=1", "teacher_training.epochs=1"]
    if name.endswith("_cifar10"):
        small += [f"dataset.root={pictures}", "dataset.image_size=8", "transfer.fraction=1"]
        small += [
            "training.batch_size=16",
            "teacher.depth=8",
            *(f"{m}.widths=[4,4,8,8]" for m in ("teacher", "student")),
        ]
    else:
        small += ["dataset=digits"]
    ran = kd_run(f"experiment={name}", *words, *small, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert ran.code == 0, ran.err + ran.out
    found = [json.loads(file.read_text()) for file in sorted(tmp_path.rglob("summary.json"))]
    methods = next((word[7:] for word in words if word.startswith("method=")), None)
    if methods is None and name.startswith("methods_"):
        methods = "soft_targets,logits,dist,dkd,nkd,ttm,wttm,rld,wsld,teacher_free"
    assert {summary["method"] for summary in found} == set((methods or "soft_targets").split(","))
    assert all(summary["status"] == "completed" for summary in found)
    if name.startswith("methods_") and methods and "soft_targets" in methods:
        assert "vs soft targets" in ran.out
