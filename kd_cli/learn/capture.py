"""Blocks of steps recorded once and replayed, so that a small network does not wait for its launches.

A GPU computes a step of a small network faster than Python can ask for its kernels one by one. A CUDA graph holds the
kernels of many steps and is launched as one. What Python does between the kernels is done once, at the recording: all
that changes from step to step must be a tensor that stays where it is, and no step may wait for a number.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from kd_cli.learn.optim import is_recordable

log = logging.getLogger(__name__)

OWN = ("kd_cli", "torch", "torchvision")  # code that is known to do the same in every step


class Graph(Protocol):
    """Work that was recorded and not done, and is done at every replay."""

    def record(self, work: Callable[[], None], generators: Sequence[torch.Generator]) -> None:
        """`generators` are those that the work draws from, beside the device's own; each replay draws on."""
        ...

    def replay(self) -> None: ...


class CudaGraph:
    """A graph of the current CUDA device."""

    def __init__(self) -> None:
        self.graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], None], generators: Sequence[torch.Generator]) -> None:
        for generator in generators:
            self.graph.register_generator_state(generator)
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            work()

    def replay(self) -> None:
        self.graph.replay()


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
        graph: Callable[[], Graph],
        *,
        generators: Sequence[torch.Generator],
        replayed: Callable[[], None],
    ) -> None:
        """`replayed` is told of each step that is done without Python."""
        self.block, self.graph, self.generators, self.replayed = block, graph, generators, replayed
        self.done: dict[tuple[int, ...], int] = {}
        self.recorded: dict[tuple[int, ...], tuple[Graph, tuple[Tensor | None, ...]]] = {}
        self.failed = False

    def __call__(
        self, index: Tensor, draws: Tensor | None, sizes: tuple[int, ...], factors: Sequence[float], rates: Tensor
    ) -> None:
        """`rates` are the `factors` as a tensor [steps] on the device."""
        if sizes not in self.recorded and not self.failed and self.done.get(sizes, 0) >= 2:
            self._record(index, draws, sizes, rates)
        if sizes not in self.recorded:
            self.block(index, draws, sizes, factors)
            self.done[sizes] = self.done.get(sizes, 0) + 1
            return
        graph, places = self.recorded[sizes]
        for place, now in zip(places, (index, draws, rates), strict=True):
            if place is not None and now is not None:
                place.copy_(now)
        graph.replay()
        for _ in sizes:
            self.replayed()

    def _record(self, index: Tensor, draws: Tensor | None, sizes: tuple[int, ...], rates: Tensor) -> None:
        places = (index.clone(), None if draws is None else draws.clone(), rates.clone())
        graph = self.graph()
        try:
            graph.record(
                lambda: self.block(places[0], places[1], sizes, places[2].unbind()),
                self.generators,
            )
        except Exception as error:  # whatever a driver, a kernel or a layer has against it
            self.failed = True
            first = (str(error).splitlines() or [repr(error)])[0]
            log.warning("steps cannot be recorded as CUDA graphs, and run one by one: %s", first)
        else:
            self.recorded[sizes] = graph, places


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
            if kind.__module__.split(".")[0] not in OWN and not getattr(part, "recordable", False):
                return f"{kind.__name__} does not say recordable = True"
    return None
