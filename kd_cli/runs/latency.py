"""How long teacher and student take for one example, measured where that is quick; kd-export measures the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kd_cli.config.fingerprint import fingerprint
from kd_cli.config.values import TrainSpec
from kd_cli.errors import first_line
from kd_cli.export.latency import surroundings, threads, within
from kd_cli.export.student import with_preparation
from kd_cli.export.teacher import one_network
from kd_cli.runs.answering import is_answers
from kd_cli.runs.jobs import Job
from kd_cli.runs.models import load_module
from kd_cli.runs.pruned import pruned_spec

if TYPE_CHECKING:
    from kd_cli.runs.session import Session

LIMIT = 0.5  # seconds that the measurement may take
BATCH = 1

Latency = dict[str, Any]


def report_latency(session: Session, job: Job, spec: TrainSpec, state: dict[str, Tensor]) -> None:
    """Put the latencies of a job's teacher and students into its summary, or say why not.

    `spec` and `state` are those of the distilled student. Runs of the same models share one measurement.
    """
    if not job.config.latency:
        return
    teacher = job.teacher
    known = None if teacher is None else [teacher.spec.model, teacher.spec.input, len(teacher.members)]
    key = fingerprint([known, *([one.model, one.input] for one in (job.config.student, spec))])
    if key not in session.latencies:
        try:
            session.latencies[key] = measured(networks_of(session, job, spec, state), session)
        except Exception as error:  # a user's module that runs on its own device only; the result does not depend on it
            session.latencies[key] = {"not_measured": f"{type(error).__name__}: {first_line(error)}"}
    job.summary["latency"] = found = session.latencies[key]
    if (why := found.get("not_measured")) is not None:  # no note: it depends on the machine's load, and notes do not
        sentence = f"latencies were not measured: {why}"
        job.say(sentence, shown=sentence not in session.shown)
        session.shown.add(sentence)


def networks_of(session: Session, job: Job, spec: TrainSpec, state: dict[str, Tensor]) -> dict[str, nn.Module]:
    """The run's networks by role; the student alone only where it is of another architecture than the student."""
    data, found = session.data, {}
    if job.teacher is not None and not is_answers(job.teacher.spec):
        own = [load_module(job.teacher.spec, one.weights(), data, role="teacher") for one in job.teacher.members]
        found["teacher"] = one_network(own, job.teacher.combine)
    alone = pruned_spec(job.config.student, data.dataset)
    if job.alone is not None and spec.model != alone.model:
        found["student_alone"] = load_module(alone, job.alone.weights(), data, role="student")
    return found | {"student": load_module(spec, state, data, role="student")}


def measured(networks: dict[str, nn.Module], session: Session) -> Latency:
    """Latencies on the CPU by role, for one example on one thread; why not, where they would take too long."""
    data = session.data
    image = data.dataset.test.images[:BATCH].contiguous()
    models = {role: with_preparation(one.cpu(), data.dataset, data.dtype) for role, one in networks.items()}
    calls = {role: lambda model=model: model.unchecked(image) for role, model in models.items()}
    where = surroundings()
    with threads(1), torch.inference_mode():
        found = within(calls, batch=BATCH, limit=LIMIT)
    if found is None:
        return {"not_measured": f"that would take more than {LIMIT:g} s; kd-export measures them"}
    return {**where, "batch": BATCH, "threads": 1, "rows": found}
