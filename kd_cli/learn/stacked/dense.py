"""Fully connected networks, S at once, with their gradients in closed form.

Autograd builds a graph and allocates every result in every step: small beside a large matrix product, large beside a
small one. Here each result is written into the buffer of the step before, and gradients straight into the memory that
the optimiser reads.

Shapes: S models, B examples, I inputs and O outputs of a layer. The images may be shared: [U,B,I], each of the U
batches for S/U neighbouring models. Between the layers examples come last, [S,O,B], so that one product for all models
with the same input writes its result where each model's next product reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from kd_cli.learn.batches import repeat_groups
from kd_cli.learn.randomness import Generators
from kd_cli.losses import FEW
from kd_cli.models.layers import Dropout, draw_dropout


class Dense:
    """S networks of `module`'s architecture, with parameters and gradients `[S, ...]` by name.

    Gradients are written, not added. Dropout draws from `generators`; `dtype` is that of the matrix products.
    """

    def __init__(
        self,
        module: nn.Sequential,
        parameters: Mapping[str, Tensor],
        gradients: Mapping[str, Tensor],
        *,
        generators: Generators,
        dtype: torch.dtype,
    ) -> None:
        self.dtype = dtype
        self.layers: list[_Layer] = []
        for i, layer in module._modules.items():  # named_children leaves out a layer that comes again
            assert layer is not None
            first = not any(isinstance(one, _Linear) for one in self.layers)
            if type(layer) is nn.Linear:
                names = [name for name, _ in layer.named_parameters()]
                own, slopes = ({name: of[f"{i}.{name}"] for name in names} for of in (parameters, gradients))
                self.layers.append(_Linear(own, slopes, first=first, dtype=dtype))
            elif type(layer) is nn.ReLU:
                self.layers.append(_ReLU())
            elif type(layer) is Dropout and layer.p:
                self.layers.append(_Dropout(layer.p, generators, examples_last=not first))

    def logits(self, images: Tensor) -> Tensor:
        """Images [U,B,...] -> logits [S,B,C]; a view of [S,C,B] on a CPU with few classes, where losses are faster so.

        With gradients enabled, what the backward pass needs is kept, and the next call overwrites the result.
        """
        x, keep = images.flatten(2), torch.is_grad_enabled()
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        for layer in self.layers:
            x = layer.forward(x, keep)
        return x.mT if x.device.type == "cpu" and x.shape[1] <= FEW else x.mT.contiguous()

    def backward(self, slope: Tensor) -> None:
        """Compute the parameters' gradients from the gradient on the logits [S,B,C], which is overwritten."""
        below: Tensor | None = slope.mT
        if slope.dtype != self.dtype:
            below = slope.mT.to(self.dtype)
        for layer in reversed(self.layers):
            if below is None:
                break
            below = layer.backward(below)


def makes_one_product(weight_SOI: Tensor, dtype: torch.dtype) -> bool:
    """Whether one product in this type may serve all models that see the same input.

    Not for few outputs, nor in double precision: there MKL chooses its kernel, and with it the rounding, by the number
    of models, and a model's result would depend on its neighbours. Nor in half precision on a CPU: oneDNN's AMX kernel
    reads past the end of a row into the next one and multiplies by 0, so that a NaN there reaches the model before.
    """
    half = dtype in (torch.bfloat16, torch.float16) and weight_SOI.device.type == "cpu"
    return weight_SOI.shape[1] >= 16 and dtype != torch.float64 and not half


def dropout_masks(x: Tensor, p: float, generators: Sequence[torch.Generator]) -> Tensor:
    """The factors of inverted dropout for each of S models, [S,...], for x [U,...]."""
    masks = torch.empty((len(generators), *x.shape[1:]), dtype=x.dtype, device=x.device)
    for mask, generator in zip(masks, generators, strict=True):
        draw_dropout(mask, p, generator=generator)
    return masks


class _Layer(Protocol):
    def forward(self, x: Tensor, keep: bool) -> Tensor: ...

    def backward(self, slope: Tensor) -> Tensor | None:
        """The gradient on the input from that on the output; None for the first layer with parameters."""
        ...


class _Linear:
    """`W x + b` of S models. The network's first linear layer takes images [U,B,I], the others [S,I,B]."""

    def __init__(
        self, own: Mapping[str, Tensor], slopes: Mapping[str, Tensor], *, first: bool, dtype: torch.dtype
    ) -> None:
        self.weight, self.bias = own["weight"], own.get("bias")
        self.weight_slope, self.bias_slope = slopes["weight"], slopes.get("bias")
        self.first = first
        self.size, self.outputs, self.inputs = self.weight.shape
        self.tall = makes_one_product(self.weight, dtype) and self.weight.is_contiguous()
        self.buffers = Buffers()

    def forward(self, x: Tensor, keep: bool) -> Tensor:
        weight = self.weight
        if weight.dtype != x.dtype:
            weight = self.buffers("weight", x, weight.shape).copy_(weight)
        bias = self.bias if self.bias is None or self.bias.dtype == x.dtype else self.bias.to(x.dtype)
        if self.first and not self.tall:
            x = repeat_groups(x, self.size)
        if keep:
            self.x, self.w = x, weight
        groups, batch = len(x), x.shape[1 if self.first else 2]
        shape = (self.size, self.outputs, batch)
        y = self.buffers("y", x, shape) if keep else x.new_empty(shape)
        if self.first:  # one product for all models that see the same images
            torch.bmm(weight.view(groups, -1, self.inputs), x.mT, out=y.view(groups, -1, batch))
        else:
            torch.bmm(weight, x, out=y)
        if bias is not None:
            y += bias[:, :, None]  # after the product in both cases, so that they round alike
        return y

    def backward(self, slope: Tensor) -> Tensor | None:
        below = None
        if not self.first:
            below = self.buffers("below", slope, (self.size, self.inputs, slope.shape[2]))
            torch.bmm(self.w.mT, slope, out=below)
        if self.bias_slope is not None:
            if slope.dtype == self.bias_slope.dtype:
                torch.sum(slope, 2, out=self.bias_slope)
            else:
                self.bias_slope.copy_(slope.sum(2, dtype=self.bias_slope.dtype))
        # bmm would write into a tensor with gaps matrix by matrix.
        same = slope.dtype == self.weight_slope.dtype and self.weight_slope.is_contiguous()
        out = self.weight_slope if same else self.buffers("weight_slope", slope, self.weight_slope.shape)
        if self.first:
            groups = len(self.x)
            torch.bmm(slope.reshape(groups, -1, slope.shape[2]), self.x, out=out.view(groups, -1, self.inputs))
        else:
            torch.bmm(slope, self.x.mT, out=out)
        if not same:
            self.weight_slope.copy_(out)
        return below


class Buffers:
    """Reused memory for results, by name and shape."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, Sequence[int]], Tensor] = {}

    def __call__(self, name: str, like: Tensor, shape: Sequence[int]) -> Tensor:
        found = self.found.get((name, shape))
        if found is None or found.dtype != like.dtype:
            found = self.found[name, shape] = torch.empty(shape, dtype=like.dtype, device=like.device)
        return found


class _ReLU:
    def forward(self, x: Tensor, keep: bool) -> Tensor:
        y = x.relu_()
        if keep:
            self.y = y
        return y

    def backward(self, slope: Tensor) -> Tensor:
        return torch.ops.aten.threshold_backward.grad_input(slope, self.y, 0, grad_input=slope)


class _Dropout:
    mask: Tensor | None = None

    def __init__(self, p: float, generators: Generators, *, examples_last: bool) -> None:
        self.p, self.generators, self.examples_last = p, generators, examples_last

    def forward(self, x: Tensor, keep: bool) -> Tensor:
        generators = self.generators.now
        if generators is None:
            self.mask = None
            return x
        mask = dropout_masks(x.mT if self.examples_last else x, self.p, generators)  # drawn as for one model
        self.mask = mask.mT if self.examples_last else mask
        return repeat_groups(x, len(generators)) * self.mask

    def backward(self, slope: Tensor) -> Tensor:
        return slope if self.mask is None else slope.mul_(self.mask)
