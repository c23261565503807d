"""What a model's training does beside plain steps: averaged weights, several batches per step, clipping, freezing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from kd_cli.errors import ConfigError
from kd_cli.nearest import did_you_mean


@dataclass(frozen=True)
class Recipe:
    """Options of one model's training; the defaults are plain steps.

    `ema` is the decay of the average of the weights, `accumulate` the batches whose gradients make one step, `clip` the
    largest norm of a step's gradient, `freeze` the module up to which nothing is trained. `channels_last` is the layout
    in memory of images and convolutions, `checkpointing` computes blocks again in the backward pass.
    """

    ema: float = 0.0
    accumulate: int = 1
    clip: float = 0.0
    freeze: str | None = None
    channels_last: bool = False
    checkpointing: bool = False

    @property
    def plain(self) -> bool:
        return self == PLAIN


PLAIN = Recipe()


class AveragedWeights:
    """The exponential moving average of a module's parameters over its steps; it takes their place between epochs.

    After step t, `average = d * average + (1 - d) * weights` with `d = min(decay, (1 + t) / (10 + t))`, so that the
    first weights are soon forgotten. Buffers are not averaged: BatchNorm's statistics are estimated anew.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.steps, self.shown = decay, 0, False
        self.weights = [p for p in module.parameters() if p.requires_grad]
        self.other = [p.detach().clone() for p in self.weights]  # the average, or the weights while that is shown

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights after a step."""
        self.steps += 1
        share = 1 - min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.other, [p.detach() for p in self.weights], share)

    @torch.no_grad()
    def show(self, average: bool) -> None:
        """Let the module have its average, or its own weights again."""
        if average == self.shown:
            return
        for weight, other in zip(self.weights, self.other, strict=True):
            kept = weight.detach().clone()
            weight.copy_(other)
            other.copy_(kept)
        self.shown = average

    def state(self) -> dict[str, Any]:
        return {"steps": self.steps, "shown": self.shown, "other": [tensor.clone() for tensor in self.other]}

    def load_state(self, state: dict[str, Any]) -> None:
        self.steps, self.shown = state["steps"], state["shown"]
        for tensor, saved in zip(self.other, state["other"], strict=True):
            tensor.copy_(saved)


def freeze_up_to(module: nn.Module, path: str) -> Sequence[nn.Module]:
    """Stop the gradients of the module at `path` and of all that are registered before it; return the frozen modules.

    Their BatchNorm keeps its statistics, and their dropout is not active: they stay in eval mode. Raises ConfigError
    for a path that is not there, and when nothing is left to train.
    """
    names = [name for name, _ in module.named_modules() if name]
    found = path if path in names else f"network.{path}"  # of a model with a normalisation of its own
    if found not in names:
        own = [name.removeprefix("network.") for name in names]
        shown = ", ".join(own[:8]) + (", ..." if len(own) > 8 else "")
        hint = did_you_mean(path, own) or f"it has {shown}"
        raise ConfigError(f"there is no module {path!r} to freeze up to", hint=hint)
    frozen = []
    for name, part in _up_to(module, found):
        for p in part.parameters(recurse=False):
            p.requires_grad_(False)
        if not found.startswith(f"{name}.") and name:  # a module around the last one goes on beyond it
            frozen.append(part)
            if isinstance(part, _NormBase):
                part.track_running_stats = False  # in eval mode it uses what it has, and no estimate replaces that
    if not any(p.requires_grad for p in module.parameters()):
        raise ConfigError(f"all weights are frozen up to {path}: there is nothing to train", hint="an earlier module")
    return frozen


def _up_to(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The named modules in the order in which they are registered, up to the last one inside `path`."""
    reached = False
    for name, part in module.named_modules():
        inside = name == path or name.startswith(f"{path}.")
        if reached and not inside:
            return
        reached |= inside
        yield name, part


def clip(parameters: Sequence[Tensor], most: float) -> None:
    """Scale the gradients so that their norm, over all of them, is at most this."""
    torch.nn.utils.clip_grad_norm_([p for p in parameters if p.grad is not None], most)
