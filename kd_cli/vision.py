"""torchvision, imported so that it works beside any torch, and kept from waiting for ever on a dead network.

torchvision from the package index is built against CUDA's torch. Beside CPU torch its compiled part cannot be loaded,
and because it then describes two operators that were never defined, `import torchvision` dies with "operator
torchvision::nms does not exist". Data sets and classification models need neither operator: their bare schemas are
enough for the import. Everything of this package that needs torchvision gets it here.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import socket
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType

import torch

from kd_cli.errors import ConfigError

NMS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_kept: list[torch.library.Library] = []  # a Library that is collected takes its definitions with it


@functools.cache
def import_torchvision() -> ModuleType:
    """Import torchvision, defining the operators that its missing compiled part would have brought.

    Raises ConfigError where torch and torchvision do not belong together for another reason.
    """
    try:
        return _import()
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise _mismatch(error) from error
    except ImportError as error:
        raise _mismatch(error) from error
    library = torch.library.Library("torchvision", "DEF")
    library.define(f"nms{NMS}")
    library.define(f"qnms{NMS}")
    _kept.append(library)
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left: submodules of a package that is gone
    try:
        return _import()
    except (RuntimeError, ImportError) as error:
        raise _mismatch(error) from error


@contextlib.contextmanager
def network_timeout(seconds: float = 30) -> Iterator[None]:
    """Let a silent server fail within the block: torchvision's and torch.hub's downloads set no timeout."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _import() -> ModuleType:
    with warnings.catch_warnings():
        # older ones (0.21) say so where the compiled part is missing; images are read with PIL here
        warnings.filterwarnings("ignore", message="Failed to load image Python extension", category=UserWarning)
        return importlib.import_module("torchvision")


def _mismatch(error: Exception) -> ConfigError:
    return ConfigError(
        f"torchvision cannot be imported beside torch {torch.__version__}: {error}",
        hint="install the torchvision that belongs to this torch; dataset=digits and the models mlp and cnn need none",
    )
