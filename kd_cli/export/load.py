"""The student of a run as a module to use elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.config.build import build
from kd_cli.config.moved import with_current_names
from kd_cli.data.normalisation import normalise
from kd_cli.errors import CheckpointError, KdError, first_line
from kd_cli.learn.teachers import freeze
from kd_cli.runs.device_data import dtype_of
from kd_cli.runs.models import mismatches, with_sizes
from kd_cli.shipped import USER, raised_by
from kd_cli.storage.files import checksum, read_json
from kd_cli.storage.run_dir import STUDENT, WEIGHTS, intact

OWN_MODELS = tuple(f"kd_cli.models.{name}" for name in ("mlp.mlp", "cnn.cnn", "torchvision.torchvision_model"))


class Student(nn.Module):
    """A trained student with the preparation of its input: images as the data set has them in, logits out."""

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        classes: tuple[str, ...],
        input_shape: tuple[int, ...],
        dtype: torch.dtype,
        shift: list[float] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("shift", None if shift is None else torch.tensor(shift, dtype=dtype))
        self.mean, self.std, self.classes, self.input_shape, self.dtype = mean, std, classes, input_shape, dtype

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, *input_shape], uint8 or float in [0, 1] -> logits [B, classes]."""
        device = next(self.network.parameters()).device
        logits = self.network(normalise(images, self.mean, self.std, self.dtype).to(device))
        return logits if self.shift is None else logits + self.shift

    def probabilities(self, images: Tensor) -> Tensor:
        """Probabilities at T = 1, the temperature of all inference: [B, classes]."""
        return self(images).softmax(-1)


def load_student(run_dir: str | Path, *, trust: bool = False) -> Student:
    """The distilled student of a run directory, on the CPU, in eval mode.

    Takes images as its data set has them, uint8 or float in [0, 1]; predicts exactly what the run reported. Only models
    of kd_cli itself are built unless you trust the run: `trust=True` imports and calls the code that its student.json
    names, a model of your own for example. Raises CheckpointError when there is no student or its files are damaged.
    """
    from safetensors.torch import load_file

    folder = Path(run_dir).expanduser()
    try:
        rebuild = read_json(folder / STUDENT)
        if not intact(folder / STUDENT):
            raise ValueError(f"{STUDENT} is not what the run wrote")
        model = with_current_names(rebuild["model"])
        check_targets(model, folder, trust=trust)
        if checksum(folder / WEIGHTS) != rebuild["checksum"]:
            raise ValueError(f"{WEIGHTS} is not what the run wrote")
        state = load_file(folder / WEIGHTS)
        shape = tuple(rebuild["input_shape"])
        network = build(model, where="model", input_shape=shape, num_classes=len(rebuild["classes"]))
        network = with_sizes(network, shape)
        dtype = dtype_of(rebuild["precision"])
        network.to(dtype)
        if problems := mismatches(network, state):
            raise ValueError("; ".join(problems[:3]))
        network.load_state_dict(state)
        return Student(
            freeze(network),
            mean=tuple(rebuild["mean"]),
            std=tuple(rebuild["std"]),
            classes=tuple(rebuild["classes"]),
            input_shape=shape,
            dtype=dtype,
            shift=rebuild.get("shift"),
        ).eval()
    except Exception as error:
        explained = refusal(folder, error)
        if explained is None:
            raise
        raise explained from error


def refusal(folder: Path, error: Exception) -> CheckpointError | None:
    """Return why a student cannot be rebuilt; None for a CheckpointError, and for a bug of our own or the model's."""
    from safetensors import SafetensorError

    if isinstance(error, CheckpointError) or raised_by(error) == USER:
        return None
    if isinstance(error, FileNotFoundError):
        message = f"{folder} holds no student: {error.filename} is missing"
        return CheckpointError(message, hint="name the directory of a finished run")
    if isinstance(error, KdError):
        return CheckpointError(f"the student in {folder} cannot be rebuilt: {error.message}", hint=error.hint)
    expected = ArithmeticError | AttributeError | LookupError | OSError | TypeError | ValueError | RuntimeError
    if isinstance(error, expected | SafetensorError):
        return CheckpointError(f"the student in {folder} cannot be rebuilt: {first_line(error)}")
    return None


def check_targets(node: Any, folder: Path, *, trust: bool) -> None:
    """CheckpointError when the description of a model names code other than this package's models."""
    if isinstance(node, list):
        for item in node:
            check_targets(item, folder, trust=trust)
    if not isinstance(node, dict):
        return
    target = node.get("_target_")
    if target is not None and target not in OWN_MODELS and not trust:
        raise CheckpointError(
            f"the student in {folder} is built by {target}, which is code that kd_cli does not ship",
            hint="load_student(DIR, trust=True) imports and runs it: for your own runs, and for those of people whose "
            "code you would run",
        )
    for value in node.values():
        check_targets(value, folder, trust=trust)
