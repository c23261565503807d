"""Show that an installed wheel behaves as the checkout does.

Builds the source archive and from it the wheel, installs that in a new, empty virtual environment, and runs `kd-run`
there in an empty folder. The test errors must equal those of this interpreter's `kd-run`, which is the checkout's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHORT_RUN = ("training.epochs=1", "teacher_training.epochs=1")
ROLES = ("teacher", "student_alone", "student")


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="kd-wheel-") as folder:
        work = Path(folder)
        wheel = build_wheel(work / "dist")
        check_contents(wheel)
        bin_dir = install(wheel, work / "venv")
        show_help(bin_dir / "kd-run", work / "help")
        installed = test_errors(bin_dir / "kd-run", work / "installed")
        checkout = test_errors(Path(sys.executable).parent / "kd-run", work / "checkout")
    if installed != checkout:
        raise SystemExit(f"test errors differ: installed wheel {installed}, checkout {checkout}")
    say(f"the installed wheel gives the checkout's result: {installed}")


def build_wheel(dist: Path) -> Path:
    """Build the wheel from the source archive, so that a file missing in either shows."""
    run([sys.executable, "-m", "build", "--outdir", str(dist), str(ROOT)], cwd=ROOT, env=os.environ)
    (wheel,) = dist.glob("*.whl")
    say(f"built {wheel.name}, {wheel.stat().st_size / 1000:.0f} kB")
    return wheel


def check_contents(wheel: Path) -> None:
    """Check that the wheel holds exactly the checkout's YAML, and the licence."""
    names = set(zipfile.ZipFile(wheel).namelist())
    packaged = {name for name in names if name.startswith("kd_cli/conf/") and name.endswith(".yaml")}
    expected = {f"kd_cli/{file.relative_to(ROOT).as_posix()}" for file in (ROOT / "conf").rglob("*.yaml")}
    if not expected or packaged != expected:
        raise SystemExit(f"YAML in the wheel differs from conf/: {sorted(packaged ^ expected) or 'there is none'}")
    if not any(name.endswith("LICENSE") for name in names):
        raise SystemExit("the wheel has no LICENSE")
    say(f"{len(packaged)} YAML files packaged")


def install(wheel: Path, environment: Path) -> Path:
    """Install the wheel with its dependencies in a new environment and return the folder of its commands."""
    venv.create(environment, symlinks=True)  # without pip: this interpreter's serves
    bin_dir = environment / "bin"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(bin_dir / "python")]
    options = ["--quiet", "--no-compile", "-c", str(ROOT / "constraints.txt")]
    run([*pip, "install", *options, str(wheel)], cwd=environment, env=os.environ)
    where = "import kd_cli.config.options as h; d = h.conf_dir(); assert d.parent.name == 'kd_cli' and d.is_dir(), d"
    run([str(bin_dir / "python"), "-I", "-c", where], cwd=environment, env=os.environ)
    return bin_dir


def show_help(command: Path, folder: Path) -> None:
    out = run([str(command), "--help"], cwd=empty(folder), env=clean_environment(folder))
    if "teacher=" not in out or "T=" not in out:
        raise SystemExit(f"{command} --help does not list the groups and keys:\n{out}")


def test_errors(command: Path, folder: Path) -> dict[str, int]:
    """Run a short distillation in an empty folder and return each role's number of test errors."""
    run([str(command), *SHORT_RUN], cwd=empty(folder / "work"), env=clean_environment(folder))
    (summary,) = (folder / "work" / "outputs").glob("*/*/summary.json")
    results = json.loads(summary.read_text(encoding="utf-8"))
    return {role: results[role]["test"]["errors"] for role in ROLES}


def clean_environment(home: Path) -> dict[str, str]:
    """Return an environment in which neither the checkout nor an earlier run can help."""
    own = {"HOME": str(home), "KD_STORE": str(home / "store"), "OMP_NUM_THREADS": "2"}
    return {"PATH": os.environ["PATH"], "LANG": os.environ.get("LANG", "C.UTF-8")} | own


def empty(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def run(command: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> str:
    """Run a command and return its standard output; show everything it said if it fails."""
    start = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    said = " ".join([Path(command[0]).name, *command[1:]])
    if done.returncode:
        raise SystemExit(f"{said}\nexited with {done.returncode}\n{done.stdout}{done.stderr}")
    say(f"{time.perf_counter() - start:5.1f} s  {said[:100]}")
    return done.stdout


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
