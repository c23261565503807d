"""Specialists on classes that a generalist confuses (Hinton 2015, section 5): samples, loss, and the joint prediction.

A specialist has logits for its own classes and one for all others, the dustbin. Specialists of different numbers of
classes have the same number of logits K, so that they can be a stack: unused ones never win.

Shapes: S specialists, B examples of a batch, N examples, C classes, K logits of a specialist; the dustbin is logit
K - 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_cli.learn.batches import Batch
from kd_cli.learn.engine import Training
from kd_cli.learn.joint_prediction import geometric_prediction, joint_prediction
from kd_cli.learn.methods import Method
from kd_cli.learn.methods.base import Terms, Weights
from kd_cli.learn.outputs import Outputs
from kd_cli.learn.randomness import generator
from kd_cli.learn.teachers import Teacher, freeze
from kd_cli.losses import at_temperature, log_soften, single_precision

UNUSED = -1e9  # a logit that never wins
SHUFFLES = 200  # random groups, of which the mean purity is that by chance


def covariance(probabilities: Tensor) -> Tensor:
    """The covariance matrix of predicted probabilities [N,C] over examples, in double precision: [C,C]."""
    centred = probabilities.double() - probabilities.double().mean(0)
    return centred.T @ centred / len(centred)


@dataclass(frozen=True)
class Classes:
    """Each specialist's own classes, and what the training part has of each of the C classes."""

    own: tuple[tuple[int, ...], ...]
    counts: Tensor  # [C]
    size: int  # the number K of logits: the most own classes that a specialist has, and the dustbin

    @classmethod
    def of(cls, own: Sequence[Sequence[int]], counts: Tensor) -> Classes:
        """Of all specialists, which have as many logits as the largest of them needs."""
        return cls(tuple(tuple(some) for some in own), counts, max(len(some) for some in own) + 1)

    def some(self, which: Sequence[int]) -> Classes:
        """Those of the specialists of these numbers, with the number of logits that all have."""
        return Classes(tuple(self.own[m] for m in which), self.counts, self.size)

    def owned(self) -> Tensor:
        """Which classes each specialist has: [S,C], bool."""
        table = torch.zeros(len(self.own), len(self.counts), dtype=torch.bool)
        for row, some in zip(table, self.own, strict=True):
            row[list(some)] = True
        return table

    def local(self) -> Tensor:
        """The number of each class among a specialist's logits; K - 1 for the classes of others: [S,C]."""
        table = torch.full((len(self.own), len(self.counts)), self.size - 1)
        for row, some in zip(table, self.own, strict=True):
            row[list(some)] = torch.arange(len(some))
        return table

    def unused(self) -> Tensor:
        """Which logits of each specialist stand for nothing: [S,K], bool."""
        lengths = torch.tensor([len(some) for some in self.own])[:, None]
        numbers = torch.arange(self.size)
        return (numbers >= lengths) & (numbers < self.size - 1)

    def dustbin_shift(self) -> Tensor:
        """What is added to each dustbin's logit, as its classes were half of the examples in training: [S].

        The logarithm of how much more often the own classes were seen than they occur, relative to the others: of
        examples of which a share p is of own classes, log((1 - p) / p).
        """
        share = (self.owned() * self.counts).sum(1) / self.counts.sum()
        return ((1 - share) / share).log()


class SpecialistLoss(Method):
    """Cross-entropy over own classes and dustbin: -log softmax(z)[local label] of z [S,B,K], mean over examples."""

    needs_teacher = False
    has_T = False
    has_alpha = False

    def __init__(self, classes: Classes) -> None:
        super().__init__()
        self.register_buffer("table", classes.local(), persistent=False)
        self.register_buffer("unused", classes.unused(), persistent=False)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        table, unused = self.get_buffer("table"), self.get_buffer("unused")
        logits = student.logits.masked_fill(unused[:, None], UNUSED)
        labels = table.gather(1, batch.labels)
        hard = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels).mean(1)
        return {"loss": weights.beta * hard, "hard": hard}


class SoftOutside(Method):
    """Labels for own classes, the generalist's soft targets for all others; Hinton 2015, section 6.1.

    Specialists have all C logits. Mean over examples of the cross-entropy at T = 1 with the label where a specialist
    has the label's class, and of `T^2` times that with the teacher's probabilities, both at T, where it does not.
    """

    def __init__(self, classes: Classes) -> None:
        super().__init__()
        self.register_buffer("owned", classes.owned(), persistent=False)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        assert teacher is not None
        mine = self.get_buffer("owned").gather(1, batch.labels)
        logits = student.logits
        labels = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="none").view_as(mine)
        q = at_temperature(teacher.logits, weights.T).softmax(-1)
        soft = -(q * log_soften(logits, T=weights.T)).sum(-1)
        hard, soft = (labels * mine).mean(1), (soft * ~mine).mean(1)
        return {"loss": weights.beta * hard + weights.alpha * weights.T**2 * soft, "hard": hard, "soft": soft}


@dataclass(frozen=True)
class SpecialistTraining(Training):
    """A training in which each of the S models has its own sample: half of its own classes, half of all others."""

    owned: Tensor | None = None  # [S,C]

    def order(self, epoch: int) -> Tensor:
        """Half an epoch's examples from own classes, half from the others, mixed: [S,N].

        Where a half is larger than what there is, all of it is taken as often as it fits, and a rest at random.
        """
        assert self.owned is not None
        mine = self.owned.to(self.train.device)[:, self.train.labels].cpu()
        rows = []
        for seed, own in zip(self.seeds, mine, strict=True):
            random = generator(seed, self.role, "order", epoch)
            total = len(self.train)
            halves = [
                drawn(part.nonzero()[:, 0], count, random)
                for part, count in ((own, total - total // 2), (~own, total // 2))
            ]
            rows.append(torch.cat(halves)[torch.randperm(total, generator=random)])
        return torch.stack(rows)


def drawn(positions: Tensor, count: int, random: torch.Generator) -> Tensor:
    """`count` of the positions [n], each as often as any other up to one time: [count]."""
    rounds = [positions[torch.randperm(len(positions), generator=random)] for _ in range(-(-count // len(positions)))]
    return torch.cat(rounds)[:count]


def active(generalist: Tensor, owned: Tensor, *, best: int) -> Tensor:
    """Which specialists answer: those with one of the generalist's `best` likeliest classes. [N,C], [S,C] -> [N,S]."""
    return owned.to(generalist.device)[:, generalist.topk(best, -1).indices].any(-1).T


def log_probabilities(logits: Tensor, classes: Classes) -> Tensor:
    """Log probabilities [S,N,K] of specialists' logits [S,N,K], the dustbin's oversampling corrected."""
    shifted = logits.masked_fill(classes.unused().to(logits.device)[:, None], UNUSED)
    shifted[..., -1] += classes.dustbin_shift().to(shifted)[:, None]
    return shifted.log_softmax(-1)


def grouped(logits: Tensor, classes: Classes) -> Tensor:
    """Specialists' logits of all classes [S,N,C] as logits of own classes and the dustbin, which adds up: [S,N,K]."""
    found = torch.full((*logits.shape[:2], classes.size), UNUSED, dtype=logits.dtype, device=logits.device)
    for row, some, own, mine in zip(found, logits, classes.own, classes.owned(), strict=True):
        row[:, : len(own)] = some[:, list(own)]
        row[:, -1] = some[:, (~mine).to(some.device)].logsumexp(1)
    return found


def from_generalist(tensor: Tensor, like: Tensor, own: Sequence[int]) -> Tensor:
    """A specialist's first values of a parameter `like`: the generalist's rows of own classes, the mean of the others.

    A parameter of the same shape is taken as it is; one with a row for each class, [C,...], becomes [K,...]. Raises
    ValueError for another shape.
    """
    if tensor.shape == like.shape:
        return tensor.clone()
    if tensor.shape[1:] != like.shape[1:] or tensor.dim() == 0:
        raise ValueError(f"{tuple(tensor.shape)} has no row for each class")
    others = torch.ones(len(tensor), dtype=torch.bool)
    others[list(own)] = False
    rows = like.new_zeros(like.shape)
    rows[: len(own)] = tensor[list(own)]
    rows[-1] = tensor[others].mean(0)
    return rows


def families_found(groups: Sequence[Sequence[int]], families: Sequence[int]) -> dict[str, float]:
    """How well groups of classes agree with known families [C].

    Purity is the share of classes that belong to the commonest family of their group, `purity_by_chance` its mean over
    random groups of the same sizes; mutual information is normalised to 0 to 1; the adjusted Rand index (Hubert and
    Arabie 1985) is 0 by chance and 1 for equal partitions. Classes in no group are left out; those in several count in
    each.
    """
    pairs = [(g, families[c]) for g, some in enumerate(groups) for c in some]
    table = torch.zeros(len(groups), max(families) + 1, dtype=torch.float64)
    for g, family in pairs:
        table[g, family] += 1
    joint = table / len(pairs)
    by_group, by_family = joint.sum(1, keepdim=True), joint.sum(0, keepdim=True)

    def entropy(p: Tensor) -> float:
        some = p[p > 0]
        return float(-(some * some.log()).sum())

    information = entropy(by_group) + entropy(by_family) - entropy(joint)
    scale = math.sqrt(entropy(by_group) * entropy(by_family))
    chance = generator(0, "specialists", "families")
    of_pairs, shuffled = torch.tensor(pairs), torch.zeros(len(groups), max(families) + 1, dtype=torch.float64)
    ones, by_chance = torch.ones(len(pairs), dtype=torch.float64), 0.0
    for _ in range(SHUFFLES):
        mixed = of_pairs[torch.randperm(len(pairs), generator=chance), 1]
        shuffled.zero_().index_put_((of_pairs[:, 0], mixed), ones, accumulate=True)
        by_chance += float(shuffled.max(1).values.sum()) / len(pairs) / SHUFFLES
    return {
        "purity": float(table.max(1).values.sum()) / len(pairs),
        "purity_by_chance": by_chance,
        "mutual_information": information / scale if scale > 0 else 0.0,
        "adjusted_rand": adjusted_rand(table),
    }


def adjusted_rand(table: Tensor) -> float:
    """The adjusted Rand index of two partitions, from how many members each pair of their parts shares: [G,F]."""

    def choose_two(n: Tensor) -> float:
        return float((n * (n - 1)).sum()) / 2

    both, rows, columns = choose_two(table), choose_two(table.sum(1)), choose_two(table.sum(0))
    expected, most = rows * columns / choose_two(table.sum()), (rows + columns) / 2
    return 1.0 if most == expected else (both - expected) / (most - expected)


class Committee(Teacher):
    """A generalist and its specialists as one teacher, run on the student's batch; its logits are log q."""

    needs_images = True

    def __init__(
        self,
        generalist: nn.Module,
        specialists: Sequence[nn.Module],
        classes: Classes,
        *,
        best: int,
        tolerance: float,
        whole: bool = False,
        combine: str = "arithmetic",
    ) -> None:
        """`whole` says that specialists have logits of all classes, as `SoftOutside` trains them.

        `combine="geometric"` minimises KL(q, p) in place of KL(p, q).
        """
        self.join = geometric_prediction if combine == "geometric" else joint_prediction
        self.modules = [freeze(module) for module in (generalist, *specialists)]
        self.classes, self.best, self.tolerance, self.whole = classes, best, tolerance, whole

    def __call__(self, batch: Batch, T: Tensor) -> Outputs:
        lead = batch.images.shape[:2]
        q = self.probabilities(batch.images.flatten(0, 1))
        return Outputs(q.clamp_min(torch.finfo(q.dtype).tiny).log().unflatten(0, lead))

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """q for images [B,...]: [B,C]."""
        generalist, *specialists = (single_precision(module(images)) for module in self.modules)
        return self.joined(generalist.softmax(-1), torch.stack(specialists))

    def joined(self, generalist: Tensor, logits: Tensor) -> Tensor:
        """q [N,C] from the generalist's probabilities [N,C] and specialists' logits [S,N,K], [S,N,C] if `whole`."""
        if self.whole:
            logits = grouped(logits, self.classes)
        answers = log_probabilities(logits, self.classes).exp()
        own = self.classes.own
        each = [torch.cat([p[:, : len(some)], p[:, -1:]], 1) for p, some in zip(answers, own, strict=True)]
        which = active(generalist, self.classes.owned(), best=self.best)
        return self.join(generalist, each, own, which, tolerance=self.tolerance)
