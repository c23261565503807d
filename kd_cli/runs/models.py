"""Models of a run: built from a spec, checked against the data, loaded from weights, measured."""

from __future__ import annotations

import copy
import inspect
import math
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.config.build import build
from kd_cli.config.moved import current_name
from kd_cli.config.values import TrainSpec
from kd_cli.data.source import Dataset
from kd_cli.errors import CheckpointError, ConfigError, KdError, first_line
from kd_cli.learn.batches import Examples, gathered
from kd_cli.learn.randomness import global_stream
from kd_cli.learn.stacked.structure import is_dense, widths
from kd_cli.learn.teachers import freeze
from kd_cli.losses import single_precision
from kd_cli.models.building import dtype_of, prepared
from kd_cli.models.input_view import seen_shape
from kd_cli.models.outputs import described
from kd_cli.models.renormalised import Renormalised
from kd_cli.models.timm import TARGET as TIMM
from kd_cli.models.timm import notes_on_timm
from kd_cli.models.torchvision import notes_on_building
from kd_cli.models.weights import Fit, absurd, fit_weights, mismatches, wrong_head, wrong_input
from kd_cli.runs.device_data import DeviceData
from kd_cli.shipped import raised_by_statement
from kd_cli.storage.weight_files import SAVE, WeightFile, read_weight_file

NOTES_ON_BUILDING = {"kd_cli.models.torchvision.torchvision_model": notes_on_building, TIMM: notes_on_timm}


WHERE = {"teacher": "teacher", "assistant": "teacher.chain"}  # the key of a role's model, where it is not `student`


def build_module(spec: TrainSpec, dataset: Dataset, *, role: str, device: torch.device | str = "cpu") -> nn.Module:
    """The model of a spec with its initial weights, which depend on the seed and the role alone."""
    # Built on the CPU: the same weights on every device.
    with global_stream(spec.seed, role, "init"):
        module = _built(spec, dataset, role)
    return module.to(device, dtype_of(spec.precision))


def blank_module(spec: TrainSpec, dataset: Dataset, *, role: str) -> nn.Module:
    """The model without memory for its weights, to look at its shapes; a real one where its code needs numbers."""
    try:
        with torch.device("meta"):
            return _built(spec, dataset, role)
    except KdError:
        raise
    except Exception:  # a constructor that computes with its weights; the user's own errors come again below
        with global_stream(0, "blank"):
            return _built(spec, dataset, role)


def _built(spec: TrainSpec, dataset: Dataset, role: str) -> nn.Module:
    where = WHERE.get(role, "student")
    try:
        shape = seen_shape(spec.input, dataset.shape)
        built = build(spec.model, where=where, input_shape=shape, num_classes=dataset.classes)
    except ConfigError as error:
        if error.message.startswith("input."):
            raise ConfigError(f"{where}.{error.message}", hint=error.hint) from error
        if error.hint is None or error.hint.partition("=")[0] not in spec.model:
            raise
        raise ConfigError(error.message, hint=f"{where}.{error.hint}") from error  # the model does not know its role
    if not isinstance(built, nn.Module):
        raise ConfigError(f"{where}: {spec.model['_target_']} gave a {type(built).__name__}, not a torch.nn.Module")
    check_inputs(built, where=f"{where}={spec.name}")
    try:
        return prepared(
            built,
            target=spec.model["_target_"],
            shape=dataset.shape,
            classes=dataset.classes,
            normalize=spec.normalize,
            view=spec.input,
            data_mean=dataset.mean,
            data_std=dataset.std,
        )
    except ValueError as error:
        if not str(error).startswith("normalize"):
            raise
        raise ConfigError(f"{where}.{error}") from error


def check_inputs(module: nn.Module, *, where: str) -> None:
    """ConfigError when the model cannot be called with images alone."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # compiled code, whose signature cannot be read
        return
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p.name for p in positional if p.default is p.empty]
    by_name = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if len(needed) > 1 or by_name:
        raise ConfigError(
            f"{where}: its forward takes {', '.join([*needed, *by_name])}, and it is called with one input, the images",
            hint="give the others a default, or wrap the network in a module whose forward takes the images alone",
        )
    if not positional and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise ConfigError(f"{where}: its forward takes no input", hint="def forward(self, images)")


def check_shape(spec: TrainSpec, dataset: Dataset, *, role: str, trained: bool = True) -> list[str]:
    """Try the model on two blank images, in evaluation and in training; return notes on what is made of its output.

    ConfigError when model and data do not fit, and when the model is to be `trained` and its output has no gradient.
    """
    where = WHERE.get(role, "student")
    wanted = f"images {tuple(dataset.shape)} and {dataset.classes} classes"
    try:
        module = blank_module(spec, dataset, role=role)
        if is_dense(module):  # plain to see, and without torch's compiler, whose import for meta tensors takes a second
            sizes = widths(module)  # type: ignore[arg-type]
            joints = [math.prod(dataset.shape), *(n for pair in sizes for n in pair), dataset.classes]
            if joints[::2] == joints[1::2]:
                return []
        notes = [
            f"{where} {spec.title} {said}"
            for said in [*_notes_on_building(spec, dataset), *_try_output(module, dataset)]
        ]
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        with torch.enable_grad():
            learns = module.train()(torch.zeros(2, *dataset.shape, device=device)).requires_grad
        with torch.no_grad():
            logits = module.eval()(torch.zeros(2, *dataset.shape, device=device))
    except ConfigError as error:
        if not error.message.startswith("the model returns"):
            raise
        raise ConfigError(f"{where}={spec.name}: {error.message}", hint=error.hint) from error
    except NotImplementedError:
        return []  # an operation that needs real numbers; training will raise its errors
    except (RuntimeError, ValueError) as error:
        if raised_by_statement(error) or not in_forward(error):
            raise  # the user's own error, of which the data may know nothing
        message = first_line(error)
        raise ConfigError(
            f"{where}={spec.name} does not take the data of {dataset.name} ({wanted}): {message}",
            hint=f"choose another {where}, or set its sizes to the data's",
        ) from error
    if tuple(logits.shape) != (2, dataset.classes):
        raise ConfigError(
            f"{where}={spec.name} gives {tuple(logits.shape)} for 2 images of {dataset.name}; it must be "
            f"(2, {dataset.classes}): one logit for each class"
        )
    if trained and not learns:
        raise ConfigError(
            f"{where}={spec.name} cannot be trained: its output does not depend on any weights that learn",
            hint="no .detach(), torch.no_grad() or requires_grad=False on the way from the weights to the logits",
        )
    return notes


def _notes_on_building(spec: TrainSpec, dataset: Dataset) -> list[str]:
    notes = NOTES_ON_BUILDING.get(current_name(str(spec.model["_target_"])))
    if notes is None:
        return []
    return notes(spec.model, shape=dataset.shape, classes=dataset.classes, normalize=spec.normalize)


def in_forward(error: BaseException) -> bool:
    """Return whether an error was raised while a module was called, not while it was made."""
    return any(frame.f_code.co_name == "_call_impl" for frame, _ in traceback.walk_tb(error.__traceback__))


def _try_output(module: nn.Module, dataset: Dataset) -> list[str]:
    """What the module returns beside logits, in evaluation or in training. ConfigError when it returns no logits."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    images = torch.zeros(2, *dataset.shape, device=device)
    inner = module.network if isinstance(module, Renormalised) else module
    found: dict[str, list[str]] = {}

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            mode = "training" if inner.training else "evaluation"
            found.setdefault(f"returns {described(output, dataset.classes)[1]}", []).append(mode)

    hook = inner.register_forward_hook(keep, prepend=True)  # before the one that takes the logits
    for training in (False, True):
        with torch.no_grad():
            inner.train(training)(images)
    hook.remove()
    return [said + (f", in {modes[0]} only" if len(modes) == 1 else "") for said, modes in found.items()]


def load_module(spec: TrainSpec, state: dict[str, Tensor], data: DeviceData, *, role: str) -> nn.Module:
    """The model with trained weights, frozen, on the data's device."""
    # Everything an mlp holds is in its state dict: no random weights need to be drawn first.
    plain = spec.model["_target_"] == "kd_cli.models.mlp.mlp" and spec.normalize == "data" and spec.input is None
    module = (blank_module if plain else build_module)(spec, data.dataset, role=role)
    where = WHERE.get(role, "student")
    if problems := mismatches(module, state):
        raise CheckpointError(
            f"the weights of {where} {spec.title} do not fit it: {'; '.join(problems[:3])}",
            hint="they are another version's; remove them from the store to train it again",
        )
    module.load_state_dict(state, assign=plain)
    return freeze(module.to(data.device, dtype_of(spec.precision)))


@dataclass(frozen=True)
class Checkpoint:
    """A user's weights for a model, the checksum of the file they are from, and notes on what was made of it."""

    state: dict[str, Tensor]
    checksum: str
    notes: tuple[str, ...]


def read_checkpoint(path: Path, spec: TrainSpec, dataset: Dataset, *, key: str | None = None) -> Checkpoint:
    """The user's own weights for a model, read once and without running code that the file names.

    CheckpointError when they are unreadable, damaged, or those of another architecture.
    """
    named = f"teacher.checkpoint={path}"
    try:
        file = read_weight_file(path)
    except CheckpointError as error:  # whose message begins with the path
        raise CheckpointError(f"teacher.checkpoint={error.message}", hint=error.hint) from error
    if not file.tensors:
        raise CheckpointError(
            f"{named} holds no tensors{_keys(file)}",
            hint=SAVE if file.keys else "it may be an optimiser's, a list or a log",
        )
    module = blank_module(spec, dataset, role="teacher")
    fit = fit_weights(module, file.tensors, homes=file.homes, key=key)
    if fit.problems:
        message, hint = _misfit(named, spec, dataset, module, fit, file)
        raise CheckpointError(message, hint=hint)
    if (reason := absurd(fit.state)) is not None:
        raise CheckpointError(
            f"{named}: {reason}", hint="the file is damaged, or its training diverged; take weights of an earlier epoch"
        )
    notes = list(fit.notes)
    if file.not_read:
        classes = ", ".join(file.not_read[:3]) + (" and others" if len(file.not_read) > 3 else "")
        notes.append(f"objects of {classes} in it are not created; only tensors are read")
    # The store keeps them with the model, which the same bytes under another name find again: no file is named.
    return Checkpoint(fit.state, file.checksum, tuple(f"teacher.checkpoint: {note}" for note in notes))


def _misfit(
    named: str, spec: TrainSpec, dataset: Dataset, module: nn.Module, fit: Fit, file: WeightFile
) -> tuple[str, str]:
    """The message and the hint for weights that do not fit."""
    where = f" (under '{fit.place}.')" if fit.place else ""
    data = f"teacher={spec.name} on {dataset.name} ({dataset.classes} classes)"
    architecture = "give the architecture that these weights come from, e.g. teacher=smallmlp teacher.hidden=[300,300]"
    own = list(module.state_dict())
    if 2 * fit.matched <= len(own):
        reason = f"{fit.matched} of the model's {len(own)} names are in it" if fit.matched else fit.problems[0]
        return (
            f"{named} does not fit {data}: {reason}{_keys(file)}; its tensors are {', '.join(list(file.tensors)[:3])}, "
            f"..., the model's {', '.join(own[:3])}, ...",
            architecture,
        )
    if (head := wrong_head(module, fit.state, dataset.classes)) is not None:
        layer, classes = head
        return (
            f"{named}{where} fits teacher={spec.name} but for its last layer {layer}, which has {classes:,} classes; "
            f"{dataset.name} has {dataset.classes:,}",
            "a teacher must know the data's classes: train its last layer on them first, or choose the data that it "
            "was trained on",
        )
    problems = fit.problems
    if (first := wrong_input(module, fit.state)) is not None:
        problems = [first, *problems]
    more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
    return f"{named}{where} does not fit {data}: {'; '.join(problems[:3])}{more}", architecture


def _keys(file: WeightFile) -> str:
    """The names at the top of a file, for a message."""
    if not file.keys or file.keys[0] in file.tensors:
        return ""
    return f"; its keys are {', '.join(file.keys[:8])}" + (", ..." if len(file.keys) > 8 else "")


def forward_flops(module: nn.Module, image: Tensor) -> int:
    """Floating-point operations of one image's forward pass (a multiply-add is two).

    They are counted on a copy without data: on a CPU torch fuses layers such as attention and LSTM into operators that
    its counter does not know.
    """
    if is_dense(module):
        layers = widths(module)  # type: ignore[arg-type]
        return sum(2 * inputs * outputs for inputs, outputs in layers)
    try:
        return _count_flops(_without_data(module), image.to("meta"))
    except Exception:  # a forward that needs numbers, or an operator that has no form without them
        return _count_flops(module, image)


def _without_data(module: nn.Module) -> nn.Module:
    """A copy on the meta device, for which no memory is taken."""
    known: dict[int, Any] = {}
    for p in module.parameters():
        known[id(p)] = nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad)
    for b in module.buffers():
        known[id(b)] = b.detach().to("meta")
    return copy.deepcopy(module, known)


def _count_flops(module: nn.Module, image: Tensor) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(image[None])
    return int(counter.get_total_flops())


@torch.no_grad()
def predict_module(module: nn.Module, examples: Examples) -> Tensor:
    """Logits at T = 1, on the CPU, in float32 at least; `bfloat16` is for training, and what is reported is what
    the saved weights say."""
    parts = (single_precision(module(images)) for images in examples.in_order())
    return gathered(parts, len(examples)).cpu()
