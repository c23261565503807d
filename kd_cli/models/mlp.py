"""Multilayer perceptrons."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from kd_cli.errors import ConfigError
from kd_cli.models.arguments import check_sizes, share, sizes
from kd_cli.models.layers import Dropout
from kd_cli.numeric import is_number


def mlp(
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    hidden: Sequence[int],
    dropout: float = 0.0,
    input_dropout: float = 0.0,
    max_norm: float | None = None,
) -> nn.Sequential:
    """A multilayer perceptron with ReLU; `hidden` holds the layers' widths, `dropout` follows each of them.

    With `max_norm` the network has an attribute `max_norm`: the bounds that `constrain_max_norm` keeps after each step,
    by parameter name, for the weights that feed hidden units (Hinton et al. 2012, appendix A). Raises ConfigError.
    """
    dropout, input_dropout = share("dropout", dropout), share("input_dropout", input_dropout)
    widths = sizes("hidden", hidden)
    if max_norm is not None and not (is_number(max_norm) and max_norm > 0):
        raise ConfigError(f"max_norm is {max_norm!r}; it must be null or a number above 0")
    check_sizes(input_shape, num_classes)

    layers: list[nn.Module] = [nn.Flatten()]
    bounds: dict[str, float] = {}
    fan_in = torch.Size(input_shape).numel()
    if input_dropout:
        layers.append(Dropout(input_dropout))
    for width in widths:
        if max_norm is not None:
            bounds[f"{len(layers)}.weight"] = float(max_norm)
        # in place: the gradient of neither a linear layer nor ReLU needs what ReLU overwrites
        layers += [nn.Linear(fan_in, width), nn.ReLU(inplace=True)]
        if dropout:
            layers.append(Dropout(dropout))
        fan_in = width
    network = nn.Sequential(*layers, nn.Linear(fan_in, num_classes))
    if max_norm is not None:
        network.max_norm = bounds  # type: ignore[assignment]  # plain values are welcome on a module
    return network
