"""What a configuration runs in place of a training: a measurement, for example."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from kd_cli.config.build import build
from kd_cli.errors import ConfigError, KdError
from kd_cli.sweeps.sweep_folder import SweepNotes, leave_nothing


def run_instead(cfg: DictConfig, path: Path) -> None:
    """Run the function that `instead` names, with the run's directory; print its table and the files that it wrote."""
    node: Any = OmegaConf.to_container(cfg.instead, resolve=True)
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(f"instead is {node!r}; it must be a `_target_` node", hint="see conf/experiment")
    if cfg.dry_run:
        print(f"{node['_target_']}: to run, in place of a training")
        leave_nothing(path, begun=True)
        return
    try:
        table, files = build(node, path, where="instead")
    except KdError:
        if SweepNotes.new:
            leave_nothing(path, begun=True)
        raise
    print(f"{table}\n\nwritten to {os.path.relpath(path)}: {', '.join(file.name for file in files)}")
