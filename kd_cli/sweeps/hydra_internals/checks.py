"""Whether the shortcuts can be used with the Hydra that is installed."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
from importlib.metadata import version
from typing import Any

SWITCH = "KD_HYDRA_INTERNALS"  # environment variable: 0 switches the shortcuts off

# Versions, and for each shortcut what it relies on: module, name in it, parameters (None: any).
VERSIONS = {"hydra-core": ((1, 3), (1, 4)), "omegaconf": ((2, 3), (2, 4))}
RELIES_ON: dict[str, tuple[tuple[str, str, tuple[str, ...] | None], ...]] = {
    "mode": (("hydra._internal.hydra", "Hydra.get_mode", ("self", "config_name", "overrides")),),
    "compositions": (
        (
            "hydra._internal.config_loader_impl",
            "ConfigLoaderImpl.load_sweep_config",
            ("self", "master_config", "sweep_overrides"),
        ),
        (
            "hydra._internal.config_loader_impl",
            "ConfigLoaderImpl._apply_overrides_to_config",
            ("overrides", "cfg"),
        ),
        (
            "hydra._internal.config_loader_impl",
            "get_overrides_dirname",
            ("overrides", "exclude_keys", "item_sep", "kv_sep"),
        ),
        ("hydra._internal.config_repository", "ConfigRepository.group_exists", ("self", "config_path")),
    ),
    "jobs": (
        (
            "hydra.core.utils",
            "run_job",
            ("task_function", "config", "job_dir_key", "job_subdir_key", "hydra_context", "configure_logging"),
        ),
        ("hydra.core.utils", "configure_log", ("log_config", "verbose_config")),
        ("hydra.core.utils", "env_override", ("env",)),
        ("hydra.version", "base_at_least", ("ver",)),
        ("hydra._internal.callbacks", "Callbacks._notify", ("self", "function_name", "reverse", "kwargs")),
        ("omegaconf._utils", "OmegaConfDumper.str_representer", ("dumper", "data")),
        ("omegaconf._utils", "get_omega_conf_dumper", ()),
    ),
}


def usable(shortcut: str) -> bool:
    """Whether a shortcut ("mode", "compositions" or "jobs") is switched on and finds all that it relies on."""
    return os.environ.get(SWITCH, "1") != "0" and missing(shortcut) is None


@functools.cache
def missing(shortcut: str) -> str | None:
    """Return the first thing that a shortcut relies on and that is not as it expects; None where all is there."""
    for package, (least, below) in VERSIONS.items():
        found = tuple(int(part) for part in version(package).split(".")[:2])
        if not least <= found < below:
            return f"{package} {version(package)}"
    for module, name, parameters in RELIES_ON[shortcut]:
        try:
            value: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
        except (ImportError, AttributeError):
            return f"{module}.{name}"
        if parameters is not None and sorted(inspect.signature(value).parameters) != sorted(parameters):
            return f"{module}.{name}{inspect.signature(value)}"
    return None
