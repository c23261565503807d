"""Which models of a run or a sweep are trained together: chosen once, written down, and read again on resume."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kd_cli.storage.files import read_json, write_json

Stacks = list[list[str]]


class StackPlan:
    """For each stage of training, the stacks by their members' keys.

    A model's last digits can depend on the size of its stack, so a resumed sweep trains the stacks that were noted.
    Without a path the plan is kept in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.stages: dict[str, Stacks] = _read(path) if path is not None else {}

    def get(self, stage: str) -> Stacks:
        return self.stages.get(stage, [])

    def add(self, stage: str, stacks: Sequence[Sequence[str]]) -> None:
        """Note further stacks of a stage."""
        self._write(stage, [*self.get(stage), *map(list, stacks)])

    def split(self, stage: str, stack: Sequence[str], parts: Sequence[Sequence[str]]) -> None:
        """Note that a stack is trained in parts."""
        self._write(stage, [part for one in self.get(stage) for part in (parts if one == list(stack) else [one])])

    def remove(self) -> None:
        """Remove the file, once every result is there."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _write(self, stage: str, stacks: Sequence[Sequence[str]]) -> None:
        self.stages[stage] = [list(stack) for stack in stacks]
        if self.path is not None:
            write_json(self.path, self.stages)


def _read(path: Path) -> dict[str, Stacks]:
    """What the file holds; nothing when there is none or it is damaged: then the stacks are chosen anew."""
    try:
        found = read_json(path)
        return {str(stage): [[str(key) for key in stack] for stack in stacks] for stage, stacks in found.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
