"""A network that computes as its int8 form will: weights and inputs of its layers rounded to 8 bits in every pass.

Jacob et al. 2018, "Quantization and training of neural networks for efficient integer-arithmetic-only inference",
section 3: the forward pass rounds, the gradient passes through as if it had not (and not where a value is clipped).
Weights have a scale for each output channel, symmetric; inputs have one scale and zero point for a layer, of a moving
average of the batches' ranges. These are the scales of ONNX's QuantizeLinear and DequantizeLinear. Biases, sums and
what lies between linear and convolutional layers stay in floating point.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_cli.errors import ConfigError
from kd_cli.models.outputs import take_logits

LEAST, MOST = -128, 127
AVERAGE = 0.1  # the weight of a batch in the moving average of ranges


def rounded(values: Tensor, scale: Tensor, zero: Tensor | float, least: int) -> Tensor:
    """Values at the nearest of the integers from `least` to MOST times `scale`, where `zero` stands for 0.

    The gradient is 1 inside that range and 0 outside.
    """
    steps = values / scale
    whole = steps + (steps.round() - steps).detach() + zero
    return (whole.clamp(least, MOST) - zero) * scale


def rounded_weights(weight: Tensor) -> Tensor:
    """Weights [out, ...] at 255 levels around 0, as far apart as the largest weight of an output channel asks for."""
    largest = weight.detach().abs().flatten(1).amax(1).reshape(-1, *[1] * (weight.ndim - 1))
    return rounded(weight, scale_of(largest / MOST), 0.0, -MOST)


def scale_of(step: Tensor) -> Tensor:
    """A step between two levels; 1 where all values are 0."""
    return torch.where(step > 0, step, torch.ones_like(step))


class Int8(nn.Module):
    """What Int8Linear and Int8Conv2d share: the range of their input, kept while they are trained."""

    weight: Tensor
    low: Tensor
    high: Tensor
    batches: Tensor
    simulates = True  # False computes in floating point

    def begin(self) -> None:
        """Register the range, empty before the first batch."""
        for name in ("low", "high"):
            self.register_buffer(name, torch.zeros((), dtype=self.weight.dtype))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's input and weight, rounded where it simulates."""
        if not self.simulates:
            return x, self.weight
        low, high = self.range_of(x.detach())
        scale = scale_of((high - low) / (MOST - LEAST))
        zero = (LEAST - low / scale).round()
        return rounded(x, scale, zero, LEAST), rounded_weights(self.weight)

    @torch.no_grad()
    def range_of(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The range that 8 bits cover, with 0 in it; in training it follows the batch."""
        low, high = torch.aminmax(x)
        low, high = low.clamp(max=0), high.clamp(min=0)
        new = self.batches == 0  # a layer that was never trained has its batch's range
        if self.training:
            for kept, found in ((self.low, low), (self.high, high)):
                kept.copy_(torch.where(new, found, kept + AVERAGE * (found - kept)))
            self.batches += 1
            return self.low.clone(), self.high.clone()
        return torch.where(new, low, self.low), torch.where(new, high, self.high)


class Int8Linear(Int8, nn.Linear):
    """A linear layer on rounded input and weights."""

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.parts(x)
        return F.linear(x, weight, self.bias)


class Int8Conv2d(Int8, nn.Conv2d):
    """A convolution of rounded input and weights."""

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.parts(x)
        return self._conv_forward(x, weight, self.bias)


def as_int8(layer: nn.Module) -> Int8 | None:
    """A layer with the same parameters that rounds; None for layers of another type."""
    found: Int8Linear | Int8Conv2d
    bias = getattr(layer, "bias", None) is not None
    if type(layer) is nn.Linear:
        found = Int8Linear(layer.in_features, layer.out_features, bias, device="meta")
    elif type(layer) is nn.Conv2d:
        found = Int8Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            layer.groups,
            bias,
            layer.padding_mode,
            device="meta",
        )
    else:
        return None
    found.weight, found.bias = layer.weight, layer.bias
    found.begin()
    return found.train(layer.training)


def quantised(*, input_shape: tuple[int, ...], num_classes: int, network: Callable[..., nn.Module]) -> nn.Module:
    """The network that `network` builds, its linear and convolutional layers computing in simulated int8.

    Parameters have the names and initial values that they have in the network itself. Raises ConfigError for a network
    without such layers.
    """
    built = network(input_shape=input_shape, num_classes=num_classes)
    if not str(getattr(network, "func", network).__module__).startswith("kd_cli."):  # what ships returns logits
        take_logits(built, num_classes)
    replaced: dict[int, Int8] = {}  # a layer that has two names stays one layer
    for path, layer in list(built.named_modules(remove_duplicate=False)):
        found = replaced.get(id(layer)) or as_int8(layer)
        if found is None:
            continue
        if not path or next(layer.named_children(), None) is not None or layer._forward_hooks:
            raise ConfigError(f"quantise=int8 cannot replace {path or 'the network itself'}", hint="quantise=null")
        replaced[id(layer)] = found
        built.set_submodule(path, found)
    if not replaced:
        raise ConfigError(
            "quantise=int8 simulates torch.nn.Linear and torch.nn.Conv2d, and the student has none of them",
            hint="quantise=null; kd-export --int8 quantises a trained student",
        )
    return built


def int8_layers(network: nn.Module) -> list[Int8]:
    """The layers of a network that simulate int8."""
    return [layer for layer in network.modules() if isinstance(layer, Int8)]


@contextlib.contextmanager
def in_floats(network: nn.Module) -> Iterator[None]:
    """A context in which the layers of a network compute in floating point."""
    layers = int8_layers(network)
    try:
        for layer in layers:
            layer.simulates = False
        yield
    finally:
        for layer in layers:
            layer.simulates = True


@torch.no_grad()
def ranges_in_order(network: nn.Module, model: Callable[[Tensor], Any], images: Tensor) -> list[tuple[float, float]]:
    """The input ranges of the int8 layers in the order in which they compute for `model(images)`, once for each use."""
    order: list[Int8] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, _: order.append(module)) for layer in int8_layers(network)
    ]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return [(float(layer.low), float(layer.high)) for layer in order]
