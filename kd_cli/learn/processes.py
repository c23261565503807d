"""What the processes of one training exchange, by torch.distributed: gloo between CPUs, NCCL between GPUs.

Each process holds the whole model and computes its part of every batch. Outputs are gathered, so that each computes the
loss of the whole batch; gradients are summed before a step. Every process therefore has the same weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from kd_cli.errors import KdError

# The others wait as long while the first process alone tests and writes. A process that dies is noticed at once: its
# connections close, and torchrun ends the others.
WAIT = timedelta(days=1)


class ProcessLost(KdError):
    """Another process of the training has ended, or cannot be reached."""


class Processes:
    """The processes that train together; `rank` is this one's number of `size`."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def join(cls, rank: int, size: int) -> Self:
        """Wait for all processes that torchrun has started, and connect with them."""
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        with lost_explained():
            dist.init_process_group(backend, rank=rank, world_size=size, timeout=WAIT)
        return cls(rank, size)

    def leave(self) -> None:
        """Close the connections."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def part(self, n: int) -> slice:
        """This process's part of a batch of n examples; the parts differ by one example at most."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def taken(self, n: int) -> slice:
        """The examples that this process computes: its part, or the first example where it has none.

        A step of all processes needs a forward pass of each. What the first example gives there is not used.
        """
        part = self.part(n)
        return part if part.start < part.stop else slice(0, 1)

    def gather(self, taken: Tensor, n: int) -> Tensor:
        """The rows [S,n,...] of a batch from each process's own, [S,b,...] of `taken(n)`.

        The gradient of a row reaches the process that computed it; each process must compute the same loss of them.
        """
        found: Tensor = _Gather.apply(taken, n, self)
        return found

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of all processes' tensors; its gradient is the sum of their gradients."""
        found: Tensor = _Sum.apply(tensor, self)
        return found

    def sum_in_place(self, tensor: Tensor) -> None:
        """Replace a tensor by the sum of all processes' tensors, the same bytes in each."""
        with lost_explained():
            dist.all_reduce(tensor)

    @torch.no_grad()
    def sum_gradients(self, gradients: Iterable[Tensor]) -> None:
        """Replace gradients by their sums over all processes, in one exchange for each type and device."""
        alike: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for gradient in gradients:
            alike.setdefault((gradient.dtype, gradient.device), []).append(gradient)
        for some in alike.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in some])
            self.sum_in_place(flat)
            for gradient, summed in zip(some, flat.split([g.numel() for g in some]), strict=True):
                gradient.copy_(summed.view_as(gradient))

    @torch.no_grad()
    def average(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of real numbers by their means over all processes."""
        floats = [tensor for tensor in tensors if tensor.is_floating_point()]
        for tensor in floats:
            tensor.div_(self.size)
        self.sum_gradients(floats)

    def from_first(self, value: Any) -> Any:
        """The value that process 0 gives: tensors on the CPU and plain values."""
        box = [value if self.rank == 0 else None]
        with lost_explained():
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def all_gather(self, own: Tensor) -> list[Tensor]:
        """The tensors of all processes, which have one shape."""
        found = [torch.empty_like(own) for _ in range(self.size)]
        with lost_explained():
            dist.all_gather(found, own)
        return found


@contextlib.contextmanager
def lost_explained() -> Iterator[None]:
    """Turn torch's error on a lost connection into ProcessLost."""
    try:
        yield
    except RuntimeError as error:  # gloo's, and torch.distributed.DistError
        raise ProcessLost(
            "a process of this training has ended, or cannot be reached, and the others end with it",
            hint="its own message, or torchrun's, says why; the same torchrun command with resume=RUN_DIR goes on from "
            "the last saved epoch",
        ) from error


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, taken: Tensor, n: int, processes: Processes) -> Tensor:
        ctx.part, ctx.shape = processes.part(n), taken.shape
        sizes = [n * (rank + 1) // processes.size - n * rank // processes.size for rank in range(processes.size)]
        own = taken.new_zeros(taken.shape[0], max(sizes), *taken.shape[2:])
        size = sizes[processes.rank]
        own[:, :size] = taken[:, :size]
        parts = processes.all_gather(own)
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        own = gradient[:, ctx.part]
        return (own.contiguous() if own.shape[1] else gradient.new_zeros(ctx.shape)), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        total = tensor.clone()
        processes.sum_in_place(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone()
        ctx.processes.sum_in_place(gradient)
        return gradient, None
