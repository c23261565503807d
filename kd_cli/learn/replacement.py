"""A student that is trained inside its teacher: blocks of the teacher are replaced by the student's at random."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from kd_cli.learn.batches import Batch
from kd_cli.learn.blocks import Cut, placed, weights_of_rest
from kd_cli.learn.learner import ModuleLearner, Rate
from kd_cli.learn.objective import Objective
from kd_cli.learn.outputs import Outputs
from kd_cli.learn.randomness import generator


class Replacement:
    """The blocks of a student and of its teacher, the predecessor, in the student's network.

    What follows the last block is the teacher's: its weights are copied to the student and stay as they are.
    """

    def __init__(self, student: Cut, teacher: Cut) -> None:
        self.student = student
        self.predecessors = [teacher.block(k) for k in range(len(teacher.blocks))]
        self.frozen: list[nn.Module] = []  # parts of the student that are not trained
        for own, other in zip(weights_of_rest(student), weights_of_rest(teacher), strict=True):
            own.load_state_dict(other.state_dict())
            own.requires_grad_(False)
            for part in own.modules():
                self.frozen.append(part)
                if isinstance(part, _NormBase):
                    part.track_running_stats = False  # in eval mode it uses what it has; no estimate replaces that

    def __len__(self) -> int:
        return len(self.predecessors)

    def mixed(self, drawn: Sequence[bool]) -> contextlib.AbstractContextManager[None]:
        """A context in which the student has its own blocks where they are `drawn`, and else the predecessor's."""
        return placed(self.student, {k: self.predecessors[k] for k, own in enumerate(drawn) if not own})


class ReplacingLearner(ModuleLearner):
    """A student that takes each step in a network of its own blocks and of its teacher's.

    `probability(progress)` is that of a block to be the student's, drawn for each block and step, the same for all
    examples. The teacher's blocks pass gradients on and have none of their own: a step's gradient, and with it
    clipping, is that of the student's blocks which were drawn. A step that draws none changes nothing.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        replacement: Replacement,
        probability: Callable[[float], float],
        **own: Any,
    ) -> None:
        super().__init__(module, optimizer, **own)
        self.replacement, self.probability = replacement, probability
        self.drawn: list[bool] = []

    @contextlib.contextmanager
    def training(self, role: str, epoch: int) -> Iterator[None]:
        self.draws = generator(self.seed, role, "replacement", epoch)
        with super().training(role, epoch):
            yield

    def step(self, batch: Batch, target: Outputs | None, objective: Objective, rate: Rate) -> None:
        if self.rate is None:  # the first batch of a step
            chance = torch.rand(len(self.replacement), generator=self.draws, dtype=torch.float64)
            self.drawn = (chance < self.probability(batch.progress)).tolist()
        with self.replacement.mixed(self.drawn):
            super().step(batch, target, objective, rate)

    def backward(self, loss: Tensor) -> None:
        if loss.requires_grad:  # else no block was drawn
            super().backward(loss)
