"""What a run says of students that learn from each other."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kd_cli.export.load import record_student
from kd_cli.learn.engine import Outcome
from kd_cli.learn.teachers import combine_logits
from kd_cli.metrics import agreement
from kd_cli.runs.auto import choose
from kd_cli.runs.jobs import Job
from kd_cli.runs.models import load_module, predict_module
from kd_cli.runs.summary import results_on_test, with_agreement
from kd_cli.statistics import gap_closed

if TYPE_CHECKING:
    from kd_cli.runs.session import Session

FOLDER = "peers"  # in a run's directory: the students beside the first, by number


def peers_report(session: Session, job: Job, outcomes: Sequence[Outcome], shift: Tensor) -> dict[str, Any]:
    """Test every peer and write the weights of those beside the first; `peers` in a summary.

    `best` is the number of the student with the best validation results, None without validation data; `agreement` is
    the share of the test examples that two peers put in the same class, as a mean over the pairs, `diversity` the share
    that they do not; `together` are the results of the mean of all peers' distributions, by `teacher.combine`. The mean
    errors are those of the students, without a teacher that learned on.
    """
    data, found, logits = session.data, [], []
    stored = job.summary["student_alone"]["from_store"]  # whether all of them are
    specs, entries = list(job.config.peers), list(job.peers_alone)
    students = len(specs)
    if job.method is not None and job.method.teacher_joins and job.teacher is not None:
        specs.append(job.config.teacher_as_peer())
        entries += job.teacher.members
    for k, (spec, outcome, alone) in enumerate(zip(specs, outcomes, entries, strict=True)):
        module = load_module(spec, outcome.state, data, role="student")
        logits.append(predict_module(module, data.test) + shift)
        report = session.model_report(spec, module, logits[-1], outcome)
        if k:
            folder = f"{FOLDER}/{k}"
            job.directory.write_student(outcome.state, record_student(spec, data.dataset, shift), folder)
        found.append(
            {
                **with_agreement(report, logits[-1], job.teacher),
                "gap_closed": _gap_closed(job, alone.report, report) if k < students else None,
                **({"learned_on": True} if k >= students else {}),  # the teacher
                "seed": spec.seed,
                "folder": folder if k else ".",
                "alone": {"fingerprint": alone.fingerprint, **alone.report, "from_store": stored},
            }
        )
    pairs = [float(agreement(one, other)) for one, other in itertools.combinations(logits, 2)]
    best = choose(outcomes[:students]) if len(data.val) else None
    job.say(sentence(found, best))
    mean = combine_logits(torch.stack(logits), combine=job.config.combine, T=torch.ones(()))
    together = {
        "members": len(found),
        "combine": job.config.combine,
        **{fact: sum(one[fact] for one in found) for fact in ("parameters", "flops")},
        "test": results_on_test(mean, data.dataset),
    }
    return {
        "peers": found,
        "together": with_agreement(together, mean, job.teacher),
        "diversity": 1 - statistics.fmean(pairs),
        "best": best,
        "mean_errors": statistics.fmean(one["test"]["errors"] for one in found[:students]),
        "mean_errors_alone": statistics.fmean(one["alone"]["test"]["errors"] for one in found[:students]),
        "agreement": statistics.fmean(pairs),
    }


def _gap_closed(job: Job, alone: Mapping[str, Any], report: Mapping[str, Any]) -> float | None:
    """A peer's share of the gap between itself alone and the teacher; None without a teacher, or without a gap."""
    if job.teacher is None:
        return None
    return gap_closed(job.summary["teacher"]["test"]["errors"], alone["test"]["errors"], report["test"]["errors"])


def without_unused_peers(jobs: Sequence[Job]) -> None:
    """Leave `peers` out of the jobs of a sweep whose method trains each student by itself, and note it.

    Only beside jobs whose method couples peers; a run by itself refuses peers that it does not use.
    """
    coupled = [job for job in jobs if job.method is not None and job.method.couples_models]
    for job in jobs:
        if coupled and job.config.peers and job.method is not None and not job.method.couples_models:
            job.config = replace(job.config, peers=())
            job.note(
                f"peers are not used by method={job.config.method_name}, which trains each student by itself: its "
                f"student is the first of the peers that method={coupled[0].config.method_name} trains"
            )


def sentence(peers: Sequence[dict[str, Any]], best: int | None) -> str:
    """A line for the log on all peers."""
    errors = ", ".join(f"{one['name']} with seed {one['seed']}: {one['test']['errors']:,}" for one in peers)
    chosen = "" if best is None else f"; the best by validation is number {best}"
    return f"test errors of the peers: {errors}{chosen}"
