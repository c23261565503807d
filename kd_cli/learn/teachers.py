"""The teacher while it teaches: frozen, in eval mode, without gradients.

A teacher is one network or an ensemble. A cached teacher looks its logits up by the example's index; a live one runs
on the very images that the student sees, which is needed once these are augmented, or when a method reads features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_cli.learn.batches import Batch
from kd_cli.learn.outputs import FeatureHooks, Outputs


class Teacher(ABC):
    """The teacher's outputs for a batch."""

    needs_images: bool  # False where the batch's index is enough
    depends_on_T: bool = False  # as the arithmetic mean of an ensemble does
    modules: Sequence[nn.Module] = ()  # the networks that run live

    def read_features(self, paths: Sequence[str]) -> None:
        """Answer with the outputs of these modules too; a teacher that does not run live has none."""
        if paths:
            raise ValueError(f"{type(self).__name__} does not run its network and has no features {list(paths)}")

    @abstractmethod
    def __call__(self, batch: Batch, T: Tensor) -> Outputs:
        """Outputs for index [U,B] and images [U,B,...]: logits [U,B,C]. `T` are the students' temperatures, [S].

        Where they depend on T, U is 1 or S, and the logits are [S,B,C].
        """


class CachedTeacher(Teacher):
    """The logits of one or more members on the transfer set, `[M,N,C]` or `[N,C]`, looked up by index."""

    needs_images = False

    def __init__(self, logits_MNC: Tensor, *, combine: str = "geometric") -> None:
        if logits_MNC.ndim == 2:
            logits_MNC = logits_MNC[None]
        if combine == "geometric":  # does not depend on T: one mean for all
            logits_MNC = combine_logits(logits_MNC, combine=combine, T=torch.ones(()))[None]
        self.logits_MNC, self.combine = logits_MNC, combine
        self.depends_on_T = len(logits_MNC) > 1

    def __call__(self, batch: Batch, T: Tensor) -> Outputs:
        index = batch.index
        if len(self.logits_MNC) == 1:
            return Outputs(self.logits_MNC[0].index_select(0, index.flatten()).unflatten(0, index.shape))
        return Outputs(combine_logits(self.logits_MNC[:, index], combine=self.combine, T=T[:, None, None]))


class MappedTeacher(Teacher):
    """A `CachedTeacher` whose logits stay in the files that they are mapped from: only a batch's are in memory."""

    needs_images = False

    def __init__(
        self, members: Sequence[Tensor], rows: Tensor, *, combine: str = "geometric", device: torch.device | str = "cpu"
    ) -> None:
        """`members` are each one's logits [N,C] on the CPU; `rows` [n] are the examples of the transfer set in them."""
        self.members, self.rows, self.combine, self.device = members, rows.cpu(), combine, device
        self.depends_on_T = len(members) > 1 and combine != "geometric"

    def __call__(self, batch: Batch, T: Tensor) -> Outputs:
        rows = self.rows[batch.index.flatten().cpu()]
        found = torch.stack([logits.index_select(0, rows) for logits in self.members]).to(self.device)
        members_MUBC = found.unflatten(1, batch.index.shape)
        return Outputs(combine_logits(members_MUBC, combine=self.combine, T=T[:, None, None]))


Answer = tuple[Batch, Tensor, dict[str, Tensor]]  # of a live teacher: members' logits [M,U,B,C], features


class LiveTeacher(Teacher):
    """The networks of one or more members, run on the student's own batch; features are those of the first."""

    needs_images = True

    def __init__(self, modules: Sequence[nn.Module], *, combine: str = "geometric") -> None:
        self.modules, self.combine = [freeze(module) for module in modules], combine
        self.depends_on_T = len(modules) > 1 and combine != "geometric"
        self.hooks = FeatureHooks(modules[0], (), role="teacher")
        self.known: tuple[Answer, ...] = ()  # to the last two batches

    def read_features(self, paths: Sequence[str]) -> None:
        self.hooks.remove()
        self.hooks = FeatureHooks(self.modules[0], paths, role="teacher")
        self.known = ()

    def __call__(self, batch: Batch, T: Tensor) -> Outputs:
        answer = next((known for known in self.known if known[0] is batch), None)
        if answer is None:  # no other student has asked about this batch, and nobody asked ahead
            answer = batch, *self._run(batch)
            self.known = (*self.known[-1:], answer)
        _, members, features = answer
        logits = combine_logits(members, combine=self.combine, T=T[:, None, None])
        return Outputs(logits, features, overwritten=self.hooks.overwritten)

    @torch.no_grad()
    def _run(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The members' logits [M,U,B,C] and the first one's features."""
        lead = batch.images.shape[:2]
        flat = batch.images.flatten(0, 1)
        members = torch.stack([module(flat).unflatten(0, lead) for module in self.modules])
        return members, {path: feature.unflatten(0, lead) for path, feature in self.hooks.take().items()}


def combine_logits(logits_MxC: Tensor, *, combine: str, T: Tensor) -> Tensor:
    """Logits `[..., C]` whose softmax at T is the mean of M members' distributions at T, `[M, ..., C]`.

    `geometric`: the mean of the logits, whatever T is. `arithmetic`: `T log mean softmax(z / T)`. Hinton 2015,
    section 1.
    """
    if len(logits_MxC) == 1:
        return logits_MxC[0]
    if combine == "geometric":
        return logits_MxC.mean(0)  # T may have any shape
    log_p = (logits_MxC / T).log_softmax(-1)
    return T * (log_p.logsumexp(0) - math.log(len(logits_MxC)))


def freeze(module: nn.Module) -> nn.Module:
    """Put the module in eval mode and stop its gradients; return it."""
    return module.eval().requires_grad_(False)
