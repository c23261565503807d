"""What a person sees while models train: a bar on a terminal, a line per stage everywhere."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from kd_cli.learn.engine import Observer

log = logging.getLogger(__name__)


class Progress(Observer):
    """A bar with loss, accuracy and time left, which leaves no trace; without a terminal there is none."""

    def __init__(self, title: str, epochs: int, *, role: str, told: Callable[[int, dict[str, Any]], None]) -> None:
        self.title, self.epochs, self.done = title, epochs, 0
        self.role, self.told = role, told

    def start(self, steps: int, models: int) -> None:
        self.bar = tqdm(
            total=steps,
            desc=self.title,
            unit="step",
            leave=False,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {remaining} left, {rate_fmt}{postfix}",
        )

    def step(self) -> None:
        self.bar.update()

    def epoch(self, rows: list[dict[str, Any]]) -> None:
        self.done += 1
        for s, row in enumerate(rows):
            self.told(s, {**row, "role": self.role})
        self.bar.set_postfix_str(f"epoch {self.done}/{self.epochs}, {describe(rows)}", refresh=False)

    def finish(self) -> None:
        self.bar.close()


def describe(rows: list[dict[str, Any]]) -> str:
    """The loss and the accuracy in an epoch's rows; the mean over the models that are still finite."""

    def mean(key: str) -> float | None:
        values = [row[key] for row in rows if row[key] is not None and row[key] == row[key]]
        return sum(values) / len(values) if values else None

    parts = []
    if (loss := mean("loss")) is not None:
        parts.append(f"loss {loss:.4g}")
    for key, name in (("train_accuracy", "training"), ("val_accuracy", "validation")):
        if (value := mean(key)) is not None:
            parts.append(f"{name} {value:.2%}")
    return ", ".join(parts)
