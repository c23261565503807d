"""torch's dropout with random numbers of a network's own, so that several networks can draw at once.

`nn.Dropout` draws from the one generator that a process has on the CPU. The same draws from another generator in the
same state give the same bytes.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class OwnDropout:
    """The `nn.Dropout` layers of a network, which draw from `generator` while they are replaced.

    While it is the global one, `watch` and `watched` find out whether these layers are all that draws in a step.
    """

    def __init__(self, module: nn.Module) -> None:
        self.layers = [part for part in module.modules() if type(part) is nn.Dropout]
        self.generator = torch.default_generator
        self.after: Tensor | None = None  # the global generator's state after the last draw of these layers
        self.others = False  # whether something else has drawn in between

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        """A context in which the layers draw from `generator`."""
        for layer in self.layers:
            layer.forward = functools.partial(self._drop, layer)  # type: ignore[method-assign]
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward

    def watch(self) -> None:
        """A step begins in which all draws are compared with those of these layers."""
        self.after, self.others = torch.default_generator.get_state(), False

    def watched(self) -> bool:
        """Whether nothing but these layers has drawn since `watch`."""
        self._compare()
        self.after = None
        return not self.others

    def continue_from(self, state: Tensor) -> None:
        """Draw from a generator of the layers' own from now on, which is in this state."""
        if self.generator is torch.default_generator:
            self.generator = torch.Generator()
        self.generator.set_state(state)

    def _compare(self) -> None:
        assert self.after is not None
        self.others |= not torch.equal(self.after, torch.default_generator.get_state())

    def _drop(self, layer: nn.Dropout, x: Tensor) -> Tensor:
        if not layer.training or layer.p == 0:
            return x
        if layer.p == 1:
            return x.zero_() if layer.inplace else x * torch.zeros_like(x)
        if self.after is not None:
            self._compare()
        kept = torch.empty_like(x).bernoulli_(1 - layer.p, generator=self.generator).div_(1 - layer.p)
        if self.after is not None:
            self.after = torch.default_generator.get_state()
        return x.mul_(kept) if layer.inplace else x * kept
