"""Every use of randomness draws from a generator of its own, named by what it is for.

So the order of the draws, the company of other models, and a resumed run change nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence

import torch


def stream(seed: int, *purpose: str | int) -> int:
    """The 63-bit seed of the generator for one purpose, e.g. `stream(0, "student", "order", 3)`."""
    name = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one purpose."""
    return torch.Generator(device=device).manual_seed(stream(seed, *purpose))


class Generators:
    """Each of S models' random numbers for dropout, `now`: started anew in each epoch, None in eval mode.

    The generators are always the same: a recorded step draws from those it was recorded with.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        self.seeds = list(seeds)
        self.own = [torch.Generator(device=device) for _ in seeds]
        self.now: list[torch.Generator] | None = None

    def start(self, role: str, epoch: int) -> None:
        for seed, own in zip(self.seeds, self.own, strict=True):
            own.manual_seed(stream(seed, role, "dropout", epoch))
        self.now = self.own

    def end(self) -> None:
        self.now = None


@contextlib.contextmanager
def global_stream(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's global generators inside the block and put back what they were.

    For code that knows no other source: the initialisation of a module, a user's `nn.Dropout`.
    """
    device = torch.device(device)
    kind = device.type if device.type != "cpu" else "cuda"
    devices = [device.index or 0] if device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, device_type=kind):
        # Not torch.manual_seed: that takes a trace of the stack at every call where CUDA has not been used.
        torch.default_generator.manual_seed(stream(seed, *purpose))
        if device.type == "cuda":
            torch.cuda.init()
            torch.cuda.default_generators[devices[0]].manual_seed(stream(seed, *purpose))
        elif device.type != "cpu":
            getattr(torch, device.type).manual_seed(stream(seed, *purpose))
        yield
