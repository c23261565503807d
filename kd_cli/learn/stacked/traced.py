"""S networks whose gradients autograd finds: layer by layer where each layer has a form for S models, else by
`torch.vmap`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from kd_cli.learn.batches import repeat_groups
from kd_cli.learn.learner import Autocast
from kd_cli.learn.randomness import Generators
from kd_cli.learn.stacked.dense import dropout_masks, makes_one_product
from kd_cli.learn.stacked.flat import Flat
from kd_cli.models.layers import Dropout


class Traced:
    """S networks whose gradients autograd finds; layer by layer where each has a form for S, else by `torch.vmap`."""

    def __init__(
        self,
        module: nn.Module,
        flat: Flat,
        generators: Generators,
        autocast: Autocast,
    ) -> None:
        self.module, self.generators, self.size, self.autocast = module, generators, flat.size, autocast
        self.parameters = {name: p.detach().requires_grad_() for name, p in flat.parameters.items()}
        self.slopes = list(flat.gradients.values())
        self.layered = is_layered(module)

    def logits(self, images: Tensor) -> Tensor:
        """Images [U,B,...] -> logits [S,B,C] without a graph; `backward` continues from the last ones."""
        with self.autocast():
            if self.layered:
                logits = self._layers(images if len(images) == 1 else repeat_groups(images, self.size))
            else:
                shared = len(images) == 1
                forward = vmapped(self.module, shared=shared)
                logits = forward(self.parameters, images[0] if shared else repeat_groups(images, self.size))
        self.last = logits
        return logits.detach()

    def _layers(self, x: Tensor) -> Tensor:
        for i, layer in self.module._modules.items():  # named_children leaves out a layer that comes again
            assert layer is not None
            own = {name: self.parameters[f"{i}.{name}"] for name, _ in layer.named_parameters()}
            x = LAYERS[type(layer)](layer, own, x, self.generators.now)
        return x

    def backward(self, slope: Tensor) -> None:
        """Compute the parameters' gradients, each model's own, from the gradient on the last logits [S,B,C]."""
        found = torch.autograd.grad(
            self.last, list(self.parameters.values()), slope.to(self.last.dtype), materialize_grads=True
        )
        del self.last  # and with it the graph, whose nodes remember the stream they were made on
        torch._foreach_copy_(self.slopes, found)


def vmapped(module: nn.Module, *, shared: bool = False) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """The forward pass of S models by `torch.vmap`: parameters [S,...], images [S,B,...] or shared [B,...]."""

    def forward(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        return functional_call(module, parameters, (images,))

    return vmap(forward, in_dims=(0, None if shared else 0))


# ---------------------------------------------------------------- layers with a form for S models
# Each maps x [S,B,...], or [1,B,...] while all models still see the same, to [S,B,...].

Layer = Callable[[Any, dict[str, Tensor], Tensor, list[torch.Generator] | None], Tensor]


def _linear(layer: nn.Linear, own: dict[str, Tensor], x: Tensor, generators: Any) -> Tensor:
    weight, bias = own["weight"], own.get("bias")
    # All models see the same input: one tall product instead of S small ones.
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    if len(x) == 1 and makes_one_product(weight, dtype):
        y = F.linear(x[0], weight.flatten(0, 1)).unflatten(-1, weight.shape[:2]).transpose(0, 1)
    else:
        y = torch.bmm(x.expand(len(weight), *x.shape[1:]), weight.mT)
    return y if bias is None else y + bias[:, None]


def _conv(layer: nn.Conv2d, own: dict[str, Tensor], x: Tensor, generators: Any) -> Tensor:
    weight, bias = own["weight"], own.get("bias")
    size, out = weight.shape[:2]
    # Each model has its group of channels even where all see the same images: else rounding depends on the neighbours.
    y = F.conv2d(
        repeat_groups(x, size).transpose(0, 1).flatten(1, 2),
        weight.flatten(0, 1),
        None if bias is None else bias.flatten(),
        layer.stride,
        layer.padding,
        layer.dilation,
        groups=size,
    )
    return y.unflatten(1, (size, out)).transpose(0, 1)


def _pool(layer: nn.Module, own: dict[str, Tensor], x: Tensor, generators: Any) -> Tensor:
    return layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _relu(layer: nn.ReLU, own: dict[str, Tensor], x: Tensor, generators: Any) -> Tensor:
    return F.relu(x)


def _flatten(layer: nn.Flatten, own: dict[str, Tensor], x: Tensor, generators: Any) -> Tensor:
    return x.flatten(2)


def _dropout(layer: Dropout, own: dict[str, Tensor], x: Tensor, generators: list[torch.Generator] | None) -> Tensor:
    if generators is None or layer.p == 0:  # evaluation
        return x
    return x * dropout_masks(x, layer.p, generators)


def _identity(layer: nn.Module, own: dict[str, Tensor], x: Tensor, generators: Any) -> Tensor:
    return x


LAYERS: dict[type[nn.Module], Layer] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv,
    nn.MaxPool2d: _pool,
    nn.AvgPool2d: _pool,
    nn.ReLU: _relu,
    nn.Flatten: _flatten,
    nn.Identity: _identity,
    Dropout: _dropout,
}


def is_layered(module: nn.Module) -> bool:
    """Whether the network is a sequence of layers that all have a form for S models here."""
    return isinstance(module, nn.Sequential) and all(type(layer) in LAYERS for layer in module.children())
