"""The rooms of the package: imports go downward only, files stay short, and what must be light imports no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kd_cli

PACKAGE = Path(kd_cli.__file__).parent
# From the top down: a room may import those below it, and itself. Rooms in one row do not import each other. What a
# preset analyses is drawn by the report's charts.
ROOMS = (
    ("commands",),
    ("sweeps",),
    ("experiments",),
    ("report",),
    ("runs",),
    ("export",),
    ("storage",),
    ("config",),
    ("learn",),
    ("answers",),
    ("models", "data"),
    ("label_metrics",),
    ("losses", "metrics", "statistics", "vision"),
    ("errors", "nearest", "shipped", "numeric", "roles", "locks", "cpus", "processes"),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
OLD_NAMES = "zoo"  # names of earlier versions, for users' code; nothing here imports it
ENTRIES = {"__init__", "__main__"}
LINES = 400
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def room_of(module: str) -> str:
    """The room of `kd_cli.learn.engine` or of the file `learn/engine.py`."""
    return module.removeprefix("kd_cli.").removesuffix(".py").replace("/", ".").partition(".")[0]


def imports_of(file: str) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            assert node.module is not None
            found |= {node.module} if node.module != "kd_cli" else {f"kd_cli.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file) not in {OLD_NAMES, *ENTRIES}])
def test_imports_go_downward_only(file: str) -> None:
    own = room_of(file)
    for module in imports_of(file):
        if module.split(".")[0] == "kd_cli":
            other = room_of(module)
            assert other == own or LEVEL[other] > LEVEL[own], f"{file} imports {module}"


def test_every_file_is_in_a_room() -> None:
    assert {room_of(file) for file in FILES} == LEVEL.keys() | ENTRIES | {OLD_NAMES}


@pytest.mark.parametrize("file", FILES)
def test_no_file_is_too_long_to_read(file: str) -> None:
    assert len((PACKAGE / file).read_text(encoding="utf-8").splitlines()) <= LINES


@pytest.mark.parametrize("file", [file for file in FILES if room_of(file) == "learn"])
def test_training_knows_no_files_and_no_configuration_nodes(file: str) -> None:
    names = {module.split(".")[0] for module in imports_of(file)}
    rooms = {room_of(module) for module in imports_of(file)}
    assert not names & {"omegaconf", "hydra", "pathlib", "os", "shutil", "safetensors"}
    assert not rooms & {"storage", "config"}


# What must start quickly, or must work where no torch is.
LIGHT = {
    "config": ("torch", "hydra._internal"),
    "report": ("torch", "hydra"),
    "sweeps/names.py": ("torch",),
    "commands/help.py": ("torch", "hydra", "numpy"),
}


@pytest.mark.parametrize("part", LIGHT)
def test_what_is_light_imports_nothing_heavy_while_it_is_imported(part: str) -> None:
    modules = [
        "kd_cli." + file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for file in FILES
        if file == part or room_of(file) == part
    ]
    assert modules
    program = f"import importlib, sys\nfor name in {modules!r}: importlib.import_module(name)\n"
    program += f"print([name for name in {LIGHT[part]!r} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"
