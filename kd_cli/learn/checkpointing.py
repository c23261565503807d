"""Activation checkpointing: what a block computes within is not kept for the backward pass but computed again there.

The memory of a step is then that of the blocks' inputs and of one block, at the cost of a second forward pass (Chen et
al. 2016). The second pass draws the same random numbers and leaves BatchNorm's statistics alone: the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.checkpoint import checkpoint

from kd_cli.errors import ConfigError
from kd_cli.learn.outputs import FeatureHooks
from kd_cli.models.layers import Dropout

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The outermost modules of a network that hold other modules and are no containers: residual or attention blocks.

    One that holds more than half of the network's weights is opened where there are several blocks in it. A container
    of plain layers inside the network is one block.
    """
    half = sum(p.numel() for p in network.parameters()) / 2

    def inside(module: nn.Module) -> list[nn.Module]:
        found = []
        for child in module.children():
            within = inside(child)
            large = sum(p.numel() for p in child.parameters()) > half
            if within and (isinstance(child, CONTAINERS) or (large and len(within) > 1)):
                found += within
            elif any(True for _ in child.children()) and not isinstance(child, nn.ModuleList | nn.ModuleDict):
                found.append(child)
        return found

    return inside(network)


class Checkpointing:
    """The blocks of one network as they are called while it trains."""

    def __init__(self, network: nn.Module, features: FeatureHooks) -> None:
        """`features` are not collected a second time. Raises ConfigError for a network without blocks."""
        self.blocks, self.features = blocks_of(network), features
        if not self.blocks:
            raise ConfigError(
                "checkpointing computes blocks of layers a second time, and this network has none in it",
                hint="leave checkpointing out, or put layers that follow each other into an nn.Sequential",
            )

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """A context in which the blocks keep their inputs alone, wherever they train and gradients are wanted."""
        kept = [vars(block).get("forward") for block in self.blocks]  # a module may have one of its own
        for block in self.blocks:
            block.forward = functools.partial(self._forward, block, block.forward)
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, kept, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward

    def _forward(self, block: nn.Module, forward: Callable[..., Any], *args: Any, **keys: Any) -> Any:
        if not (block.training and torch.is_grad_enabled()):
            return forward(*args, **keys)
        dropouts = [part.generator for part in block.modules() if isinstance(part, Dropout) and part.generator]
        generators = list(dict.fromkeys(dropouts))
        states = [one.get_state() for one in generators]

        def contexts() -> tuple[Any, Any]:
            return contextlib.nullcontext(), self._again(block, generators, states)

        return checkpoint(functools.partial(forward, **keys), *args, use_reentrant=False, context_fn=contexts)

    @contextlib.contextmanager
    def _again(
        self, block: nn.Module, generators: Sequence[torch.Generator], states: Sequence[torch.Tensor]
    ) -> Iterator[None]:
        """A context for the second pass of a block: the same random numbers, and nothing outside it changes."""
        norms = [part for part in block.modules() if isinstance(part, _NormBase)]
        own = [(norm, dict(norm._buffers)) for norm in norms]
        statistics = {id(buffer) for _, buffers in own for buffer in buffers.values()}
        others = {name: (b, b._version) for name, b in block.named_buffers() if id(b) not in statistics}
        now = [one.get_state() for one in generators]
        for one, state in zip(generators, states, strict=True):
            one.set_state(state)
        for norm, buffers in own:  # a batch is normalised by its own statistics; the running ones move once
            norm._buffers.update({name: None if b is None else b.clone() for name, b in buffers.items()})
        try:
            with self.features.paused():
                yield
        finally:
            for norm, buffers in own:
                norm._buffers.update(buffers)
            for one, state in zip(generators, now, strict=True):
                one.set_state(state)
            for name, (buffer, version) in others.items():  # here, as torch ends this pass by an exception
                if buffer._version != version:
                    raise ConfigError(
                        f"{type(block).__name__} changes its buffer {name} whenever it is called, and checkpointing "
                        "calls it twice in a step",
                        hint="leave checkpointing out",
                    )
