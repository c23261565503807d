"""Chains of distillation: teacher, assistants, student, each taught by the one before; and generations of one model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kd_cli.config.fingerprint import code_version
from kd_cli.config.values import RunConfig
from kd_cli.errors import ConfigError
from kd_cli.learn.methods import Method
from kd_cli.learn.teachers import combine_logits
from kd_cli.runs.answering import is_answers
from kd_cli.runs.building import TrainingTask
from kd_cli.runs.jobs import Job
from kd_cli.runs.summary import results_on_test, with_agreement
from kd_cli.runs.teaching import way_of_teaching
from kd_cli.runs.trained_once import Ensemble, Shared, Wanted, fingerprint_of, wanted_teacher

if TYPE_CHECKING:
    from kd_cli.runs.session import Session


def check_chain(config: RunConfig, method: Method) -> None:
    """ConfigError where a method cannot train the models between teacher and student."""
    if not config.chain:
        return
    key = "teacher.generations" if config.generations > 1 else "teacher.chain"
    name = config.method_name
    if not method.needs_teacher:
        raise ConfigError(f"{key} is given, and method={name} has no teacher", hint="method=soft_targets")
    if is_answers(config.teacher):
        raise ConfigError(
            f"{key} is given, and teacher={config.teacher.name} is no network that starts a chain",
            hint="a model as the teacher; its weights can come from teacher.checkpoint",
        )
    if method.couples_models:
        raise ConfigError(f"{key} trains one model after the other, and method={name} couples peers")
    if method.extends_student:
        raise ConfigError(
            f"{key} is given, and method={name} makes the student another network with parts of its teacher",
            hint="a method that leaves the student as it is",
        )


def wanted_assistants(session: Session, job: Job) -> list[Wanted]:
    """The models between teacher and student, in the order in which they are trained.

    Each is trained as the run's student is, by the same method with the same weights on the same transfer set; its
    fingerprint holds that of the model that teaches it.
    """
    config, transfer = job.config, session.transfer(job.config)
    if not config.chain:
        return []
    ((T, alpha),) = config.settings()
    beta = config.beta if transfer.labelled else 0.0
    teacher = fingerprint_of([model.key for model in wanted_teacher(session, job)], config.combine)
    found: list[Wanted] = []
    for k, spec in enumerate(config.chain):
        facts: dict[str, Any] = {
            "kind": "assistant",
            **spec.identity(session.data.dataset.fingerprint),
            "method": config.method,
            "weights": [T, alpha, beta],
            "teacher": teacher,
            "transfer": transfer.facts,
        }
        if code := code_version(config.method):
            facts["method_code"] = code
        found.append(
            Wanted(
                facts,
                spec,
                title_of(config, k),
                replace(session.data, train=transfer.examples),
                task=TrainingTask(spec, config.method, T, alpha, beta),
                taught=way_of_teaching(job),
                number=k,
            )
        )
        teacher = found[-1].key
    return found


def title_of(config: RunConfig, k: int) -> str:
    """The name of the chain's model `k` in messages."""
    spec = config.chain[k]
    if config.generations > 1:
        return f"generation {k + 1} of {config.generations} ({spec.title})"
    before = config.teacher.title if k == 0 else config.chain[k - 1].title
    return f"assistant {spec.title}, taught by {before}"


def obtain_assistants(session: Session, jobs: Sequence[Job]) -> None:
    """Give each job that has not ended the models between its teacher and its student, one after the other."""
    for k in range(max((len(job.config.chain) for job in jobs), default=0)):
        some = [job for job in jobs if len(job.config.chain) > k]
        for job, (entry,), from_store in Shared(session, some, functools.partial(_link, k=k), "assistant").obtain():
            job.taught_by = Ensemble([entry], job.config.combine, job.config.chain[k])
            job.assistants.append(entry)
            report = {"fingerprint": entry.fingerprint, **entry.report, "from_store": from_store}
            report["seed"] = job.config.chain[k].seed
            job.summary["chain"].append(with_agreement(report, entry.outputs()["test"], job.teacher))


def _link(session: Session, job: Job, k: int) -> list[Wanted]:
    return [wanted_assistants(session, job)[k]]


def generations_report(session: Session, job: Job, logits: Tensor) -> dict[str, Any]:
    """`generations` in a summary: the test results of all generations together, the last with these logits [M,C].

    Their distributions are averaged as those of several teachers are, by `teacher.combine`; Furlanello 2018, whose
    ensembles leave out the first teacher.
    """
    members = torch.stack([*(entry.outputs()["test"] for entry in job.assistants), logits])
    together = combine_logits(members, combine=job.config.combine, T=torch.ones(()))
    report = {
        "members": len(members),
        "combine": job.config.combine,
        "parameters": len(members) * job.summary["student"]["parameters"],
        "flops": len(members) * job.summary["student"]["flops"],
        "test": results_on_test(together, session.data.dataset),
    }
    return with_agreement(report, together, job.teacher)
