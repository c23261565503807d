"""Models that learn from each other: their losses on a batch need the answers of all of them to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from kd_cli.learn.batches import Batch, Block
from kd_cli.learn.cohort import Cohort
from kd_cli.learn.learner import Learner, ModuleLearner, Rate, TermGradient
from kd_cli.learn.methods.base import Terms
from kd_cli.learn.objective import Objective
from kd_cli.learn.outputs import Outputs
from kd_cli.learn.teachers import Teacher
from kd_cli.losses import single_precision


class Peers(Cohort):
    """S models, each a learner with an optimiser of its own, under one objective that couples them."""

    def __init__(self, learners: Sequence[ModuleLearner], device: torch.device) -> None:
        super().__init__(learners, device)
        self.peers = list(learners)
        self.made = 0  # steps
        self.earlier: list[dict[str, Tensor]] = []  # the weights that answer the others, where they are renewed rarely

    def with_objectives(self, objective: Objective) -> Sequence[tuple[Learner, Objective]]:
        return [(self, objective)]

    def steps(
        self, block: Block, teacher: Teacher | None, objective: Objective, rates: Sequence[Rate]
    ) -> Iterator[None]:
        return Learner.steps(self, block, teacher, objective, rates)

    def step(self, batch: Batch, target: Outputs | None, objective: Objective, rate: Rate) -> None:
        """All peers answer the batch, then each takes a step down its own loss."""
        shown = self._shown(batch, objective.method.refresh_every)
        student = replace(self._outputs(batch), shown=shown)
        terms = objective(student, target, batch)
        for peer in self.peers:
            peer.clear_gradients()
        terms["loss"].sum().backward()
        for s, peer in enumerate(self.peers):
            peer.update(rate)
            own = {name: term[s : s + 1] for name, term in terms.items()}
            peer.sums.add(own, student.logits[s : s + 1], batch.labels)

    @torch.no_grad()
    def _shown(self, batch: Batch, every: int) -> Tensor | None:
        """The logits [S,B,C] of weights that are renewed after so many steps; None where they are renewed in each."""
        if every == 1:
            return None
        if self.made % every == 0:
            self.earlier = [
                {name: t.detach().clone() for name, t in peer.module.state_dict().items()} for peer in self.peers
            ]
        self.made += 1
        logits = []
        for peer, weights in zip(self.peers, self.earlier, strict=True):
            peer.module.eval()
            with peer.autocast():
                logits.append(single_precision(functional_call(peer.module, weights, (batch.images[0],)))[None])
            peer.module.train()
        return torch.cat(logits)

    def state(self) -> dict[str, Any]:
        return {**super().state(), "made": self.made, "earlier": self.earlier}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.made, self.earlier = state["made"], state["earlier"]

    def term_gradients(self, batch: Batch, terms: Callable[[Outputs], Terms]) -> dict[str, TermGradient]:
        student = self._outputs(batch)
        parameters = [[p for p in peer.module.parameters() if p.requires_grad] for peer in self.peers]
        found = {}
        for name, term in terms(student).items():
            if name != "loss":
                inputs = [student.logits, *(p for some in parameters for p in some)]
                on_logits, *slopes = torch.autograd.grad(term.sum(), inputs, retain_graph=True, materialize_grads=True)
                # A row for each peer: its own slopes, which differ in shape from the others'.
                flat = iter(slopes)
                rows = [torch.cat([next(flat).flatten() for _ in some]) for some in parameters]
                padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
                found[name] = TermGradient(on_logits, [padded])
        return found

    def _outputs(self, batch: Batch) -> Outputs:
        """The logits [S,B,C] of all peers, each drawing its own random numbers while it trains."""
        logits = []
        for s, peer in enumerate(self.peers):
            if self.states:
                with self.states[s]:
                    logits.append(peer.outputs(batch.images).logits)
            else:
                logits.append(peer.outputs(batch.images).logits)
        return Outputs(torch.cat(logits))
