"""What a CUDA graph does, on any device: kernels are recorded without effect, and replayed on the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves


class Tape:
    """A `Recorder` of `kd_cli.learn.cuda_graphs`, and its recording of the operators that PyTorch ran.

    As under CUDA: a replay writes its results to the same memory and runs no Python; recording has no effect (tensors
    and generators are put back); a step that waits for a number cannot be recorded.
    """

    made: ClassVar[list[Tape]] = []  # of recordings

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.replays = 0

    def run(self, work: Callable[[], None]) -> None:
        work()

    def record(self, work: Callable[[], None], generators: Sequence[torch.Generator]) -> Callable[[], None]:
        tape = Tape()
        tape.take(work, generators)
        Tape.made.append(tape)
        return tape.replay

    def take(self, work: Callable[[], None], generators: Sequence[torch.Generator]) -> None:
        states = [generator.get_state() for generator in generators]
        before, device = Before(), torch.get_rng_state()
        try:
            with _Recorder(self, before):
                work()
        finally:
            before.put_back()
            torch.set_rng_state(device)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for function, args, kwargs, places in self.calls:
            for place, result in zip(tree_leaves(places), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != result.data_ptr():
                    place.copy_(result)


class Before:
    """Tensors as they were before they were written to."""

    def __init__(self) -> None:
        self.storages: dict[int, tuple[Any, Any]] = {}

    def keep(self, written: Iterable[Any]) -> None:
        for tensor in written:
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self.storages.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def put_back(self) -> None:
        for storage, was in self.storages.values():
            storage.copy_(was)


class _Recorder(TorchDispatchMode):
    def __init__(self, tape: Tape, before: Before) -> None:
        super().__init__()
        self.tape, self.before = tape, before

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a recorded step waits for a number")
        given = [*args, *[None] * len(function._schema.arguments)]
        for argument, value in zip(function._schema.arguments, given, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.keep(tree_flatten(kwargs.get(argument.name, value))[0])
        if "native_batch_norm" in function._schema.name and "backward" not in function._schema.name:
            self.before.keep(args[3:5])  # the running statistics, which its schema does not call written
        result = function(*args, **kwargs)
        self.tape.calls.append((function, args, kwargs, result))
        return result
