"""What a network gives for a batch: its logits, and the outputs of inner modules that a method asks for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.errors import ConfigError
from kd_cli.nearest import nearest


@dataclass(frozen=True)
class Outputs:
    """Logits `[S,B,C]` of S models at T = 1, and by module path the outputs `[S,B,...]` of inner modules.

    A teacher that answers all S students alike has a leading axis of 1. `shown` are the logits [S,B,C] that the other
    students learn from, where these are not `logits`: those of earlier weights. `overwritten` are the modules whose
    output here is not what they returned, since a later layer works in place.
    """

    logits: Tensor
    features: dict[str, Tensor] = field(default_factory=dict)
    shown: Tensor | None = None
    overwritten: frozenset[str] = frozenset()

    def of(self, models: slice) -> Outputs:
        """Those of some of the S models."""
        return Outputs(self.logits[models], {path: feature[models] for path, feature in self.features.items()})


class FeatureHooks:
    """Forward hooks that keep the outputs of the modules at `paths` of `module`, until `take` collects them.

    Raises ConfigError for a path that the module does not have; `role` names the module in the message.
    """

    def __init__(self, module: nn.Module, paths: Sequence[str], *, role: str) -> None:
        paths = [str(path) for path in paths]  # YAML reads the path of a layer of an nn.Sequential as a number
        check_paths(module, paths, role=role)
        self.role = role
        self.kept: dict[str, Any] = {}
        self.versions: dict[str, int] = {}
        self.overwritten: frozenset[str] = frozenset()  # those of the outputs taken last that changed after their hook
        self.active = True
        self.handles = [module.get_submodule(path).register_forward_hook(self._hook(path)) for path in paths]

    def _hook(self, path: str) -> Any:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if self.active:
                self.kept[path] = output
                self.versions[path] = _version(output)

        return keep

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which nothing is kept: the maps of a large batch would take memory that no one needs."""
        self.active = False
        try:
            yield
        finally:
            self.active = True

    def remove(self) -> None:
        """Take the hooks off the module."""
        for handle in self.handles:
            handle.remove()

    def take(self) -> dict[str, Tensor]:
        """Return and forget the outputs `[B,...]` of the last forward pass. ConfigError for one that is no tensor."""
        kept, self.kept = self.kept, {}
        self.overwritten = frozenset(path for path, output in kept.items() if _version(output) != self.versions[path])
        for path, output in kept.items():
            if not isinstance(output, Tensor):
                raise ConfigError(
                    f"{self.role}: the module {path!r} returns a {type(output).__name__}; a feature must be a tensor",
                    hint="name a module inside or behind it",
                )
        return kept


def _version(output: Any) -> int:
    """How often a tensor has been changed in place; 0 for what does not count that."""
    return output._version if isinstance(output, Tensor) and not output.is_inference() else 0


def check_paths(module: nn.Module, paths: Iterable[str], *, role: str) -> None:
    """Raise ConfigError for a path that is no module of this network, with the nearest paths that are."""
    known = [path for path, _ in module.named_modules() if path]
    for path in paths:
        if path not in known:
            close = nearest(path, known)
            raise ConfigError(
                f"the {role} has no module {path!r}",
                hint=f"the nearest: {', '.join(close)}" if close else f"it has {', '.join(known[:12])}",
            )


@torch.no_grad()
def sample_outputs(module: nn.Module, images: Tensor, paths: Sequence[str], *, role: str) -> Outputs:
    """The outputs of a network in eval mode for a few images `[B,...]`, as `[1,B,...]`; for shapes, not for values."""
    paths = [str(path) for path in paths]
    hooks = FeatureHooks(module, paths, role=role)
    training = module.training
    logits = module.eval()(images)
    module.train(training)
    hooks.remove()
    features = hooks.take()
    for path in paths:
        if path not in features:
            raise ConfigError(f"the {role}'s forward pass does not reach its module {path!r}")
    lead = {path: feature[None] for path, feature in features.items()}
    return Outputs(logits[None], lead, overwritten=hooks.overwritten)
