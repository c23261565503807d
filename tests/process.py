"""Run the command in a process of its own that need not import torch again.

multiprocessing's fork server imports the heavy libraries once; every run is then a fresh process with its own folder,
environment, arguments and output, through the real entry point.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 120  # no run here takes a tenth of it

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        *("torch", "torch._dynamo", "torch.utils.flop_counter", "safetensors.torch"),
        *("hydra.main", "hydra._internal.hydra", "hydra._internal.utils"),
        *("kd_cli.commands.kd_run", "kd_cli.runs.run_many", "kd_cli.report.tables"),
    ]
)


@dataclass(frozen=True)
class Ran:
    """A finished command: exit code, output, errors, the folder it ran in, and the run directories it made there."""

    code: int
    out: str
    err: str
    folder: Path
    run_dirs: list[Path]

    @property
    def run_dir(self) -> Path:
        (found,) = self.run_dirs
        return found

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.run_dir / "summary.json").read_text())

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.run_dir / "metrics.jsonl").read_text().splitlines()]


class Running:
    """A command under way."""

    def __init__(self, argv: tuple[str, ...], folder: Path, limit: int | None = None, prelude: str = "") -> None:
        self.folder, self.before = folder, run_dirs(folder)
        self.outputs = [folder.parent / f"{folder.name}-{os.urandom(4).hex()}.{name}" for name in ("out", "err")]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        paths = [str(path) for path in self.outputs]
        self.process = _context.Process(target=_child, args=(argv, str(folder), env, paths, limit, prelude))
        self.process.start()

    def wait(self) -> Ran:
        self.process.join(SECONDS)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"still running after {SECONDS} s")
        assert self.process.exitcode is not None
        out, err = (path.read_text() if path.exists() else "" for path in self.outputs)
        made = [path for path in run_dirs(self.folder) if path not in self.before]
        return Ran(self.process.exitcode, out, err, self.folder, made)


def run_dirs(folder: Path) -> list[Path]:
    """The run directories under a folder."""
    return sorted(path.parent.parent for path in folder.glob("**/.hydra/config.yaml"))


def _child(
    argv: tuple[str, ...], folder: str, env: dict[str, str], outputs: list[str], limit: int | None, prelude: str
) -> None:
    for number, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.argv = ["kd-run", *argv]
    if limit is not None:  # bytes in a file
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    exec(prelude, {"__name__": "prelude"})
    from kd_cli.commands.kd_run import main

    main()
