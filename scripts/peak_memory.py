"""Run a command and print the most memory that it and its worker processes held at once (Linux).

    python scripts/peak_memory.py kd-run dataset=imagefolder dataset.root=photos dataset.keep=disk

`anonymous` is memory of the processes' own; `files` are pages of files in use, libraries and memory-mapped data, which
the system takes back when it needs room. Pages that several processes share are divided among them (PSS), so that the
sums count each page once. `largest process` is the most that the system itself recorded for one process (VmHWM).
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

EVERY = 0.1  # seconds between two looks


def main() -> int:
    if len(sys.argv) < 2:
        raise SystemExit(__doc__)
    running = subprocess.Popen(sys.argv[1:])
    peaks = dict.fromkeys(("all", "anonymous", "files", "largest process"), 0)
    most, looks = {"anonymous": 0, "files": 0}, 0
    while running.poll() is None:
        found = {"anonymous": 0, "files": 0}
        for pid in tree(running.pid):
            own = pages_of(pid)
            found["anonymous"] += own.get("Pss_Anon", 0)
            found["files"] += own.get("Pss_File", 0) + own.get("Pss_Shmem", 0)
            peaks["largest process"] = max(peaks["largest process"], own.get("VmHWM", 0))
        looks += 1
        peaks["anonymous"] = max(peaks["anonymous"], found["anonymous"])
        peaks["files"] = max(peaks["files"], found["files"])
        if sum(found.values()) > peaks["all"]:
            peaks["all"], most = sum(found.values()), found
        time.sleep(EVERY)
    words = ", ".join(f"{name} {kilobytes / 1e3:,.0f} MB" for name, kilobytes in peaks.items())
    print(f"peak memory: {words} ({looks:,} looks)")
    print(f"at the peak of all: anonymous {most['anonymous'] / 1e3:,.0f} MB, files {most['files'] / 1e3:,.0f} MB")
    return running.returncode


def tree(pid: int) -> Iterator[int]:
    """A process and all that descend from it."""
    yield pid
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = path.read_text().split()
        except OSError:
            continue
        for child in children:
            yield from tree(int(child))


def pages_of(pid: int) -> dict[str, int]:
    """The lines of a process's memory that are kilobytes; empty when it has just ended."""
    found = {}
    for name in ("smaps_rollup", "status"):
        try:
            lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
        except OSError:
            continue
        for key, _, value in (line.partition(":") for line in lines):
            if value.strip().endswith(" kB"):
                found[key] = int(value.split()[0])
    return found


if __name__ == "__main__":
    raise SystemExit(main())
