"""Networks from which whole hidden units and channels are removed: which can be, and what is left of the weights.

A unit can be removed where all that it feeds is known: a linear or convolutional layer whose outputs reach the next
such layer through elementwise functions, pooling, BatchNorm and depthwise convolutions alone. These are the layers that
follow each other in an `nn.Sequential`, and the inner ones of the residual blocks in INNER. Layers whose outputs are
added to others keep their widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd_cli.errors import ConfigError
from kd_cli.models.input_view import InputView
from kd_cli.models.layers import Dropout
from kd_cli.models.outputs import take_logits
from kd_cli.models.quantised import Int8Conv2d, Int8Linear
from kd_cli.models.renormalised import Renormalised

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, Int8Linear, Int8Conv2d)
# What lies between two layers and treats every unit alike.
BETWEEN = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh, nn.Sigmoid, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, Dropout, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Flatten),
)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
# Residual blocks by the class's full name: a layer, what treats its units alike, and the layer that they feed.
INNER = {
    "kd_cli.models.cifar.BasicBlock": (("conv1", "bn1", "conv2"),),
    "kd_cli.models.cifar.PreActivationBlock": (("conv1", "bn2", "conv2"),),
    "torchvision.models.resnet.BasicBlock": (("conv1", "bn1", "conv2"),),
    "torchvision.models.resnet.Bottleneck": (("conv1", "bn1", "conv2"), ("conv2", "bn2", "conv3")),
}

Kept = Mapping[str, Tensor]  # the numbers of the units that stay, by the path of the layer that makes them


@dataclass(frozen=True)
class Units:
    """The hidden units, or channels, that one layer makes: paths of the layer and of all that a unit belongs to.

    In the input of the layer that they `feed`, each unit has `width` neighbouring numbers: the positions of a flattened
    map.
    """

    made: str
    between: tuple[str, ...]
    feed: str
    count: int
    width: int


def units_of(network: nn.Module, path: str = "") -> list[Units]:
    """The units of a network that can be removed, in the order of its modules."""
    if is_chain(network):
        members = list(links(network, path))
        found = in_chain(members)
    else:
        members = [(joined(path, name), child) for name, child in network.named_children()]
        found = in_block(network, path)
    return found + [units for where, child in members for units in units_of(child, where)]


def is_chain(module: nn.Module) -> bool:
    """Whether a module calls its children one after the other and does nothing else."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def links(chain: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a chain, and the chains in it, call in turn."""
    for name, child in chain.named_children():
        if is_chain(child):
            yield from links(child, joined(path, name))
        else:
            yield joined(path, name), child


def in_chain(members: Sequence[tuple[str, nn.Module]]) -> list[Units]:
    """The units between two layers of a chain."""
    found: list[Units] = []
    made: tuple[str, nn.Module] | None = None
    between: list[str] = []
    for path, module in members:
        if type(module) in LAYERS and ungrouped(module) and has_weight(module):
            if made is not None and ends_of(module)[0] % ends_of(made[1])[1] == 0:
                count = ends_of(made[1])[1]
                found.append(Units(made[0], tuple(between), path, count, ends_of(module)[0] // count))
            made, between = (path, module), []
        elif made is not None and belongs_to(module, ends_of(made[1])[1]):
            between.append(path)
        elif type(module) not in BETWEEN:
            made = None
    return found


def in_block(block: nn.Module, path: str) -> list[Units]:
    """The inner units of a residual block whose class is known."""
    kind = f"{type(block).__module__}.{type(block).__qualname__}"
    found = []
    for made, norm, feed in INNER.get(kind, ()):
        count = ends_of(block.get_submodule(made))[1]
        if ungrouped(block.get_submodule(made)) and ungrouped(block.get_submodule(feed)):
            found.append(Units(joined(path, made), (joined(path, norm),), joined(path, feed), count, 1))
    return found


def joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def ungrouped(layer: nn.Module) -> bool:
    return not isinstance(layer, nn.Conv1d | nn.Conv2d) or layer.groups == 1


def has_weight(layer: nn.Module) -> bool:
    """Whether a layer's weight is its own parameter, and not computed of others, as spectral_norm does it."""
    return layer._parameters.get("weight") is not None


def ends_of(layer: nn.Module) -> tuple[int, int]:
    """The numbers of inputs and outputs, or of channels, of a linear or convolutional layer."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    assert isinstance(layer, nn.Conv1d | nn.Conv2d)
    return layer.in_channels, layer.out_channels


def belongs_to(module: nn.Module, count: int) -> bool:
    """Whether a module has weights or statistics for each of `count` units: BatchNorm, a depthwise convolution."""
    if type(module) in NORMS:
        return bool(module.num_features == count)
    return isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups == count == ends_of(module)[1] > 1


# ---------------------------------------------------------------- removal


def cuts(network: nn.Module, units: Sequence[Units]) -> Iterator[tuple[str, str, int, int]]:
    """What belongs to removable units: the path of their layer, the name of a tensor, its dimension, numbers a unit."""
    for one in units:
        for path in (one.made, *one.between):
            for name, tensor in network.get_submodule(path).state_dict(keep_vars=True).items():
                if tensor.ndim and len(tensor) == one.count:
                    yield one.made, f"{path}.{name}", 0, 1
        yield one.made, f"{one.feed}.weight", 1, one.width


def positions(kept: Tensor, width: int) -> Tensor:
    """Where the numbers of units are that have `width` numbers each."""
    return (kept[:, None] * width + torch.arange(width, device=kept.device)).flatten()


def narrowed_state(
    network: nn.Module, units: Sequence[Units], kept: Kept, state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A network's state dict without the units that are not kept."""
    found = dict(state)
    for made, name, dim, width in cuts(network, units):
        index = positions(kept[made], width).to(found[name].device)
        found[name] = found[name].index_select(dim, index)
    return found


def narrow(network: nn.Module, units: Sequence[Units], kept: Kept) -> None:
    """Remove units from a network, in place."""
    old = network.state_dict(keep_vars=True)
    new = narrowed_state(network, units, kept, {name: tensor.detach() for name, tensor in old.items()})
    for name, tensor in new.items():
        if tensor.shape == old[name].shape:
            continue
        path, _, own = name.rpartition(".")
        value = nn.Parameter(tensor, old[name].requires_grad) if isinstance(old[name], nn.Parameter) else tensor
        setattr(network.get_submodule(path), own, value)
    for one in units:
        count = len(kept[one.made])
        resize(network.get_submodule(one.made), outputs=count)
        resize(network.get_submodule(one.feed), inputs=count * one.width)
        for path in one.between:
            resize(network.get_submodule(path), inputs=count, outputs=count)


def resize(module: nn.Module, *, inputs: int | None = None, outputs: int | None = None) -> None:
    """Set the sizes that a module says it has."""
    if isinstance(module, NORMS):
        module.num_features = inputs or module.num_features
    elif isinstance(module, nn.Linear):
        module.in_features, module.out_features = inputs or module.in_features, outputs or module.out_features
    else:
        assert isinstance(module, nn.Conv1d | nn.Conv2d)
        if module.groups > 1:
            module.groups = outputs or module.groups
        module.in_channels, module.out_channels = inputs or module.in_channels, outputs or module.out_channels


def pruned(
    *,
    input_shape: tuple[int, ...],
    num_classes: int,
    network: Callable[..., nn.Module],
    widths: Mapping[str, int],
) -> nn.Module:
    """The network that `network` builds with `widths` units left in layers, by their paths; the first ones of each.

    Its weights are those of a pruned student once they are loaded. Raises ConfigError.
    """
    built = network(input_shape=input_shape, num_classes=num_classes)
    if not str(getattr(network, "func", network).__module__).startswith("kd_cli."):  # what ships returns logits
        take_logits(built, num_classes)
    units = [one for one in units_of(built) if one.made in widths]
    known = {one.made: one.count for one in units}
    for path, width in widths.items():
        if path not in known or not 0 < width <= known[path]:
            raise ConfigError(
                f"widths has {width} units for {path!r}, which has {known.get(path, 'none')} that can be removed"
            )
    narrow(built, units, {path: torch.arange(width) for path, width in widths.items()})
    return built


def inside(module: nn.Module) -> nn.Module:
    """A network without its view of the input and its normalisation."""
    while isinstance(module, InputView | Renormalised):
        module = module.network
    return module
