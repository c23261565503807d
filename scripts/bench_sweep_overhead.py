"""Measure what a sweep costs beyond training: seconds and memory of a job, for sweeps of several sizes.

    python scripts/bench_sweep_overhead.py                    # 10, 100 and 1,000 jobs: some minutes
    python scripts/bench_sweep_overhead.py --jobs 10 100 --launcher basic

Every sweep is a process of its own with its own store: one epoch of tinymlp with four hidden units on the handwritten
digits, its jobs differing in T. The teacher, the student alone and the sizes of stacks are made before, by sweeps that
are not counted. A job's cost is the processor time of the whole command less that of a sweep of one job, less its share
of the training, divided by the jobs beyond the first; so start-up and training are not in it, and composing,
directories, files, pages, the table and sweep.html are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = [f"{role}.hidden=[4]" for role in ("teacher", "student")]
RUN = ["teacher=tinymlp", "student=tinymlp", *MODEL, "training.epochs=1", "teacher_training.epochs=1", "device=cpu"]
# Runs the command and writes what it took: processor seconds, peak memory, seconds in the epoch loop and in the end.
MEASURED = """
import atexit, json, resource, sys, time
from kd_cli.commands import kd_run as cli
from kd_cli.runs import run_many, stacks
from kd_cli.report import pages
spent = {"training": 0.0, "report": 0.0}
def timed(module, name, key):
    function = getattr(module, name)
    def call(*args, **keys):
        started = time.process_time()
        try:
            return function(*args, **keys)
        finally:
            spent[key] += time.process_time() - started
    setattr(module, name, call)
timed(stacks, "fit", "training")
timed(pages, "write_report", "report")
def end(path=sys.argv.pop(1)):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    spent.update(cpu=time.process_time() - begun, peak=peak)
    open(path, "w").write(json.dumps(spent))
atexit.register(end)
begun = time.process_time()
cli.main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description="A job's cost beyond training, in sweeps of several sizes.")
    parser.add_argument("--jobs", type=int, nargs="+", default=[10, 100, 1000], help="sizes of sweeps (%(default)s)")
    parser.add_argument("--launcher", default="fused", help="fused or basic (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers")
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(prefix="kd-bench-") as scratch:
        sweep(2, args.launcher, Path(scratch))  # fills the store
        for n in args.jobs:
            found = median(n, args.launcher, Path(scratch))
            results.append(found)
            print(
                f"{n:6,} jobs: {found['each_ms']:6.1f} ms a job beyond training, peak {found['peak']:5.0f} MB, "
                f"{found['wall']:6.1f} s in all; table and page {found['report']:.2f} s, "
                f"sweep.html {found['page_kb']:,.0f} KB",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def median(n: int, launcher: str, scratch: Path) -> dict[str, Any]:
    """The sweep of n jobs with the median cost of a job; of several, where they are small."""
    times = 9 if n <= 20 else 3 if n <= 200 else 1
    runs = []
    sweep(n, launcher, scratch)  # measures which size of stack is fastest
    for _ in range(times):
        base, found = sweep(1, launcher, scratch), sweep(n, launcher, scratch)
        # Processor seconds that are neither training nor what a sweep of one job takes as well.
        beyond = (found["cpu"] - found["training"]) - (base["cpu"] - base["training"])
        runs.append(found | {"each_ms": 1e3 * beyond / (n - 1)})
    return sorted(runs, key=lambda run: float(run["each_ms"]))[times // 2]


def sweep(n: int, launcher: str, scratch: Path) -> dict[str, Any]:
    """One sweep of n jobs in a process of its own."""
    folder, numbers = scratch / f"{n}-{time.monotonic_ns()}", scratch / "numbers.json"
    values = f"T=range(1,{n + 1})"
    command = [sys.executable, "-c", MEASURED, str(numbers), "-m", *RUN, values]
    command += [f"hydra.sweep.dir={folder}", f"hydra/launcher={launcher}"]
    env = {**os.environ, "KD_STORE": str(scratch / "store"), "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    done = subprocess.run(command, env=env, cwd=scratch, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    found: dict[str, Any] = json.loads(numbers.read_text())
    found |= {"jobs": n, "wall": time.perf_counter() - started}
    found["page_kb"] = (folder / "sweep.html").stat().st_size / 1024
    return found


if __name__ == "__main__":
    main()
