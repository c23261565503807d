"""A job's record in `.hydra/`, written as OmegaConf writes it but by libyaml and from remembered parts."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kd_cli.sweeps.jobs import is_recorded


def save_configuration(written: Mapping[str, Any], folder: Path) -> None:
    """Write config.yaml, hydra.yaml and overrides.yaml as Hydra does, unless they are there.

    `written` is what `as_written` returns of the configuration with its node `hydra`.
    """
    if is_recorded(folder):
        return
    folder.mkdir(parents=True, exist_ok=True)
    hydra = written["hydra"]
    text = "".join(_known_yaml(pickle.dumps({key: value})) for key, value in written.items() if key != "hydra")
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    parts = (_known_yaml(pickle.dumps({"hydra": {key: value}})) for key, value in hydra.items())
    text = "hydra:\n" + "".join(part.removeprefix("hydra:\n") for part in parts)
    (folder / "hydra.yaml").write_text(text, encoding="utf-8")
    (folder / "overrides.yaml").write_text(to_yaml(hydra["overrides"]["task"]), encoding="utf-8")


def to_yaml(value: Any) -> str:
    """Return the text of OmegaConf.to_yaml, by libyaml where PyYAML has it: five times as fast."""
    return yaml.dump(value, default_flow_style=False, allow_unicode=True, sort_keys=False, Dumper=_dumper())


@functools.lru_cache(1024)
def _known_yaml(pickled: bytes) -> str:
    """Return the text of a part of a configuration; most parts are the same in all jobs of a sweep."""
    return to_yaml(pickle.loads(pickled))


@functools.cache
def _dumper() -> Any:
    from omegaconf._utils import OmegaConfDumper, get_omega_conf_dumper

    plain = get_omega_conf_dumper()
    if not hasattr(yaml, "CDumper"):
        return plain
    fast = type("FastDumper", (yaml.CDumper,), {})
    fast.add_representer(str, OmegaConfDumper.str_representer)  # type: ignore[attr-defined]
    return fast
