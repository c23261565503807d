"""What a model's outputs show that its user should know: probabilities for logits, a wrong normalisation, chance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_cli.config.values import TrainSpec
from kd_cli.learn.batches import EVAL_BATCH, Examples
from kd_cli.losses import correct
from kd_cli.models.renormalised import Renormalised, normalisation_of

MANY = 6  # classes of which no untrained network has all logits from 0 to 1
NEAR = 0.85  # share of the errors at chance from which a teacher is called near it
TRIED = 1000  # examples on which other normalisations are tried
# name for the user, what it stands for; values of the data are from 0 to 1
NORMALISATIONS = (
    ("teacher.normalize=none", "none"),
    ("teacher.normalize=imagenet", "imagenet"),
    ("'teacher.normalize={mean: 0.5, std: 0.5}'", {"mean": 0.5, "std": 0.5}),
    ("'teacher.normalize={mean: 0, std: 0.00392157}', bytes from 0 to 255", {"mean": 0.0, "std": 1 / 255}),
)


def output_notes(logits: Tensor, *, title: str) -> list[str]:
    """Notes on logits `[N, C]` that are probabilities, or the same for every example."""
    if len(logits) < 2 or logits.shape[-1] < 2:
        return []
    if bool((logits == logits[0]).all()):
        return [f"{title} gives the same outputs for every example"]
    if bool(((logits >= 0) & (logits <= 1)).all()):
        if torch.allclose(logits.double().sum(-1), torch.ones(len(logits), dtype=torch.float64), atol=1e-3):
            return [
                f"{title} ends in a softmax: its outputs are probabilities, and the softmax at T flattens them once "
                "more; remove its last layer, so that it returns logits"
            ]
        # Two classes' logits of a hardly trained network lie there by chance, those of many classes do not.
        if logits.shape[-1] >= MANY or (float(logits.min()) < 0.1 and float(logits.max()) > 0.9):
            return [f"{title} gives outputs from 0 to 1 only, as after a sigmoid; distillation needs logits"]
    return []


def loaded_teacher_notes(
    module: nn.Module,
    examples: Examples,
    *,
    data_mean: Sequence[float],
    data_std: Sequence[float],
    normalize: object,
) -> list[str]:
    """Notes on a teacher from a file that is near chance, or much better under another normalisation of its input.

    `examples` are validation data, or training data where there are none.
    """
    images, labels = examples.first(TRIED), examples.labels[:TRIED].cpu()
    total = len(labels)
    if not total:
        return []
    errors = _errors(module, images, labels)
    network = module.network if isinstance(module, Renormalised) else module
    notes = []
    found: list[tuple[int, str]] = []
    for name, value in (("teacher.normalize=data", "data"), *NORMALISATIONS):
        if value == normalize:
            continue
        own = normalisation_of(value, data_mean=data_mean, data_std=data_std)
        mean, std = own or (list(data_mean), list(data_std))
        other = Renormalised(
            network, data_mean=data_mean, data_std=data_std, mean=mean, std=std, dims=images.dim() - 1
        ).to(images.device)
        found.append((_errors(other, images, labels), name))
    best, name = min(found)
    # Better by far more than chance: a difference of counts has about the deviation of their sum's root.
    if best < 0.8 * errors and errors - best > 3 * math.sqrt(errors + best):
        notes.append(
            f"the teacher makes {errors:,} errors on {total:,} examples with its input normalised as it is now, and "
            f"{best:,} with {name}"
        )
    most = int(labels.unique(dim=0, return_counts=True)[1].max())
    expected = total - most  # errors of always answering the most frequent class
    if errors > min(NEAR * expected, expected - 2 * math.sqrt(expected * most / total)):
        notes.append(
            f"the teacher from teacher.checkpoint is near chance: {errors:,} errors on {total:,} examples, and always "
            f"answering the most frequent class makes {expected:,}; look at its normalisation (teacher.normalize) and "
            "at the order of its classes"
        )
    return notes


@torch.no_grad()
def _errors(module: nn.Module, images: Tensor, labels: Tensor) -> int:
    logits = torch.cat([module(batch) for batch in images.split(EVAL_BATCH)]).cpu()
    return int((~correct(logits, labels)).sum())


def quantised_notes(spec: TrainSpec) -> list[str]:
    """What a student with simulated int8 is, for those who read its results."""
    if not spec.quantised:
        return []
    return [
        f"{spec.title} simulates int8, alone and distilled: weights and inputs of its linear and convolutional layers "
        "are rounded to 8 bits in every pass, which takes time in PyTorch that the exported file does not take"
    ]
