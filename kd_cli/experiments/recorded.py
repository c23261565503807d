"""What the runs of a sweep have recorded: configurations, and the outputs of stored models."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from kd_cli.config.read import run_config
from kd_cli.config.values import RunConfig
from kd_cli.errors import DataError
from kd_cli.report.read import Run, collect
from kd_cli.storage.store import Entry, Store


def completed(folder: Path) -> list[Run]:
    """The completed runs of a sweep. Raises DataError when there is none."""
    runs = [run for run in collect([folder])[0] if run.status == "completed"]
    if not runs:
        raise DataError(f"{folder} has no completed run")
    return runs


def configuration(run: Run) -> RunConfig:
    """The configuration that Hydra recorded for a run."""
    from omegaconf import DictConfig, OmegaConf

    cfg = OmegaConf.load(run.path / ".hydra" / "config.yaml")
    assert isinstance(cfg, DictConfig)
    return run_config(cfg, run.choices)


def stored(store: Store, fingerprint: str, run: Run) -> Entry:
    """A model that a run has used, from the store. Raises DataError when the store has it no longer."""
    entry = store.get(fingerprint)
    if entry is None:
        raise DataError(f"the store no longer has the model {fingerprint} of {run.path}", hint="repeat the sweep")
    return entry


def logits_on_test(entry: Entry) -> Tensor:
    """A stored model's logits at T = 1 on the test data: [M,C]."""
    found: Tensor = entry.outputs()["test"]
    return found
