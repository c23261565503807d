"""Every use of randomness draws from its own generator, named by its purpose.

The order of the draws, other models in the stack, and an interruption of the run change nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch


def stream(seed: int, *purpose: str | int) -> int:
    """The 63-bit seed of the generator for one purpose, e.g. `stream(0, "student", "order", 3)`."""
    name = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """A fresh generator for one purpose."""
    return torch.Generator(device=device).manual_seed(stream(seed, *purpose))


class Generators:
    """The generators of S models for dropout; `now` is the list of them during training, None in eval mode.

    They are reseeded at the start of each epoch. The objects stay the same, because a recorded step draws from those
    that it was recorded with.
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


class GlobalState:
    """The state of torch's global generators that one of several users in turn continues from; at first, that of now.

    with state:  # the generators are as this user left them
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.keep()

    def keep(self) -> None:
        """Keep the generators' state."""
        self.of_cpu = torch.default_generator.get_state()
        self.of_device = None if self.device.type == "cpu" else self._on_device().get_rng_state(*self._which())

    def __enter__(self) -> None:
        torch.default_generator.set_state(self.of_cpu)
        if self.of_device is not None:
            self._on_device().set_rng_state(self.of_device, *self._which())

    def __exit__(self, *_: object) -> None:
        self.keep()

    def _on_device(self) -> Any:
        return getattr(torch, self.device.type)

    def _which(self) -> tuple[torch.device, ...]:
        return (self.device,) if self.device.type == "cuda" else ()  # the others have one


@contextlib.contextmanager
def global_stream(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's global generators inside the block and restore them afterwards.

    This is for code that uses no other source: the initialisation of a module, a user's `nn.Dropout`.
    """
    device = torch.device(device)
    kind = device.type if device.type != "cpu" else "cuda"
    devices = [device.index or 0] if device.type != "cpu" else []
    with torch.random.fork_rng(devices=devices, device_type=kind):
        # Not torch.manual_seed, which records a stack trace at every call until CUDA is used.
        torch.default_generator.manual_seed(stream(seed, *purpose))
        if device.type == "cuda":
            torch.cuda.init()
            torch.cuda.default_generators[devices[0]].manual_seed(stream(seed, *purpose))
        elif device.type != "cpu":
            getattr(torch, device.type).manual_seed(stream(seed, *purpose))
        yield
