"""Fully connected networks, S at once, with their gradients in closed form.

What autograd adds to a step of such a network is small beside a large matrix product and large beside a small one: it
builds a graph, and allocates every result anew. Here results are written where they were a step before, gradients
straight into the place where the optimiser reads them. Between large products the processor's caches are cold for all
else, and a call that takes a microsecond in a loop takes ten: views are made once, and one model's tensors have no axis
of models.

Shapes: S models, B examples, I inputs and O outputs of a layer. The input of the first layer may be shared: [U,B,I],
each of the U for the S/U models that lie together. Between the layers of S > 1 models examples come last, [S,O,B]: so
what one product makes for all models with the same input lies where each of them reads it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from kd_cli.learn.randomness import Generators
from kd_cli.losses import FEW
from kd_cli.models.layers import Dropout, draw_dropout


def is_dense(module: nn.Module) -> bool:
    """Whether the network is plain, and all of it is trained."""
    return is_plain(module) and all(p.requires_grad for p in module.parameters())


def is_plain(module: nn.Module) -> bool:
    """Whether the network is a sequence, from flattened images on, of what has a closed form here, and nothing else."""
    if type(module) is not nn.Sequential or not len(module) or not all(type(layer) in KINDS for layer in module):
        return False
    flat = [(layer.start_dim, layer.end_dim) for layer in module if isinstance(layer, nn.Flatten)]
    kinds = [type(layer) for layer in module if type(layer) not in (nn.Flatten, nn.Identity, Dropout)]
    if type(module[0]) is not nn.Flatten or set(flat) != {(1, -1)} or kinds[:1] != [nn.Linear]:
        return False
    own = [name for layer in module for name, _ in layer.named_parameters()]
    parameters = list(module.parameters())  # fewer where two layers share one
    return (
        set(own) <= {"weight", "bias"}
        and len(own) == len(parameters)
        and len({p.dtype for p in parameters}) == 1
        and not any(True for _ in module.buffers())
        and not any(put_on(part) for part in module.modules())
    )


def put_on(part: nn.Module) -> list[str]:
    """What somebody put on this very module that changes its forward or backward pass: hooks, a `forward`."""
    return [name for name, value in vars(part).items() if name == "forward" or (name in HOOKS and value)]


def widths(module: nn.Sequential) -> list[tuple[int, int]]:
    """Inputs and outputs of each linear layer of such a network."""
    return [(layer.in_features, layer.out_features) for layer in module if isinstance(layer, nn.Linear)]


def parameter_counts(module: nn.Sequential) -> list[int]:
    """How many parameters each linear layer of such a network has."""
    return [len(list(layer.parameters())) for layer in module if isinstance(layer, nn.Linear)]


class Dense:
    """S networks of one architecture: `module`'s, with parameters and gradients `[S, ...]` by name.

    Gradients are written, not added. `generators` are filled by who trains them;
    `dtype` is what matrix products are computed in.
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
        self.alone = len(next(iter(parameters.values()))) == 1
        self.layers: list[_Layer] = []
        for i, layer in module._modules.items():  # named_children leaves out a layer that comes again
            assert layer is not None
            if type(layer) is nn.Linear:
                own = [
                    {name: of[f"{i}.{name}"] for name, _ in layer.named_parameters()} for of in (parameters, gradients)
                ]
                linear = _LinearAlone if self.alone else _Linear
                self.layers.append(linear(*own, number=sum(one.number is not None for one in self.layers)))
            elif type(layer) is nn.ReLU:
                self.layers.append(_ReLU())
            elif type(layer) is Dropout and layer.p:
                within = any(one.number is not None for one in self.layers)
                self.layers.append(_Dropout(layer.p, generators, examples_last=within and not self.alone))

    def logits(self, images: Tensor) -> Tensor:
        """Images [U,B,...] -> logits [S,B,C], of S > 1 models as a view of [S,C,B] where the losses are quicker so.

        With gradients enabled, what the backward pass needs is kept, and the result lies where the next call writes.
        """
        x, keep = images[0].flatten(1) if self.alone else images.flatten(2), torch.is_grad_enabled()
        if x.dtype != self.dtype:
            x = x.to(self.dtype)
        for layer in self.layers:
            x = layer.forward(x, keep)
        if self.alone:
            return x[None]
        quick = x.device.type == "cpu" and x.shape[1] <= FEW
        return x.mT if quick else x.mT.contiguous()

    def backward(self, slope: Tensor, ready: Callable[[int], None]) -> None:
        """From the gradient on the logits [S,B,C], which is overwritten, to the gradients on the parameters.

        `ready` is told the number of each linear layer, the last one first, when its gradients are there and nothing
        more is computed from its weights.
        """
        below = slope[0] if self.alone else slope.mT
        if slope.dtype != self.dtype:
            below = below.to(self.dtype)
        for layer in reversed(self.layers):
            found = layer.backward(below)
            if layer.number is not None:
                ready(layer.number)
            if found is None:
                break
            below = found


def makes_one_product(weight_SOI: Tensor) -> bool:
    """Whether one product may serve all models that see the same input.

    Not for a few outputs, nor in double precision: there MKL's choice of a kernel, and with it the rounding, depends on
    how many models there are, and a model on its company.
    """
    return weight_SOI.shape[1] >= 16 and weight_SOI.dtype != torch.float64


@functools.cache
def linear_of_onednn() -> Callable[..., Tensor] | None:
    """oneDNN's product `x W^T + b`, which `torch.compile` calls too; None where it is not known to be quicker.

    On processors with AVX-512, in float32 and from 64 examples and 2^18 weights on, it takes 0.8 to 1.0 of MKL's time.
    """
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return None
    packet = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    if packet is None:
        return None
    linear = packet.default
    return lambda x, weight, bias=None: linear(x, weight, bias, "none", [], "")


def each(x: Tensor, size: int) -> Tensor:
    """What every one of S models gets, [S,...], from what the U groups of S/U models that lie together get, [U,...]."""
    if len(x) == 1:
        return x.expand(size, *x.shape[1:])
    return x if len(x) == size else x.repeat_interleave(size // len(x), 0)


def dropout_masks(x: Tensor, p: float, generators: Sequence[torch.Generator]) -> Tensor:
    """What each of S models multiplies its input with, [S,...], for x [U,...]."""
    masks = torch.empty((len(generators), *x.shape[1:]), dtype=x.dtype, device=x.device)
    for mask, generator in zip(masks, generators, strict=True):
        draw_dropout(mask, p, generator=generator)
    return masks


class _Layer(Protocol):
    number: int | None  # among the layers with parameters; None for one without

    def forward(self, x: Tensor, keep: bool) -> Tensor: ...

    def backward(self, slope: Tensor) -> Tensor | None:
        """The gradient on the input from that on the output; None where nobody asks for it."""
        ...


class _Linear:
    """`W x + b` of S > 1 models. The network's first layer gets the images, [U,B,I], and its own gradient is the last;
    the others get and give [S,I,B]."""

    def __init__(self, own: Mapping[str, Tensor], gradients: Mapping[str, Tensor], *, number: int) -> None:
        self.weight, self.bias = own["weight"], own.get("bias")
        self.weight_slope, self.bias_slope = gradients["weight"], gradients.get("bias")
        self.number: int | None = number
        self.size, self.outputs, self.inputs = self.weight.shape
        self.tall = makes_one_product(self.weight) and self.weight.is_contiguous()
        self.buffers = Buffers()

    def forward(self, x: Tensor, keep: bool) -> Tensor:
        weight = self.weight
        if weight.dtype != x.dtype:
            weight = self.buffers("weight", x, weight.shape).copy_(weight)
        bias = self.bias if self.bias is None or self.bias.dtype == x.dtype else self.bias.to(x.dtype)
        if not self.number and not self.tall:
            x = each(x, self.size)
        if keep:
            self.x, self.w = x, weight
        groups, batch = len(x), x.shape[2 if self.number else 1]
        shape = (self.size, self.outputs, batch)
        y = self.buffers("y", x, shape) if keep else x.new_empty(shape)
        if self.number:
            torch.bmm(weight, x, out=y)
        else:  # one product for all models that see the same
            torch.bmm(weight.view(groups, -1, self.inputs), x.mT, out=y.view(groups, -1, batch))
        if bias is not None:
            y += bias[:, :, None]  # afterwards on both ways, which so round alike
        return y

    def backward(self, slope: Tensor) -> Tensor | None:
        below = None
        if self.number:
            below = self.buffers("below", slope, (self.size, self.inputs, slope.shape[2]))
            torch.bmm(self.w.mT, slope, out=below)
        # The weights' gradient comes last: the optimiser may read it next.
        if self.bias_slope is not None:
            if slope.dtype == self.bias_slope.dtype:
                torch.sum(slope, 2, out=self.bias_slope)
            else:
                self.bias_slope.copy_(slope.sum(2, dtype=self.bias_slope.dtype))
        # Into a tensor with gaps the products would be written one by one.
        same = slope.dtype == self.weight_slope.dtype and self.weight_slope.is_contiguous()
        out = self.weight_slope if same else self.buffers("weight_slope", slope, self.weight_slope.shape)
        if self.number:
            torch.bmm(slope, self.x.mT, out=out)
        else:
            groups = len(self.x)
            torch.bmm(slope.reshape(groups, -1, slope.shape[2]), self.x, out=out.view(groups, -1, self.inputs))
        if not same:
            self.weight_slope.copy_(out)
        return below


class _LinearAlone:
    """`x W^T + b` of one model, its tensors without the axis of models."""

    def __init__(self, own: Mapping[str, Tensor], gradients: Mapping[str, Tensor], *, number: int) -> None:
        self.weight = own["weight"][0]
        self.across = self.weight.t()
        self.bias = own["bias"][0] if "bias" in own else None
        self.weight_slope = gradients["weight"][0]
        self.bias_slope = gradients["bias"][0] if "bias" in gradients else None
        self.number: int | None = number
        self.outputs, self.inputs = self.weight.shape
        self.buffers = Buffers()
        usual = self.weight.device.type == "cpu" and self.weight.dtype == torch.float32
        self.quick = linear_of_onednn() if usual and self.weight.numel() >= 2**18 else None

    def forward(self, x: Tensor, keep: bool) -> Tensor:
        weight, across, bias = self.weight, self.across, self.bias
        if weight.dtype != x.dtype:
            weight = self.buffers("weight", x, weight.shape).copy_(weight)
            across = weight.t()
            bias = None if bias is None else bias.to(x.dtype)
        if keep:
            self.x, self.w = x, weight
        if self._quick(x):
            return self.quick(x, weight, bias)  # type: ignore[misc]
        shape = (len(x), self.outputs)
        y = self.buffers("y", x, shape) if keep else x.new_empty(shape)
        return torch.mm(x, across, out=y) if bias is None else torch.addmm(bias, x, across, out=y)

    def backward(self, slope: Tensor) -> Tensor | None:
        below = None
        if self.number:
            if self._quick(slope):
                below = self.quick(slope, self.across)  # type: ignore[misc]
            else:
                below = torch.mm(slope, self.w, out=self.buffers("below", slope, (len(slope), self.inputs)))
        # The weights' gradient comes last: the optimiser may read it next.
        if slope.dtype == self.weight_slope.dtype:
            if self.bias_slope is not None:
                torch.sum(slope, 0, out=self.bias_slope)
            torch.mm(slope.t(), self.x, out=self.weight_slope)
        else:
            if self.bias_slope is not None:
                self.bias_slope.copy_(slope.sum(0, dtype=self.bias_slope.dtype))
            out = self.buffers("weight_slope", slope, self.weight_slope.shape)
            self.weight_slope.copy_(torch.mm(slope.t(), self.x, out=out))
        return below

    def _quick(self, x: Tensor) -> bool:
        return self.quick is not None and x.dtype == torch.float32 and len(x) >= 64


class Buffers:
    """Memory for results, by name and shape: where they were a step before."""

    def __init__(self) -> None:
        self.found: dict[tuple[str, Sequence[int]], Tensor] = {}

    def __call__(self, name: str, like: Tensor, shape: Sequence[int]) -> Tensor:
        found = self.found.get((name, shape))
        if found is None or found.dtype != like.dtype:
            found = self.found[name, shape] = torch.empty(shape, dtype=like.dtype, device=like.device)
        return found


class _ReLU:
    number: int | None = None

    def forward(self, x: Tensor, keep: bool) -> Tensor:
        y = x.relu_()
        if keep:
            self.y = y
        return y

    def backward(self, slope: Tensor) -> Tensor:
        return torch.ops.aten.threshold_backward.grad_input(slope, self.y, 0, grad_input=slope)


class _Dropout:
    number: int | None = None
    mask: Tensor | None = None

    def __init__(self, p: float, generators: Generators, *, examples_last: bool) -> None:
        self.p, self.generators, self.examples_last = p, generators, examples_last

    def forward(self, x: Tensor, keep: bool) -> Tensor:
        generators = self.generators.now
        if generators is None:
            self.mask = None
            return x
        if x.ndim == 2:  # of one model
            self.mask = dropout_masks(x[None], self.p, generators)[0]
            return x * self.mask
        mask = dropout_masks(x.mT if self.examples_last else x, self.p, generators)  # drawn as for one model
        self.mask = mask.mT if self.examples_last else mask
        return each(x, len(generators)) * self.mask

    def backward(self, slope: Tensor) -> Tensor:
        return slope if self.mask is None else slope.mul_(self.mask)


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
KINDS = (nn.Linear, nn.ReLU, nn.Flatten, nn.Identity, Dropout)
