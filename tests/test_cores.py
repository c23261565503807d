from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd_cli.commands import cores
from kd_cli.commands.cores import others, threads
from kd_cli.cpus import allowance, seen, usable

SEEN = seen()


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


def test_whole_cores_that_are_seen_and_granted_can_be_used(tmp_path: Path) -> None:
    assert usable(group(tmp_path / "half", 2, "50000")) == 1
    assert usable(group(tmp_path / "all", 2, "max")) == SEEN
    assert usable(group(tmp_path / "more", 1, str(100000 * (SEEN + 3)))) == SEEN
    assert usable(group(tmp_path / "one", 2, "199000")) == 1


OTHERS = """
import sys
from pathlib import Path
from kd_cli.commands.cores import others
print(others(Path(sys.argv[1])), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="locks that many hold together are POSIX's")
def test_who_is_at_work_is_found_by_who_comes_later(tmp_path: Path) -> None:
    def begin() -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-c", OTHERS, str(tmp_path)]
        running = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert running.stdout is not None
        return running, running.stdout.readline().strip()

    def end(*running: subprocess.Popen[str]) -> None:
        for one in running:
            one.communicate()

    first, alone = begin()
    second, found = begin()
    third, found_two = begin()
    assert (alone, found, found_two) == ("False", "True", "True")
    end(first)
    fourth, left = begin()
    assert left == "True"
    end(second, third, fourth)
    fifth, alone = begin()
    assert alone == "False"
    end(fifth)


def test_threads_spin_shortly_where_others_are_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, dict[str, str]] = {
        "alone": {},
        "several": {},
        "with others": {},
        "chosen": {"GOMP_SPINCOUNT": "7"},
    }
    monkeypatch.setattr(cores, "others", lambda: False)
    cores.share(found["alone"])
    cores.share(found["several"], several=True)
    monkeypatch.setattr(cores, "others", lambda: True)
    cores.share(found["with others"])
    cores.share(found["chosen"])
    spins = {name: environment["GOMP_SPINCOUNT"] for name, environment in found.items()}
    assert spins == {"alone": "3000", "several": "1000", "with others": "1000", "chosen": "7"}


def test_a_machine_without_such_a_file_or_lock_tells_of_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not others(tmp_path / "nowhere")

    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(cores, "try_lock", refuse)
    assert not others(tmp_path)
    monkeypatch.setattr("tempfile.gettempdir", refuse)
    assert not others()


FREED = """
import ctypes, os
from kd_cli.commands.cores import keep_memory
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
