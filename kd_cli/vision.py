"""torchvision, imported so that it works beside any torch, and downloads that give up on a silent server.

torchvision from the package index is built against CUDA's torch. Beside CPU torch its compiled part cannot be loaded,
and because it then describes two operators that were never defined, `import torchvision` dies with "operator
torchvision::nms does not exist". Data sets and classification models need neither operator: their bare schemas are
enough for the import. `repair_torchvision` defines them for every import of torchvision in the process, so that a
user's own module, and timm, can import it as well.
"""

from __future__ import annotations

import contextlib
import importlib
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

from kd_cli.errors import ConfigError

NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept: list[Any] = []  # a torch.library.Library that is collected takes its definitions with it


class TorchvisionFinder:
    """Finds torchvision as Python does, and gives it a loader that repairs the import. For `sys.meta_path`."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = RepairingLoader(spec.loader.name, spec.loader.path)
        return spec


class RepairingLoader(SourceFileLoader):
    """Runs a module; if an operator of torchvision's compiled part is missing, defines it and runs the module again."""

    def exec_module(self, module: ModuleType) -> None:
        with warnings.catch_warnings():
            # torchvision 0.21 warns where the compiled part is missing; images are read with PIL here.
            warnings.filterwarnings("ignore", message="Failed to load image Python extension", category=UserWarning)
            try:
                super().exec_module(module)
                return
            except RuntimeError as error:
                if "torchvision::nms does not exist" not in str(error):
                    raise
            _define_operators()
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]  # what the failed import has left
            super().exec_module(module)


def repair_torchvision() -> None:
    """Let every later `import torchvision` in this process work beside a torch that its compiled part does not fit."""
    if TorchvisionFinder not in sys.meta_path:
        sys.meta_path.insert(0, TorchvisionFinder)


def import_torchvision() -> ModuleType:
    """Import torchvision. Raises ConfigError if torch and torchvision do not belong together for another reason."""
    repair_torchvision()
    try:
        return importlib.import_module("torchvision")
    except (RuntimeError, ImportError) as error:
        import torch

        raise ConfigError(
            f"torchvision cannot be imported beside torch {torch.__version__}: {error}",
            hint="install the torchvision that belongs to this torch; dataset=digits and the models mlp and cnn need "
            "none",
        ) from error


@contextlib.contextmanager
def network_timeout(seconds: float = 30) -> Iterator[None]:
    """Let a silent server fail within the block: torchvision's and torch.hub's downloads set no timeout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _define_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "DEF")
    library.define(f"nms{NMS}")
    library.define(f"qnms{NMS}")
    _kept.append(library)
