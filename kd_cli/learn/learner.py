"""S models of one architecture that are trained together; S = 1 is a module, a `torch.optim` optimiser and autograd."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.learn.batches import Batch, Block, Examples, gathered, repeat_groups
from kd_cli.learn.checkpointing import Checkpointing
from kd_cli.learn.methods.base import Terms, is_temperature
from kd_cli.learn.objective import Objective
from kd_cli.learn.optimizers import quick_step, set_rates
from kd_cli.learn.outputs import FeatureHooks, Outputs
from kd_cli.learn.randomness import Generators, global_stream
from kd_cli.learn.recipe import PLAIN, AveragedWeights, Recipe, clip
from kd_cli.learn.teachers import Teacher
from kd_cli.losses import correct, single_precision
from kd_cli.models.layers import Dropout, constrain_max_norm

Rate = float | Tensor  # the factor on each model's learning rate; a tensor while steps are recorded


class Autocast:
    """The arithmetic of the forward pass: in the tensors' own type, or in bfloat16 where autocast allows it."""

    def __init__(self, device: torch.device, precision: str) -> None:
        self.device, self.enabled = device, precision == "bfloat16"

    def __call__(self) -> contextlib.AbstractContextManager[Any]:
        if not self.enabled:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


NO_AUTOCAST = Autocast(torch.device("cpu"), "float32")


class Sums:
    """The terms of S models and their correct predictions, summed over an epoch's examples.

    The sums stay on the device, so that no step waits for them.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self.device = size, device
        self.terms: dict[str, Tensor] = {}
        self.correct = torch.zeros(size, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, terms: Terms, logits: Tensor, labels: Tensor) -> None:
        """Add the means `terms` over the B examples of logits [S,B,C] and labels [S,B] or [1,B] ([...,L])."""
        if terms.keys() != self.terms.keys():
            self.terms = {name: torch.zeros(self.size, dtype=torch.float64, device=self.device) for name in terms}
        torch._foreach_add_(
            list(self.terms.values()), [t.detach().double() for t in terms.values()], alpha=logits.shape[-2]
        )
        self.correct += correct(logits, labels).sum(-1)

    def means(self, n: int) -> list[dict[str, float | None]]:
        """For each model the means over n examples: `loss`, `soft_loss` and `hard_loss` (None where the method has no
        such term), further terms as `name_loss`, temperatures by their names, `train_accuracy`. The sums start from 0
        again."""
        means = torch.stack([*self.terms.values(), self.correct.double()]).div(n).tolist()  # waits for the device
        names = [name if name == "loss" or is_temperature(name) else f"{name}_loss" for name in self.terms]
        for values in (*self.terms.values(), self.correct):
            values.zero_()
        columns = dict.fromkeys(["loss", "soft_loss", "hard_loss"]) | dict(zip(names, means[:-1], strict=True))
        columns["train_accuracy"] = means[-1]
        return [
            {name: None if values is None else values[s] for name, values in columns.items()} for s in range(self.size)
        ]


class Learner(ABC):
    """S models and what advances them by steps on the same batches."""

    size: int

    @property
    @abstractmethod
    def parts(self) -> Sequence[UniformLearner]:
        """The learners of one architecture that it consists of, in the order of the S models."""

    def with_objectives(self, objective: Objective) -> Sequence[tuple[Learner, Objective]]:
        """The learners in it whose losses do not depend on each other, each with its objective."""
        return [(self, objective)]

    @abstractmethod
    def training(self, role: str, epoch: int) -> contextlib.AbstractContextManager[None]:
        """A context in which the models train for one epoch: train mode, random numbers of their own."""

    @abstractmethod
    def step(self, batch: Batch, target: Outputs | None, objective: Objective, rate: Rate) -> None:
        """Make one optimiser step on a batch at `rate` times each model's learning rate.

        `target` are the teacher's outputs for the batch. The terms are added to `sums`.
        """

    def steps(
        self,
        block: Block,
        teacher: Teacher | None,
        objective: Objective,
        rates: Sequence[Rate],
    ) -> Iterator[None]:
        """Make consecutive steps, one on each batch of the block; the iterator yields after each."""
        for batch, rate in zip(block, rates, strict=True):
            target = None if teacher is None else ask(teacher, batch, objective.weights.T)
            self.step(batch, target, objective, rate)
            yield

    def asked_for(self, order: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Sequence[int]]:
        """The examples whose images its steps ask for, of an epoch's `order` [U,n] in batches of these sizes."""
        return order, sizes

    @abstractmethod
    def logits(self, images: Tensor) -> Tensor:
        """The models' logits at T = 1 in eval mode, without gradients, for the same images [B,...]: [S,B,C]."""

    def predict(self, examples: Examples) -> Tensor:
        """The models' logits at T = 1 for all examples, in eval mode: [S,N,C]."""
        parts = (self.logits(images) for images in examples.in_order())
        return gathered(parts, len(examples), dim=1)

    @abstractmethod
    def term_gradients(self, batch: Batch, terms: Callable[[Outputs], Terms]) -> dict[str, TermGradient]:
        """The gradient of each of the `terms` of the students' outputs, by its name, in eval mode; no step is made."""

    @abstractmethod
    def rates(self, factor: float) -> list[float]:
        """The learning rate of each model at this factor."""

    @abstractmethod
    def model_state(self, s: int) -> dict[str, Tensor]:
        """The state dict of model `s`, copied to the CPU."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """All that the training needs to continue: tensors and plain values."""

    @abstractmethod
    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from what `state` returned."""


class UniformLearner(Learner):
    """S models of one architecture with one optimiser."""

    module: nn.Module  # one of the models
    optimizer: torch.optim.Optimizer
    generators: Generators
    sums: Sums

    @property
    def parts(self) -> Sequence[UniformLearner]:
        return [self]


class TermGradient:
    """The gradient of one term of S models: on the logits, [S,B,C], and on each parameter, [S,...]."""

    def __init__(self, logits: Tensor, parameters: Sequence[Tensor]) -> None:
        size, batch = logits.shape[:2]
        self.on_logits = logits.norm(dim=-1).mean(-1) * batch  # a mean over examples; this is an example's own
        squares = [g.reshape(size, -1).double().square().sum(-1) for g in parameters]
        self.on_parameters = torch.stack(squares).sum(0).sqrt()


class ModuleLearner(UniformLearner):
    """S = 1: any module, any `torch.optim` optimiser.

    The optimiser holds the module's parameters, and those of the objective's method where it has any. The method's
    features are collected by hooks on the module.
    """

    size = 1

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        seed: int,
        objective: Objective,
        autocast: Autocast = NO_AUTOCAST,
        recipe: Recipe = PLAIN,
        frozen: Sequence[nn.Module] = (),
    ) -> None:
        """`frozen` are those of the module's parts that stay in eval mode."""
        self.module, self.optimizer, self.seed, self.autocast = module, optimizer, seed, autocast
        self.recipe, self.frozen = recipe, frozen
        if recipe.channels_last:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # the stubs leave this form out
        self.average = AveragedWeights(module, recipe.ema) if recipe.ema else None
        self.rate: Rate | None = None  # of the step whose gradients are being accumulated
        self.method = objective.method
        self.features = FeatureHooks(module, self.method.student_features, role="student")
        self.checkpointing = Checkpointing(module, self.features) if recipe.checkpointing else None
        self.trained = [p for group in optimizer.param_groups for p in group["params"]]
        self.base_rates = [group["lr"] for group in optimizer.param_groups]
        self.optimizer_step = quick_step(optimizer)
        self.device = next(module.parameters()).device
        self.sums = Sums(1, self.device)
        self.generators = Generators([seed], self.device)
        for part in module.modules():
            if isinstance(part, Dropout):
                part.generator = self.generators.own[0]
        self.bounds: Mapping[str, float] = getattr(module, "max_norm", None) or {}
        self.bounded = {name: p for name, p in module.named_parameters() if name in self.bounds}
        self.module.eval()
        self.method.eval()

    @property
    def makes_plain_steps(self) -> bool:
        """Whether a step is that of the optimiser alone."""
        return self.recipe.plain

    @contextlib.contextmanager
    def training(self, role: str, epoch: int) -> Iterator[None]:
        self.generators.start(role, epoch)
        if self.average is not None:
            self.average.show(False)
        self.module.train()
        for part in self.frozen:
            part.training = False
        self.method.train()
        # A user's nn.Dropout knows only the global generator, so that one is seeded too.
        blocks = contextlib.nullcontext() if self.checkpointing is None else self.checkpointing.active()
        with global_stream(self.seed, role, "global", epoch, device=self.device), blocks:
            yield
        self.generators.end()
        if self.average is not None:
            self.average.show(True)
        self.module.eval()
        self.method.eval()

    def outputs(self, images: Tensor) -> Outputs:
        """The outputs for images [1,B,...], with their graph."""
        seen = images[0]
        if self.recipe.channels_last and seen.dim() == 4:
            seen = seen.contiguous(memory_format=torch.channels_last)
        with self.autocast():
            logits = self.module(seen)
        features = {path: feature[None] for path, feature in self.features.take().items()}
        return Outputs(single_precision(logits)[None], features)

    def step(self, batch: Batch, target: Outputs | None, objective: Objective, rate: Rate) -> None:
        student = self.outputs(batch.images)
        terms = objective(student, target, batch)
        loss = terms["loss"].sum()
        if self.rate is None:
            self.clear_gradients()
            self.rate = rate
        self.backward(loss if batch.share == 1 else loss * batch.share)
        if batch.ends_step:
            self.update(self.rate)
            self.rate = None
        self.sums.add(terms, student.logits, batch.labels)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a batch's loss."""
        loss.backward()

    def clear_gradients(self) -> None:
        """What optimizer.zero_grad does, at a tenth of its cost."""
        for p in self.trained:
            p.grad = None

    def update(self, rate: Rate) -> None:
        """Make an optimiser step from the gradients."""
        set_rates(self.optimizer, self.base_rates, rate)
        if self.recipe.clip:
            clip(self.trained, self.recipe.clip)
        self.optimizer_step()
        if self.bounded:
            constrain_max_norm(self.bounded, self.bounds)
        if self.average is not None:
            self.average.update()

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        with self.features.paused():
            return self.outputs(images[None]).logits

    def term_gradients(self, batch: Batch, terms: Callable[[Outputs], Terms]) -> dict[str, TermGradient]:
        student = self.outputs(batch.images)
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        found = {}
        for name, term in terms(student).items():
            sources = [student.logits, *parameters]
            gradients: Sequence[Tensor] = [torch.zeros_like(source) for source in sources]
            if term.requires_grad:  # a term without a weight may be a constant
                gradients = torch.autograd.grad(term.sum(), sources, retain_graph=True, materialize_grads=True)
            found[name] = TermGradient(gradients[0], [gradient[None] for gradient in gradients[1:]])
        return found

    def rates(self, factor: float) -> list[float]:
        return [self.base_rates[0] * factor]

    def model_state(self, s: int) -> dict[str, Tensor]:
        return {name: t.detach().to("cpu", copy=True) for name, t in self.module.state_dict().items()}

    def state(self) -> dict[str, Any]:
        set_rates(self.optimizer, self.base_rates, 1.0)
        return {
            "module": self.module.state_dict(),
            "method": self.method.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **({} if self.average is None else {"average": self.average.state()}),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state(state["average"])


def ask(teacher: Teacher, batch: Batch, T: Tensor) -> Outputs:
    """The teacher's outputs for the batches [U,B] of S models: a leading axis of 1 or S."""
    size = len(T)
    if teacher.depends_on_T and 1 < len(batch.index) < size:
        index, images = repeat_groups(batch.index, size), repeat_groups(batch.images, size)
        batch = Batch(index, images, batch.labels, batch.progress, batch.epoch)
    found = teacher(batch, T)
    if len(found.logits) == 1:
        return found
    features = {path: repeat_groups(feature, size) for path, feature in found.features.items()}
    return Outputs(repeat_groups(found.logits, size), features)
