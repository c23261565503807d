"""BatchNorm's running statistics, estimated anew for the weights as they are.

During training they are a moving average over the last steps: after few steps, or with a small `momentum`, they belong
to weights of long ago, and the model is evaluated with the wrong mean and variance. Averaging over training batches at
fixed weights is "precise BatchNorm" (Wu & Johnson 2021, section 3).
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from kd_cli.learn.batches import Examples, batch_sizes
from kd_cli.learn.randomness import generator

BATCHES = 64  # that the statistics are averaged over at most


def tracked_norms(module: nn.Module) -> list[_NormBase]:
    """The layers of a model that keep running statistics: BatchNorm, and InstanceNorm where it tracks them.

    Those of frozen layers stay as they are, and are not among them.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, _NormBase)]
    return [layer for layer in layers if layer.running_mean is not None and layer.track_running_stats]


@torch.no_grad()
def estimate_statistics(modules: Sequence[nn.Module], images: Iterator[Tensor]) -> None:
    """Replace running means and variances by their averages over batches of images [B,...]; nothing else changes.

    The models are in eval mode before and after; dropout is not active meanwhile.
    """
    norms = [norm for module in modules for norm in tracked_norms(module)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.training = True
    try:
        for batch in images:
            for module in modules:
                module(batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum, norm.training = momentum, False


@contextlib.contextmanager
def batch_statistics(module: nn.Module) -> Iterator[None]:
    """A context in which the layers normalise by their batch's statistics, as in training, and keep their own.

    The model is in eval mode before and after; dropout is not active meanwhile.
    """
    norms = tracked_norms(module)
    kept = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    for norm in norms:
        norm.training = True
    try:
        yield
    finally:
        for norm, buffers in zip(norms, kept, strict=True):
            norm.training = False
            for name, buffer in buffers.items():
                norm.get_buffer(name).copy_(buffer)


def training_batches(train: Examples, batch_size: int, *, seed: int, role: str, epoch: int) -> Iterator[Tensor]:
    """At most BATCHES batches of training images [B,...], not augmented, in an order drawn for this epoch."""
    n = len(train)
    order = torch.randperm(n, generator=generator(seed, role, "batchnorm", epoch)).to(train.device)
    sizes = batch_sizes(n, batch_size)[:BATCHES]
    train.expect(order[None, : sum(sizes)], sizes)
    for start, size in zip(itertools.accumulate(sizes, initial=0), sizes, strict=False):
        yield train.images(order[None, start : start + size])[0]
