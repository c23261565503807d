"""What the jobs of a sweep report: in their own logs, and on the terminal."""

from __future__ import annotations

import logging
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from kd_cli.errors import KdError
from kd_cli.sweeps.jobs import SweepJob

if TYPE_CHECKING:
    from kd_cli.runs.jobs import Say

log = logging.getLogger("kd_cli")

LINES = 8  # of all jobs' messages, as many as a sweep prints; the others are in the jobs' logs


class Printed:
    """Writes each message of a sweep's jobs into the job's own log, and the first LINES different ones on the terminal.

    Twenty jobs with one teacher would otherwise print twenty times where it came from.
    """

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def by(self, job: SweepJob) -> Say:
        """Return the function by which a job reports a message; one that is not `shown` is for its own log only."""

        def say(message: str, *, shown: bool = True) -> None:
            job.records.append(record(logging.INFO, message))
            if not shown:
                return
            short = re.sub(r", [0-9a-f]{32}$", "", message)  # a fingerprint
            if short in self.seen or len(self.seen) > LINES:
                return
            self.seen.add(short)
            name = job.path.name if job.path is not None else ""
            more = len(self.seen) > LINES
            log.handle(
                record(logging.INFO, "further messages are in the jobs' run.log" if more else f"{name}: {short}")
            )

        return say


def report_failure(job: SweepJob) -> None:
    """Print a job's failure now, and write it into the job's own log."""
    assert job.path is not None
    assert job.error is not None
    error = None if isinstance(job.error, KdError) else job.error
    line = record(logging.ERROR, failure(job.path, job.error), error)
    job.records.append(line)
    log.handle(line)


def failure(path: Path, error: Exception) -> str:
    """Return the line on a job's failure."""
    return f"failed: {os.path.relpath(path)}: {error}"


def record(level: int, message: str, error: Exception | None = None) -> logging.LogRecord:
    """Return a log record, with the traceback of an error."""
    exc_info = None if error is None else (type(error), error, error.__traceback__)
    return log.makeRecord(log.name, level, __file__, 0, message, (), exc_info)
