"""The progress of a training: a bar on a terminal, elsewhere a line every half minute; each epoch's metrics."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

from tqdm import tqdm

from kd_cli.learn.engine import Observer

log = logging.getLogger(__name__)

SECONDS = 30.0  # between two lines, where there is no terminal
OnEpoch = Callable[[int, dict[str, Any]], None]  # called with the number of a model and its metrics of an epoch


class Progress(Observer):
    """Shows loss, accuracy and time left while a training runs: a bar, or a line now and then without a terminal."""

    def __init__(self, title: str, epochs: int, *, role: str, on_epoch: OnEpoch) -> None:
        self.title, self.epochs, self.done = title, epochs, 0
        self.role, self.on_epoch = role, on_epoch
        self.metrics = ""

    def start(self, steps: int, models: int) -> None:
        self.steps, self.step_number, self.skipped = steps, 0, 0
        self.started = self.printed = time.monotonic()
        self.lines = not sys.stderr.isatty()
        self.bar = tqdm(
            total=steps,
            desc=self.title,
            unit="step",
            leave=False,
            disable=self.lines,
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}% |{bar}| {remaining} left, {rate_fmt}{postfix}",
        )

    def step(self) -> None:
        self.step_number += 1
        self.bar.update()
        if self.lines and (now := time.monotonic()) - self.printed >= SECONDS:
            self.printed = now
            log.info("%s", self.line(now - self.started))

    def line(self, seconds: float) -> str:
        """Return how far the training is after so many seconds, and how long it will take."""
        share = self.step_number / max(self.steps, 1)
        left = seconds * (self.steps - self.step_number) / max(self.step_number - self.skipped, 1)
        parts = [f"epoch {min(self.done + 1, self.epochs)}/{self.epochs}", f"{share:.0%}", f"{duration(left)} left"]
        return f"{self.title}: " + ", ".join([*parts, *filter(None, [self.metrics])])

    def epoch(self, rows: list[dict[str, Any]]) -> None:
        self.done += 1
        if (steps := self.steps * self.done // self.epochs) > self.step_number:  # an epoch of an earlier process
            self.skipped += steps - self.step_number
            self.step_number = steps
        for s, row in enumerate(rows):
            self.on_epoch(s, {**row, "role": self.role})
        self.metrics = describe(rows)
        self.bar.set_postfix_str(f"epoch {self.done}/{self.epochs}, {self.metrics}", refresh=False)

    def finish(self) -> None:
        self.bar.close()


def duration(seconds: float) -> str:
    """Return a duration in words: 40 s, 12 min, 2 h 5 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


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
