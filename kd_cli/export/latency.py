"""How long a model takes: measured on this machine, side by side with what it is compared with."""

from __future__ import annotations

import contextlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping

import torch

from kd_cli.cpus import usable

Call = Callable[[], object]  # one batch through a model
ROUNDS = 5  # in which what is compared takes turns
CALLS = 200  # of one model, at most
QUICK = 0.1  # seconds of a model in a quick measurement
SIDE_BY_SIDE = "all models took turns; other work on the machine, if there was any, met all of them"


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Run torch with this many threads, then with as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def side_by_side(calls: Mapping[str, Call], *, batch: int, seconds: float = 0.4) -> dict[str, dict[str, float]]:
    """Latencies of several models, which take turns, so that other work on the machine meets all of them.

    Every model gets about this many seconds, ROUNDS calls at least and CALLS at most, after two that do not count.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
        call()
    for _ in range(ROUNDS):
        for name, call in calls.items():
            times[name] += timed(call, seconds / ROUNDS, fewest=1, most=CALLS // ROUNDS)
    return {name: described(found, batch) for name, found in times.items()}


def within(calls: Mapping[str, Call], *, batch: int, limit: float) -> dict[str, dict[str, float]] | None:
    """The latencies of several models as `side_by_side` measures them; None where that would take over `limit` seconds.

    The first call of each counts: it prepares what the others use.
    """
    begun = time.perf_counter()
    for call in calls.values():
        call()
    if time.perf_counter() - begun > limit:
        return None
    once = sum(timed(call, 0.0, fewest=1, most=1)[0] for call in calls.values())
    left = limit - (time.perf_counter() - begun) - (2 + ROUNDS) * once
    if left < 0:
        return None
    return side_by_side(calls, batch=batch, seconds=min(QUICK, left / len(calls)))


def timed(call: Call, seconds: float, *, fewest: int, most: int) -> list[float]:
    """The seconds of each of several calls."""
    found: list[float] = []
    begun = time.perf_counter()
    while len(found) < most and (len(found) < fewest or time.perf_counter() - begun < seconds):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def surroundings() -> dict[str, object]:
    """The machine of a measurement and the load that other work put on it just before."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"machine": platform.machine(), "cores": usable(), "device": "cpu", "how": SIDE_BY_SIDE, "load": load}


def described(times: list[float], batch: int) -> dict[str, float]:
    """Median and 95th percentile in milliseconds, and examples per second at the median, of calls in seconds."""
    median = statistics.median(times)
    p95 = statistics.quantiles(times, n=20, method="inclusive")[-1] if len(times) > 1 else median
    return {
        "median_ms": round(1000 * median, 4),
        "p95_ms": round(1000 * p95, 4),
        "per_second": round(batch / median, 1),
        "calls": len(times),
    }
