"""T=auto and alpha=auto: choose among the settings that were trained, on validation data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kd_cli.config.values import RunConfig
from kd_cli.learn.engine import Outcome
from kd_cli.runs.building import TrainingTask
from kd_cli.runs.summary import validation


def choose(outcomes: Sequence[Outcome]) -> int:
    """The number of the setting with the best validation accuracy, then the best likelihood; 0 if there is one."""
    if len(outcomes) == 1:
        return 0

    def rank(k: int) -> tuple[bool, float, float]:
        if outcomes[k].diverged is not None:
            return True, 0.0, 0.0
        result = validation(outcomes[k])
        return False, -result["accuracy"], result["nll"]

    return min(range(len(outcomes)), key=rank)


def choice_report(
    config: RunConfig, tasks: Sequence[TrainingTask], outcomes: Sequence[Outcome], chosen: int
) -> dict[str, Any]:
    """The settings that were tried, their validation results, and which was chosen: `auto` in a summary."""
    return {
        "keys": [key for key in ("T", "alpha") if getattr(config, key) == "auto"],
        "rule": "highest validation accuracy, then lowest validation NLL",
        "chosen": chosen,
        "tried": [
            {
                "T": task.T,
                "alpha": task.alpha,
                **{f"val_{key}": value for key, value in validation(outcome).items()},
                "diverged": outcome.diverged,
            }
            for task, outcome in zip(tasks, outcomes, strict=True)
        ],
    }
