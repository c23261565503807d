"""Unfinished trainings: where their states are saved, and how a training continues from one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from kd_cli import processes
from kd_cli.storage.run_dir import number
from kd_cli.storage.stack_plan import StackPlan
from kd_cli.storage.training_state import TrainingState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoints:
    """Where and how often states are saved, which models are trained together, and who may stop a training."""

    folder: Path | None = None  # of the states; None saves none
    every: tuple[int, float] = (1, 0.0)  # epochs or seconds between two states, the other one 0
    stopping: Callable[[], bool] = lambda: False  # asked at the end of each epoch
    plan: StackPlan = field(default_factory=lambda: StackPlan(None))

    def of(self, name: str, *, title: str, device: torch.device, results: Sequence[Path]) -> SavedTraining | None:
        """The saved state of the training with this name; `results` are the files that the training ends with."""
        if self.folder is None:
            return None
        state = TrainingState(self.folder / f"{name}.state", every=self.every, results=results)
        return SavedTraining(state, title, device)


class SavedTraining:
    """A training's state on disk, with the machine's settings that its last digits depend on.

    Under other settings the training continues from the state all the same, and the log says so.
    """

    def __init__(self, state: TrainingState, title: str, device: torch.device) -> None:
        self.state, self.title = state, title
        self.due, self.remove = state.due, state.remove
        self.settings: dict[str, Any] = {
            "device": device.type,
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }
        if (together := processes.count()) > 1:
            self.settings["processes"] = together

    def save(self, state: dict[str, Any]) -> None:
        self.state.save({**state, "saved_with": self.settings})

    def load(self) -> dict[str, Any] | None:
        state = self.state.load()
        if state is None:
            return None
        saved = state.pop("saved_with")
        if saved["device"] != self.settings["device"]:
            log.warning(
                "%s: saved on %s, and this run is on %s: training starts from its first epoch",
                *(self.title, saved["device"], self.settings["device"]),
            )
            return None
        before, now = (number(int(of.get("processes", 1))) for of in (saved, self.settings))
        if before != now:
            log.warning(
                "%s: saved by %s, and this is %s: training starts from its first epoch", self.title, before, now
            )
            return None
        if changed := [key for key in saved if saved[key] != self.settings[key]]:
            before, now = (", ".join(setting(key, of[key]) for key in changed) for of in (saved, self.settings))
            log.warning("%s: saved with %s, continuing with %s: the last digits may differ", self.title, before, now)
        return state


def setting(key: str, value: Any) -> str:
    return f"{value} thread{'s' * (value != 1)}" if key == "threads" else f"{key} {value}"
