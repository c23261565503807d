"""What is registered with Hydra before it composes: the launcher and the sweeper, and nodes of the configuration."""

from __future__ import annotations

import inspect
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper

PREFIX = "hydra_plugins.kd_cli."


def register_plugin(plugin: type[Launcher] | type[Sweeper]) -> str:
    """Register a launcher or a sweeper and return the `_target_` that Hydra accepts for it.

    Hydra 1.3 instantiates plug-ins of its own package only, so the class gets a name of that package as well. Hydra 1.4
    accepts the class's own name. KD_HYDRA_INTERNALS=0 does not change this: 1.3 has no public way for a plug-in that
    is not installed as hydra_plugins.
    """
    plugins = Plugins.instance()
    plugins.register(plugin)
    if not hasattr(Plugins, "is_in_toplevel_plugins_module"):
        return f"{plugin.__module__}.{plugin.__qualname__}"
    target = PREFIX + plugin.__qualname__
    plugins.class_name_to_class[target] = plugin
    return target


def store_node(name: str, node: Any, group: str | None = None) -> None:
    """Store a node of the configuration, in place of one that this process has stored before."""
    store = ConfigStore.instance().store
    replace: dict[str, Any] = {"replace": True} if "replace" in inspect.signature(store).parameters else {}  # Hydra 1.4
    store(group=group, name=name, node=node, provider="kd_cli", **replace)
