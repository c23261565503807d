"""Blocks of steps recorded once and replayed, so that a small network does not wait for its launches.

A GPU computes a step of a small network faster than Python can ask for its kernels one by one. A CUDA graph holds the
kernels of many steps and is launched as one. What Python does between the kernels is done once, at the recording: all
that changes from step to step must be a tensor that stays where it is, and no step may wait for a number.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from kd_cli.errors import KdError, first_line
from kd_cli.learn.optim import is_recordable
from kd_cli.learn.stacked.dense import put_on
from kd_cli.shipped import is_shipped

log = logging.getLogger(__name__)


class Recorder(Protocol):
    """Where steps are done, recorded and replayed."""

    def run(self, work: Callable[[], None]) -> None:
        """Do the work as it is, in the place where it would be recorded."""
        ...

    def record(self, work: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
        """Record the work, which is not done; what is returned does it, as often as it is called.

        `generators` are those that the work draws from, beside the device's own; each replay draws on.
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


class Block(Protocol):
    """Consecutive steps on batches of `sizes` examples, at `factors` times the learning rates, one for each step.

    `index` [U,n] and `draws` [U,n,k] hold the examples of all batches, one batch after another.
    """

    def __call__(
        self, index: Tensor, draws: Tensor | None, sizes: tuple[int, ...], factors: Iterable[float | Tensor]
    ) -> None: ...


class Recorded:
    """A block of steps that is done twice as it is, and recorded and replayed from then on.

    The first times allocate what lasts: an optimiser's state, buffers, a library's workspace. Blocks of other sizes,
    the last of an epoch, have recordings of their own. When a recording fails, it says so once and goes on without.
    """

    def __init__(
        self,
        block: Block,
        recorder: Recorder,
        *,
        generators: Sequence[torch.Generator],
        replayed: Callable[[], None],
    ) -> None:
        """`replayed` is told of each step that is done without Python."""
        self.block, self.recorder, self.generators, self.replayed = block, recorder, generators, replayed
        self.done: dict[tuple[int, ...], int] = {}
        self.recorded: dict[tuple[int, ...], tuple[Callable[[], None], tuple[Tensor | None, ...]]] = {}
        self.failed = False

    def __call__(
        self, index: Tensor, draws: Tensor | None, sizes: tuple[int, ...], factors: Sequence[float], rates: Tensor
    ) -> None:
        """`rates` are the `factors` as a tensor [steps] on the device."""
        if sizes not in self.recorded and not self.failed and self.done.get(sizes, 0) >= 2:
            self._record(index, draws, sizes, rates)
        if sizes not in self.recorded:
            self.recorder.run(lambda: self.block(index, draws, sizes, factors))
            self.done[sizes] = self.done.get(sizes, 0) + 1
            return
        replay, places = self.recorded[sizes]
        for place, now in zip(places, (index, draws, rates), strict=True):
            if place is not None and now is not None:
                place.copy_(now)
        replay()
        for _ in sizes:
            self.replayed()

    def _record(self, index: Tensor, draws: Tensor | None, sizes: tuple[int, ...], rates: Tensor) -> None:
        places = (index.clone(), None if draws is None else draws.clone(), rates.clone())
        try:
            replay = self.recorder.record(
                lambda: self.block(places[0], places[1], sizes, places[2].unbind()),
                self.generators,
            )
        except NotClean:
            raise
        except Exception as error:  # whatever a driver, a kernel or a layer has against it
            self.failed = True
            log.warning("steps cannot be recorded as CUDA graphs, and run one by one: %s", first_line(error))
        else:
            self.recorded[sizes] = replay, places


def why_not_recorded(optimizer: torch.optim.Optimizer, code: Iterable[object]) -> str | None:
    """Why steps made of this cannot be replayed, or None; `code` is the models and the method.

    Somebody's own code may do in Python what changes from step to step, and a replay would leave that out unsaid. It
    is recorded when it has an attribute `recordable = True`.
    """
    if not is_recordable(optimizer):
        return f"the optimiser {type(optimizer).__name__} counts its steps outside the device"
    for one in code:
        for part in one.modules() if isinstance(one, nn.Module) else [one]:
            kind = type(part)
            if getattr(part, "recordable", False):
                continue
            if isinstance(part, nn.Module) and (added := put_on(part)):
                return f"{kind.__name__} has {added[0].strip('_')} of its own and does not say recordable = True"
            if not is_shipped(kind.__module__):
                return f"{kind.__name__} does not say recordable = True"
    return None
