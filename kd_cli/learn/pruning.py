"""A model that loses weights while it is trained: whole units, or single weights, by a schedule."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.learn.learner import ModuleLearner, Rate
from kd_cli.models.pruned import cuts, narrowed_state, units_of

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
ROUNDING = 1e-6  # of a share times a number: 0.29 * 100 is 28.999999999999996


@dataclass(frozen=True)
class Pruning:
    """How much is removed, of what, and when.

    The share that is removed goes from 0 at `begin` to `amount` at `end`, both shares of the training, in `updates`
    equal intervals: `amount * (1 - (1 - t)^3)` with `t` from 0 to 1 (cubic; Zhu & Gupta 2017, "To prune, or not to
    prune", equation 1, with no initial sparsity), or `amount * t` (linear).
    """

    amount: float
    kind: str = "structured"  # or magnitude
    schedule: str = "cubic"  # or linear
    begin: float = 0.1
    end: float = 0.5
    updates: int = 20

    def updates_at(self, progress: float) -> int:
        """How many updates were due when this share of the training is done."""
        if progress >= self.end:
            return self.updates
        return max(0, math.floor(self.updates * (progress - self.begin) / (self.end - self.begin)))

    def share_after(self, updates: int) -> float:
        """The share that is removed after some of the updates."""
        t = updates / self.updates
        return self.amount * (t if self.schedule == "linear" else 1 - (1 - t) ** 3)


def removed_of(count: int, share: float) -> int:
    """How many of `count` units are removed at a share: rounded down, and one always stays."""
    return min(count - 1, math.floor(share * count + ROUNDING))


def smallest(sizes: Tensor, gone: Tensor, number: int) -> Tensor:
    """Which of some sizes are the `number` smallest, those that are `gone` first: no weight comes back."""
    ranked = torch.where(gone, torch.full_like(sizes, -1.0), sizes).argsort(stable=True)
    found = torch.zeros_like(gone)
    found[ranked[:number]] = True
    return found


class Masks(ABC):
    """What of a module is removed: `gone`, by the path of a layer."""

    gone: dict[str, Tensor]

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.parameters = dict(module.named_parameters())

    @abstractmethod
    def prune(self, share: float) -> None:
        """Remove until this share of each layer is gone."""

    @abstractmethod
    def factors(self) -> Iterator[tuple[str, Tensor]]:
        """Names of parameters with what they are multiplied by: 0 where they are removed, else 1."""

    @abstractmethod
    def shipped(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The module's state dict as it is kept when training has ended."""


class UnitMasks(Masks):
    """Removes the hidden units and channels with the smallest incoming weights, by their L1 norm (Li et al. 2017)."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.units = units_of(module)
        self.gone = {
            one.made: torch.zeros(one.count, dtype=torch.bool, device=self.weight(one.made).device)
            for one in self.units
        }

    def weight(self, path: str) -> Tensor:
        return self.module.get_parameter(f"{path}.weight").detach()  # one that layers share has one name in parameters

    def prune(self, share: float) -> None:
        for path, gone in self.gone.items():
            norms = self.weight(path).abs().flatten(1).sum(1)
            self.gone[path] = smallest(norms, gone, removed_of(len(gone), share))

    def factors(self) -> Iterator[tuple[str, Tensor]]:
        for made, name, dim, width in cuts(self.module, self.units):
            if name in self.parameters:
                tensor = self.parameters[name]
                kept = (~self.gone[made]).to(tensor.dtype).repeat_interleave(width)
                yield name, kept.reshape([-1 if d == dim else 1 for d in range(tensor.ndim)])

    def shipped(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {path: (~gone).nonzero().flatten().cpu() for path, gone in self.gone.items()}
        return narrowed_state(self.module, self.units, kept, state)


class WeightMasks(Masks):
    """Sets the smallest weights of every linear and convolutional layer to 0, by their magnitude."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        layers = [f"{path}.weight" for path, part in module.named_modules() if isinstance(part, LAYERS)]
        names = [name for name in layers if name in self.parameters]  # a shared one once, a computed one not
        self.gone = {name: torch.zeros_like(self.parameters[name], dtype=torch.bool) for name in names}

    def prune(self, share: float) -> None:
        for name, gone in self.gone.items():
            sizes = self.parameters[name].detach().abs().flatten()
            number = math.floor(share * len(sizes) + ROUNDING)
            self.gone[name] = smallest(sizes, gone.flatten(), number).reshape(gone.shape)

    def factors(self) -> Iterator[tuple[str, Tensor]]:
        for name, gone in self.gone.items():
            yield name, (~gone).to(self.parameters[name].dtype)

    def shipped(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state


def masks_of(pruning: Pruning, module: nn.Module) -> Masks:
    return (UnitMasks if pruning.kind == "structured" else WeightMasks)(module)


class PruningLearner(ModuleLearner):
    """A model some of whose weights are removed in training, and stay 0 after every step.

    Gradients of removed weights are 0, for clipping and the optimiser's moments too. The state dict that training ends
    with is without the removed units.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, *, pruning: Pruning, steps: int, **own: Any
    ) -> None:
        """`steps` are those of the optimiser in the whole training."""
        self.masks = masks_of(pruning, module)  # before hooks for features are there
        super().__init__(module, optimizer, **own)
        self.pruning, self.total = pruning, steps
        self.done = self.updates = 0
        self.set_factors()

    @property
    def makes_plain_steps(self) -> bool:
        return False

    def set_factors(self) -> None:
        """Look up what each parameter, and its average over steps, is multiplied by."""
        averages = (
            {} if self.average is None else dict(zip(map(id, self.average.weights), self.average.other, strict=True))
        )
        self.factors: list[tuple[nn.Parameter, list[Tensor], Tensor]] = []
        for name, factor in self.masks.factors():
            p = self.masks.parameters[name]
            self.factors.append((p, [p.detach(), *([averages[id(p)]] if id(p) in averages else [])], factor))

    @torch.no_grad()
    def update(self, rate: Rate) -> None:
        for p, _, factor in self.factors:
            if p.grad is not None:
                p.grad.mul_(factor)
        super().update(rate)
        self.done += 1
        due = self.pruning.updates_at(self.done / self.total)
        if due > self.updates:
            self.updates = due
            self.masks.prune(self.pruning.share_after(due))
            self.set_factors()
        for _, tensors, factor in self.factors:
            for tensor in tensors:
                tensor.mul_(factor)

    def model_state(self, s: int) -> dict[str, Tensor]:
        return self.masks.shipped(super().model_state(s))

    def state(self) -> dict[str, Any]:
        own = {"done": self.done, "updates": self.updates, "gone": dict(self.masks.gone)}
        return {**super().state(), "pruning": own}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        own = state["pruning"]
        self.done, self.updates = own["done"], own["updates"]
        for path, gone in self.masks.gone.items():
            gone.copy_(own["gone"][path])
        self.set_factors()
