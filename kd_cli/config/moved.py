"""Former names of functions and modules that a user's YAML or an older record may still hold under `_target_`."""

from __future__ import annotations

from typing import Any

# Former dotted name, of a module or of something in it, and the present one. Add a line when something moves; a line
# may lead to a name that another line moves on.
MOVED = {
    "kd_cli.zoo.models.mlp": "kd_cli.models.mlp.mlp",
    "kd_cli.zoo.models.cnn": "kd_cli.models.cnn.cnn",
    "kd_cli.zoo.models.torchvision_model": "kd_cli.models.torchvision.torchvision_model",
    "kd_cli.zoo.data.digits": "kd_cli.data.digits.digits_at_random",  # the only split there was
    "kd_cli.zoo.data.imagefolder": "kd_cli.data.folders.imagefolder",
    "kd_cli.zoo.data.torchvision_dataset": "kd_cli.data.torchvision.torchvision_dataset",
    "kd_cli.learn.optim.Constant": "kd_cli.learn.schedules.Constant",
    "kd_cli.learn.optim.Linear": "kd_cli.learn.schedules.Linear",
    "kd_cli.learn.optim.Cosine": "kd_cli.learn.schedules.Cosine",
    "kd_cli.learn.optim.Step": "kd_cli.learn.schedules.Step",
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
