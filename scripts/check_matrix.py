"""Show with which versions of Python, torch and Hydra an installed wheel works.

Builds the wheel, makes a new virtual environment for each row of MATRIX, installs the wheel there with plain pip, and
runs a distillation, a sweep of two jobs, `kd-report`, `load_student` and the fast unit tests against it. Prints a row
for each: the versions that pip chose, time and size of the installation, what ran, and ok or the first error's first
line. A row whose Python is not on this machine is "not tried", which is no success. Not part of continuous integration:
a torch for GPUs takes 5 GB and minutes to install; where pip is configured with an index of CPU builds, less.

    python scripts/check_matrix.py                        # every row
    python scripts/check_matrix.py oldest newest          # some rows
    python scripts/check_matrix.py --environments FOLDER  # keep the environments, and use those that are there again
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from check_wheel import ROOT, SHORT_RUN, build_wheel, clean_environment, empty

TESTS = (
    *("test_losses.py", "test_methods.py", "test_engine.py", "test_config.py", "test_digits.py", "test_vision.py"),
    *("test_student.py", "test_stack_equality.py", "test_checkpoints.py"),
)
CHOICE = "(not test_stack_equality or small) and (not test_checkpoints or weights or tensors or objects)"
SMALL = (*SHORT_RUN, "teacher=tinymlp", "student=tinymlp", "device=cpu")
SHOW = "from importlib.metadata import version as v; print(*map(v, 'torch torchvision hydra-core omegaconf'.split()))"
LOAD = "import sys, kd_cli, torch; assert kd_cli.load_student(sys.argv[1])(torch.rand(3, 1, 8, 8)).shape == (3, 10)"
COLUMNS = ("row", "python", "torch", "torchvision", "hydra", "omegaconf", "install", "ran", "result")


@dataclass(frozen=True)
class Row:
    """An interpreter, and the requirements beside the wheel that pip must meet."""

    name: str
    python: str
    pins: tuple[str, ...] = ()


TORCH_2_6 = ("torch==2.6.0", "torchvision==0.21.0")
FLOORS = ("omegaconf==2.3.0", "pyyaml==6.0", "jinja2==3.1.0", "markupsafe==2.1.0", "pillow==10.1.0", "tqdm==4.66.0")
MATRIX = (
    Row("oldest", "3.11", (*TORCH_2_6, "hydra-core==1.3.2", *FLOORS, "numpy==1.26.0", "safetensors==0.4.3")),
    Row("choice", "3.11"),
    Row("oldest-torch", "3.12", (*TORCH_2_6, "hydra-core==1.3.2")),
    Row("next-hydra", "3.11", ("torch==2.13.0", "torchvision==0.28.0", "hydra-core==1.4.0rc3")),
    Row("old-on-new", "3.13", (*TORCH_2_6, "hydra-core==1.3.8")),
    Row("newest", "3.13", ("torch==2.15.0", "torchvision==0.29.2", "hydra-core==1.3.8")),
)


@dataclass
class Tried:
    """What a row has shown so far."""

    row: Row
    versions: list[str] = field(default_factory=lambda: ["-"] * 4)
    python: str = ""
    install: str = "-"
    ran: list[str] = field(default_factory=list)
    result: str = "not tried"

    def cells(self) -> tuple[str, ...]:
        python = self.python or self.row.python
        return (self.row.name, python, *self.versions, self.install, ", ".join(self.ran) or "-", self.result)


class Failed(Exception):
    """A command that exited with an error: its name and the line that says why."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("rows", nargs="*", help=f"of {', '.join(row.name for row in MATRIX)}; all if none is named")
    parser.add_argument("--environments", type=Path, help="keep the environments in this folder and use them again")
    arguments = parser.parse_args()
    rows = [row for row in MATRIX if not arguments.rows or row.name in arguments.rows]
    if unknown := set(arguments.rows) - {row.name for row in rows}:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    tried = []
    with tempfile.TemporaryDirectory(prefix="kd-matrix-") as folder:
        work = Path(folder)
        wheel = build_wheel(work / "dist")
        copy_tests(work / "tests")  # at once: an edit meanwhile must not meet this wheel
        for row in rows:
            environments = (arguments.environments or work / "environments").absolute()
            tried.append(try_row(row, wheel, environments / row.name, empty(work / row.name)))
            if arguments.environments is None:
                shutil.rmtree(environments, ignore_errors=True)
            print(" | ".join(tried[-1].cells()), flush=True)
    print("\n" + table([COLUMNS, *(one.cells() for one in tried)]))
    if any(one.result not in ("ok", "not tried") for one in tried):
        raise SystemExit(1)


def try_row(row: Row, wheel: Path, environment: Path, work: Path) -> Tried:
    """Install the wheel for a row, and use it in every way until one fails."""
    tried = Tried(row)
    interpreter = find_python(row.python)
    if interpreter is None:
        tried.result = f"not tried: this machine has no Python {row.python}"
        return tried
    try:
        tried.install = install(interpreter, wheel, environment, row.pins)
        python = str(environment / "bin" / "python")
        tried.versions = run([python, "-c", SHOW], work).split()
        tried.python = run([python, "-c", "import platform; print(platform.python_version())"], work).strip()
        use(environment / "bin", work, tried.ran)
        tried.ran.append(unit_tests(environment / "bin", work))
        tried.result = "ok"
    except Failed as failure:
        tried.result = str(failure)
    return tried


def find_python(version: str) -> str | None:
    """The path of an interpreter of this version: this one, one of PATH, or one of pyenv's."""
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    candidates = [shutil.which(f"python{version}"), *map(str, sorted(pyenv.glob(f"{version}.*/bin/python")))]
    for candidate in filter(None, candidates):
        asked = [candidate, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
        done = subprocess.run(asked, capture_output=True, text=True)
        if done.returncode == 0 and done.stdout.strip() == version:  # pyenv's shims answer for versions not chosen
            return candidate
    return None


def install(interpreter: str, wheel: Path, environment: Path, pins: tuple[str, ...]) -> str:
    """Install the wheel into a new environment, or anew into one that is there; return the time and size."""
    pip = [str(environment / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if environment.exists():
        run([*pip, "--no-deps", "--force-reinstall", str(wheel)], environment, own_environment=False)
        run([*pip, str(wheel), *pins], environment, own_environment=False)
        return f"{size_of(environment)} MB"
    run([interpreter, "-m", "venv", str(environment)], Path.cwd(), own_environment=False)
    start = time.perf_counter()
    run([*pip, str(wheel), *pins], environment, own_environment=False)
    seconds = time.perf_counter() - start
    return f"{seconds:.0f} s, {size_of(environment)} MB"


def use(bin_dir: Path, work: Path, ran: list[str]) -> None:
    """Run a distillation, a sweep, a report and the loaded student in empty folders; `ran` names what succeeded."""
    kd_run = str(bin_dir / "kd-run")
    quiet(run_both([kd_run], empty(work / "default")), "the default run")
    ran.append("default run")
    folder = empty(work / "runs")
    quiet(run_both([kd_run, *SMALL], folder), "kd-run")
    (run_dir,) = (path.parent for path in folder.glob("outputs/*/*/summary.json"))
    ran.append("run")
    quiet(run_both([kd_run, "-m", *SMALL, "T=1,4"], folder), "kd-run -m")
    ran.append("sweep")
    said = run([str(bin_dir / "kd-report"), "multirun"], folder)
    if not all(f"T={T}" in said for T in (1, 4)):
        raise Failed(f"kd-report prints no row for T=1 and T=4: {said!r}"[:300])
    ran.append("report")
    run([str(bin_dir / "python"), "-W", "error", "-c", LOAD, str(run_dir)], folder)
    ran.append("load_student")


def quiet(said: tuple[str, str], command: str) -> None:
    """Fail if a library warned or printed something of its own on standard error."""
    for line in said[1].splitlines():
        if "Warning" in line or "leaked" in line:
            raise Failed(f"{command} printed: {line.strip()[:150]}")


def copy_tests(folder: Path) -> None:
    """Copy the tests without `kd_cli`, so that they test the installed one."""
    shutil.copytree(ROOT / "tests", folder / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "conf", folder / "conf")
    shutil.copy(ROOT / "pyproject.toml", folder)


def unit_tests(bin_dir: Path, work: Path) -> str:
    """Run the fast unit tests against the installed wheel; return how many passed."""
    python = str(bin_dir / "python")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    run([*pip, "pytest>=8", "hypothesis>=6.100"], work, own_environment=False)
    pytest = [python, "-m", "pytest", "-p", "no:cacheprovider", "--tb=line"]
    chosen = ["-k", CHOICE, "-m", "not slow and not gpu", *(f"tests/{name}" for name in TESTS)]
    done = subprocess.run(
        [*pytest, *chosen],
        cwd=work.parent / "tests",
        env=clean_environment(work) | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    if done.returncode:
        print(done.stdout[-6000:], flush=True)
        raise Failed(f"tests: {next((line for line in lines if line.startswith('FAILED')), lines[-1])[:200]}")
    return lines[-1].partition(",")[0].strip("= ")  # "628 passed"


def run(command: list[str], folder: Path, *, own_environment: bool = True) -> str:
    """Run a command and return its standard output. Raises Failed with the line that names the error."""
    return run_both(command, folder, own_environment=own_environment)[0]


def run_both(command: list[str], folder: Path, *, own_environment: bool = True) -> tuple[str, str]:
    """`run`, with standard error beside standard output."""
    env = clean_environment(folder) if own_environment else dict(os.environ)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or done.stdout.strip().splitlines() or ["no output"]
        error = next((line for line in lines if line.lower().startswith("error")), lines[-1])
        what = " ".join(Path(word).name for word in command[:3])
        raise Failed(f"{what}: {error[:200]}")
    return done.stdout, done.stderr


def size_of(folder: Path) -> int:
    """The megabytes of a folder's files."""
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir()) // 1_000_000


def table(rows: list[tuple[str, ...]]) -> str:
    """The rows as aligned text."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(COLUMNS))]
    aligned = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


if __name__ == "__main__":
    main()
