"""How many threads train on this CPU now: on a busy machine fewer are faster.

An operation is divided among threads that wait for each other. Where other processes hold the cores, each operation
waits for the thread that is not running, and one thread can be several times as fast as two.
"""

from __future__ import annotations

import os
import time

import torch

BATCH, UNITS = 128, 800  # of the layer whose step is timed
ROUNDS, STEPS = 4, 2  # timed in turn, so that a passing load meets all numbers of threads
GAIN = 0.85  # fewer threads must take less than this share of the time of all


def choose_threads() -> str | None:
    """Set torch's number of threads to what is fastest now; return a sentence where these are fewer than usual.

    A step of one layer is timed with all threads and with fewer, for about a tenth of a second. A number that is set in
    OMP_NUM_THREADS is left alone.
    """
    most = torch.get_num_threads()
    if most == 1 or "OMP_NUM_THREADS" in os.environ:
        return None
    candidates = [most]
    while candidates[-1] > 1:
        candidates.append(candidates[-1] // 2)
    rounds = [{threads: seconds_of_steps(threads) for threads in candidates} for _ in range(ROUNDS)]
    seconds = {threads: sum(one[threads] for one in rounds[1:]) for threads in candidates}  # the first one warms up
    threads = fastest(seconds)
    torch.set_num_threads(threads)
    if threads == most:
        return None
    return (
        f"the machine is busy: training with {threads} thread{'s' * (threads > 1)}, as {most} take "
        f"{seconds[most] / seconds[threads]:.1f} times as long now (set OMP_NUM_THREADS to choose yourself)"
    )


def seconds_of_steps(threads: int) -> float:
    """Seconds of a few steps of one layer: its products forward and backward, an activation, an update."""
    torch.set_num_threads(threads)
    x, weight = torch.ones(BATCH, UNITS), torch.ones(UNITS, UNITS)
    started = time.perf_counter()
    for _ in range(STEPS):
        y = torch.mm(x, weight).relu_()
        weight.add_(torch.mm(y.t(), x), alpha=1e-9)
    return time.perf_counter() - started


def fastest(seconds: dict[int, float]) -> int:
    """The number of threads to train with: all, unless fewer are clearly faster; `seconds` by number of threads."""
    most = max(seconds)
    best = min(seconds, key=lambda threads: seconds[threads])
    return best if seconds[best] < GAIN * seconds[most] else most
