"""Former names of functions and modules that a user's YAML or an older record may still hold under `_target_`."""

from __future__ import annotations

from typing import Any

# Former dotted name, of a module or of something in it, and the present one. Add a line when something moves; a line
# may lead to a name that another line moves on.
MOVED = {
    "kd_cli.zoo.models": "kd_cli.models.networks",
    "kd_cli.zoo.data": "kd_cli.data.sources",
    "kd_cli.zoo.vision": "kd_cli.vision",
    "kd_cli.runs.limits": "kd_cli.experiments.high_temperature",
}


def current_name(target: str) -> str:
    """Return the present dotted name of what a former one meant; other names are returned as they are."""
    for _ in MOVED:  # each line is used once at most: no name goes round in a circle
        parts = target.split(".")
        for cut in range(len(parts), 0, -1):
            if new := MOVED.get(".".join(parts[:cut])):
                target = ".".join([new, *parts[cut:]])
                break
        else:
            break
    return target


def with_current_names(value: Any) -> Any:
    """Return a configuration's value with the present names under every `_target_` in it."""
    if isinstance(value, dict):
        return {
            key: current_name(item) if key == "_target_" and isinstance(item, str) else with_current_names(item)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [with_current_names(item) for item in value]
    return value
