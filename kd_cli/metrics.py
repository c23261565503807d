"""What a model's answers are worth: pure functions of logits `[N, C]` and labels `[N]`, always at T = 1.

Logits are brought to the CPU in float64 first, so that a result does not depend on the device it was made on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_cli.errors import DataError

__all__ = [
    "Clusters",
    "ReliabilityBin",
    "TestResult",
    "agreement",
    "calibration_error",
    "clusters",
    "confusion",
    "evaluate_logits",
    "reliability",
]


@dataclass(frozen=True)
class TestResult:
    """One model on one split: `nll` is the mean negative log likelihood in nats, `ece` the calibration error.

    `recall` is the share of each class's examples that are classified correctly, None for a class without examples;
    `balanced_accuracy` is its mean over the classes that have some, `worst_class` the class where it is smallest.
    """

    __test__ = False  # not a test class, whatever pytest makes of the name

    errors: int
    total: int
    accuracy: float
    nll: float
    ece: float
    recall: list[float | None]
    balanced_accuracy: float
    worst_class: int


@dataclass(frozen=True)
class ReliabilityBin:
    """The examples whose highest probability lies in `(lower, upper]`; the means are None when there are none."""

    lower: float
    upper: float
    count: int
    confidence: float | None
    accuracy: float | None


def evaluate_logits(logits: Tensor, labels: Tensor) -> TestResult:
    """Errors, accuracy, likelihood, 15-bin calibration error and recall by class of logits `[N, C]`.

    Raises DataError when there are no examples, ValueError when the shapes do not belong together.
    """
    logits, labels = _examples(logits, labels)
    total = len(labels)
    errors = int((logits.argmax(-1) != labels).sum())
    log_p = torch.log_softmax(logits, -1)
    nll = -log_p.gather(-1, labels.unsqueeze(-1)).mean().item()
    counts = confusion(logits, labels)
    present = counts.sum(1) > 0
    recall = counts.diagonal().double() / counts.sum(1)  # not a number for a class without examples
    return TestResult(
        errors=errors,
        total=total,
        accuracy=(total - errors) / total,
        nll=nll,
        ece=calibration_error(reliability(logits, labels)),
        recall=[value if has else None for value, has in zip(recall.tolist(), present.tolist(), strict=True)],
        balanced_accuracy=recall[present].mean().item(),
        worst_class=int(recall.where(present, torch.inf).argmin()),
    )


def reliability(logits: Tensor, labels: Tensor, *, bins: int = 15) -> list[ReliabilityBin]:
    """Confidence against accuracy in `bins` bins of equal width, lowest first (Guo et al. 2017, section 2).

    Errors as in `evaluate_logits`.
    """
    logits, labels = _examples(logits, labels)
    confidence, predicted = torch.softmax(logits, -1).max(-1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    place = torch.bucketize(confidence, edges[1:-1])  # a value on an edge belongs to the bin below it
    counts = torch.bincount(place, minlength=bins).tolist()
    confidences = torch.bincount(place, weights=confidence, minlength=bins).tolist()
    rights = torch.bincount(place, weights=(predicted == labels).double(), minlength=bins).tolist()
    ends = edges.tolist()
    return [
        ReliabilityBin(
            lower=ends[i],
            upper=ends[i + 1],
            count=count,
            confidence=confidences[i] / count if count else None,
            accuracy=rights[i] / count if count else None,
        )
        for i, count in enumerate(counts)
    ]


def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """Counts `[C, C]`, int64: row the true class, column the predicted one. Errors as in `evaluate_logits`."""
    logits, labels = _examples(logits, labels)
    classes = logits.shape[-1]
    return torch.bincount(labels * classes + logits.argmax(-1), minlength=classes**2).view(classes, classes)


def agreement(a: Tensor, b: Tensor) -> float:
    """Share of the examples that two models, logits `[N, C]` each, put in the same class, right or wrong.

    Errors as in `evaluate_logits`.
    """
    if a.shape != b.shape or a.ndim != 2:
        raise ValueError(f"agreement needs two [N, C] tensors of logits, got {list(a.shape)} and {list(b.shape)}")
    _refuse_empty(a)
    return (a.argmax(-1) == b.argmax(-1).to(a.device)).double().mean().item()


def calibration_error(bins: Sequence[ReliabilityBin]) -> float:
    """The mean over the examples of how far their bin's accuracy is from its mean confidence."""
    total = sum(b.count for b in bins)
    return sum(
        b.count / total * abs(b.accuracy - b.confidence)
        for b in bins
        if b.accuracy is not None and b.confidence is not None
    )


def _examples(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(f"expected logits [N, C] and labels [N], got {list(logits.shape)} and {list(labels.shape)}")
    _refuse_empty(logits)
    labels = labels.detach().to("cpu", torch.int64)
    classes = logits.shape[1]
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise DataError(
            f"labels go from {int(labels.min())} to {int(labels.max())}, but the model has {classes} classes (0 to "
            f"{classes - 1})",
            hint="give the model as many outputs as the data has classes",
        )
    return logits.detach().to("cpu", torch.float64), labels


def _refuse_empty(logits: Tensor) -> None:
    if len(logits) == 0:
        raise DataError(
            f"there are no examples to evaluate: logits {list(logits.shape)}",
            hint="look at the split and at any filter on classes; a result needs at least one example",
        )


@dataclass(frozen=True)
class Clusters:
    """How examples lie about their classes' means: mean Euclidean distances in the units of the features.

    `within` is that of an example to its class's mean, `between` that of two classes' means.
    """

    within: float
    between: float

    @property
    def ratio(self) -> float:
        """`within / between`: small for tight clusters far from each other, whatever the scale of the features."""
        return self.within / self.between


def clusters(features: Tensor, labels: Tensor) -> Clusters:
    """The clusters that the classes of labels `[N]` form in features `[N, D]`; classes without examples do not count.

    Raises DataError where fewer than two classes have examples, ValueError for other shapes.
    """
    if features.ndim != 2 or labels.shape != features.shape[:1]:
        raise ValueError(
            f"expected features [N, D] and labels [N], got {list(features.shape)} and {list(labels.shape)}"
        )
    _refuse_empty(features)
    features = features.detach().to("cpu", torch.float64)
    _, place, counts = labels.detach().cpu().unique(return_inverse=True, return_counts=True)
    if len(counts) < 2:
        raise DataError("the distance between classes needs examples of two classes or more")
    means = torch.zeros(len(counts), features.shape[1], dtype=torch.float64).index_add_(0, place, features)
    means /= counts[:, None]
    within = (features - means[place]).norm(dim=1).mean()
    return Clusters(float(within), float(torch.pdist(means).mean()))


def matching_shift(logits: Tensor, classes: Sequence[int], *, frequency: float) -> float:
    """The number to add to the logits of `classes` so that they are predicted as often as they occur.

    Logits `[N, C]` of training inputs, at T = 1; `frequency` is the share of these classes there. With it the mean
    probability of the classes equals their frequency: a correction of the bias that needs no labels of the student's
    own and no test data (for a student whose transfer set had none of these classes; Hinton 2015, section 3).
    """
    if not 0 < frequency < 1:
        raise ValueError(f"frequency is {frequency}; it must lie between 0 and 1")
    chosen = torch.zeros(logits.shape[-1], dtype=torch.bool)
    chosen[list(classes)] = True
    logits = logits.double()
    inside, outside = logits[:, chosen].logsumexp(-1), logits[:, ~chosen].logsumexp(-1)
    odds = inside - outside  # of these classes against the others
    low, high = -1e3 - float(odds.max()), 1e3 - float(odds.min())
    for _ in range(100):
        middle = (low + high) / 2
        if float(torch.sigmoid(odds + middle).mean()) < frequency:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def oracle_shift(logits: Tensor, labels: Tensor, classes: Sequence[int]) -> float:
    """The number to add to the logits of `classes` that makes the fewest errors on these very examples.

    Tuned on what it is tested on: an upper bound to report beside an honest correction, never a result.
    """
    chosen = torch.zeros(logits.shape[-1], dtype=torch.bool)
    chosen[list(classes)] = True
    logits = logits.double()
    inside, best_inside = logits[:, chosen].max(-1)
    outside, best_outside = logits[:, ~chosen].max(-1)
    numbers = torch.arange(logits.shape[-1])
    right_inside = numbers[chosen][best_inside] == labels
    right_outside = numbers[~chosen][best_outside] == labels
    threshold, order = (outside - inside).sort()  # above it an example goes to these classes
    gain = (right_inside.long() - right_outside.long())[order].cumsum(0)
    right = torch.cat([torch.zeros(1, dtype=torch.int64), gain])
    k = int(right.argmax())
    if k == 0:
        return float(threshold[0]) - 1
    return float((threshold[k - 1] + threshold[k]) / 2) if k < len(threshold) else float(threshold[-1]) + 1
