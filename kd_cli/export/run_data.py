"""The data set of a finished run, read again, and proof that it is the one that the run used."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import yaml

from kd_cli.config.build import build
from kd_cli.config.moved import with_current_names
from kd_cli.config.options import conf_dir
from kd_cli.config.read import folder as data_folder
from kd_cli.config.schema import DATASET_KEYS
from kd_cli.data.prepare import prepare
from kd_cli.data.source import Dataset
from kd_cli.errors import DataError, StorageError
from kd_cli.storage.run_dir import read_summary


@functools.cache
def shipped_readers() -> frozenset[str]:
    """The functions that the shipped options of `dataset` name: what is called without trust."""
    options = (conf_dir() / "dataset").glob("*.yaml")
    return frozenset(yaml.safe_load(option.read_text(encoding="utf-8"))["_target_"] for option in options)


def finished_summary(folder: Path) -> dict[str, Any]:
    """The summary of a completed run. StorageError for a folder that holds none."""
    summary = read_summary(folder)
    if summary is None or summary["status"] != "completed":
        state = "no summary.json" if summary is None else f"a run that is {summary['status']}"
        raise StorageError(f"{folder} holds {state}", hint="name the directory of a completed run")
    return summary


def dataset_of(folder: Path, summary: dict[str, Any], *, trust: bool = False) -> Dataset:
    """The data set of a run. Raises DataError when it is not the one that the run used, or is read by unknown code."""
    config = configuration_of(folder)
    node = with_current_names(config["dataset"])
    preparation = {key: node.pop(key) for key in DATASET_KEYS if key in node}
    for target in targets(node):
        if target not in shipped_readers() and not trust:
            raise DataError(
                f"the data set of {folder} is read by {target}, which is code that kd_cli does not ship",
                hint="--trust imports and runs it: for your own runs, and for those of people whose code you would run",
            )
    data_dir = data_folder(config["data_dir"], "KD_DATA", "data")
    dataset = prepare(build(node, where="dataset", data_dir=data_dir), **preparation)
    if dataset.fingerprint != summary["dataset"]["fingerprint"]:
        raise DataError(
            f"the data set {dataset.name} is not the one of the run in {folder}: its fingerprint is "
            f"{dataset.fingerprint}, the run's is {summary['dataset']['fingerprint']}",
            hint="bring the data back as they were; an export is compared on the run's own test set",
        )
    return dataset


def configuration_of(folder: Path) -> dict[str, Any]:
    """A run's composed configuration, references in it resolved. StorageError where the run did not leave it."""
    from omegaconf import OmegaConf

    path = folder / ".hydra" / "config.yaml"
    if not path.is_file():
        raise StorageError(f"{path} is missing, so data set and teacher of this run are not known")
    config = OmegaConf.load(path)
    return {key: resolved(config, key) for key in ("dataset", "teacher", "data_dir", "store_dir", "precision")}


def background_of(folder: Path) -> Any:
    """The colour under transparent pixels, as the run read its pictures; None for a run that read no pictures."""
    return configuration_of(folder)["dataset"].get("background")


def sound_of(folder: Path) -> dict[str, Any] | None:
    """How a run of `dataset=audiofolder` read its recordings, the fields of `SoundReading`; None for another run."""
    node = with_current_names(configuration_of(folder)["dataset"])
    if node["_target_"] != "kd_cli.data.audiofolder.audiofolder":
        return None
    return {key: node[key] for key in ("sample_rate", "seconds", "mels")}


def resolved(config: Any, key: str) -> Any:
    """One value of a configuration as plain values; other parts may hold references that only Hydra resolves."""
    from omegaconf import OmegaConf

    value = config.get(key)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def targets(node: Any) -> list[str]:
    """Every `_target_` in a node."""
    if isinstance(node, list):
        return [target for item in node for target in targets(item)]
    if not isinstance(node, dict):
        return []
    own = [str(node["_target_"])] if "_target_" in node else []
    return own + [target for value in node.values() for target in targets(value)]
