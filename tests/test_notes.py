"""What the tool leaves out, changes, fills in or guesses is one line of the log and stands in summary.json."""

from __future__ import annotations

import ast
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY
from PIL import Image
from process import Ran

import kd_cli
from kd_cli.models.torchvision import notes_on_building

# All messages that are no notes: they tell how far the work is or how fast it goes. A message on what the tool left
# out, changed, filled in, guessed or took from elsewhere is a note of the job (or a warning, which becomes one).
PROGRESS = {
    "%s: %d specialists: %s",
    "%s: %s of %s pictures decoded",
    "specialists are trained one after another: %s",
    "%d jobs in %.1f s",
    "trials %d to %d of %d%s; best so far: %s",
    "%d jobs in %s",
    "#%d : %s",
    "%d models do not fit in the memory of %s together; halving",
    "%d × %s run one by one: %s (%s)",
    "%d × %s: %d at once, about %.3g MB each, measured %s",
    "%d %s side by side on %s: %s (%s)",
    "%d models side by side: about %s each, and %s in a step",
    "%d models side by side: %d at a time, measured %.3g s one after another, %.3g s %d at a time",
    "%s: %s; they are trained one by one now",
    "%d × student run one by one: those that differ in %s are not trained together (%s)",
    "%s pictures of %s decoded in %.0f s, %s",
    "%s %s of %s %s, %.0f s left",
    "%s pictures of %s take %s, %s",
    "downloading %s to %s",
    "waiting for another process that trains the same model for %s",
    "waiting for another process that decodes the pictures of %s",
}

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


def summary_of(ran: Ran) -> list[str]:
    notes = ran.summary["notes"]
    log = (ran.run_dir / "run.log").read_text()
    page = (ran.run_dir / "report.html").read_text()
    for note in notes:
        assert log.count(note) == 1
        assert note.split("'")[0] in page
    return notes


def test_a_damaged_model_of_the_store_is_noted(tiny: Callable[..., Ran]) -> None:
    tiny()
    for entry in Path(os.environ["KD_STORE"]).glob("*/weights.safetensors"):
        entry.write_bytes(entry.read_bytes()[:-1])
    notes = summary_of(tiny())
    assert sum("is damaged (weights.safetensors was changed" in note for note in notes) == 2


def test_a_sweep_notes_its_warnings_in_each_job(kd_run: Callable[..., Ran], tiny: Callable[..., Ran]) -> None:
    tiny()
    for entry in Path(os.environ["KD_STORE"]).glob("*/weights.safetensors"):
        entry.write_bytes(entry.read_bytes()[:-1])
    ran = kd_run("-m", *TINY, "T=1,2")
    assert ran.code == 0, ran.err
    for job in ran.run_dirs:
        notes = json.loads((job / "summary.json").read_text())["notes"]
        assert sum("is damaged" in note for note in notes) == 2
        assert (job / "run.log").read_text().count("is damaged") == 2
    assert ran.err.count("is damaged") == 2


@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["a run", "a sweep"])
def test_a_working_directory_that_is_not_changed_is_noted(kd_run: Callable[..., Ran], sweep: list[str]) -> None:
    ran = kd_run(*sweep, *TINY, "hydra.job.chdir=true")
    assert ran.code == 0, ran.err
    said = f"hydra.job.chdir has no effect: relative paths start in {ran.folder}"
    assert summary_of(ran) == [said]
    assert ran.err.count("hydra.job.chdir has no effect") == 1


def test_pictures_found_in_the_data_directory_are_noted(tiny: Callable[..., Ran], tmp_path: Path) -> None:
    for name, value in (("dark", 10), ("light", 240)):
        (tmp_path / "data" / "pets" / name).mkdir(parents=True)
        for i in range(8):
            Image.new("RGB", (8, 8), (value, i, i)).save(tmp_path / "data" / "pets" / name / f"{i}.png")
    ran = tiny("dataset=imagefolder", "dataset.root=pets", "dataset.image_size=8", f"data_dir={tmp_path / 'data'}")
    said = f"there is no folder pets here: the pictures are read from {tmp_path / 'data' / 'pets'}"
    assert said in ran.summary["notes"]


def test_a_network_for_colours_says_that_it_repeats_one_channel(kd_run: Callable[..., Ran]) -> None:
    words = [word for word in TINY if not word.startswith("student")]
    ran = kd_run(*words, "student=torchvision", "student.name=resnet18", "student.image_size=32", "dry_run=true")
    assert ran.code == 0, ran.err
    said = "student resnet18 takes colour pictures: the one channel of the data is repeated to three"
    assert ran.err.count(said) == 1
    assert "student resnet18 by soft_targets: to train" in ran.out


def test_pretrained_weights_say_what_they_lack_and_how_their_input_was_normalised() -> None:
    node = {"name": "resnet18", "pretrained": True}
    head, normalisation = notes_on_building(node, shape=(3, 32, 32), classes=10, normalize="data")
    assert head == "starts from ImageNet weights, all but its last layer, which is new for 10 classes"
    assert "normalize=imagenet" in normalisation
    assert notes_on_building(node, shape=(3, 32, 32), classes=1000, normalize="imagenet") == []


def test_every_message_that_is_no_note_is_about_progress() -> None:
    package = Path(kd_cli.__file__).parent
    found = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "info":
                if ast.unparse(node.func.value) == "soundfile":
                    continue
                message = node.args[0]
                assert isinstance(message, ast.Constant), file
                if message.value != "%s":  # a sentence that was made elsewhere: a job's note, or its result
                    found.add(message.value)
    assert found == PROGRESS
