"""Blocks of steps recorded once as CUDA graphs and replayed, so that a small network does not wait for kernel launches.

A GPU computes a step of a small network faster than Python can launch its kernels one by one. A CUDA graph holds the
kernels of many steps and is launched as one. What Python does between the kernels happens once, while recording:
everything that changes from step to step must be a tensor at a fixed address, and no step may wait for a number.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor, nn

from kd_cli.errors import KdError, first_line
from kd_cli.learn.batches import Block
from kd_cli.learn.learner import Learner, ModuleLearner, Rate, UniformLearner
from kd_cli.learn.objective import Objective
from kd_cli.learn.optimizers import is_recordable, make_recordable
from kd_cli.learn.stacked.structure import instance_overrides
from kd_cli.learn.teachers import Teacher
from kd_cli.shipped import is_shipped

log = logging.getLogger(__name__)


class Recorder(Protocol):
    """Runs steps, or records them for replay."""

    def run(self, work: Callable[[], None]) -> None:
        """Do the work as it is, on the stream where it would be recorded."""
        ...

    def record(self, work: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
        """Record the work without doing it; return a function that does it, as often as it is called.

        `generators` are those that the work draws from, beside the device's own; each replay draws further.
        """
        ...


class CudaGraphs:
    """Records on one GPU. All its recordings share their memory: they are replayed one after another."""

    def __init__(self, device: torch.device) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        self.stream = torch.cuda.Stream(self.device)
        self.pool = torch.cuda.graph_pool_handle()

    def run(self, work: Callable[[], None]) -> None:
        with self._beside():
            work()

    def record(self, work: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        torch.cuda.synchronize(self.device)
        with self._beside():
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            try:
                work()
                graph.capture_end()
            except BaseException:
                self._abandon(graph, generators)
                raise

        def replay() -> None:
            with self._beside():
                graph.replay()

        return replay

    @contextlib.contextmanager
    def _beside(self) -> Iterator[None]:
        """A block on the recordings' own stream; what is before and after it waits for it."""
        with torch.cuda.device(self.device):
            current = torch.cuda.current_stream()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):
                yield
            current.wait_stream(self.stream)

    def _abandon(self, graph: torch.cuda.CUDAGraph, generators: Sequence[torch.Generator]) -> None:
        """Leave the device as it was before a recording that failed. NotClean where that does not succeed."""
        with contextlib.suppress(Exception):
            graph.capture_end()
        with contextlib.suppress(Exception):  # skipped by capture_end when the driver has given the recording up
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
        for generator in (*generators, torch.cuda.default_generators[self.device.index]):
            with contextlib.suppress(Exception):
                generator.graphsafe_set_state(generator.clone_state())
        try:
            torch.cuda.synchronize(self.device)
            for generator in (*generators, torch.cuda.default_generators[self.device.index]):
                torch.empty(1, device=self.device).uniform_(generator=generator.clone_state())
        except Exception as error:
            raise NotClean(
                "a recording of steps as CUDA graphs failed, and the GPU cannot go on from there",
                hint="cuda_graphs=false runs the steps one by one",
            ) from error


class NotClean(KdError):
    """A recording failed in a way that nothing can follow."""


class PlainSteps:
    """Makes the steps of a block as the learner does."""

    def __init__(self, learner: Learner, teacher: Teacher | None, objective: Objective) -> None:
        self.learner, self.teacher, self.objective = learner, teacher, objective

    def __call__(self, block: Block, rates: Sequence[Rate], stepped: Callable[[], None] = lambda: None) -> None:
        """`rates` are factors on the learning rates, one for each batch; `stepped` is called after each step."""
        for _ in self.learner.steps(block, self.teacher, self.objective, rates):
            stepped()


class RecordedSteps:
    """Makes the steps of a block as they are twice, then records them and replays the recording.

    The first times allocate what stays: an optimiser's state, buffers, a library's workspace. Blocks of other sizes,
    the last of an epoch, have recordings of their own. When a recording fails, a warning says so once and steps are
    made as they are from then on.
    """

    def __init__(self, steps: PlainSteps, recorder: Recorder, generators: Sequence[torch.Generator]) -> None:
        self.steps, self.recorder, self.generators = steps, recorder, generators
        self.done: dict[tuple[int, ...], int] = {}
        self.recorded: dict[tuple[int, ...], tuple[Callable[[], None], tuple[Tensor | None, ...]]] = {}
        self.failed = False

    def __call__(self, block: Block, rates: Sequence[float], stepped: Callable[[], None] = lambda: None) -> None:
        sizes = block.sizes
        now = (
            block.index,
            None if block.augmented is None else block.augmented.draws,
            torch.tensor(rates, device=block.index.device),
        )
        if sizes not in self.recorded and not self.failed and self.done.get(sizes, 0) >= 2:
            self._record(block, now)
        if sizes not in self.recorded:
            self.recorder.run(lambda: self.steps(block, rates, stepped))
            self.done[sizes] = self.done.get(sizes, 0) + 1
            return
        replay, places = self.recorded[sizes]
        for place, value in zip(places, now, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        replay()
        for _ in sizes:
            stepped()

    def _record(self, block: Block, now: tuple[Tensor | None, ...]) -> None:
        index, draws, rates = (None if value is None else value.clone() for value in now)
        assert index is not None
        assert rates is not None
        augmented = None if draws is None or block.augmented is None else replace(block.augmented, draws=draws)
        fixed = replace(block, index=index, augmented=augmented)
        try:
            replay = self.recorder.record(
                # a copy, whose labels are gathered within the recording
                lambda: self.steps(replace(fixed), rates.unbind()),
                self.generators,
            )
        except NotClean:
            raise
        except Exception as error:  # whatever a driver, a kernel or a layer has against it
            self.failed = True
            log.warning("steps cannot be recorded as CUDA graphs, and run one by one: %s", first_line(error))
        else:
            self.recorded[block.sizes] = replay, (index, draws, rates)


def recorded_steps(
    learner: Learner, teacher: Teacher | None, objective: Objective, recorder: Recorder | None
) -> PlainSteps | RecordedSteps:
    """What makes the steps: recorded and replayed where there is a recorder and all parts of a step allow it."""
    steps = PlainSteps(learner, teacher, objective)
    if recorder is None:
        return steps
    if not isinstance(learner, UniformLearner):
        log.warning("steps are not recorded as CUDA graphs, and run one by one: several learners take turns")
        return steps
    if isinstance(learner, ModuleLearner) and not learner.makes_plain_steps:
        log.warning("steps are not recorded as CUDA graphs, and run one by one: they do more than plain ones")
        return steps
    code = [learner.module, objective.method, *(teacher.modules if teacher is not None else ())]
    if (reason := why_not_recorded(learner.optimizer, code)) is not None:
        log.warning("steps are not recorded as CUDA graphs, and run one by one: %s", reason)
        return steps
    make_recordable(learner.optimizer)
    return RecordedSteps(steps, recorder, learner.generators.own)


def why_not_recorded(optimizer: torch.optim.Optimizer, modules: Iterable[nn.Module]) -> str | None:
    """Why steps made of these modules cannot be replayed, or None.

    Code outside this package may change in Python from step to step, and a replay would leave that out silently. It is
    recorded when it has an attribute `recordable = True`.
    """
    if not is_recordable(optimizer):
        return f"the optimiser {type(optimizer).__name__} counts its steps outside the device"
    for part in (part for module in modules for part in module.modules()):
        kind = type(part)
        if getattr(part, "recordable", False):
            continue
        if added := instance_overrides(part):
            return f"{kind.__name__} has {added[0].strip('_')} of its own and does not say recordable = True"
        if not is_shipped(kind.__module__):
            return f"{kind.__name__} does not say recordable = True"
    return None
