"""Which modules of a network a feature method reads where the user names none, found by one forward pass.

The trunk of a network is what its maps pass through on the way to the logits: the children of the network, and in
their place the children of each `nn.Sequential` and of each module that returns no map. Blocks with a forward of their
own count as one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

POOLINGS = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d)


@dataclass(frozen=True)
class Layer:
    """A module by its path, and the shape of its output without the batch: `(C, H, W)` of a map."""

    path: str
    module: nn.Module
    shape: tuple[int, ...]

    @property
    def positions(self) -> int:
        """The positions of a map, 1 of a vector."""
        return torch.Size(self.shape[1:]).numel()


def last_layer(module: nn.Module, images: Tensor) -> list[Layer]:
    """The last map before the pooling in front of the classifier; without maps, the last hidden layer.

    `images` are a few examples `[B,...]`. Transformers have tokens `[B,N,D]` in place of a map. An empty list means
    that the network has nothing of the kind.
    """
    called = trace(module, images)
    maps = _before_pooling(_trunk(module, called), tokens=True)
    return (maps or _hidden(_trunk(module, called)))[-1:]


def stage_layers(module: nn.Module, images: Tensor) -> list[Layer]:
    """The last map of each spatial size, in the order of the forward pass; without maps, all hidden layers.

    A map has the proportions of the images: maps whose channels come last, and tokens, are none.
    """
    called = trace(module, images)
    inside: list[str] = []
    while True:
        trunk = _trunk(module, called, inside)
        maps = [layer for layer in _before_pooling(trunk, tokens=False) if _is_map(layer, images)]
        last = {layer.shape[1:]: layer for layer in maps}
        stages = [layer for layer in maps if last[layer.shape[1:]] is layer]
        # A network made of one module with a forward of its own and a classifier: look inside it.
        closed = [layer.path for layer in stages if layer.path not in inside and any(layer.module.children())]
        if len(stages) != 1 or not closed:
            return stages or _hidden(trunk)
        inside += closed


def trace(module: nn.Module, images: Tensor) -> list[Layer]:
    """The modules that are called once and return a tensor of the examples, in the order in which they return."""
    found: list[Layer] = []
    calls: dict[str, int] = {}

    def hook(path: str) -> Callable[..., None]:
        def keep(inner: nn.Module, _inputs: Any, output: Any) -> None:
            calls[path] = calls.get(path, 0) + 1
            if isinstance(output, Tensor) and output.is_floating_point() and output.shape[:1] == images.shape[:1]:
                found.append(Layer(path, inner, tuple(output.shape[1:])))

        return keep

    hooks = [inner.register_forward_hook(hook(path)) for path, inner in module.named_modules() if path]
    modes = {inner: inner.training for inner in module.modules()}
    try:
        with torch.no_grad():
            module.eval()(images)
    finally:
        for handle in hooks:
            handle.remove()
        for inner, training in modes.items():
            inner.training = training
    return [layer for layer in found if calls[layer.path] == 1]


def _trunk(module: nn.Module, called: Sequence[Layer], inside: Collection[str] = ()) -> list[Layer]:
    """The called layers of the trunk; the modules at the paths `inside` are looked into as well."""
    layers = {layer.path: layer for layer in called}

    def paths(parent: nn.Module, prefix: str) -> Iterator[str]:
        for name, child in parent.named_children():
            path = prefix + name
            yield path
            returns_map = path in layers and len(layers[path].shape) > 1
            if isinstance(child, nn.Sequential) or not returns_map or path in inside:
                yield from paths(child, f"{path}.")

    trunk = set(paths(module, ""))
    return [layer for layer in called if layer.path in trunk and not _ends_in(layer.module, _is_dropout)]


def _before_pooling(trunk: Sequence[Layer], *, tokens: bool) -> list[Layer]:
    """The maps up to the first vector that follows one, without the poolings at their end."""
    dimensions = (2, 3) if tokens else (3,)
    maps: list[Layer] = []
    for layer in trunk:
        if len(layer.shape) in dimensions:
            maps.append(layer)
        elif maps and len(layer.shape) == 1:
            break
    for i, layer in enumerate(maps):  # ConvNeXt normalises behind its pooling
        if _ends_in(layer.module, _is_pooling) and all(after.positions == 1 for after in maps[i:]):
            maps = maps[:i]
            break
    while maps and _ends_in(maps[-1].module, _is_pooling):
        maps.pop()
    return maps


def _hidden(trunk: Sequence[Layer]) -> list[Layer]:
    """The inputs of all linear layers but the first: the hidden layers after their activations."""
    found, previous, linear = [], None, False
    for layer in trunk:
        if isinstance(layer.module, nn.Linear):
            if linear and previous is not None:
                found.append(previous)
            linear = True
        if len(layer.shape) == 1:
            previous = layer
    return found


def _is_map(layer: Layer, images: Tensor) -> bool:
    if images.ndim != 4:
        return False
    (h, w), (height, width) = layer.shape[1:], images.shape[2:]
    return abs(h * width - w * height) <= max(height, width)


def _ends_in(module: nn.Module, kind: Callable[[nn.Module], bool]) -> bool:
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1]
    return kind(module)


def _is_dropout(module: nn.Module) -> bool:
    return "Dropout" in type(module).__name__


def _is_pooling(module: nn.Module) -> bool:
    return isinstance(module, (*POOLINGS, nn.AvgPool2d))
