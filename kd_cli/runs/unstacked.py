"""Say which students of a sweep are trained by themselves, and which of their configuration keys are the reason."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from kd_cli.data.sentences import listed
from kd_cli.runs.jobs import Job, alive

if TYPE_CHECKING:
    from kd_cli.runs.building import TrainingTask
    from kd_cli.runs.session import Session

log = logging.getLogger(__name__)

GROUPS = {"model": "student", "optimizer": "optimizer", "schedule": "schedule", "method": "method"}
OF_TRAINING = ("epochs", "batch_size", "keep", "batchnorm")


def log_unstacked(session: Session, groups: Sequence[tuple[Sequence[Job], TrainingTask]]) -> None:
    """Log the students that no other one can be stacked with; a group is the jobs that can, and the task of one."""
    facts = [stack_facts(session, jobs[0], task) for jobs, task in groups]
    differing: dict[str, None] = {}
    names: list[str] = []
    for i, (jobs, _) in enumerate(groups):
        if len(jobs) == 1 and len(jobs[0].config.settings()) == 1 and alive(jobs) and len(groups) > 1:
            names.append(jobs[0].path.name)
            found = [differences(facts[i], other) for k, other in enumerate(facts) if k != i]
            fewest = min(map(len, found))
            differing |= dict.fromkeys(key for keys in found if len(keys) == fewest for key in keys)
    if names:
        log.info(
            "%d × student run one by one: those that differ in %s are not trained together (%s)",
            *(len(names), ", ".join(differing), listed(dict.fromkeys(names), 3)),
        )


def stack_facts(session: Session, job: Job, task: TrainingTask) -> dict[str, Any]:
    """What must be equal for students to be trained in one stack, by configuration key."""
    teacher = job.summary["teacher"]
    return {
        "teacher": teacher and teacher["fingerprint"],
        "transfer": [session.transfer(job.config).facts, job.config.transfer.labels],
        "diagnostics": job.config.diagnostics,
        **dict(_by_key(task.stack_facts())),
    }


def _by_key(facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The facts of a task by configuration key: `student` for the function that builds it, `student.hidden`."""
    for name, group in GROUPS.items():
        for key, value in facts[name].items():
            yield group if key == "_target_" else f"{group}.{key}", value
    for name in OF_TRAINING:
        yield f"training.{name}", facts.get(name)
    for key, value in facts["augment"].items():
        yield f"training.{key}", value
    yield "precision", facts["precision"]


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The keys in which two differ; where a group's option differs, that one alone for the group."""
    keys = [key for key in one | other if (key in one, one.get(key)) != (key in other, other.get(key))]
    return [key for key in keys if key.partition(".")[0] == key or key.partition(".")[0] not in keys]
