"""Every shipped experiment runs, on small data and for an epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from process import Ran

from kd_cli.help import conf_dir

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


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs(name: str, kd_run: Callable[..., Ran], tmp_path: Path) -> None:
    own = [] if name == "hinton_mnist_temperature" else ["student.hidden=[8]"]
    ran = kd_run(f"experiment={name}", *SMALL, *own, *FEWER.get(name, []))
    assert ran.code == 0, ran.err
    assert list(tmp_path.rglob("summary.json"))
    if name == "high_temperature_limit":
        (page,) = tmp_path.rglob("limit.html")
        assert "cosine" in page.read_text()
    if name == "gradient_sizes":
        (page,) = tmp_path.rglob("sweep.html")
        assert "Sizes of the gradients" in page.read_text()
