"""What a model's answers on independent labels are worth: logits `[N, L]` and labels `[N, L]`, 0 or 1, at T = 1.

A label is predicted where its probability, the sigmoid of its logit, is above one half. Logits are brought to the CPU
in float64 first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kd_cli.errors import DataError
from kd_cli.metrics import calibration_error, reliability

__all__ = ["LabelResult", "LabelsResult", "average_precision", "evaluate_labels", "label_agreement"]


@dataclass(frozen=True)
class LabelResult:
    """One label on one split: `positives` of `total` examples have it, `errors` are decided wrongly.

    `f1` is None where no example has the label and none is predicted to, `average_precision` where none has it. `ece`
    is the 15-bin calibration error of the decisions.
    """

    positives: int
    total: int
    errors: int
    f1: float | None
    average_precision: float | None
    ece: float


@dataclass(frozen=True)
class LabelsResult:
    """One model on one split: `errors` are examples with a wrong label or more, `label_errors` wrong labels.

    `nll` is the mean over examples of the labels' summed negative log likelihoods in nats, `ece` the calibration error
    of all decisions, `mean_average_precision` the mean over the labels that some example has.
    """

    errors: int
    total: int
    accuracy: float
    nll: float
    ece: float
    label_errors: int
    mean_average_precision: float | None
    labels: list[LabelResult]


def evaluate_labels(logits: Tensor, labels: Tensor) -> LabelsResult:
    """Errors, likelihood, calibration, F1 and average precision of logits `[N, L]`, by label and over all.

    Raises DataError when there are no examples, ValueError when the shapes do not belong together.
    """
    logits, labels = _examples(logits, labels)
    wrong = (logits > 0) != labels.bool()
    errors, total = int(wrong.any(-1).sum()), len(labels)
    each = [_label(z, y) for z, y in zip(logits.unbind(-1), labels.unbind(-1), strict=True)]
    precisions = [label.average_precision for label in each if label.average_precision is not None]
    return LabelsResult(
        errors=errors,
        total=total,
        accuracy=(total - errors) / total,
        nll=F.binary_cross_entropy_with_logits(logits, labels.double(), reduction="none").sum(-1).mean().item(),
        ece=_ece(logits.flatten(), labels.flatten()),
        label_errors=int(wrong.sum()),
        mean_average_precision=sum(precisions) / len(precisions) if precisions else None,
        labels=each,
    )


def _label(logits: Tensor, labels: Tensor) -> LabelResult:
    predicted, true = logits > 0, labels.bool()
    hits, claimed, positives = (int(x.sum()) for x in (predicted & true, predicted, true))
    return LabelResult(
        positives=positives,
        total=len(labels),
        errors=int((predicted != true).sum()),
        f1=2 * hits / (claimed + positives) if claimed + positives else None,
        average_precision=average_precision(logits, true),
        ece=_ece(logits, labels),
    )


def average_precision(scores: Tensor, labels: Tensor) -> float | None:
    """`sum_k (R_k - R_(k-1)) P_k` over the distinct scores from the highest down: [N] and [N]; None without positives.

    P_k and R_k are precision and recall of the examples with the k-th highest score or a higher one.
    """
    positives = int(labels.sum())
    if not positives:
        return None
    ordered, order = scores.sort(descending=True)
    hits = labels[order].long().cumsum(0)
    last = torch.cat([ordered[1:] != ordered[:-1], torch.ones(1, dtype=torch.bool)])  # of equal scores
    hits, ranks = hits[last].double(), torch.arange(1, len(scores) + 1)[last].double()
    gained = hits.diff(prepend=torch.zeros(1, dtype=torch.float64))
    return float((gained * hits / ranks).sum() / positives)


def label_agreement(a: Tensor, b: Tensor) -> float:
    """Share of the examples for which two models, logits `[N, L]` each, decide all labels alike, right or wrong."""
    if a.shape != b.shape or a.ndim != 2 or not len(a):
        raise ValueError(f"agreement needs two [N, L] tensors of logits, got {list(a.shape)} and {list(b.shape)}")
    return ((a > 0) == (b > 0).to(a.device)).all(-1).double().mean().item()


def _ece(logits: Tensor, labels: Tensor) -> float:
    """The calibration error of decisions [n]: a label against its absence is two classes with the logits z and 0."""
    return calibration_error(reliability(torch.stack([torch.zeros_like(logits), logits], -1), labels))


def _examples(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if logits.ndim != 2 or labels.shape != logits.shape:
        raise ValueError(f"expected logits [N, L] and labels [N, L], got {list(logits.shape)} and {list(labels.shape)}")
    if not len(logits):
        raise DataError("there are no examples to evaluate", hint="look at the split; a result needs an example")
    return logits.detach().to("cpu", torch.float64), labels.detach().to("cpu", torch.int64)
