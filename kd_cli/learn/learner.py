"""One step of training for S models of one architecture. S = 1 is an ordinary module with an ordinary optimiser."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kd_cli.learn.optim import set_rates
from kd_cli.learn.randomness import Generators, global_stream
from kd_cli.models.layers import Dropout, constrain_max_norm


class Learner(Protocol):
    """S models that are trained together."""

    size: int
    optimizer: torch.optim.Optimizer
    module: nn.Module  # what each of them is
    generators: Generators

    def train(self, role: str, epoch: int) -> contextlib.AbstractContextManager[None]:
        """The block in which the models train for one epoch: train mode, their own random numbers."""
        ...

    def logits(self, images: Tensor) -> Tensor:
        """Images [U,B,...], each of the U for the S/U models that lie together -> logits [S,B,C], good until the next
        call. They carry no graph: the loss is a function of them, and `update` goes on from its gradient."""
        ...

    def update(self, slope: Tensor, factor: float | Tensor) -> None:
        """One optimiser step, at `factor` times each model's learning rate, from the gradient [S,B,C] of the S losses
        on the last logits; it may be overwritten. The factor is a tensor while steps are recorded."""
        ...

    def gradients(self, slope: Tensor) -> list[Tensor]:
        """The gradient of each parameter, [S,...] for S > 1, from that on the last logits; no step is made."""
        ...

    def rates(self, factor: float) -> list[float]:
        """The learning rate of each model at this factor."""
        ...

    def model_state(self, s: int) -> dict[str, Tensor]:
        """The state dict of model `s`, copied to the CPU."""
        ...

    def state(self) -> dict[str, Any]:
        """All that training needs to go on."""
        ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class Autocast:
    """The arithmetic of the forward pass: as the tensors are, or bfloat16 where it is safe."""

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device, self.enabled = device, precision == "bfloat16"

    def __call__(self) -> contextlib.AbstractContextManager[Any]:
        if not self.enabled:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def single_precision(logits: Tensor) -> Tensor:
    """Losses and metrics are computed in float32 at least."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


class SoloLearner:
    """S = 1: any module, any `torch.optim` optimiser."""

    size = 1

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, *, seed: int, autocast: Autocast | None = None
    ) -> None:
        self.module, self.optimizer, self.seed = module, optimizer, seed
        self.autocast = autocast or contextlib.nullcontext
        self.trainable = [p for group in optimizer.param_groups for p in group["params"]]
        self.base_rates = [group["lr"] for group in optimizer.param_groups]
        self.device = next(module.parameters()).device
        self.generators = Generators([seed], self.device)
        for part in module.modules():
            if isinstance(part, Dropout):
                part.generator = self.generators.own[0]
        self.bounds: dict[str, float] = getattr(module, "max_norm", None) or {}
        self.bounded = {name: p for name, p in module.named_parameters() if name in self.bounds}

    @contextlib.contextmanager
    def train(self, role: str, epoch: int) -> Iterator[None]:
        self.generators.start(role, epoch)
        self.module.train()
        # A user's nn.Dropout knows only the global generator, so that one is seeded too.
        with global_stream(self.seed, role, "global", epoch, device=self.device):
            yield
        self.generators.end()
        self.module.eval()

    def logits(self, images: Tensor) -> Tensor:
        with self.autocast():
            self.last = self.module(images[0])
        return single_precision(self.last.detach())[None]

    def gradients(self, slope: Tensor) -> list[Tensor]:
        trained = [p for p in self.module.parameters() if p.requires_grad]
        found = torch.autograd.grad(self.last, trained, slope[0].to(self.last.dtype), materialize_grads=True)
        del self.last
        return list(found)

    def update(self, slope: Tensor, factor: float | Tensor) -> None:
        set_rates(self.optimizer, self.base_rates, factor)
        for p in self.trainable:  # optimizer.zero_grad does the same at ten times the cost
            p.grad = None
        self.last.backward(slope[0].to(self.last.dtype))
        del self.last  # and with it the graph, whose nodes remember the stream they were made on
        self.optimizer.step()
        if self.bounded:
            constrain_max_norm(self.bounded, self.bounds)

    def rates(self, factor: float) -> list[float]:
        return [self.base_rates[0] * factor]

    def model_state(self, s: int) -> dict[str, Tensor]:
        return {name: t.detach().to("cpu", copy=True) for name, t in self.module.state_dict().items()}

    def state(self) -> dict[str, Any]:
        set_rates(self.optimizer, self.base_rates, 1.0)
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
