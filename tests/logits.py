"""Logits, labels and weights for the tests of methods, and a method's loss and gradient on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kd_cli.learn.batches import Batch
from kd_cli.learn.methods import Method, Weights
from kd_cli.learn.outputs import Outputs


def some_logits(*shape: int, seed: int = 0, scale: float = 3.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def some_labels(*shape: int, classes: int, seed: int = 9) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def weights_of(T: Sequence[float], alpha: float = 1.0, beta: float = 0.0) -> Weights:
    T_ = torch.tensor(T, dtype=torch.float64)
    return Weights(T_, torch.full_like(T_, alpha), torch.full_like(T_, beta))


def terms_of(
    method: Method,
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    weights: Weights,
    *,
    progress: float = 0.0,
) -> dict[str, Tensor]:
    """The terms of a method for logits [S,B,C] or [B,C] and labels [S,B] or [B]."""
    student, labels = student.reshape(-1, *student.shape[-2:]), labels.reshape(-1, labels.shape[-1])
    labels = labels.expand(len(student), -1)
    theirs = None if teacher is None else Outputs(teacher.reshape(-1, *teacher.shape[-2:]))
    batch = Batch(labels, labels, labels, progress)
    return dict(method(Outputs(student), theirs, batch, weights))


def loss_of(
    method: Method, student: Tensor, teacher: Tensor | None, labels: Tensor, T: float = 1.0, beta: float = 0.0
) -> float:
    """The loss of one student, alpha = 1."""
    return float(terms_of(method, student, teacher, labels, weights_of([T], beta=beta))["loss"])


def gradient_of(
    method: Method, student: Tensor, teacher: Tensor | None, labels: Tensor, T: float = 1.0, beta: float = 0.0
) -> Tensor:
    """The gradient of one student's loss on its logits, of their shape."""
    leaf = student.clone().requires_grad_()
    loss = terms_of(method, leaf, teacher, labels, weights_of([T], beta=beta))["loss"]
    return torch.autograd.grad(loss.sum(), leaf)[0]
