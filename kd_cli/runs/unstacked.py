"""Say which students of a sweep are trained by themselves, and which of their configuration keys are the reason."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from kd_cli.config.fingerprint import fingerprint
from kd_cli.data.sentences import listed
from kd_cli.runs.cohorts import cohort_facts, differences
from kd_cli.runs.distil import student_tasks
from kd_cli.runs.jobs import Job
from kd_cli.runs.teaching import STORED, taught_by, way_of_teaching

if TYPE_CHECKING:
    from kd_cli.runs.session import Session

log = logging.getLogger(__name__)


def log_unstacked(session: Session, jobs: Sequence[Job]) -> None:
    """Log the students that no other one is trained together with: neither in a stack nor side by side."""
    tasks = [student_tasks(session, job)[0] for job in jobs]
    shared = [shared_facts(session, job) for job in jobs]
    facts = [{**ours, **cohort_facts(task), "seed": task.spec.seed} for ours, task in zip(shared, tasks, strict=True)]
    stacks = [fingerprint([ours, task.stack_key()]) for ours, task in zip(shared, tasks, strict=True)]
    cohorts = list(map(fingerprint, facts))
    in_stack, in_cohort = Counter(stacks), Counter(cohorts)
    differing: dict[str, None] = {}
    names: list[str] = []
    for i, job in enumerate(jobs):
        single = in_stack[stacks[i]] == in_cohort[cohorts[i]] == len(job.config.settings()) == 1
        if single and not job.ended and len(jobs) > 1:
            names.append(job.path.name)
            found = [differences(facts[i], other) for k, other in enumerate(facts) if k != i]
            fewest = min(map(len, found))
            differing |= dict.fromkeys(key for keys in found if len(keys) == fewest for key in keys)
    if names:
        log.info(
            "%d × student run one by one: those that differ in %s are not trained together (%s)",
            *(len(names), ", ".join(differing), listed(dict.fromkeys(names), 3)),
        )


def shared_facts(session: Session, job: Job) -> dict[str, Any]:
    """What students that are trained together have in common beside their recipe, by configuration key."""
    teacher = taught_by(job.summary)
    return {
        "teacher": teacher,
        "method": way_of_teaching(job) if teacher is not None else STORED,  # hard labels differ by their teacher alone
        "transfer": [session.transfer(job.config).facts, job.config.transfer.labels],
        "diagnostics": job.config.diagnostics,
    }
