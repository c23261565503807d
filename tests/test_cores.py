from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd_cli.cores import allowance, threads

SEEN = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def group(root: Path, version: int, quota: str, period: str = "100000") -> Path:
    (root / "cpu").mkdir(parents=True)
    if version == 2:
        (root / "cpu.max").write_text(f"{quota} {period}\n")
    else:
        (root / "cpu" / "cpu.cfs_quota_us").write_text(f"{quota}\n")
        (root / "cpu" / "cpu.cfs_period_us").write_text(f"{period}\n")
    return root


@pytest.mark.parametrize("version", [1, 2])
def test_a_group_of_either_version_grants_its_quota_over_its_period(version: int, tmp_path: Path) -> None:
    assert allowance(group(tmp_path, version, "150000")) == 1.5
    assert allowance(group(tmp_path / "long", version, "50000", "25000")) == 2.0


@pytest.mark.parametrize(("version", "quota"), [(2, "max"), (1, "-1"), (2, ""), (2, "0")])
def test_a_group_without_a_limit_grants_all(version: int, quota: str, tmp_path: Path) -> None:
    assert allowance(group(tmp_path, version, quota)) is None


def test_no_groups_grant_all(tmp_path: Path) -> None:
    assert allowance(tmp_path / "none") is None


def test_fewer_threads_are_asked_for_only_where_less_is_granted_and_nobody_chose(tmp_path: Path) -> None:
    half = group(tmp_path / "half", 2, "50000")
    assert threads({}, half) == 1 if SEEN > 0.5 else None
    assert threads({"OMP_NUM_THREADS": "4"}, half) is None
    assert threads({}, group(tmp_path / "all", 2, str(100000 * SEEN))) is None
    assert threads({}, group(tmp_path / "most", 2, str(100000 * SEEN - 1000))) == max(1, SEEN - 1)
    assert threads({}, tmp_path / "none") is None


FREED = """
import ctypes, os
from kd_cli.cores import keep_memory
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
keep_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
block = libc.malloc(ctypes.c_size_t(64 << 20))
ctypes.memset(block, 1, 64 << 20)
full = resident()
libc.free(block)
print((full - resident()) >> 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's malloc")
@pytest.mark.parametrize(("variables", "given_back"), [({}, False), ({"MALLOC_ARENA_MAX": "2"}, True)], ids=str)
def test_freed_memory_is_kept_unless_malloc_has_been_set(variables: dict[str, str], given_back: bool) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    found = subprocess.run(
        [sys.executable, "-c", FREED], env={**own, **variables}, capture_output=True, text=True, check=True
    )
    assert (int(found.stdout) > 50) is given_back
