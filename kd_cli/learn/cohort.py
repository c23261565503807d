"""Learners of any architectures that are advanced side by side: each batch is fetched, augmented and answered by the
teacher once, then every learner takes its own step on it.

Each learner trains as it would by itself, to the same bytes where the number of threads is the same: it has its own
optimiser, method and weights, and continues its own random numbers. With several workers, learners take their steps at
the same time, each with one thread, while the next batch is fetched and answered. Shapes: S models, the sum of the
learners' own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from kd_cli.learn.batches import Batch, Block
from kd_cli.learn.learner import Learner, Rate, TermGradient, UniformLearner, ask
from kd_cli.learn.methods.base import Terms
from kd_cli.learn.objective import Objective, SideBySide
from kd_cli.learn.outputs import Outputs
from kd_cli.learn.own_dropout import OwnDropout
from kd_cli.learn.randomness import GlobalState
from kd_cli.learn.teachers import Teacher


class Cohort(Learner):
    """Learners side by side on the same batches; its objective is `SideBySide`.

    With `workers` above 1, so many learners take a step at once on a CPU. torch's dropout then draws from a generator
    of the learner's own; learners with other draws from torch's global generator still take turns.
    """

    def __init__(self, learners: Sequence[UniformLearner], device: torch.device, *, workers: int = 1) -> None:
        self.learners, self.device, self.workers = list(learners), device, workers
        self.pool: ThreadPoolExecutor | None = None
        self.draws: list[bool] | None = None  # whether each learner draws from torch's global generator, once known
        self.own = [False] * len(learners)  # whether its dropout draws from a generator of its own
        self.dropouts = [OwnDropout(learner.module) for learner in learners] if workers > 1 else []
        self.size = sum(learner.size for learner in learners)
        self.places = [(learner, s) for learner in learners for s in range(learner.size)]  # of the S models
        self.states: list[GlobalState] = []  # of torch's global generators, while the learners train

    @property
    def parts(self) -> Sequence[UniformLearner]:
        return self.learners

    def with_objectives(self, objective: Objective) -> Sequence[tuple[Learner, Objective]]:
        return list(zip(self.learners, objectives_of(objective), strict=True))

    @contextlib.contextmanager
    def training(self, role: str, epoch: int) -> Iterator[None]:
        with contextlib.ExitStack() as contexts:
            if self.workers > 1:
                self.pool = contexts.enter_context(one_thread_each(self.workers))
            for learner in self.learners:
                contexts.enter_context(learner.training(role, epoch))
                self.states.append(GlobalState(self.device))
            if self.pool is not None:
                self._own_dropouts(contexts)
            yield
            self.states.clear()
        self.pool = None

    def steps(
        self, block: Block, teacher: Teacher | None, objective: Objective, rates: Sequence[Rate]
    ) -> Iterator[None]:
        """Make consecutive steps: on each batch one of every learner."""
        blocks = block.shared(len(self.learners))
        running = [
            learner.steps(own, teacher, one, rates)
            for learner, own, one in zip(self.learners, blocks, objectives_of(objective), strict=True)
        ]
        batches, pool, steps = blocks[0].batches, self.pool, len(block.sizes)

        def prepare() -> None:
            batch = batches.fetch()
            if teacher is not None and teacher.needs_images:
                ask(teacher, batch, objective.weights.T)

        coming = None if pool is None else pool.submit(prepare)
        for number in range(steps):
            if pool is not None and coming is not None:  # a batch and its answer are there before the workers begin
                coming.result()
                batches.at(number)
                coming = pool.submit(prepare) if number + 1 < steps else None
            self._advance(running)
            yield
        self._advance(running)  # to their ends: some add their losses there

    def step(self, batch: Batch, target: Outputs | None, objective: Objective, rate: Rate) -> None:
        start = 0
        for state, learner, one in zip(self.states, self.learners, objectives_of(objective), strict=True):
            own = target if target is None or len(target.logits) == 1 else target.of(slice(start, start + learner.size))
            start += learner.size
            with state:
                learner.step(batch, own, one, rate)

    def _own_dropouts(self, contexts: contextlib.ExitStack) -> None:
        """Let dropout layers draw where this cohort can watch them, or from their own generators once it is known."""
        for k, (state, dropout) in enumerate(zip(self.states, self.dropouts, strict=True)):
            contexts.enter_context(dropout.replaced())
            if self.own[k]:
                dropout.continue_from(state.of_cpu)

    def _advance(self, running: Sequence[Iterator[None]]) -> None:
        """Each learner's next step, with the random numbers that it would draw by itself."""
        if self.pool is None:
            for state, steps in zip(self.states, running, strict=True):
                advance(state, steps)
            return
        if self.draws is None:
            self.draws = [False] * len(running)
            for k, (state, steps) in enumerate(zip(self.states, running, strict=True)):
                before = state.of_cpu
                only_dropout = self.pool.submit(watched_advance, state, steps, self.dropouts[k]).result()
                self.draws[k] = not only_dropout
                if only_dropout and not torch.equal(before, state.of_cpu):
                    self.own[k] = True
                    self.dropouts[k].continue_from(state.of_cpu)
            return
        before = torch.default_generator.get_state()
        quiet = [steps for steps, draws in zip(running, self.draws, strict=True) if not draws]
        list(self.pool.map(lambda steps: next(steps, None), quiet))
        if not torch.equal(before, torch.default_generator.get_state()):
            raise RuntimeError("a model draws random numbers in some steps only, and cannot take them beside others")
        for state, steps, draws in zip(self.states, running, self.draws, strict=True):
            if draws:
                self.pool.submit(advance, state, steps).result()

    def logits(self, images: Tensor) -> Tensor:
        return torch.cat([learner.logits(images) for learner in self.learners])

    def term_gradients(self, batch: Batch, terms: Callable[[Outputs], Terms]) -> dict[str, TermGradient]:
        raise NotImplementedError("the learners of a cohort have terms of their own: see with_objectives")

    def rates(self, factor: float) -> list[float]:
        return [rate for learner in self.learners for rate in learner.rates(factor)]

    def model_state(self, s: int) -> dict[str, Tensor]:
        learner, own = self.places[s]
        return learner.model_state(own)

    def state(self) -> dict[str, Any]:
        return {"learners": [learner.state() for learner in self.learners], "workers": self.workers}

    def load_state(self, state: dict[str, Any]) -> None:
        for learner, own in zip(self.learners, state["learners"], strict=True):
            learner.load_state(own)
        self.workers = state["workers"]  # on which the last digits depend
        self.dropouts = [OwnDropout(learner.module) for learner in self.learners] if self.workers > 1 else []


def watched_advance(state: GlobalState, steps: Iterator[None], dropout: OwnDropout) -> bool:
    """Make the next step of a learner; whether nothing but its dropout layers drew from the global generator."""
    with state:
        dropout.watch()
        next(steps, None)
        return dropout.watched()


def advance(state: GlobalState, steps: Iterator[None]) -> None:
    """Make the next step of a learner, which continues from its own state of the global generators."""
    with state:
        next(steps, None)


@contextlib.contextmanager
def one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of workers whose operations are not divided among threads; torch's number of threads is as before."""
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool
    torch.set_num_threads(threads)


def objectives_of(objective: Objective) -> Sequence[Objective]:
    """The objectives of a cohort's learners."""
    assert isinstance(objective, SideBySide), "a cohort is trained with the objectives of its learners"
    return objective.each
