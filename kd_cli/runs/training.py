"""Train many models: those that differ only in their numbers together, the others one by one."""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.config.fingerprint import fingerprint
from kd_cli.config.values import TrainSpec
from kd_cli.errors import ConfigError
from kd_cli.learn.engine import Examples, Outcome, Plan, fit, steps_together
from kd_cli.learn.stacked import flat
from kd_cli.learn.stacked.learner import why_not
from kd_cli.learn.teachers import Teacher
from kd_cli.runs.building import (
    TrainingTask,
    make_learner,
    make_method,
    make_optimizer,
    make_plan,
    make_weights,
    stream_of,
)
from kd_cli.runs.device_data import DeviceData, device_name
from kd_cli.runs.models import build_module
from kd_cli.runs.progress import Progress, describe
from kd_cli.storage.files import read_json, write_json
from kd_cli.storage.training_state import StackNotes, TrainingState

log = logging.getLogger(__name__)

SIZES = (4, 16, 64, 256)  # the stacks that are tried
ENOUGH = 64  # the smallest after which no larger one is tried when it gains nothing
ABOUT = 1.1  # times the fastest one's time: measurements of one stack differ by as much


@dataclass(frozen=True)
class Care:
    """How trainings are looked after while they run: where their states are kept, who is told, who may stop them."""

    folder: Path | None = None  # of states, for going on after an interruption
    every: tuple[int, float] = (1, 0.0)
    stopping: Callable[[], bool] = lambda: False
    stacks: StackNotes | None = None  # which models were trained together before an interruption
    kept: list[TrainingState] = field(default_factory=list)  # to be removed when their results are safe

    @contextlib.contextmanager
    def until_safe(self) -> Iterator[Callable[[], None]]:
        """Call what is given when the results of the trainings in the block are safe; their states are then removed."""
        safe = False

        def told() -> None:
            nonlocal safe
            safe = True

        try:
            yield told
        finally:
            if safe:
                for state in self.kept:
                    state.remove()
            self.kept.clear()


Row = dict[str, Any]
Told = Callable[[int, Row], None]  # is told an epoch's metrics of the model with this number


def train_all(
    bench: DeviceData,
    lessons: Sequence[TrainingTask],
    *,
    role: str,
    title: str,
    teacher: Teacher | None = None,
    notes: Path | None = None,
    diagnostics: bool = False,
    care: Care | None = None,
    subject: str = "",
    told: Told = lambda i, row: None,
    needed: Sequence[bool] | None = None,
    names: Sequence[str] | None = None,
    owners: Sequence[str] | None = None,
    results: Sequence[Path] = (),
) -> Iterator[tuple[int, Outcome]]:
    """Train a model for each lesson on the bench's training part; yield numbers and outcomes as each stack ends.

    `subject` is the fingerprint of what all lessons share beside themselves: data, teacher. `told` gets the metrics of
    lesson i after each epoch. Stacks in which no lesson is `needed` are left out. `names` are the jobs' names for a
    person, to say which run one by one. `owners` tell apart who trains the same, `results` are the files that the
    trainings end with, one for each lesson.

    `role` names the rows in metrics.jsonl, `title` is what a person reads. `notes` is a file that remembers which size
    of stack is fastest on this machine, so that the same sweep takes the same path again.
    """
    care = care or Care()
    groups: dict[str, list[int]] = {}
    for i, lesson in enumerate(lessons):
        groups.setdefault(lesson.stack_key(), []).append(i)
    names = names or [lesson.spec.name for lesson in lessons]
    for members in groups.values():
        # Neighbours with equal learning rate and weight decay share one call of the optimiser, those with equal seeds
        # their batches.
        members.sort(key=lambda i: (sorted(lessons[i].hyper().items()), lessons[i].spec.seed))
        wanted = [i for i in members if needed is None or needed[i]]
        if not wanted:
            continue

        def stack(chunk: list[int]) -> Stack:
            own = [owners[i] for i in chunk] if owners is not None else []
            files = [results[i] for i in chunk] if results else []
            lessons_here = [lessons[i] for i in chunk]
            return Stack(bench, lessons_here, role, title, teacher, diagnostics, care, subject, own, files)

        def train(chunk: list[int]) -> Iterator[tuple[int, Outcome]]:
            outcomes = stack(chunk).train(functools.partial(_tell, told, chunk))
            yield from dict(zip(chunk, outcomes, strict=True)).items()

        # Those which are left after an interruption have the company that they had before it.
        stage = fingerprint([role, subject, lessons[members[0]].stack_key()])
        keys = lesson_keys([lessons[i] for i in members], [owners[i] for i in members] if owners is not None else None)
        number = dict(zip(keys, members, strict=True))
        for noted in care.stacks.get(stage) if care.stacks is not None else ():
            chunk = [number[key] for key in noted if key in number]
            if len(chunk) == len(noted) and set(chunk) & set(wanted):
                wanted = [i for i in wanted if i not in chunk]
                yield from train(chunk)
        if not wanted:
            continue
        size, why_one = stack_size(bench, [lessons[i] for i in members], role=role, teacher=teacher, notes=notes)
        if why_one is not None:
            log.info("%d × %s run one by one: %s (%s)", len(wanted), title, why_one, listed(names[i] for i in wanted))
        # one that is left over is doubled: a stack of one would round differently
        planned = [chunk * 2 if size > 1 and len(chunk) == 1 else chunk for chunk in chunks(wanted, size)]
        if care.stacks is not None and len(members) > 1:
            key_of = {i: key for key, i in number.items()}
            care.stacks.add(stage, [[key_of[i] for i in chunk] for chunk in planned])
        for chunk in planned:
            yield from train(chunk)


def lesson_keys(lessons: Sequence[TrainingTask], owners: Sequence[str] | None) -> list[str]:
    """A name for each lesson, by which it is found again after an interruption; the same lesson twice has two."""
    count: collections.Counter[str] = collections.Counter()
    keys = []
    for i, lesson in enumerate(lessons):
        facts = [lesson.spec.identity(""), lesson.method, lesson.T, lesson.alpha, lesson.beta]
        key = fingerprint([facts, owners[i] if owners is not None else None])
        keys.append(f"{key}.{count[key]}")
        count[key] += 1
    return keys


def listed(names: Iterable[str]) -> str:
    """The first few of the names, and how many more there are."""
    first = list(dict.fromkeys(names))
    return ", ".join(first[:3]) + (f" and {len(first) - 3} more" if len(first) > 3 else "")


def _tell(told: Told, chunk: list[int], s: int, row: Row) -> None:
    if s == chunk.index(chunk[s]):  # not for a model that only keeps another one company
        told(chunk[s], row)


def chunks(members: list[int], size: int) -> list[list[int]]:
    """Parts of at most `size`, as equal as can be."""
    parts = -(-len(members) // size)
    edges = [round(k * len(members) / parts) for k in range(parts + 1)]
    return [members[a:b] for a, b in itertools.pairwise(edges)]


@dataclass(frozen=True)
class Stack:
    """Lessons that are given together."""

    bench: DeviceData
    lessons: list[TrainingTask]
    role: str
    title: str
    teacher: Teacher | None
    diagnostics: bool
    care: Care
    subject: str
    owners: list[str]
    results: list[Path]

    def train(self, told: Told) -> list[Outcome]:
        """Train them and tell of each epoch; when they do not fit in the device's memory together, in halves."""
        lessons, spec = self.lessons, self.lessons[0].spec
        many = f"{len(lessons)} × " if len(lessons) > 1 else ""
        state = self.state()
        outcomes: list[Outcome] | None = None
        try:
            outcomes = fit(
                make_learner(self.bench, lessons, self.role),
                self.bench.train,
                self.bench.val,
                role=stream_of(self.role),
                seeds=[lesson.spec.seed for lesson in lessons],
                plan=make_plan(self.bench, spec, self.role, diagnostics=self.diagnostics),
                method=make_method(lessons),
                weights=make_weights(self.bench, lessons),
                teacher=self.teacher,
                observer=Progress(many + self.title, spec.epochs, role=self.role, told=told),
                checkpoint=state,
                stopping=self.care.stopping,
                recorder=self.bench.recorder,
            )
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ConfigError(
                f"{spec.name} has BatchNorm, which cannot learn from a batch of one example",
                hint="a batch size of 2 or more, and two training examples or more",
            ) from error
        except torch.OutOfMemoryError:
            if len(lessons) == 1:
                raise
        if outcomes is None:  # and the error has let go of the models
            log.info("%d models do not fit in the memory of %s together; halving", len(lessons), self.bench.device)
            torch.cuda.empty_cache()
            half = len(lessons) // 2
            return self.part(slice(half)).train(told) + self.part(slice(half, None)).train(
                lambda s, row: told(s + half, row)
            )
        if state is not None:
            self.care.kept.append(state)
        for outcome in outcomes:
            outcome.history = [{**row, "role": self.role} for row in outcome.history]
        return outcomes

    def part(self, which: slice) -> Stack:
        return replace(self, lessons=self.lessons[which], owners=self.owners[which], results=self.results[which])

    def state(self) -> TrainingState | None:
        """Where the state of this very training is kept: its name is made of all that its course depends on."""
        if self.care.folder is None:
            return None
        lessons = [
            [lesson.spec.identity(""), lesson.method, lesson.T, lesson.alpha, lesson.beta] for lesson in self.lessons
        ]
        bench = [self.bench.dataset.fingerprint, len(self.bench.train), self.bench.device.type, self.diagnostics]
        machine = [torch.get_num_threads(), torch.__version__, flat.LARGE, flat.PIECE]
        key = fingerprint([self.role, self.subject, lessons, self.owners, bench, *machine])
        return TrainingState(self.care.folder / f"{key}.state", every=self.care.every, results=self.results)


def said_of(title: str, spec: TrainSpec, outcome: Outcome) -> str:
    """A line on a finished training."""
    epochs = f"{spec.epochs:,} epoch{'s' * (spec.epochs != 1)}"
    return f"{title}: {epochs} in {outcome.seconds:.1f} s, {describe(outcome.history[-1:])}"


# ---------------------------------------------------------------- how many at once


def stack_size(
    bench: DeviceData, lessons: Sequence[TrainingTask], *, role: str, teacher: Teacher | None, notes: Path | None
) -> tuple[int, str | None]:
    """How many of these models to train at once: the size that is fastest, as measured; 1 and why when none stack.

    The smallest of those that are about as fast: a larger one takes more memory.
    """
    if len(lessons) == 1:
        return 1, None
    module = build_module(lessons[0].spec, bench.dataset, role=stream_of(role), device=bench.device)
    optimizer = make_optimizer(lessons[0], role, module.parameters())
    reason = why_not(module, optimizer, bench.train.images[0])
    if reason is not None:
        return 1, reason
    each = memory_of_one(bench, lessons[0], module)
    most = min(len(lessons), room_for(bench.device, each))
    if most < 2:
        return 1, "two do not fit in memory"
    shared = len({lesson.spec.seed for lesson in lessons}) == 1
    machine = [device_name(bench.device), torch.__version__, torch.get_num_threads()]
    key = fingerprint([lessons[0].stack_key(), bench.dataset.shape, bench.dataset.classes, most, shared, *machine])
    known = _read_notes(notes)
    if key not in known:
        candidates = [1, *(size for size in SIZES if size < most), most]
        seconds: dict[int, float] = {}
        for size in candidates:
            fastest = min(seconds.values(), default=math.inf)
            seconds[size] = _time_step(bench, lessons[:size], role, teacher) / size
            if size >= ENOUGH and seconds[size] > fastest / ABOUT:
                break  # larger ones gain nothing either, and would take their memory
        best = min(size for size, time in seconds.items() if time <= ABOUT * min(seconds.values()))
        known[key] = best
        _write_notes(notes, known)
        log.info(
            "%d × %s: %s at once, about %.3g MB each, measured %s",
            len(lessons),
            lessons[0].spec.name,
            best,
            each / 2**20,
            ", ".join(f"{1e3 * s:.3g} ms a step and model in stacks of {n}" for n, s in seconds.items()),
        )
    return int(known[key]), None


def _read_notes(notes: Path | None) -> dict[str, int]:
    try:
        found = read_json(notes) if notes is not None else {}
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict):
        return {}
    return {key: value for key, value in found.items() if isinstance(value, int) and value > 0}


def _write_notes(notes: Path | None, known: dict[str, int]) -> None:
    if notes is not None:
        notes.parent.mkdir(parents=True, exist_ok=True)
        write_json(notes, _read_notes(notes) | known)


def room_for(device: torch.device, each: int) -> int:
    """How many models of so many bytes fit in the device's free memory."""
    return int(free_memory(device) // each)


def memory_of_one(bench: DeviceData, lesson: TrainingTask, module: nn.Module) -> int:
    """Bytes that a model of a stack takes while it trains, by a careful estimate."""
    weights = 5 * sum(p.numel() for p in module.parameters())  # weight, gradient, two of the optimiser, a temporary
    outputs = 0

    def count(_module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal outputs
        outputs += output.numel() if isinstance(output, Tensor) else 0

    hooks = [m.register_forward_hook(count) for m in module.modules()]
    with torch.no_grad():
        module.eval()(bench.train.images[:1])
    for hook in hooks:
        hook.remove()
    batch, classes = min(lesson.spec.batch_size, len(bench.train)), bench.dataset.classes
    step = batch * (3 * outputs + 2 * bench.train.images[0].numel())
    block = min(steps_together(batch, classes), -(-len(bench.train) // batch)) * batch * classes
    losses = 10 * block  # of the logits that wait, their targets, and what a method makes of both
    return int(bench.dtype.itemsize * (weights + step + losses))


def free_memory(device: torch.device) -> float:
    """Bytes that a stack may take: most of what is free on a GPU, half of what is free on the machine."""
    if device.type == "cuda":
        return 0.8 * torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
        return 0.5 * 1024 * int(text.split("MemAvailable:")[1].split()[0])
    except (OSError, IndexError, ValueError):
        return 2.0 * 1024**3


def _time_step(bench: DeviceData, lessons: Sequence[TrainingTask], role: str, teacher: Teacher | None) -> float:
    """Seconds of one training step of these models, on copies that are thrown away; the best of several epochs."""
    spec = lessons[0].spec
    batch = min(spec.batch_size, len(bench.train))
    plan = make_plan(bench, spec, role)
    outcome, *_ = fit(
        make_learner(bench, lessons, role),
        Examples(bench.train.images[: 3 * batch], bench.train.labels[: 3 * batch]),
        Examples(bench.train.images[:0], bench.train.labels[:0]),
        role="timing",
        seeds=[lesson.spec.seed for lesson in lessons],
        plan=Plan(5, batch, plan.schedule, plan.augment, classes=plan.classes, fill=plan.fill),
        method=make_method(lessons),
        weights=make_weights(bench, lessons),
        teacher=teacher,
        recorder=bench.recorder,
    )
    return batch / max(row["examples_per_second"] for row in outcome.history)
