"""Contrastive representation distillation: an example's two embeddings are alike, those of others are not (CRD)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods.base import Published, Setting, Terms, Weights
from kd_cli.learn.methods.features import AUTO, FeatureMethod, Layers, embed, one_of, positive, width
from kd_cli.learn.outputs import Outputs

UNKNOWN = -1  # the label of an example that no batch has shown yet


class CRD(FeatureMethod):
    """`alpha * weight * L_crd + beta * L_hard`; Tian, Krishnan & Isola 2020, section 3.

    Two linear maps, both trained, take the pooled outputs of student and teacher to vectors of unit length with `dim`
    numbers. Two memories hold such vectors of all n examples: an example's entry moves by `1 - momentum` towards its
    vector when it is in a batch. `L_crd` is the noise-contrastive loss of the student's vector against the teacher's
    memory, `-log h/(h + K/n)` of the example's own entry and `-log (K/n)/(h + K/n)` of each of K others, plus that of
    the teacher's vector against the student's memory; `h = exp(<x, m> / temperature) / Z`, where Z is n times the mean
    of the first batch. The mean over the examples. The K others are drawn with replacement from those of `negatives`.
    Published weight: the authors'.
    """

    couples_examples = True
    published = (Published("weight", 0.8, 0.8),)
    student_memory: Tensor
    teacher_memory: Tensor
    log_z: Tensor
    started: Tensor
    labels: Tensor

    def __init__(
        self,
        student_layers: Layers = AUTO,
        teacher_layers: Layers = AUTO,
        dim: int = 128,
        K: int = 16384,
        temperature: float = 0.07,
        momentum: float = 0.5,
        negatives: str = "other_classes",
        weight: float = 0.8,
    ) -> None:
        super().__init__(student_layers, teacher_layers)
        for key, value in (("dim", dim), ("K", K)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"method.{key} is {value!r}; it must be a whole number of at least 1")
        if not 0 <= momentum < 1:
            raise ConfigError(f"method.momentum is {momentum!r}; it must be at least 0 and below 1")
        self.dim, self.K, self.momentum = dim, K, momentum
        self.temperature = positive("temperature", temperature)
        self.negatives = one_of("negatives", negatives, ("other_classes", "other_examples"))
        self.needs_labels = negatives == "other_classes"
        self.weight = positive("weight", weight)
        self.known = False  # whether Z is set

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        if len(self.shapes) != 1:
            raise ConfigError(f"CRD compares one pair of layers, and there are {len(self.shapes)}")
        if setting.examples < 2:
            raise ConfigError("CRD needs two training examples or more: it compares an example with others")
        n, ((ours, theirs),) = setting.examples, self.shapes
        self.student_head, self.teacher_head = nn.Linear(width(ours), self.dim), nn.Linear(width(theirs), self.dim)
        for name in ("student_memory", "teacher_memory"):
            self.register_buffer(name, F.normalize(torch.randn(n, self.dim), dim=1))
        self.register_buffer("log_z", torch.zeros(2))  # of the student's vectors and of the teacher's
        self.register_buffer("started", torch.zeros((), dtype=torch.bool))
        self.register_buffer("labels", torch.full((n,), UNKNOWN))

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        ((ours, theirs),) = self.pairs(student, teacher)
        ours = F.normalize(self.student_head(embed(ours)), dim=1)
        theirs = F.normalize(self.teacher_head(embed(theirs)), dim=1)
        if self.training:
            self.labels[batch.index] = batch.labels
        others = self.draw(batch)
        sides = (ours, self.teacher_memory), (theirs, self.student_memory)
        scores = [self.scores(vectors, memory, batch.index, others) for vectors, memory in sides]
        self.set_constants(scores)
        crd = torch.stack(
            [self.contrast(score - log_z) for score, log_z in zip(scores, self.log_z.clone(), strict=True)]
        ).sum()
        if self.training:
            self.remember(batch.index, ours.detach(), theirs.detach())
        hard = self.hard_loss(student.logits, batch.labels)
        return {"loss": weights.alpha * self.weight * crd + weights.beta * hard, "crd": crd, "hard": hard}

    @torch.no_grad()
    def draw(self, batch: Batch) -> Tensor:
        """K examples `[B,K]` for each of the batch, drawn with replacement from those it is contrasted with."""
        n, order = len(self.labels), torch.arange(len(self.labels), device=self.labels.device)
        # in `order`, the examples that are no choice lie side by side, from start to stop
        start, stop = batch.index, batch.index + 1
        if self.negatives == "other_classes":
            ranked, order = self.labels.sort(stable=True)
            itself = torch.empty_like(order).scatter_(0, order, torch.arange(n, device=order.device))[batch.index]
            start, stop = (torch.searchsorted(ranked, batch.labels, right=right) for right in (False, True))
            alone = stop - start == n  # all examples that were seen are of its class: any other will do
            start, stop = torch.where(alone, itself, start), torch.where(alone, itself + 1, stop)
        left_out = (stop - start)[:, None]
        # what is measured between two epochs must not depend on how the process came there
        generator = None if self.training else torch.Generator(order.device).manual_seed(0)
        share = torch.rand(len(start), self.K, device=order.device, generator=generator)
        place = (share * (n - left_out)).long().minimum(n - left_out - 1)  # where the product was rounded up
        return order[place + left_out * (place >= start[:, None])]

    def scores(self, vectors: Tensor, memory: Tensor, index: Tensor, others: Tensor) -> Tensor:
        """`<x, m> / temperature` of the vectors with their own entry and K others, `[B,1+K]`."""
        return (vectors @ memory.clone().mT).gather(1, torch.cat([index[:, None], others], 1)) / self.temperature

    @torch.no_grad()
    def set_constants(self, scores: list[Tensor]) -> None:
        """Set Z from the first batch of the training; it stays as it is from then on."""
        self.known = self.known or bool(self.started)  # which waits for the device, once
        if self.known:
            return
        for i, score in enumerate(scores):
            mean = score.logsumexp((0, 1)) - math.log(score.numel())
            self.log_z[i] = mean + math.log(len(self.labels))
        self.started.fill_(True)

    def contrast(self, log_h: Tensor) -> Tensor:
        """The noise-contrastive loss of `log h` `[B,1+K]`, the example's own first: the mean over the examples."""
        margin = log_h - math.log(self.K / len(self.labels))
        return -(F.logsigmoid(margin[:, 0]) + F.logsigmoid(-margin[:, 1:]).sum(1)).mean()

    @torch.no_grad()
    def remember(self, index: Tensor, ours: Tensor, theirs: Tensor) -> None:
        for memory, vectors in ((self.student_memory, ours), (self.teacher_memory, theirs)):
            moved = self.momentum * memory[index] + (1 - self.momentum) * vectors
            memory[index] = F.normalize(moved, dim=1)
