"""What differs between runs of one configuration: the weights in a checkpoint's file, and the user's own code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable

from kd_cli.report.read import Run

TEACHER_FILE = "teacher.checkpoint content"  # swept where one path held several weights; its value is a fingerprint
OWN_CODE = "own code"  # swept where a file was edited between the runs; its value is a checksum


def hidden_differences(runs: Iterable[Run]) -> set[str]:
    """The keys of MARKS that differ between runs whose configurations may be equal."""
    runs = list(runs)
    return {key for key, found in ((TEACHER_FILE, _replaced_checkpoints), (OWN_CODE, _edited_code)) if found(runs)}


def teacher_file(run: Run) -> str | None:
    """The start of the fingerprint of a loaded teacher; None where the teacher is trained, or not there yet."""
    mark = _teacher_mark(run) if run.config.get("teacher.checkpoint") is not None else None
    return mark and mark[:8]


def own_code(run: Run) -> str | None:
    """The start of a checksum of all files of the user's that a run used; None where it used none."""
    code = run.summary.get("code")
    return hashlib.sha256(json.dumps(code, sort_keys=True).encode()).hexdigest()[:8] if code else None


MARKS: dict[str, Callable[[Run], str | None]] = {TEACHER_FILE: teacher_file, OWN_CODE: own_code}


def _teacher_mark(run: Run) -> str | None:
    report = run.summary.get("teacher")
    return report["fingerprint"] if report else None


def _replaced_checkpoints(runs: Iterable[Run]) -> bool:
    """Whether runs with equal keys of the teacher had different weights from one `teacher.checkpoint`.

    The fingerprint of such a teacher does not depend on seeds: the file's content, or the model's code, has changed.
    """
    marks: dict[str, set[str]] = {}
    for run in runs:
        if run.config.get("teacher.checkpoint") is not None and (mark := _teacher_mark(run)) is not None:
            teacher = {k: v for k, v in sorted(run.config.items()) if k.startswith("teacher.") or k == "precision"}
            marks.setdefault(json.dumps(teacher, default=str), set()).add(mark)
    return any(len(found) > 1 for found in marks.values())


def _edited_code(runs: Iterable[Run]) -> bool:
    """Whether a module of the user's had different content in two of the runs."""
    checksums: dict[str, set[str]] = {}
    for run in runs:
        for module, checksum in (run.summary.get("code") or {}).items():
            checksums.setdefault(module, set()).add(checksum)
    return any(len(found) > 1 for found in checksums.values())
