"""What the tool leaves out, changes, fills in or guesses is one line of the log and stands in summary.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from conftest import TINY
from process import Ran

UNLABELLED = "the transfer set has no labels: beta = 0.5 has no effect"


def test_a_note_is_in_the_log_and_in_the_summary(tiny: Callable[..., Ran]) -> None:
    ran = tiny("transfer.labels=false")
    assert ran.summary["notes"].count(UNLABELLED) == 1
    assert ran.err.count(UNLABELLED) == 1
    assert (ran.run_dir / "run.log").read_text().count(UNLABELLED) == 1


def test_a_note_of_all_jobs_is_shown_once_and_kept_by_each(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run("-m", *TINY, "transfer.labels=false", "T=1,2,3")
    assert ran.code == 0, ran.err
    assert ran.err.count(UNLABELLED) == 1
    assert len(ran.run_dirs) == 3
    for job in ran.run_dirs:
        assert json.loads((job / "summary.json").read_text())["notes"].count(UNLABELLED) == 1
        assert (job / "run.log").read_text().count(UNLABELLED) == 1


def test_a_class_that_is_never_predicted_is_noted(kd_run: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "from kd_cli.data.source import Source\n"
        "def rare(data_dir):\n"
        "    own = torch.Generator().manual_seed(0)\n"
        "    labels = torch.tensor([0, 1] * 145 + [2] * 10)\n"
        "    images = torch.randn(300, 6, generator=own)\n"
        "    images[:, 0] += torch.tensor([-4.0, 4.0, 4.0])[labels]\n"
        "    return Source('rare', images, labels, images, labels, ('left', 'right', 'rare'))\n"
    )
    (tmp_path / "conf" / "dataset").mkdir(parents=True)
    (tmp_path / "conf" / "dataset" / "own.yaml").write_text("_target_: own.rare\nval_fraction: 0.1\n")
    longer = ["training.epochs=20", "teacher_training.epochs=20", "optimizer.lr=0.01"]
    ran = kd_run("--config-dir", str(tmp_path / "conf"), *TINY, "dataset=own", *longer)
    assert ran.code == 0, ran.err
    results = ran.summary["student"]["test"]
    assert results["accuracy"] > 0.9
    assert results["worst_class"] == {"name": "rare", "recall": 0.0, "examples": 10}
    assert results["recall"][2] == 0
    assert results["balanced_accuracy"] < 0.7
    (note,) = (note for note in ran.summary["notes"] if "rare" in note)
    assert note.startswith("the student classifies no test example of rare correctly: its accuracy is 9")
    assert note in ran.err
