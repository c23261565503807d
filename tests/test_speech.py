"""The speech experiment: the best path through a word's states, and the whole command on made recordings."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_sound import made_digits
from process import Ran

from kd_cli.experiments.speech import best_words, gain_kept


def every_path(frames: int, states: int) -> list[list[int]]:
    """All ways through the states: from the first to the last, staying or moving one on from frame to frame."""
    moves = itertools.product((0, 1), repeat=frames - 1)
    paths = [[0, *itertools.accumulate(steps)] for steps in moves]
    return [
        path for path in paths if path[-1] == states - 1 and all(b - a in (0, 1) for a, b in itertools.pairwise(path))
    ]


def test_the_best_word_is_that_of_the_best_of_all_paths() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [7, 3, 5]
    scores = torch.randn(sum(sizes), 4, 3, generator=generator)
    number = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    expected = []
    for frames in scores.split(sizes):
        paths = torch.tensor(every_path(len(frames), 3))  # [P, frames]
        each = frames.permute(1, 0, 2)[:, torch.arange(len(frames)), paths]  # [W, P, frames]
        expected.append(int(each.sum(-1).max(1).values.argmax()))
    assert best_words(scores, number).tolist() == expected


def test_a_recording_of_fewer_frames_than_states_has_a_word() -> None:
    scores = torch.zeros(1, 2, 3)
    scores[0, 1, 0] = 1.0
    assert best_words(scores, torch.zeros(1, dtype=torch.long)).tolist() == [1]


def test_the_gain_kept_is_a_share_of_the_ensembles() -> None:
    one, best, mine = (
        [{"frame_accuracy": a, "recording_errors": e}] for a, e in ((58.9, 10.9), (61.1, 10.7), (60.8, 11))
    )
    kept = gain_kept(one, best, mine)
    assert kept["frame_accuracy"] == pytest.approx(1.9 / 2.2)
    assert kept["recording_errors"] == pytest.approx(-0.5)
    assert gain_kept(one, one, mine)["frame_accuracy"] is None


@pytest.mark.slow
def test_the_experiment_runs_on_made_recordings(kd_run: Callable[..., Ran], tmp_path: Path) -> None:
    pytest.importorskip("soundfile")
    data = made_digits(tmp_path / "data")
    small = ["teacher.hidden=[16]", "student.hidden=[16]", "teacher.members=3", "training.epochs=2"]
    small += ["teacher_training.epochs=2", "T=1,4", "seed=0,1", f"data_dir={data}", "dataset.val_fraction=0.25"]
    ran = kd_run("experiment=speech", *small, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert ran.code == 0, ran.err
    assert "speech.html" in ran.out
    found = json.loads((tmp_path / "sweep" / "speech.json").read_text())
    assert found["recordings"] == 150
    assert [len(found["networks"][name]) for name in ("alone", "members", "ensemble")] == [2, 3, 1]
    assert [row["T"] for row in found["distilled"]] == [1, 4]
    assert all(len(row["results"]) == 2 for row in found["distilled"])
    summaries = [json.loads(file.read_text()) for file in tmp_path.rglob("summary.json")]
    members = sorted(100 * one["test"]["accuracy"] for one in summaries[0]["teacher"]["members"])
    assert sorted(row["frame_accuracy"] for row in found["networks"]["members"]) == pytest.approx(members)
    assert 100 * summaries[0]["teacher"]["test"]["accuracy"] == pytest.approx(
        found["networks"]["ensemble"][0]["frame_accuracy"]
    )
    page = (tmp_path / "sweep" / "speech.html").read_text()
    assert "recordings recognised wrongly" in page


@pytest.mark.slow
def test_soft_targets_as_a_regulariser_are_compared_on_made_recordings(
    kd_run: Callable[..., Ran], tmp_path: Path
) -> None:
    pytest.importorskip("soundfile")
    data = made_digits(tmp_path / "data")
    small = ["teacher.hidden=[16]", "student.hidden=[16]", "training.epochs=3", "transfer.fraction=0.3"]
    small += ["teacher_training.epochs=2", "seed=0,1", f"data_dir={data}", "dataset.val_fraction=0.25"]
    ran = kd_run("experiment=speech_regulariser", *small, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert ran.code == 0, ran.err
    found = json.loads((tmp_path / "sweep" / "speech_regulariser.json").read_text())
    assert [len(row["results"]) for row in found["rows"]] == [2] * 4
    assert found["trained"] == round(0.3 * found["frames"])
    summaries = [json.loads(file.read_text()) for file in sorted(tmp_path.rglob("summary.json"))]
    runs = [s for s in summaries if len(s["student"]["test"]) and s["seed"] == 0]
    soft = found["rows"][3]["results"][0]["test"]
    assert soft in [pytest.approx(100 * run["student"]["test"]["accuracy"], abs=1e-4) for run in runs]
    baseline = found["rows"][0]["results"][0]["test"]
    assert baseline == pytest.approx(100 * runs[0]["teacher"]["test"]["accuracy"])
    assert "validation frames right" in (tmp_path / "sweep" / "speech_regulariser.html").read_text()
