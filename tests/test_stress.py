"""Many at once and many in a row: scripts/stress.py, small."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "stress.py"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SCRIPT.exists(), reason="the script comes with the checkout"),
    pytest.mark.skipif(sys.platform != "linux", reason="it counts open files in /proc"),
]


@pytest.mark.parametrize(
    "options", [["--processes", "3", "--runs", "12", "--in-one", "0"], ["--runs", "0", "--in-one", "25"]]
)
def test_nothing_is_lost_trained_twice_left_over_or_grows(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([sys.executable, str(SCRIPT), *options], capture_output=True, text=True, env=env, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    with capsys.disabled():
        print(f"\n{ran.stdout}")
