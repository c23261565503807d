"""One student's epoch as torchdistill's own examples train it, for the benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import RandomSampler


def torchdistill_box(
    networks: tuple[nn.Module, nn.Module],
    examples: Any,
    loader: dict[str, Any],
    optimizer: dict[str, Any],
    weights: dict[str, float],
    device: torch.device,
) -> Callable[[], None]:
    """An epoch of torchdistill's box and KDLoss in the loop of its examples, without that loop's logging.

    `networks` are teacher and student, `loader` the keywords of the DataLoader of `examples`; `weights` has T, alpha
    and beta as kd-cli means them.
    """
    from torchdistill.core.distillation import get_distillation_box  # type: ignore[import-not-found]

    loss = {"student_module_path": ".", "student_module_io": "output", "temperature": weights["T"]}
    loss |= {"alpha": weights["beta"], "beta": weights["alpha"]}  # its alpha weighs the hard term
    loss |= {"teacher_module_path": ".", "teacher_module_io": "output"}
    terms = {"kd": {"criterion": {"key": "KDLoss", "kwargs": loss}, "weight": 1.0}}
    config = {
        "num_epochs": 1,
        "train_data_loader": {
            "dataset_id": "train",
            "sampler": {"class_or_func": RandomSampler},
            "kwargs": loader,
        },
        "teacher": {"forward_proc": "forward_batch_only", "requires_grad": False},
        "student": {"forward_proc": "forward_batch_only"},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
        "optimizer": optimizer,
    }
    box = get_distillation_box(*networks, {"train": examples}, config, device, None, False, lr_factor=1)

    def epoch() -> None:
        box.pre_epoch_process(epoch=0)
        for images, labels, extra in box.train_data_loader:
            box.post_forward_process(loss=box.forward_process(images.to(device), labels.to(device), extra))
        box.post_epoch_process()

    return epoch
