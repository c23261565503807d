"""What a generalist and its specialists say together (Hinton 2015, section 5), for all examples at once.

Shapes: N examples, C classes, S specialists, K_m probabilities of specialist m: its own classes and, last, all others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LIMIT = 1000  # rounds


def joint_prediction(
    generalist: Tensor,
    specialists: Sequence[Tensor],
    own: Sequence[Sequence[int]],
    active: Tensor,
    *,
    tolerance: float = 1e-6,
) -> Tensor:
    """The distribution q that minimises KL(g, q) + sum over active specialists of KL(p_m, q), for all examples: [N,C].

    `generalist` g is [N,C], `specialists[m]` [N,K_m] the probabilities of the classes `own[m]` and, last, of all
    others, against which q summed over these others stands; `active` [N,S]. Hinton 2015, equation 5, which the paper
    solves by gradient descent for one image at a time. The sum is convex in q; where one specialist is active, q has a
    closed form, and `by_rounds` finds it where several are.
    """
    q = generalist.clone()
    several = active.sum(1) > 1
    for m, some in enumerate(own):
        rows = (active[:, m] & ~several).nonzero()[:, 0]
        if len(rows):
            q[rows] = with_one(generalist[rows], specialists[m][rows], some)
    rows = several.nonzero()[:, 0]
    if len(rows):
        each = [p[rows] for p in specialists]
        q[rows] = by_rounds(generalist[rows], each, own, active[rows], tolerance=tolerance)
    return q


def outside(own: Sequence[int], like: Tensor) -> Tensor:
    """1 for each class that is not own, 0 for own ones: [C] of the type of `like` [N,C]."""
    found = torch.ones(like.shape[1], dtype=like.dtype, device=like.device)
    found[list(own)] = 0
    return found


def with_one(generalist: Tensor, specialist: Tensor, own: Sequence[int]) -> Tensor:
    """`joint_prediction` where one specialist [N,K] is active: [N,C].

    Own classes have the mean of both; the others share the mean of what both leave them as the generalist does.
    """
    rest = generalist * outside(own, generalist)
    mass = rest.sum(1, keepdim=True)
    share = rest / mass.clamp_min(torch.finfo(rest.dtype).tiny)
    q = share * (mass + specialist[:, -1:]) / 2
    q[:, list(own)] = (generalist[:, list(own)] + specialist[:, : len(own)]) / 2
    return q


def by_rounds(
    generalist: Tensor,
    specialists: Sequence[Tensor],
    own: Sequence[Sequence[int]],
    active: Tensor,
    *,
    tolerance: float,
) -> Tensor:
    """`joint_prediction` by the EM algorithm for grouped observations: [N,C].

    Each model's probability of a group of classes is divided among them as q has it, and q becomes the mean of what all
    models then say. Every round lowers the sum, until no probability changes by `tolerance`.
    """
    models = 1 + active.sum(1, keepdim=True).to(generalist)
    fixed = generalist.clone()  # what does not depend on q
    for m, some in enumerate(own):
        fixed[:, list(some)] += specialists[m][:, : len(some)] * active[:, m, None]
    others = [outside(some, generalist) for some in own]
    q = 0.99 * generalist + 0.01 / generalist.shape[1]
    for _ in range(LIMIT):
        total = fixed.clone()
        for m, which in enumerate(others):
            rest = q * which
            mass = rest.sum(1, keepdim=True).clamp_min(torch.finfo(q.dtype).tiny)
            total += rest * (specialists[m][:, -1:] * active[:, m, None] / mass)
        new = total / models
        change = float((new - q).abs().max())
        q = new
        if change < tolerance:
            break
    return q


def geometric_prediction(
    generalist: Tensor,
    specialists: Sequence[Tensor],
    own: Sequence[Sequence[int]],
    active: Tensor,
    *,
    tolerance: float = 1e-6,
) -> Tensor:
    """The distribution q that minimises KL(q, g) + sum over active specialists of KL(q, p_m), for all examples: [N,C].

    Arguments as for `joint_prediction`. Where every model has a probability for each class, q is their geometric mean
    (Hinton 2015, section 5.4). Mirror descent with a step of 1 over the number of models: each term grows no faster
    than the entropy, so that every round lowers the sum, until no probability changes by `tolerance`.
    """
    tiny = torch.finfo(generalist.dtype).tiny
    models = 1 + active.sum(1, keepdim=True).to(generalist)
    fixed = generalist.clamp_min(tiny).log()  # the logarithms that q's are compared with, summed over models
    others = [outside(some, generalist) for some in own]
    for m, some in enumerate(own):
        weight, log_p = active[:, m, None].to(generalist), specialists[m].clamp_min(tiny).log()
        fixed[:, list(some)] += weight * log_p[:, : len(some)]
        fixed += weight * log_p[:, -1:] * others[m]
    log_q = (fixed / models).log_softmax(1)
    for _ in range(LIMIT):
        slope = log_q - fixed
        for m, which in enumerate(others):
            rest = (log_q + which.clamp_min(tiny).log()).logsumexp(1, keepdim=True)
            slope = slope + active[:, m, None] * torch.where(which.bool(), rest, log_q)
        new = (log_q - slope / models).log_softmax(1)
        change = float((new.exp() - log_q.exp()).abs().max())
        log_q = new
        if change < tolerance:
            break
    return log_q.exp()
