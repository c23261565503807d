"""S models of one architecture, their weights stacked on a leading axis and advanced by the same steps.

Equal to training the S models one by one: each has its own batches, dropout masks, learning rate and weight decay.
Fully connected networks have their gradients in closed form.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.errors import first_line
from kd_cli.learn.batches import Batch, Block, repeat_groups
from kd_cli.learn.learner import NO_AUTOCAST, Autocast, Rate, Sums, TermGradient, UniformLearner, ask
from kd_cli.learn.methods import Method, Terms
from kd_cli.learn.objective import Objective
from kd_cli.learn.optimizers import bare_step, set_rates
from kd_cli.learn.outputs import Outputs
from kd_cli.learn.randomness import Generators
from kd_cli.learn.stacked.closed_forms import ClosedForm, closed_form
from kd_cli.learn.stacked.dense import Dense
from kd_cli.learn.stacked.flat import Flat
from kd_cli.learn.stacked.structure import is_trained_dense
from kd_cli.learn.stacked.traced import Traced, is_layered, vmapped
from kd_cli.learn.teachers import Teacher
from kd_cli.losses import examples_last, single_precision
from kd_cli.models.layers import constrain_max_norm

# Optimisers whose update of a weight depends on that weight's own gradient and state only: applied to a stack they
# change each model as they would change it by itself.
ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.RMSprop,
)

OptimizerFactory = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def why_not(module: nn.Module, optimizer: torch.optim.Optimizer, image: Tensor) -> str | None:
    """Why models like this one cannot be stacked, or None when they can; `image` is one input, without batch."""
    if type(optimizer) not in ELEMENTWISE:
        return f"the optimiser {type(optimizer).__name__} has no stacked form"
    if any(True for _ in module.buffers()):
        kinds = sorted({type(m).__name__ for m in module.modules() if any(True for _ in m.buffers(recurse=False))})
        return f"{', '.join(kinds)} keeps running statistics, which do not stack"
    if not all(p.requires_grad for p in module.parameters()):
        return f"{type(module).__name__} has weights that are not trained"
    if len({p.dtype for p in module.parameters()}) > 1:
        return f"{type(module).__name__} has weights of several types"
    if len(list(module.named_parameters(remove_duplicate=False))) > len(list(module.parameters())):
        return f"{type(module).__name__} has layers that share weights"
    if is_layered(module):
        return None
    if any("Dropout" in type(m).__name__ for m in module.modules()):
        return f"{type(module).__name__} has dropout inside a forward of its own"
    try:
        parameters = {name: torch.stack([p.detach()] * 2) for name, p in module.named_parameters()}
        with torch.enable_grad():
            parameters = {name: p.requires_grad_() for name, p in parameters.items()}
            logits = vmapped(module)(parameters, torch.stack([image[None]] * 2))
            slopes = torch.autograd.grad(logits.sum(), list(parameters.values()), allow_unused=True)
    except Exception as error:  # whatever torch finds in a user's forward
        return f"torch.vmap cannot run {type(module).__name__}: {first_line(error)}"
    if any(slope is None for slope in slopes):
        return f"{type(module).__name__} has weights that its forward pass does not use"
    return None


def why_method_not(method: Method) -> str | None:
    """Why students of this method cannot be stacked, or None when they can."""
    name = type(method).__name__
    if any(True for _ in method.parameters()):
        return f"{name} has parameters of its own"
    if method.student_features or method.teacher_features or method.chooses_layers:
        return f"{name} reads features"
    if method.replaces_modules:
        return f"{name} draws modules for each student"
    return None


class StackedLearner(UniformLearner):
    """S models as one: parameters [S, ...].

    `modules` are the S models with their initial weights, which are copied. `optimizer` builds an optimiser from
    parameter groups; model s gets `hyper[s]`, its own learning rate and weight decay.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        optimizer: OptimizerFactory,
        *,
        hyper: Sequence[dict[str, float]],
        seeds: Sequence[int],
        autocast: Autocast = NO_AUTOCAST,
    ) -> None:
        self.size, self.module = len(modules), modules[0]
        self.make_optimizer, self.hyper, self.seeds, self.autocast = optimizer, hyper, seeds, autocast
        self.flat = Flat([dict(module.named_parameters()) for module in modules])
        self.parameters = self.flat.parameters
        self.device = self.flat.values.device
        self.bounds: Mapping[str, float] = getattr(self.module, "max_norm", None) or {}
        self.generators = Generators(seeds, self.device)
        self.sums = Sums(self.size, self.device)
        if is_trained_dense(self.module):
            self.network: Dense | Traced = Dense(
                self.module,  # type: ignore[arg-type]
                self.flat.parameters,
                self.flat.gradients,
                generators=self.generators,
                dtype=torch.bfloat16 if autocast.enabled else self.flat.values.dtype,
            )
        else:
            self.network = Traced(self.module, self.flat, self.generators, autocast)
        groups = list(self.flat.groups(hyper))
        self.runs = [run for run, _ in groups]
        self.optimizer = optimizer([group for _, group in groups])
        self.optimizer_step = bare_step(self.optimizer)
        self.base_rates = [group["lr"] for group in self.optimizer.param_groups]
        self._form: tuple[Objective, ClosedForm | None] | None = None

    @contextlib.contextmanager
    def training(self, role: str, epoch: int) -> Iterator[None]:
        self.generators.start(role, epoch)
        yield
        self.generators.end()

    def step(self, batch: Batch, target: Outputs | None, objective: Objective, rate: Rate) -> None:
        # A copy in the usual layout: the method may keep it, and the next step overwrites the network's own.
        leaf = self._logits(batch.images).clone(memory_format=torch.contiguous_format).requires_grad_()
        terms = objective(Outputs(leaf), target, batch)
        self._update(torch.autograd.grad(terms["loss"].sum(), leaf)[0], rate)
        self.sums.add(terms, leaf, repeat_groups(batch.labels, self.size))

    def steps(
        self,
        block: Block,
        teacher: Teacher | None,
        objective: Objective,
        rates: Sequence[Rate],
    ) -> Iterator[None]:
        """Make consecutive steps; with a closed form, targets and losses are computed once for the block."""
        form = self._closed_form(objective)
        if form is None:
            yield from super().steps(block, teacher, objective, rates)
            return
        T, sizes = objective.weights.T, block.sizes
        labels = repeat_groups(block.labels, self.size)
        for_block = teacher is not None and not teacher.needs_images and not teacher.depends_on_T
        known = ask(teacher, block.lookup(), T).logits if teacher is not None and for_block else None
        targets: Sequence[Tensor] = ()
        logits: list[Tensor] = []
        answers: list[Tensor] = []
        for i, (batch, rate, true) in enumerate(zip(block, rates, labels.split(sizes, 1), strict=True)):
            found = self._logits(batch.images)
            logits.append(found.clone())
            if teacher is not None and not for_block:
                answers.append(ask(teacher, batch, T).logits)
                target = form.target(found, answers[-1], true)
            else:
                targets = targets or form.target(found, known, labels).split(sizes, 1)
                target = targets[i]
            self._update(form.gradient(found, target), rate)
            yield
        teacher_logits = torch.cat(answers, 1) if answers else known
        self._add_losses(objective, logits, teacher_logits, labels)

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        return self._logits(images[None])

    def term_gradients(self, batch: Batch, terms: Callable[[Outputs], Terms]) -> dict[str, TermGradient]:
        logits = self._logits(batch.images).clone(memory_format=torch.contiguous_format).requires_grad_()
        found = {}
        for name, term in terms(Outputs(logits)).items():
            slope = torch.zeros_like(logits)
            if term.requires_grad:  # a term without a weight may be a constant
                slope = torch.autograd.grad(term.sum(), logits, retain_graph=True)[0]
            self._logits(batch.images)  # a backward pass uses up what its forward pass kept
            on_logits = slope.clone()
            self.network.backward(slope)
            found[name] = TermGradient(on_logits, list(self.flat.gradients.values()))
        return found

    def rates(self, factor: float) -> list[float]:
        rates = [0.0] * self.size
        for run, rate in zip(self.runs, self.base_rates, strict=True):
            for s in range(self.size)[run]:
                rates[s] = rate * factor
        return rates

    def model_state(self, s: int) -> dict[str, Tensor]:
        return {name: p[s].to("cpu", copy=True) for name, p in self.parameters.items()}

    def state(self) -> dict[str, Any]:
        set_rates(self.optimizer, self.base_rates, 1.0)
        return {"parameters": self.flat.values, "optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Any]) -> None:
        self.flat.values.copy_(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])

    def only(self, models: Sequence[int]) -> StackedLearner:
        """A stack of these models alone, ascending, with their weights and the state of their optimiser."""
        modules = []
        for s in models:
            modules.append(copy.deepcopy(self.module))
            modules[-1].load_state_dict(self.model_state(s))
        hyper, seeds = [self.hyper[s] for s in models], [self.seeds[s] for s in models]
        small = StackedLearner(modules, self.make_optimizer, hyper=hyper, seeds=seeds, autocast=self.autocast)
        small.take_optimizer_state(self, models)
        return small

    @torch.no_grad()
    def take_optimizer_state(self, other: StackedLearner, models: Sequence[int]) -> None:
        """Continue from what the optimiser of `other` has of its models of these numbers.

        Numbers that the optimiser keeps once for all, such as its count of steps, are equal for all models: the
        learning rate and the weight decay alone differ between them.
        """
        whole: dict[str, Tensor] = {}  # as the parameters lie in memory, by the optimiser's names
        once: dict[str, Any] = {}
        for run, parts in zip(other.runs, optimizer_parts(other.optimizer), strict=True):
            for b, param in enumerate(parts):
                for key, value in other.optimizer.state.get(param, {}).items():
                    if not isinstance(value, Tensor) or value.shape != param.shape:
                        once[key] = value
                        continue
                    full = whole.setdefault(key, torch.zeros_like(other.flat.values))
                    (full if param.dim() == 1 else other.flat.by_parameter(full)[b][run]).copy_(value)
        kept = {
            key: torch.cat([part[list(models)].flatten() for part in other.flat.by_parameter(full)])
            for key, full in whole.items()
        }
        for run, parts in zip(self.runs, optimizer_parts(self.optimizer), strict=True):
            for b, param in enumerate(parts):
                state = {key: value.clone() if isinstance(value, Tensor) else value for key, value in once.items()}
                for key, full in kept.items():
                    state[key] = (full if param.dim() == 1 else self.flat.by_parameter(full)[b][run]).clone()
                if state:
                    self.optimizer.state[param] = state

    def _logits(self, images: Tensor) -> Tensor:
        """Images [U,B,...] -> logits [S,B,C] without a graph, which the next call overwrites."""
        return single_precision(self.network.logits(images))

    def _update(self, slope: Tensor, rate: Rate) -> None:
        """Make an optimiser step from the gradient on the last logits [S,B,C], which is overwritten."""
        set_rates(self.optimizer, self.base_rates, rate)
        self.network.backward(slope)
        self.optimizer_step()
        if self.bounds:
            constrain_max_norm(self.parameters, self.bounds)

    def _closed_form(self, objective: Objective) -> ClosedForm | None:
        if self._form is None or self._form[0] is not objective:
            self._form = objective, closed_form(objective)
        return self._form[1]

    @torch.no_grad()
    def _add_losses(
        self, objective: Objective, logits: Sequence[Tensor], teacher: Tensor | None, labels: Tensor
    ) -> None:
        """Add the losses of a block's batches, from their logits, to the sums."""
        across = examples_last(logits[0])  # a layout in which the losses are faster
        together = torch.cat([part.mT for part in logits], 2).mT if across else torch.cat(list(logits), 1)
        batch = Batch(labels, labels, labels)
        terms = objective(Outputs(together), None if teacher is None else Outputs(teacher), batch)
        self.sums.add(terms, together, labels)


def optimizer_parts(optimizer: torch.optim.Optimizer) -> list[list[Tensor]]:
    """The tensors of each of an optimiser's parameter groups: one [numbers] for a whole stack, else one per parameter,
    [models of the group, numbers]."""
    return [group["params"] for group in optimizer.param_groups]
