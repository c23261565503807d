"""What a network is made of: whether it is fully connected and plain, and what was changed on one instance."""

from __future__ import annotations

from torch import nn

from kd_cli.models.layers import Dropout

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
DENSE_LAYERS = (nn.Linear, nn.ReLU, nn.Flatten, nn.Identity, Dropout)


def is_trained_dense(module: nn.Module) -> bool:
    """Whether the network is dense (see `is_dense`) and all its parameters are trained."""
    return is_dense(module) and all(p.requires_grad for p in module.parameters())


def is_dense(module: nn.Module) -> bool:
    """Whether the network is an `nn.Sequential` of linear layers, ReLU and dropout on flattened images, and no more:
    no shared layers, no buffers, no hooks, one dtype."""
    if type(module) is not nn.Sequential or not len(module) or any(type(layer) not in DENSE_LAYERS for layer in module):
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
        and not any(instance_overrides(part) for part in module.modules())
    )


def instance_overrides(module: nn.Module) -> list[str]:
    """The attributes set on this very module that change its forward or backward pass: hooks, a `forward`."""
    return [name for name, value in vars(module).items() if name == "forward" or (name in HOOKS and value)]


def widths(module: nn.Sequential) -> list[tuple[int, int]]:
    """Inputs and outputs of each linear layer of a dense network."""
    return [(layer.in_features, layer.out_features) for layer in module if isinstance(layer, nn.Linear)]
