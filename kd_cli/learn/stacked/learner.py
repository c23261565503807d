"""S models of one architecture, their weights stacked on a leading axis and advanced by the same step.

Equal to training the S models one by one: each has its own batches, dropout masks, learning rate and weight decay.
Fully connected networks have their gradients in closed form, which pays for S = 1 too.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from kd_cli.errors import first_line
from kd_cli.learn.learner import Autocast, single_precision
from kd_cli.learn.optim import bare_step, set_rates
from kd_cli.learn.randomness import Generators
from kd_cli.learn.stacked.dense import Dense, dropout_masks, each, is_dense, makes_one_product, parameter_counts
from kd_cli.learn.stacked.flat import Flat
from kd_cli.models.networks import Dropout, constrain_max_norm

# Optimisers whose update of a weight depends on that weight's own gradient and state only: applied to a stack they do
# to each model what they do to it alone.
ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
)

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def why_not(module: nn.Module, optimizer: torch.optim.Optimizer, image: Tensor) -> str | None:
    """Why models like this one cannot be stacked, or None when they can; `image` is one input, without batch."""
    if type(optimizer) not in ELEMENTWISE:
        return f"the optimiser {type(optimizer).__name__} has no stacked form"
    if any(True for _ in module.buffers()):
        kinds = sorted({type(m).__name__ for m in module.modules() if any(True for _ in m.buffers(recurse=False))})
        return f"{', '.join(kinds)} keeps running statistics, which do not stack"
    if not all(p.requires_grad for p in module.parameters()):
        return f"{type(module).__name__} has weights that are not trained"
    if len({p.dtype for p in module.parameters()}) > 1:
        return f"{type(module).__name__} has weights of several types"
    if isinstance(module, nn.Sequential) and all(type(layer) in LAYERS for layer in module.children()):
        several = sum(len(list(layer.parameters())) for layer in module) > len(list(module.parameters()))
        return f"{type(module).__name__} has layers that share weights" if several else None
    if any("Dropout" in type(m).__name__ for m in module.modules()):
        return f"{type(module).__name__} has dropout inside a forward of its own"
    try:
        parameters = {name: torch.stack([p.detach()] * 2) for name, p in module.named_parameters()}
        with torch.enable_grad():
            parameters = {name: p.requires_grad_() for name, p in parameters.items()}
            logits = _vmapped(module)(parameters, torch.stack([image[None]] * 2))
            slopes = torch.autograd.grad(logits.sum(), list(parameters.values()), allow_unused=True)
    except Exception as error:  # whatever torch finds in a user's forward
        return f"torch.vmap cannot run {type(module).__name__}: {first_line(error)}"
    if any(slope is None for slope in slopes):
        return f"{type(module).__name__} has weights that its forward pass does not use"
    return None


class StackedLearner:
    """S models as one: parameters [S, ...].

    `modules` are the S models with their initial weights, which are copied. `optimizer` builds an optimiser from
    parameter groups; model s gets `hyper[s]`, its own learning rate and weight decay.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        optimizer: OptimizerFactory,
        *,
        hyper: Sequence[dict[str, float]],
        seeds: Sequence[int],
        autocast: Autocast | None = None,
    ) -> None:
        self.size = len(modules)
        self.seeds = list(seeds)
        self.module = modules[0]
        dense = is_dense(self.module)
        layers = parameter_counts(self.module) if dense else []  # type: ignore[arg-type]
        self.flat = Flat([dict(module.named_parameters()) for module in modules], layers)
        self.parameters = self.flat.parameters
        self.device = self.flat.values.device
        self.bounds: dict[str, float] = getattr(self.module, "max_norm", None) or {}
        self.generators = Generators(self.seeds, self.device)
        if dense:
            self.network: Dense | Traced = Dense(
                self.module,  # type: ignore[arg-type]
                self.flat.parameters,
                self.flat.gradients,
                generators=self.generators,
                dtype=torch.bfloat16 if autocast is not None and autocast.enabled else self.flat.values.dtype,
            )
        else:
            self.network = Traced(self.module, self.flat, self.generators, autocast)

        groups = list(self.flat.groups(hyper))
        self.runs = [run for run, _ in groups]
        each_has = len(groups) // len(self.flat.pieces)
        self.groups = [slice(i * each_has, (i + 1) * each_has) for i in range(len(self.flat.pieces))]
        starts = list(itertools.accumulate(layers, initial=0))  # of layers, in the parameters
        self.pieces = {starts.index(piece.start): i for i, piece in enumerate(self.flat.pieces)}  # by their first layer
        self.optimizer = optimizer([group for _, group in groups])
        self.step = bare_step(self.optimizer)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]

    @contextlib.contextmanager
    def train(self, role: str, epoch: int) -> Iterator[None]:
        self.generators.start(role, epoch)
        yield
        self.generators.end()

    def logits(self, images: Tensor) -> Tensor:
        return single_precision(self.network.logits(images))

    def gradients(self, slope: Tensor) -> list[Tensor]:
        slopes = list(self.flat.gradients.values())
        found: list[Tensor] = []

        def keep(piece: int) -> None:  # the next one writes where this one did
            found[:0] = [slope.clone() for slope in slopes[self.flat.pieces[piece]]]

        self._backward(slope, keep)
        return found

    def update(self, slope: Tensor, factor: float | Tensor) -> None:
        set_rates(self.optimizer, self.base_rates, factor)
        self._backward(slope, lambda piece: self.step(self.groups[piece]))
        if self.bounds:
            constrain_max_norm(self.parameters, self.bounds)

    def _backward(self, slope: Tensor, ready: Callable[[int], None]) -> None:
        """From the gradient on the logits; `ready` is told the number of each of the flat's pieces when its gradients
        are there, the last one first."""
        self.network.backward(slope, lambda layer: ready(self.pieces[layer]) if layer in self.pieces else None)

    def rates(self, factor: float) -> list[float]:
        rates = [0.0] * self.size
        for run, rate in zip(self.runs, self.base_rates, strict=True):
            for s in range(self.size)[run]:
                rates[s] = rate * factor
        return rates

    def model_state(self, s: int) -> dict[str, Tensor]:
        return {name: p[s].to("cpu", copy=True) for name, p in self.parameters.items()}

    def state(self) -> dict[str, Any]:
        set_rates(self.optimizer, self.base_rates, 1.0)
        return {"parameters": self.flat.values, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        self.flat.values.copy_(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = bare_step(self.optimizer)


class Traced:
    """S networks whose gradients autograd finds; layer by layer where each has a form for S, else by `torch.vmap`."""

    def __init__(
        self,
        module: nn.Module,
        flat: Flat,
        generators: Generators,
        autocast: Autocast | None,
    ) -> None:
        self.module, self.generators, self.size = module, generators, flat.size
        self.autocast = autocast or contextlib.nullcontext
        self.parameters = {name: p.detach().requires_grad_() for name, p in flat.parameters.items()}
        self.slopes = list(flat.gradients.values())
        self.layered = isinstance(module, nn.Sequential) and all(type(layer) in LAYERS for layer in module.children())

    def logits(self, images: Tensor) -> Tensor:
        with self.autocast():
            if self.layered:
                logits = self._layers(images if len(images) == 1 else each(images, self.size))
            else:
                shared = len(images) == 1
                forward = _vmapped(self.module, shared=shared)
                logits = forward(self.parameters, images[0] if shared else each(images, self.size))
        self.last = logits
        return logits.detach()

    def _layers(self, x: Tensor) -> Tensor:
        for i, layer in self.module._modules.items():  # named_children leaves out a layer that comes again
            assert layer is not None
            own = {name: self.parameters[f"{i}.{name}"] for name, _ in layer.named_parameters()}
            x = LAYERS[type(layer)](layer, own, x, self.generators.now)
        return x

    def backward(self, slope: Tensor, ready: Callable[[int], None]) -> None:
        """Gradients on the parameters: each model's own, whatever those of the others are. All are there when `ready`
        is told so, of layer 0."""
        found = torch.autograd.grad(
            self.last, list(self.parameters.values()), slope.to(self.last.dtype), materialize_grads=True
        )
        del self.last  # and with it the graph, whose nodes remember the stream they were made on
        torch._foreach_copy_(self.slopes, found)
        ready(0)


def _vmapped(module: nn.Module, *, shared: bool = False) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """The forward pass of S models by `torch.vmap`: parameters [S,...], images [S,B,...] or shared [B,...]."""

    def forward(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        return functional_call(module, parameters, (images,))

    return vmap(forward, in_dims=(0, None if shared else 0))


# ---------------------------------------------------------------- layers with a form of their own
# Each maps x [S,B,...], or [1,B,...] while all models still see the same, to [S,B,...].

Layer = Callable[[Any, dict[str, Tensor], Tensor, list[torch.Generator] | None], Tensor]


def _linear(layer: nn.Linear, own: dict[str, Tensor], x: Tensor, generators: Any) -> Tensor:
    weight, bias = own["weight"], own.get("bias")
    # All models see the same: one tall product instead of S small ones, and the input is read once.
    if len(x) == 1 and makes_one_product(weight):
        y = F.linear(x[0], weight.flatten(0, 1)).unflatten(-1, weight.shape[:2]).transpose(0, 1)
    else:
        y = torch.bmm(x.expand(len(weight), *x.shape[1:]), weight.mT)
    return y if bias is None else y + bias[:, None]


def _conv(layer: nn.Conv2d, own: dict[str, Tensor], x: Tensor, generators: Any) -> Tensor:
    weight, bias = own["weight"], own.get("bias")
    size, out = weight.shape[:2]
    # A model's own group of channels also where all see the same images: shared, the rounding depends on the company.
    y = F.conv2d(
        each(x, size).transpose(0, 1).flatten(1, 2),
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
