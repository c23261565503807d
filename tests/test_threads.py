"""On a busy machine a run takes fewer threads and says so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from kd_cli.export.latency import threads
from kd_cli.runs.threads import choose_threads, fastest, seconds_of_steps


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({4: 1.0, 2: 1.9, 1: 3.8}, 4),  # quiet: all
        ({4: 1.0, 2: 0.95, 1: 0.9}, 4),  # too close to tell
        ({4: 5.0, 2: 2.0, 1: 1.0}, 1),
        ({4: 2.0, 2: 1.0, 1: 1.2}, 2),
    ],
)
def test_fewer_threads_are_taken_only_when_they_are_clearly_faster(seconds: dict[int, float], chosen: int) -> None:
    assert fastest(seconds) == chosen


def test_steps_are_timed_with_the_threads_asked_for() -> None:
    with threads(1):
        assert seconds_of_steps(2) > 0
        assert torch.get_num_threads() == 2


def test_a_number_of_threads_that_is_set_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    with threads(3):
        assert choose_threads() is None
        assert torch.get_num_threads() == 3


def test_the_number_chosen_is_set_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    with threads(4):
        said = choose_threads()
        now = torch.get_num_threads()
        assert now in (1, 2, 4)
        assert said is None if now == 4 else f"training with {now} thread" in str(said)


@pytest.mark.slow
def test_more_threads_than_cores_are_found_too_many() -> None:
    """64 threads on the cores of this machine wait for each other at every operation."""
    code = "import torch; torch.set_num_threads(64)\n"
    code += "from kd_cli.runs.threads import choose_threads; print(choose_threads())"
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    if (os.cpu_count() or 1) >= 32:
        pytest.skip("this machine has the cores")
    out = subprocess.check_output([sys.executable, "-c", code], env=env, text=True)
    assert "the machine is busy: training with" in out
