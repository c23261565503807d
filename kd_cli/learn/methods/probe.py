"""A method tried on made outputs before anything is trained, so that a mistake in it costs no training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Method, Setting, Terms, Weights
from kd_cli.learn.outputs import Outputs

EXAMPLES = 6  # of the made batch
TOLERANCE = 1e-3  # of float32 sums, relative to the largest


def try_method(method: Method, setting: Setting, *, size: int) -> None:
    """Call the method on random outputs of `size` students and check what it returns. Raises ConfigError.

    Checked are the terms' names and shapes, that they are finite, that the loss reaches the students, that the method
    changes nothing of what it receives, that a student's loss does not depend on the others, and that an example's
    gradient does not depend on the other examples, unless the method declares that they do (`couples_models`,
    `couples_examples`). What the method raises by itself is passed on as it is.
    """
    name = method.title
    if method.couples_models and size < 2:
        raise ConfigError(
            f"{name} couples the students that train together (couples_models = True), and this run trains one",
            hint="peers=2 trains two of them, peers=[smallmlp,cnn] these two",
        )
    generator = torch.Generator().manual_seed(0)
    device = setting.student.logits.device
    examples = max(EXAMPLES, method.min_batch)

    def made(sample: Outputs, lead: int) -> Outputs:
        def one(like: Tensor) -> Tensor:
            shape = (lead, examples, *like.shape[2:])
            return torch.randn(shape, generator=generator).to(device, like.dtype)

        return Outputs(one(sample.logits), {path: one(x) for path, x in sample.features.items()})

    student = made(setting.student, size)
    teacher = None if setting.teacher is None else made(setting.teacher, 1)
    kinds, shape = (2, (size, examples, setting.classes)) if setting.multilabel else (setting.classes, (size, examples))
    labels = torch.randint(kinds, shape, generator=generator).to(device)
    index = (torch.arange(examples) % setting.examples).expand(size, -1).to(device)
    batch = Batch(index, index, labels)
    weights = Weights(*(torch.full((size,), value, device=device) for value in (2.0, 0.7, 0.4)))

    loss, gradient = _checked(method, name, student, teacher, batch, weights)
    if method.class_weights is not None:
        weighted = method.class_weights
        method.weigh_classes(torch.ones_like(weighted))
        plain = _checked(method, name, student, teacher, batch, weights)[0]
        method.weigh_classes(weighted)
        if _close(plain, loss):
            raise ConfigError(
                f"{name} does not weigh its loss by class, and class_weights=balanced is given",
                hint="training.sampling=balanced draws the rare classes more often; a method of your own calls "
                "self.hard_loss(logits, labels)",
            )
    if size > 1 and not method.couples_models:
        for s in range(size):
            alone = _checked(method, name, _rows(student, s), teacher, _batch_of(batch, s), _weights_of(weights, s))[0]
            if not _close(alone[0], loss[s]):
                raise ConfigError(
                    f"{name}: the loss of one student is {float(alone[0]):.6g} by itself and {float(loss[s]):.6g} "
                    "beside another one",
                    hint="sum over the last axes of [S,B,C] only, or derive from kd_cli.learn.methods.PerModelMethod",
                )
    if not method.couples_examples and gradient is not None:
        changed = student.logits.clone()
        changed[:, 1:] = changed[:, 1:].flip(1) * 1.5 + 0.3
        other = _checked(method, name, Outputs(changed, student.features), teacher, batch, weights)[1]
        if other is not None and not _close(gradient[:, 0], other[:, 0]):
            raise ConfigError(
                f"{name}: the gradient of one example depends on the other examples of its batch",
                hint="logits are [S,B,C]: reduce over dim=-1, the classes, or declare couples_examples = True if it is "
                "meant",
            )


def _checked(
    method: Method, name: str, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights
) -> tuple[Tensor, Tensor | None]:
    """The losses [S], and their gradient on the logits or None where they do not depend on them."""
    logits = student.logits.detach().clone().requires_grad_()
    features = {path: x.detach().clone().requires_grad_() for path, x in student.features.items()}
    given = [batch.labels, batch.index, *([] if teacher is None else [teacher.logits, *teacher.features.values()])]
    before = [tensor.clone() for tensor in given]
    with torch.enable_grad():
        terms: Any = method(Outputs(logits, features), teacher, batch, weights)
    _check_terms(terms, name, len(logits))
    if not all(torch.equal(now, then) for now, then in zip(given, before, strict=True)):
        raise ConfigError(
            f"{name} changes the teacher's outputs, the labels or the index in place, which others read after it",
            hint="compute a new tensor: mul instead of mul_, clone() before an assignment to a part",
        )
    loss: Tensor = terms["loss"]
    inputs = [logits, *features.values(), *method.parameters()]
    if not loss.requires_grad:
        raise ConfigError(
            f"{name}: the loss does not depend on the student", hint="do not detach the student's outputs"
        )
    found = torch.autograd.grad(loss.sum(), inputs, allow_unused=True)
    if all(g is None for g in found[: 1 + len(features)]):
        raise ConfigError(f"{name}: the loss does not depend on the student's outputs")
    if any(g is not None and not g.isfinite().all() for g in found):
        raise ConfigError(f"{name}: the loss of ordinary logits has a gradient that is not finite")
    return loss.detach(), found[0]


def _check_terms(terms: Terms, name: str, size: int) -> None:
    if not isinstance(terms, Mapping) or "loss" not in terms:
        found = f"{sorted(terms)}" if isinstance(terms, Mapping) else f"a {type(terms).__name__}"
        raise ConfigError(
            f"{name} returned {found}; it must return a dictionary of terms with a 'loss' among them",
            hint='return {"loss": loss, "soft": soft, "hard": hard}, each of shape [S]',
        )
    for key, term in terms.items():
        if not isinstance(term, Tensor) or term.shape != (size,):
            found = f"of shape {list(term.shape)}" if isinstance(term, Tensor) else f"a {type(term).__name__}"
            raise ConfigError(
                f"{name}: the term {key!r} for {size} students is {found}; it must be a tensor of shape [{size}]",
                hint="sum over the classes and take the mean over the examples, for each student: the last two axes",
            )
        if not term.isfinite().all():
            raise ConfigError(f"{name}: the term {key!r} is {term.tolist()} for ordinary logits; it must be finite")


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= TOLERANCE * max(1e-6, float(a.abs().max()), float(b.abs().max())))


def _rows(outputs: Outputs, s: int) -> Outputs:
    return Outputs(outputs.logits[s : s + 1], {path: x[s : s + 1] for path, x in outputs.features.items()})


def _batch_of(batch: Batch, s: int) -> Batch:
    return Batch(batch.index[s : s + 1], batch.images, batch.labels[s : s + 1])


def _weights_of(weights: Weights, s: int) -> Weights:
    return Weights(weights.T[s : s + 1], weights.alpha[s : s + 1], weights.beta[s : s + 1])
