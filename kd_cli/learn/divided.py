"""One model trained by several processes, each of which computes its part of every batch.

A step is that of one process to rounding, whatever the method: each process computes the loss from the outputs of the
whole batch, and its gradient reaches the examples that the process computed.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from kd_cli.learn.batches import Augmented, Batch, Block, Examples
from kd_cli.learn.learner import ModuleLearner, Rate, ask
from kd_cli.learn.objective import Objective
from kd_cli.learn.outputs import Outputs
from kd_cli.learn.processes import Processes
from kd_cli.learn.randomness import GlobalState, global_stream
from kd_cli.learn.teachers import Teacher
from kd_cli.models.layers import Dropout, draw_dropout


class DividedLearner(ModuleLearner):
    """A model that several processes train; each holds the same weights before and after every step."""

    def __init__(self, *args: Any, processes: Processes, sync_batchnorm: bool = True, **keys: Any) -> None:
        """`sync_batchnorm` normalises by the statistics of the whole batch, else by those of a process's part."""
        super().__init__(*args, **keys)
        self.processes = processes
        self.norms = batch_norms(self.module)
        self.layers = DividedLayers(self.module, processes, self.norms if sync_batchnorm else ())
        self.synced = sync_batchnorm
        own = {id(p) for p in self.method.parameters()}
        # Each process has the gradient of the whole loss on the method's parameters: their sum is divided.
        self.repeated = [p for p in self.trained if id(p) in own]

    @contextlib.contextmanager
    def training(self, role: str, epoch: int) -> Iterator[None]:
        with super().training(role, epoch):
            self.common = GlobalState(self.device)  # what one process would draw from, the same in all
            with global_stream(self.seed, role, "global", epoch, "process", self.processes.rank, device=self.device):
                self.own = GlobalState(self.device)
            yield
        if not self.synced:
            self.processes.average([buffer for norm in self.norms for buffer in norm.buffers()])

    def steps(
        self, block: Block, teacher: Teacher | None, objective: Objective, rates: Sequence[Rate]
    ) -> Iterator[None]:
        wholes = zip(block.index.split(block.sizes, 1), block.labels.split(block.sizes, 1), strict=True)
        for (index, labels), batch, rate in zip(wholes, self.taken(block), rates, strict=True):
            whole = replace(batch, index=index, labels=labels)
            target = None
            if teacher is not None:
                target = ask(teacher, batch if teacher.needs_images else whole, objective.weights.T)
                if teacher.needs_images:
                    target = self.gathered(target, index.shape[1])
            self.step(whole, target, objective, rate)
            yield

    def taken(self, block: Block) -> Block:
        """The examples of a block that this process computes, batch after batch."""
        positions, sizes = self.own_positions(block.sizes)
        positions = positions.to(block.index.device)
        augmented = block.augmented
        if augmented is not None:
            augmented = Augmented(augmented.augment, augmented.draws[:, positions], augmented.fill)
        return replace(block, index=block.index[:, positions], sizes=sizes, augmented=augmented)

    def asked_for(self, order: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
        positions, own = self.own_positions(sizes)
        return order[:, positions.to(order.device)], own

    def own_positions(self, sizes: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
        """Which examples of consecutive batches this process computes, and how many of each batch."""
        parts, start = [], 0
        for size in sizes:
            taken = self.processes.taken(size)
            parts.append(torch.arange(start + taken.start, start + taken.stop))
            start += size
        return torch.cat(parts), tuple(len(part) for part in parts)

    def gathered(self, outputs: Outputs, n: int) -> Outputs:
        """The outputs for a batch of n examples, from those that each process has computed."""
        features = {path: self.processes.gather(feature, n) for path, feature in outputs.features.items()}
        return Outputs(self.processes.gather(outputs.logits, n), features)

    def step(self, batch: Batch, target: Outputs | None, objective: Objective, rate: Rate) -> None:
        """Make a step on a whole batch, of which `images` are those that this process computes."""
        n = batch.index.shape[1]
        with self.layers.dividing(n, self.common):
            with self.own:
                part = self.outputs(batch.images)
            student = self.gathered(part, n)
            with self.common:
                terms = objective(student, target, batch)
            loss = terms["loss"].sum()
            if self.rate is None:
                self.clear_gradients()
                self.rate = rate
            (loss if batch.share == 1 else loss * batch.share).backward()
        if batch.ends_step:
            self.finish_gradients()
            self.update(self.rate)
            self.rate = None
        self.sums.add(terms, student.logits, batch.labels)

    def finish_gradients(self) -> None:
        """Turn this process's gradients into those of the whole batch."""
        for p in self.repeated:
            if p.grad is not None:
                p.grad /= self.processes.size
        self.processes.sum_gradients(p.grad for p in self.trained if p.grad is not None)

    def predict(self, examples: Examples) -> Tensor:
        """The logits at T = 1 for all examples, [1,N,C]; each process computes some of the batches."""
        found, start, rank = None, 0, self.processes.rank
        for i, images in enumerate(examples.in_order()):
            if i % self.processes.size == rank or found is None:
                logits = self.logits(images)
                if found is None:
                    found = logits.new_zeros(1, len(examples), logits.shape[-1])
                if i % self.processes.size == rank:
                    found[:, start : start + len(images)] = logits
            start += len(images)
        assert found is not None
        self.processes.sum_in_place(found)
        return found

    def start_alike(self) -> None:
        """Begin with the weights of process 0, whatever the model's code has drawn."""
        kept = [module.state_dict() for module in (self.module, self.method)]
        sent = self.processes.from_first([{name: t.cpu() for name, t in state.items()} for state in kept])
        for module, state in zip((self.module, self.method), sent, strict=True):
            module.load_state_dict(state)


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers of a model."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm) and not isinstance(part, SyncBatchNorm)]


class DividedLayers:
    """The layers of a model that do in a process's part of a batch what they do in the whole one.

    Dropout draws for the whole batch and keeps the rows of the part; BatchNorm takes the whole batch's statistics. On a
    GPU `nn.Dropout` draws for its part alone: torch's fused operator divides its numbers in another way.
    """

    def __init__(self, module: nn.Module, processes: Processes, norms: Sequence[_BatchNorm]) -> None:
        self.processes, self.norms = processes, norms
        layers = list(module.modules())
        self.dropouts = [part for part in layers if isinstance(part, Dropout)]
        on_cpu = all(p.device.type == "cpu" for p in module.parameters())
        self.plain_dropouts = [part for part in layers if type(part) is nn.Dropout] if on_cpu else []
        self.generator = torch.Generator()

    @contextlib.contextmanager
    def dividing(self, n: int, common: GlobalState) -> Iterator[None]:
        """A context for a step on a batch of n examples; `common` is continued by what `nn.Dropout` draws."""
        self.n = n
        forms: list[tuple[nn.Module, Callable[..., Tensor]]] = [(norm, self._normalise) for norm in self.norms]
        forms += [(layer, self._drop) for layer in self.dropouts]
        forms += [(layer, functools.partial(self._drop_plain, common)) for layer in self.plain_dropouts]
        for layer, form in forms:
            layer.forward = functools.partial(form, layer)
        try:
            yield
        finally:
            for layer, _ in forms:
                del layer.forward

    def _rows(self, x: Tensor) -> tuple[tuple[int, ...], slice]:
        """The shape of what a layer would have for the whole batch, and this process's rows of it."""
        taken = self.processes.taken(self.n)
        if len(x) != taken.stop - taken.start:  # its first dimension is not that of the examples
            return tuple(x.shape), slice(None)
        return (self.n, *x.shape[1:]), taken

    def _drop(self, layer: Dropout, x: Tensor) -> Tensor:
        if not layer.training or layer.p == 0:
            return x
        shape, rows = self._rows(x)
        return x * draw_dropout(x.new_empty(shape), layer.p, generator=layer.generator)[rows]

    def _drop_plain(self, common: GlobalState, layer: nn.Dropout, x: Tensor) -> Tensor:
        if not layer.training or layer.p == 0:
            return x
        if layer.p == 1:
            return x * torch.zeros_like(x)
        shape, rows = self._rows(x)
        self.generator.set_state(common.of_cpu)
        kept = x.new_empty(shape).bernoulli_(1 - layer.p, generator=self.generator).div_(1 - layer.p)[rows]
        common.of_cpu = self.generator.get_state()
        return x.mul_(kept) if layer.inplace else x * kept

    def _normalise(self, layer: _BatchNorm, x: Tensor) -> Tensor:
        if not layer.training:  # frozen
            return type(layer).forward(layer, x)
        part = self.processes.part(self.n)
        counted = x[: part.stop - part.start] if part.start == part.stop else x
        dims = [d for d in range(x.ndim) if d != 1]
        shape = [1, -1] + [1] * (x.ndim - 2)
        exact = torch.promote_types(x.dtype, torch.float32)
        number = x.new_tensor([counted.numel() / x.shape[1]], dtype=exact)
        total = self.processes.sum(torch.cat([number, counted.to(exact).sum(dims)]))
        mean = total[1:] / total[0]
        centred = x.to(exact) - mean.view(shape)
        squares = centred[: len(counted)].square().sum(dims)
        variance = self.processes.sum(squares) / total[0]
        if layer.track_running_stats and layer.running_mean is not None:
            track(layer, mean.detach(), variance.detach() * total[0] / (total[0] - 1))
        y = centred * torch.rsqrt(variance + layer.eps).view(shape)
        if layer.affine:
            y = y * layer.weight.view(shape) + layer.bias.view(shape)
        return y.to(x.dtype)


@torch.no_grad()
def track(layer: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    """Move a BatchNorm layer's running statistics towards a batch's mean and unbiased variance, as torch does."""
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked.add_(1)
    share = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
    layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), share)
    layer.running_var.lerp_(variance.to(layer.running_var.dtype), share)
