"""Models of a run: built from a spec, checked against the data, loaded from weights, measured."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from kd_cli.config.build import build
from kd_cli.config.values import TrainSpec
from kd_cli.data.source import Dataset
from kd_cli.errors import CheckpointError, ConfigError, KdError, first_line
from kd_cli.learn.batches import Examples
from kd_cli.learn.learner import single_precision
from kd_cli.learn.randomness import global_stream
from kd_cli.learn.stacked.structure import is_dense, widths
from kd_cli.learn.teachers import freeze
from kd_cli.runs.device_data import DeviceData, dtype_of
from kd_cli.shipped import raised_by_statement


def build_module(spec: TrainSpec, dataset: Dataset, *, role: str, device: torch.device | str = "cpu") -> nn.Module:
    """The model of a spec with its initial weights, which depend on the seed and the role alone."""
    where = "teacher" if role == "teacher" else "student"
    # Built on the CPU: the same weights on every device.
    with global_stream(spec.seed, role, "init"):
        built = build(spec.model, where=where, input_shape=dataset.shape, num_classes=dataset.classes)
        module = with_sizes(checked_module(built, spec, where), dataset.shape)
    return module.to(device, dtype_of(spec.precision))


def with_sizes(module: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The module; lazy layers take their sizes, and their initial weights, from one blank image."""
    if any(isinstance(p, UninitializedParameter) for p in module.parameters()):
        with torch.no_grad():
            module.eval()(torch.zeros(1, *shape))
        module.train()
    return module


def blank_module(spec: TrainSpec, dataset: Dataset, *, role: str) -> nn.Module:
    """The model without memory for its weights, to look at its shapes; a real one where its code needs numbers."""
    where = "teacher" if role == "teacher" else "student"
    sizes: dict[str, Any] = {"input_shape": dataset.shape, "num_classes": dataset.classes}
    try:
        with torch.device("meta"):
            return with_sizes(checked_module(build(spec.model, where=where, **sizes), spec, where), dataset.shape)
    except KdError:
        raise
    except Exception:  # a constructor that computes with its weights; its own errors come again below
        with global_stream(0, "blank"):
            return with_sizes(checked_module(build(spec.model, where=where, **sizes), spec, where), dataset.shape)


def checked_module(module: Any, spec: TrainSpec, where: str) -> nn.Module:
    """The module itself. ConfigError when a model's target gave something else."""
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{where}: {spec.model['_target_']} gave a {type(module).__name__}, not a torch.nn.Module")
    return module


def check_shape(spec: TrainSpec, dataset: Dataset, *, role: str) -> None:
    """Try the model on two blank images. ConfigError when model and data do not fit."""
    where = "teacher" if role == "teacher" else "student"
    wanted = f"images {tuple(dataset.shape)} and {dataset.classes} classes"
    try:
        module = blank_module(spec, dataset, role=role)
        if is_dense(module):  # plain to see, and without torch's compiler, whose import for meta tensors takes a second
            sizes = widths(module)  # type: ignore[arg-type]
            joints = [math.prod(dataset.shape), *(n for pair in sizes for n in pair), dataset.classes]
            if joints[::2] == joints[1::2]:
                return
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        with torch.no_grad():
            logits = module.eval()(torch.zeros(2, *dataset.shape, device=device))
    except NotImplementedError:
        return  # an operation that needs real numbers: an error will show in training
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


def in_forward(error: BaseException) -> bool:
    """Return whether an error was raised while a module was called, not while it was made."""
    return any(frame.f_code.co_name == "_call_impl" for frame, _ in traceback.walk_tb(error.__traceback__))


def load_module(spec: TrainSpec, state: dict[str, Tensor], data: DeviceData, *, role: str) -> nn.Module:
    """The model with trained weights, frozen, on the data's device."""
    # Everything an mlp holds is in its state dict: no random weights need to be drawn first.
    plain = spec.model["_target_"] == "kd_cli.models.mlp.mlp"
    module = (blank_module if plain else build_module)(spec, data.dataset, role=role)
    where = "teacher" if role == "teacher" else "student"
    if problems := mismatches(module, state):
        raise CheckpointError(
            f"the weights of {where} {spec.name} do not fit it: {'; '.join(problems[:3])}",
            hint="they are another version's; remove them from the store to train it again",
        )
    module.load_state_dict(state, assign=plain)
    return freeze(module.to(data.device, dtype_of(spec.precision)))


def read_checkpoint(path: Path, spec: TrainSpec, dataset: Dataset) -> dict[str, Tensor]:
    """The user's own weights for a model: safetensors, or a state dict read without unpickling code.

    CheckpointError when they are unreadable or those of another architecture.
    """
    path = path.expanduser()
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"teacher.checkpoint={path} cannot be read as weights: {first_line(error)}",
            hint="save the weights alone, safetensors.torch.save_file(model.state_dict(), FILE) or "
            "torch.save(model.state_dict(), FILE); a pickled model would run code of its own and is refused",
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"teacher.checkpoint={path} holds no state dict (names and tensors)", hint="save model.state_dict()"
        )
    if problems := mismatches(blank_module(spec, dataset, role="teacher"), state):
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"teacher.checkpoint={path} does not fit teacher={spec.name} on {dataset.name} "
            f"({dataset.classes} classes): {'; '.join(problems[:3])}{more}",
            hint="give the architecture that these weights come from, e.g. teacher=smallmlp teacher.hidden=[300,300]",
        )
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"teacher.checkpoint={path}: {name} holds values that are infinite or not numbers",
                hint="the training that it comes from diverged; take weights of an earlier epoch",
            )
    return state


def mismatches(module: nn.Module, state: Mapping[str, Any]) -> list[str]:
    """Where weights do not fit a module: names, kinds of numbers, shapes."""
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in state]
    problems += [f"{name} is not in the model" for name in state if name not in own]
    for name, expected in own.items():
        if name not in state:
            continue
        found = state[name]
        if found.layout != torch.strided or found.is_quantized:
            problems.append(f"{name} is not a plain tensor")
        elif found.is_floating_point() != expected.is_floating_point() or found.is_complex():
            problems.append(f"{name} is {found.dtype}, the model's is {expected.dtype}")
        elif found.shape != expected.shape:
            problems.append(f"{name} is {tuple(found.shape)}, the model's is {tuple(expected.shape)}")
    return problems


def forward_flops(module: nn.Module, image: Tensor) -> int:
    """Floating-point operations of one image's forward pass (a multiply-add is two)."""
    if is_dense(module):
        layers = widths(module)  # type: ignore[arg-type]
        return sum(2 * inputs * outputs for inputs, outputs in layers)
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(image[None])
    return int(counter.get_total_flops())


@torch.no_grad()
def predict_module(module: nn.Module, examples: Examples) -> Tensor:
    """Logits at T = 1, on the CPU, in float32 at least; `bfloat16` is for training, and what is reported is what
    the saved weights say."""
    return single_precision(torch.cat([module(images) for images in examples.in_order()])).cpu()
