"""The logits among the outputs of a user's model, which may be a tuple, a dictionary or an object."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from kd_cli.errors import ConfigError

NAMES = ("logits", "out", "output", "outputs", "pred", "prediction", "predictions")


def take_logits(module: nn.Module, classes: int) -> nn.Module:
    """Have the module return its logits alone, whatever its forward returns; the module itself is returned."""
    module.register_forward_hook(functools.partial(_hook, classes))
    return module


def _hook(classes: int, module: nn.Module, args: Any, output: Any) -> Tensor | None:
    return None if isinstance(output, Tensor) else described(output, classes)[0]


def described(output: Any, classes: int) -> tuple[Tensor, str]:
    """The logits in a model's output, and where they were in it. ConfigError when it has none.

    They are what is named `logits`; else the only tensor `[B, classes]`, or the first one of several.
    """
    named, kind = _named(output)
    for name in NAMES:
        if isinstance(found := named.get(name), Tensor):
            return found, f"{kind}, of which '{name}' is taken as the logits"
    fitting = [name for name, value in named.items() if isinstance(value, Tensor) and value.shape[1:] == (classes,)]
    if not fitting:
        raise ConfigError(
            f"the model returns {kind}, and no tensor in it is [batch, {classes}]: one logit for each class",
            hint="have its forward return the logits, alone or under the name logits",
        )
    return named[fitting[0]], f"{kind}, of which {_place(fitting[0])} is taken as the logits"


def _named(output: Any) -> tuple[dict[str, Any], str]:
    """The parts of an output by name or number, and what it is."""
    name = type(output).__name__
    if isinstance(output, Mapping):
        return {str(key): value for key, value in output.items()}, f"a {name} with {', '.join(map(str, output))}"
    if hasattr(output, "_asdict"):  # a named tuple
        return output._asdict(), f"a {name} with {', '.join(output._fields)}"
    if isinstance(output, tuple | list):
        return {str(i): value for i, value in enumerate(output)}, f"a {name} of {len(output)}"
    if hasattr(output, "__dict__"):
        return dict(vars(output)), f"an object of the class {name}"
    return {}, f"a {name}"


def _place(name: str) -> str:
    ordinals = {"0": "the first", "1": "the second", "2": "the third"}
    return ordinals.get(name, f"number {int(name) + 1}" if name.isdigit() else f"'{name}'")
