"""Which models are trained side by side on the same batches: those of one seed, length, batch size and augmentation,
whatever their architectures, as many as fit in memory."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kd_cli.config.fingerprint import fingerprint
from kd_cli.errors import first_line
from kd_cli.learn.batches import distinct
from kd_cli.runs.building import TrainingTask, stream_of
from kd_cli.runs.group import Member, Stage
from kd_cli.runs.models import build_module
from kd_cli.runs.stack_size import free_memory, memory_of_step, memory_of_weights

log = logging.getLogger(__name__)

GROUPS = {"model": "student", "optimizer": "optimizer", "schedule": "schedule", "method": "method"}
OF_TRAINING = ("epochs", "batch_size", "keep", "batchnorm")
OF_MODEL = ("student", "optimizer", "method", "normalize")  # groups that may differ between models side by side


def cohort_key(tasks: Sequence[TrainingTask]) -> str:
    """A fingerprint that two stacks share when they can be trained side by side; a single model is a stack of one."""
    return fingerprint([cohort_facts(tasks[0]), list(distinct([task.spec.seed for task in tasks]))])


def cohort_facts(task: TrainingTask) -> dict[str, Any]:
    """What must be equal for models to be trained side by side, by configuration key, beside the seed."""
    return {key: value for key, value in stack_facts(task).items() if key.partition(".")[0] not in OF_MODEL}


def stack_facts(task: TrainingTask) -> dict[str, Any]:
    """What must be equal for models to be trained in one stack, by configuration key."""
    # The configured value: models without BatchNorm, whose fingerprints leave it out, go along with any.
    return {**dict(_by_key(task.stack_facts())), "training.batchnorm": task.spec.batchnorm}


def _by_key(facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The facts of a task by configuration key: `student` for the function that builds it, `student.hidden`."""
    for name, group in GROUPS.items():
        for key, value in facts[name].items():
            yield group if key == "_target_" else f"{group}.{key}", value
    for name in OF_TRAINING:
        yield f"training.{name}", facts.get(name)
    for key, value in facts["augment"].items():
        yield f"training.{key}", value
    for key, value in facts.get("recipe", {}).items():
        yield f"training.{key}", value
    yield "student.prune", facts.get("prune")
    yield "precision", facts["precision"]


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys in which two differ; where a group's option differs, that one alone for the group."""
    return shortened([key for key in {**one, **other} if (key in one, one.get(key)) != (key in other, other.get(key))])


def differing_keys(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which the first differs from any other."""
    return shortened([key for other in facts[1:] for key in differences(facts[0], other)])


def shortened(keys: Sequence[str]) -> list[str]:
    """The keys, each once, without those of a group that is itself among them."""
    return [key for key in dict.fromkeys(keys) if key.partition(".")[0] == key or key.partition(".")[0] not in keys]


def fitting(stage: Stage, stacks: Sequence[list[Member]]) -> list[list[list[Member]]]:
    """The stacks in groups that fit in memory together, estimated from above: the weights of all, one's step.

    A model whose memory cannot be estimated is in a group by itself.
    """
    if len(stacks) < 2:
        return [[stack] for stack in stacks]
    room = free_memory(stage.data.device)
    known: dict[str, tuple[float, float]] = {}
    groups: list[list[list[Member]]] = []
    weights = largest = 0.0
    for stack in stacks:
        key = stack[0].task.stack_key()
        if key not in known:
            known[key] = memory_of(stage, stack[0])
        own, step = (len(stack) * memory for memory in known[key])
        if groups and weights + own + max(largest, step) <= room:
            groups[-1].append(stack)
            weights, largest = weights + own, max(largest, step)
        else:
            groups.append([stack])
            weights, largest = own, step
    for group in groups:
        if len(group) > 1:
            each, steps = zip(*(known[stack[0].task.stack_key()] for stack in group), strict=True)
            log.info(
                "%d models side by side: about %s each, and %s in a step", len(group), megabytes(each), megabytes(steps)
            )
    return groups


def megabytes(sizes: Sequence[float]) -> str:
    """Bytes, or the range of several, in words: 0.3 MB, 0.3 to 12 MB."""
    ends = dict.fromkeys(f"{mb:,.0f}" if mb >= 10 else f"{mb:.2g}" for mb in (min(sizes) / 1e6, max(sizes) / 1e6))
    return f"{' to '.join(ends)} MB"


def memory_of(stage: Stage, member: Member) -> tuple[float, float]:
    """Bytes of a model between steps, and beside these in a step; infinite where its code fails on one example."""
    task, data = member.task, stage.data
    try:
        module = build_module(task.spec, data.dataset, role=stream_of(stage.role), device=data.device)
        return memory_of_weights(data, module), memory_of_step(data, task, module)
    except Exception as error:
        log.warning("%s is trained by itself: its memory cannot be estimated (%s)", member.title, first_line(error))
        return math.inf, math.inf


def why_not_one_stack(members: Sequence[Member], reasons: Mapping[str, str]) -> str:
    """Why these models, one of each stack of a cohort, are not one stack; `reasons` are known ones, by member."""
    found = list(dict.fromkeys(reasons[member.key] for member in members if member.key in reasons))
    facts = [stack_facts(member.task) for member in members]
    if differing := differing_keys(facts):
        found.append(f"they differ in {', '.join(differing)}")
    return "; ".join(found) or "a stack of them is no faster"
