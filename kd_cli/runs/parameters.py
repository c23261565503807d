"""The parameters that an optimiser trains, in groups where some have a learning rate or a weight decay of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from kd_cli.config.values import TrainSpec
from kd_cli.data.sentences import listed
from kd_cli.errors import ConfigError
from kd_cli.learn.methods import Method
from kd_cli.nearest import did_you_mean


def trained_parameters(module: nn.Module, method: Method, spec: TrainSpec) -> list[Any]:
    """The parameters of a model and its method, as an optimiser takes them.

    Those without weight decay, and those of modules with a learning rate of their own, are groups. Frozen ones of the
    model are not among them.
    """
    frozen, factors = "freeze" in spec.recipe, spec.recipe.get("lr_factors") or {}
    parameters = [p for p in module.parameters() if p.requires_grad or not frozen]
    groups = groups_by_rate(module, parameters, factors, spec.optimizer.get("lr"))
    groups[0]["params"] += method.parameters()
    undecayed = method.undecayed()
    if undecayed:
        others = {id(parameter) for parameter in undecayed}
        groups[0]["params"] = [parameter for parameter in groups[0]["params"] if id(parameter) not in others]
        groups.append({"params": undecayed, "weight_decay": 0.0})
    plain: list[Any] = groups[0]["params"]
    return groups if len(groups) > 1 else plain


def groups_by_rate(
    module: nn.Module, parameters: Sequence[nn.Parameter], factors: Mapping[str, float], lr: float | None
) -> list[dict[str, Any]]:
    """The parameters in groups, each with its learning rate: `lr` times the factor of the innermost module with one.

    The first group has the others, without a rate of its own. Raises ConfigError for a path without parameters.
    """
    if not factors:
        return [{"params": list(parameters)}]
    if lr is None:
        raise ConfigError("lr_factors multiply the optimiser's lr, and it has none", hint="optimizer=adamw")
    names = {id(p): name.removeprefix("network.") for name, p in module.named_parameters()}
    found: dict[str, list[nn.Parameter]] = {"": [], **{path: [] for path in factors}}
    for p in parameters:
        around = [path for path in factors if names[id(p)].startswith(f"{path}.")]
        found[max(around, key=len, default="")].append(p)
    if empty := [path for path in factors if not found[path]]:
        paths = {name.rpartition(".")[0] for name in names.values()}
        known = {path.rsplit(".", k)[0] for path in paths for k in range(path.count(".") + 1)}
        hint = did_you_mean(empty[0], known) or f"it has {listed(sorted(known))}"
        raise ConfigError(f"lr_factors names {empty[0]!r}, which is no module with weights that are trained", hint=hint)
    own = [{"params": some, "lr": lr * factors[path]} for path, some in found.items() if path]
    return [{"params": found[""]}, *own] if found[""] else own
