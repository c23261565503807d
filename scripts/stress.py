"""Many runs at once against one store, and many in one process: python scripts/stress.py

Prints what it counts and exits with 1 when anything was lost, trained twice, left over or grew.

    python scripts/stress.py                       8 processes, 200 runs; then 500 runs in one process
    python scripts/stress.py --processes 2 --runs 8 --in-one 20
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import gc
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

TINY = [
    *("teacher=tinymlp", "student=tinymlp", "teacher.hidden=[12]", "student.hidden=[8]", "training.epochs=2"),
    *("teacher_training.epochs=2", "device=cpu"),
]
SEEDS = 10  # of the students: as many different results


def run(number: int, folder: str) -> None:
    """One run in this process, as the command does it."""
    from kd_cli.commands.kd_run import main

    os.chdir(folder)
    seed, T = number % SEEDS, 1 + number % 3
    sys.argv = ["kd-run", *TINY, f"seed={seed}", f"T={T}", f"hydra.run.dir=runs/{number:04d}", "store_dir=store"]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main()


def begin() -> None:
    import torch

    torch.set_num_threads(1)


def at_once(processes: int, runs: int, folder: Path) -> list[str]:
    """Runs in several processes against one store: what is wrong with them."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes, context, begin) as pool:
        jobs = [pool.submit(run, number, str(folder)) for number in range(runs)]
        failed = [f"run {number}: {job.exception()}" for number, job in enumerate(jobs) if job.exception() is not None]
    done = sorted((folder / "runs").glob("*/summary.json"))
    weights: dict[tuple[int, float], set[bytes]] = {}
    trained = {"teacher": 0, "student_alone": 0}
    for path in done:
        summary = json.loads(path.read_text())
        key = summary["seed"], summary["T"]
        weights.setdefault(key, set()).add((path.parent / "student.safetensors").read_bytes())
        for role in trained:
            trained[role] += not summary[role]["from_store"]
    left = leftovers(folder)
    alone = min(SEEDS, runs)
    problems = [*failed]
    problems += [f"{len(done)} of {runs} runs are done"] * (len(done) != runs)
    problems += [
        f"seed {s}, T = {T}: {len(found)} different students" for (s, T), found in weights.items() if len(found) > 1
    ]
    problems += [f"the teacher was trained {trained['teacher']} times"] * (trained["teacher"] != 1)
    problems += [f"{trained['student_alone']} students alone were trained, not {alone}"] * (
        trained["student_alone"] != alone
    )
    problems += [f"left over: {name}" for name in left]
    print(
        f"{processes} processes at once: {len(done)} of {runs} runs right, {len(weights)} different settings, the "
        f"teacher trained {trained['teacher']} times, {trained['student_alone']} students alone, {len(left)} files left"
    )
    return problems


def leftovers(folder: Path) -> list[str]:
    """Locks, temporary files and training states."""
    found = [p for p in folder.rglob("*") if p.name.endswith((".tmp", ".lock", ".state", ".previous", ".stacks.json"))]
    found += list(folder.rglob(".making-*"))
    return [str(path.relative_to(folder)) for path in found]


def in_one(runs: int, folder: Path) -> list[str]:
    """Runs one after the other in this process: what grew in the last four fifths of them."""
    begin()
    marks: list[tuple[float, int]] = []
    for number in range(runs):
        run(number, str(folder))
        if number in (runs // 5 - 1, runs - 1):
            gc.collect()
            marks.append((resident(), len(os.listdir("/proc/self/fd"))))
    (memory, files), (memory_then, files_then) = marks
    print(
        f"{runs} runs in one process: {memory:.0f} MiB and {files} open files after {runs // 5}, "
        f"{memory_then:.0f} MiB and {files_then} at the end"
    )
    problems = [f"{files_then - files} more open files"] * (files_then > files)
    return problems + [f"{memory_then - memory:.0f} MiB more memory"] * (memory_then - memory > 16 + 0.02 * memory)


def resident() -> float:
    """Memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--in-one", type=int, default=500, help="runs in one process; 0 for none")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    problems: list[str] = []
    for work, arguments in ((at_once, (options.processes, options.runs)), (in_one, (options.in_one,))):
        if not arguments[-1]:
            continue
        with tempfile.TemporaryDirectory(prefix="kd-stress-") as folder:
            started = time.monotonic()
            problems += work(*arguments, Path(folder))
            print(f"  {time.monotonic() - started:.0f} s")
            os.chdir("/")
    sys.exit("\n".join(problems) or 0)


if __name__ == "__main__":
    main()
