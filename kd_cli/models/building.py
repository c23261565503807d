"""What is done to a model between its builder and its use, in training and where a trained student is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from kd_cli.models.input_view import seen_shape, viewed
from kd_cli.models.outputs import take_logits
from kd_cli.models.renormalised import Renormalised, normalisation_of
from kd_cli.models.timm import Pretrained


def prepared(
    module: nn.Module,
    *,
    target: str,
    shape: tuple[int, ...],
    classes: int,
    normalize: Any = "data",
    view: Mapping[str, Any] | None = None,
    data_mean: Sequence[float] = (),
    data_std: Sequence[float] = (),
) -> nn.Module:
    """The module that `target` built, with sizes for its lazy layers, logits as its only output, view, normalisation.

    `shape` is that of the data's examples, of which the network sees its `view` (`kd_cli.models.input_view`).
    `data_mean` and `data_std` are those that its input is normalised by; `normalize` is the normalisation that it was
    made for. ValueError, whose message begins with `normalize`, when that has another number of channels.
    """
    if not target.startswith("kd_cli."):  # what ships returns logits
        take_logits(module, classes)
    if isinstance(module, Pretrained) and normalize == "data":
        normalize = of_channels(module.normalisation, len(data_mean))
    module = viewed(with_sizes(module, seen_shape(view, shape)), view, shape)
    own = normalisation_of(normalize, data_mean=data_mean, data_std=data_std)
    if own is None:
        return module
    mean, std = own
    wrapped = Renormalised(module, data_mean=data_mean, data_std=data_std, mean=mean, std=std, dims=len(shape))
    if bounds := getattr(module, "max_norm", None):
        wrapped.max_norm = {f"network.{name}": bound for name, bound in bounds.items()}  # type: ignore[assignment]
    return wrapped


def of_channels(normalisation: Mapping[str, Any], channels: int) -> dict[str, list[float]]:
    """A normalisation of colour pictures for pictures with this many channels; else the mean of its own serves all."""
    own = {key: [float(value) for value in values] for key, values in normalisation.items()}
    return {k: v if len(v) == channels else [sum(v) / len(v)] * channels for k, v in own.items()}


def with_sizes(module: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The module; lazy layers take their sizes, and their initial weights, from one blank image."""
    if any(isinstance(p, UninitializedParameter) for p in module.parameters()):
        with torch.no_grad():
            module.eval()(torch.zeros(1, *shape))
        module.train()
    return module


def dtype_of(precision: str) -> torch.dtype:
    """The type of weights and images; bfloat16 and tf32 are arithmetic on float32 weights."""
    return torch.float64 if precision == "float64" else torch.float32
