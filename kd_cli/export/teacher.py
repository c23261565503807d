"""The teacher of a run, rebuilt from the store in the form in which students are exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.config.moved import with_current_names
from kd_cli.config.read import folder as store_folder
from kd_cli.config.schema import OWN_KEYS
from kd_cli.data.source import Dataset
from kd_cli.data.stored import value_range
from kd_cli.errors import ExportError
from kd_cli.export.load import check_targets, network_of
from kd_cli.export.run_data import configuration_of
from kd_cli.export.student import Student
from kd_cli.learn.teachers import combine_logits, freeze
from kd_cli.models.building import dtype_of
from kd_cli.storage.store import Entry, Store


class Combined(nn.Module):
    """Several networks as one teacher: images [B, ...] -> logits [B, C] at T = 1."""

    def __init__(self, members: list[nn.Module], combine: str) -> None:
        super().__init__()
        self.members, self.combine = nn.ModuleList(members), combine

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.stack([member(images) for member in self.members])
        return combine_logits(logits, combine=self.combine, T=torch.ones((), dtype=logits.dtype))


def load_teacher(run_dir: Path, summary: Mapping[str, Any], data: Dataset, *, trust: bool = False) -> Student:
    """The teacher of a run, on the CPU, in eval mode, with the preparation of its input.

    ExportError when the run has none, and when the store no longer holds its weights.
    """
    config = configuration_of(run_dir)
    node = with_current_names(config["teacher"])
    own = {key: node.pop(key, default) for key, default in OWN_KEYS["teacher"].items()}
    report = summary.get("teacher")
    if report is not None and report["parameters"] is None:
        raise ExportError(f"the teacher of {run_dir} is answers and no network: there is nothing to export")
    check_targets(node, f"the teacher of {run_dir}", trust=trust)
    entries = entries_of(summary, Store(store_folder(config.get("store_dir"), "KD_STORE", "")))
    dtype = dtype_of(config["precision"])
    view = dict(own["input"] or {})
    normalize = view.pop("normalize", own["normalize"])
    try:
        members = [
            network_of(
                node,
                entry.weights(),
                shape=data.shape,
                classes=data.classes,
                normalize=normalize,
                view=view or None,
                statistics=(data.mean, data.std),
                dtype=dtype,
            )
            for entry in entries
        ]
    except ValueError as error:
        raise ExportError(f"the teacher of {run_dir} cannot be rebuilt: {error}") from error
    images = data.train.images
    is_bytes = images.dtype == torch.uint8
    return Student(
        members[0] if len(members) == 1 else freeze(Combined(members, own["combine"])),
        mean=data.mean,
        std=data.std,
        classes=data.class_names,
        input_shape=data.shape,
        dtype=dtype,
        values="bytes" if is_bytes else "floats",
        range=value_range(images),
        multilabel=data.multilabel,
        encoding=data.encoding,
    ).eval()


def entries_of(summary: Mapping[str, Any], store: Store) -> list[Entry]:
    """The store's entries of a run's teacher. ExportError without a teacher, and where one is missing."""
    report = summary.get("teacher")
    if report is None:
        raise ExportError("this run has no teacher", hint="its student was trained without one")
    found = []
    for fingerprint in (member["fingerprint"] for member in report.get("members", [report])):
        entry = store.get(fingerprint)
        if entry is None:
            raise ExportError(
                f"the store {store.root} does not hold the run's teacher, {fingerprint}",
                hint="KD_STORE names another store; kd-run with the run's command trains the teacher again",
            )
        found.append(entry)
    return found
