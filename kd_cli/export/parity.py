"""What an exported form predicts on the whole test set, beside what the PyTorch student predicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from kd_cli.data.source import Split
from kd_cli.data.stored import Images, selected
from kd_cli.errors import ExportError
from kd_cli.label_metrics import evaluate_labels, label_agreement
from kd_cli.metrics import agreement, evaluate_logits

Predict = Callable[[Tensor], Tensor]  # images as the data set has them -> logits [B, C]
TOLERANCE = 1e-4  # of the largest of 1 and the student's logit
FIRST = (1, 2, 3)  # sizes of the first batches: a batch axis that only looks free fails here
BATCH = 128


@dataclass(frozen=True)
class Parity:
    """One form on the test set; `largest_difference` is of logits, `relative` of them over max(1, |logit|)."""

    errors: int
    total: int
    nll: float
    ece: float
    agreement: float
    largest_difference: float
    relative: float

    def record(self) -> dict[str, float]:
        return asdict(self)


@torch.no_grad()
def logits_of(predict: Predict, images: Images) -> Tensor:
    """Logits [N, C] of images [N, ...], in batches of several sizes."""
    found, start = [], 0
    for size in FIRST:
        found.append(predict(images[start : start + size]))
        start += size
        if start >= len(images):
            break
    found += [predict(part) for part in selected(images, slice(start, None)).split(BATCH) if len(part)]
    return torch.cat(found).double()


def compare(logits: Tensor, reference: Tensor, test: Split) -> Parity:
    """Parity of logits with the student's, `reference`, both [N, C]. ExportError for logits of another shape."""
    if logits.shape != reference.shape:
        raise ExportError(f"the exported form gives logits {list(logits.shape)}, the student {list(reference.shape)}")
    several = test.labels.ndim == 2  # independent labels
    result = (evaluate_labels if several else evaluate_logits)(logits, test.labels)
    difference = (logits - reference).abs()
    return Parity(
        errors=result.errors,
        total=result.total,
        nll=result.nll,
        ece=result.ece,
        agreement=(label_agreement if several else agreement)(logits, reference),
        largest_difference=float(difference.max()),
        relative=float((difference / reference.abs().clamp(min=1)).max()),
    )


def check_parity(parity: Parity, name: str, role: str = "student") -> None:
    """ExportError beyond the tolerance, which numbers that are not finite are beyond, too."""
    if not parity.relative <= TOLERANCE:
        raise ExportError(
            f"{name} differs from the PyTorch {role} by {parity.relative:.3g} of max(1, |logit|), and {TOLERANCE:g} "
            f"is allowed; {parity.agreement:.2%} of the test examples agree; the file was not written"
        )
