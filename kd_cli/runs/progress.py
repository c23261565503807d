"""The progress of a training: a bar on a terminal, and each epoch's metrics for whoever writes them down."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from kd_cli.learn.engine import Observer

OnEpoch = Callable[[int, dict[str, Any]], None]  # called with the number of a model and its metrics of an epoch


class Progress(Observer):
    """Shows a bar with loss, accuracy and time left while a training runs; nothing where there is no terminal."""

    def __init__(self, title: str, epochs: int, *, role: str, on_epoch: OnEpoch) -> None:
        self.title, self.epochs, self.done = title, epochs, 0
        self.role, self.on_epoch = role, on_epoch

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
            self.on_epoch(s, {**row, "role": self.role})
        self.bar.set_postfix_str(f"epoch {self.done}/{self.epochs}, {describe(rows)}", refresh=False)

    def finish(self) -> None:
        self.bar.close()


def describe(rows: list[dict[str, Any]]) -> str:
    """Loss and accuracy of an epoch's rows, averaged over the models for which they are numbers."""

    def mean(key: str) -> float | None:
        values = [row[key] for row in rows if row[key] is not None and row[key] == row[key]]
        return sum(values) / len(values) if values else None

    found = []
    if (loss := mean("loss")) is not None:
        found.append(f"loss {loss:.4g}")
    for key, name in (("train_accuracy", "training"), ("val_accuracy", "validation")):
        if (value := mean(key)) is not None:
            found.append(f"{name} {value:.2%}")
    return ", ".join(found)
