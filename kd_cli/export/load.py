"""The student of a run, recorded by the run and loaded for use elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.config.build import build
from kd_cli.config.fingerprint import code_version
from kd_cli.config.moved import with_current_names
from kd_cli.config.values import TrainSpec
from kd_cli.data.columns import Encoding
from kd_cli.data.source import Dataset
from kd_cli.data.stored import value_range
from kd_cli.errors import CheckpointError, KdError, first_line
from kd_cli.export.student import Student
from kd_cli.learn.teachers import freeze
from kd_cli.models import timm
from kd_cli.models.building import dtype_of, prepared
from kd_cli.models.input_view import seen_shape
from kd_cli.models.weights import mismatches
from kd_cli.shipped import USER, raised_by
from kd_cli.storage.files import checksum_of, read_json
from kd_cli.storage.run_dir import STUDENT, WEIGHTS, intact

# the builders that a student.json may name without `trust`: they take numbers and names, and check them
OWN_MODELS = {
    f"kd_cli.models.{name}"
    for name in (
        *("mlp.mlp", "cnn.cnn", "torchvision.torchvision_model", "timm.timm_model"),
        *("extended.extended_student", "quantised.quantised", "pruned.pruned"),
        *("cifar.resnet", "cifar.vgg", "cifar.wide_resnet"),
        *("cifar_light.mobilenetv2", "cifar_light.shufflenetv1", "cifar_light.shufflenetv2"),
    )
}


def record_student(spec: TrainSpec, dataset: Dataset, shift: Tensor) -> dict[str, Any]:
    """The content of student.json: the model and its code, its input and its normalisation, a shift of its logits."""
    images = dataset.train.images
    return {
        "model": spec.model,
        "code": code_version(spec.model),
        "name": spec.title,
        "input_shape": list(dataset.shape),
        "classes": list(dataset.class_names),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "normalize": spec.normalize,
        "values": "bytes" if images.dtype == torch.uint8 else "floats",
        "range": list(value_range(images)),
        "shift": shift.tolist() if shift.any() else None,
        "precision": spec.precision,
        **({"multilabel": True} if dataset.multilabel else {}),
        **({"view": spec.input} if spec.input is not None else {}),
        **({} if dataset.encoding is None else {"columns": dataset.encoding.record()}),
    }


def load_student(run_dir: str | Path, *, trust: bool = False, same_code: bool = True) -> Student:
    """The distilled student of a run directory, on the CPU, in eval mode.

    Takes images as its data set has them, bytes or floats in [0, 1]; predicts exactly what the run reported. Builds
    models of kd_cli only, unless you trust the run: `trust=True` imports and calls the code that its student.json
    names, a model of your own for example. Raises CheckpointError when there is no student, when its files are damaged,
    and when your model's file is not the one that the run used, which `same_code=False` accepts.
    """
    from safetensors.torch import load

    folder = Path(run_dir).expanduser()
    try:
        rebuild = read_json(folder / STUDENT)
        if not intact(folder / STUDENT):
            raise ValueError(f"{STUDENT} was changed since the run wrote it")
        model = with_current_names(rebuild["model"])
        check_targets(model, f"the student in {folder}", trust=trust)
        if same_code:
            check_code(model, rebuild.get("code"), folder)
        content = (folder / WEIGHTS).read_bytes()
        if checksum_of(content) != rebuild["checksum"]:
            raise ValueError(f"{WEIGHTS} was changed since the run wrote it")
        state = load(content)
        shape, classes = tuple(rebuild["input_shape"]), tuple(rebuild["classes"])
        network = network_of(
            model,
            state,
            shape=shape,
            classes=len(classes),
            normalize=rebuild.get("normalize", "data"),
            view=rebuild.get("view"),
            statistics=(rebuild["mean"], rebuild["std"]),
            dtype=(dtype := dtype_of(rebuild["precision"])),
        )
        return Student(
            network,
            mean=tuple(rebuild["mean"]),
            std=tuple(rebuild["std"]),
            classes=classes,
            input_shape=shape,
            dtype=dtype,
            shift=rebuild.get("shift"),
            values=rebuild.get("values", "unknown"),
            multilabel=rebuild.get("multilabel", False),
            range=tuple(rebuild["range"]) if rebuild.get("range") else None,
            encoding=Encoding.from_record(rebuild["columns"]) if "columns" in rebuild else None,
        ).eval()
    except Exception as error:
        explained = refusal(folder, error)
        if explained is None:
            raise
        raise explained from error


def network_of(
    model: dict[str, Any],
    state: dict[str, Tensor],
    *,
    shape: tuple[int, ...],
    classes: int,
    normalize: Any,
    view: Mapping[str, Any] | None,
    statistics: tuple[Sequence[float], Sequence[float]],
    dtype: torch.dtype,
) -> nn.Module:
    """A model with trained weights, frozen; `statistics` are mean and deviation of the data. ValueError on a misfit."""
    mean, std = statistics
    if model["_target_"] == timm.TARGET and model.get("pretrained") is True:
        model = {**model, "pretrained": timm.RECORDED}  # its trained weights follow
    network = prepared(
        build(model, where="model", input_shape=seen_shape(view, shape), num_classes=classes),
        target=model["_target_"],
        shape=shape,
        classes=classes,
        normalize=normalize,
        view=view,
        data_mean=mean,
        data_std=std,
    )
    network.to(dtype)
    if problems := mismatches(network, state):
        raise ValueError("; ".join(problems[:3]))
    network.load_state_dict(state)
    return freeze(network)


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


def check_code(model: Any, recorded: Any, folder: Path) -> None:
    """CheckpointError when the user's own code is not what it was in the run; older runs have not recorded it."""
    if recorded is None or (found := code_version(model)) == recorded:
        return
    changed = sorted(name for name in found.keys() | recorded if found.get(name) != recorded.get(name))
    raise CheckpointError(
        f"{', '.join(changed)}: this code was changed since the run in {folder}, so its student may predict something "
        "else",
        hint="restore the files of the run; load_student(DIR, trust=True, same_code=False) takes the changed code",
    )


def check_targets(node: Any, what: str, *, trust: bool) -> None:
    """CheckpointError when the description of a model names code other than this package's models."""
    if isinstance(node, list):
        for item in node:
            check_targets(item, what, trust=trust)
    if not isinstance(node, dict):
        return
    target = node.get("_target_")
    if target is not None and target not in OWN_MODELS and not trust:
        raise CheckpointError(
            f"{what} is built by {target}, which is code that kd_cli does not ship",
            hint="trust=True in Python, --trust on the command line, imports and runs it: for your own runs, and for "
            "those of people whose code you would run",
        )
    for value in node.values():
        check_targets(value, what, trust=trust)
