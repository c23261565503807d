"""The place of this process among those that torchrun has started together; imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that torchrun sets


@dataclass(frozen=True)
class Place:
    """One of several processes: its number `rank` of `size`, and its number on its own machine."""

    rank: int
    size: int
    on_machine: int

    @property
    def leads(self) -> bool:
        """Whether this is the process that reads the command line and writes all files."""
        return self.rank == 0


def launched() -> Place | None:
    """The place that torchrun gave this process; None where it is the only one."""
    if any(name not in os.environ for name in VARIABLES):
        return None
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    return Place(rank, size, int(os.environ.get("LOCAL_RANK", rank))) if size > 1 else None


def command_name() -> str:
    """Return how this process was started: `kd-run`, or `torchrun ... -m kd_cli`."""
    place = launched()
    if place is None:
        return "kd-run"
    machines = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    nodes = f"--nnodes={machines} ... " if machines > 1 else ""
    return f"torchrun {nodes}--nproc-per-node={place.size // machines} -m kd_cli"


def count() -> int:
    """How many processes train together, 1 without torchrun."""
    place = launched()
    return 1 if place is None else place.size
