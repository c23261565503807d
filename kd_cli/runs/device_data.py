"""The data and the machine of a run: what models are trained and tested on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kd_cli.config.build import build
from kd_cli.config.values import RunConfig
from kd_cli.data.normalisation import Normalisation
from kd_cli.data.prepare import prepare
from kd_cli.data.source import Dataset, Split
from kd_cli.data.stored import Images, StoredImages
from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Examples
from kd_cli.learn.cuda_graphs import CudaGraphs, Recorder
from kd_cli.learn.stored_examples import StoredExamples
from kd_cli.models.building import dtype_of


@dataclass(frozen=True)
class DeviceData:
    """A data set on a device, in the precision of a run: what models are trained and tested on."""

    dataset: Dataset
    device: torch.device
    precision: str
    train: Examples
    val: Examples
    test: Examples
    fill: Tensor  # a black pixel, normalised: [C]
    cuda_graphs: bool = True  # steps are recorded and replayed where the device can

    @property
    def recorder(self) -> Recorder | None:
        """A new one for the steps of a training; None where they are not recorded."""
        return CudaGraphs(self.device) if self.cuda_graphs and self.device.type == "cuda" else None

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.precision)


def resolve_device(name: str) -> torch.device:
    """The device of a name. ConfigError when the machine has none such."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}", hint="device=auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device is {name}, and torch sees no GPU here", hint="device=auto or device=cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"device is {name}, and there are {torch.cuda.device_count()} GPUs, counted from 0")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device is mps, and torch sees no such device here", hint="device=auto or device=cpu")
    elif device.type not in ("cpu", "mps"):
        raise ConfigError(f"device is {name!r}", hint="device=auto, cpu, cuda, cuda:1 or mps")
    return device


def set_precision(precision: str, device: torch.device) -> None:
    """Choose the arithmetic of float32 matrix products on the GPU."""
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError(f"precision is tf32, which {device.type} does not have", hint="precision=float32")
    if device.type == "mps" and precision == "float64":
        raise ConfigError("precision is float64, which mps does not have", hint="device=cpu")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def load_device_data(config: RunConfig) -> DeviceData:
    """Read the data set and lay it on the device."""
    device = resolve_device(config.device)
    set_precision(config.precision, device)
    source = build(config.dataset, where="dataset", data_dir=config.data_dir)
    dataset = prepare(source, val_fraction=config.val_fraction, positive=config.positive)
    dtype = dtype_of(config.precision)

    normalise = Normalisation(dataset.mean, dataset.std, dtype)

    def examples(split: Split) -> Examples:
        return examples_of(split.images, split.labels.to(device), normalise)

    black = torch.zeros(1, *dataset.shape, dtype=dataset.train.images.dtype)
    fill = normalise(black).flatten(2)[0, :, 0] if black.ndim == 4 else torch.zeros(1)
    train, val, test = map(examples, (dataset.train, dataset.val, dataset.test))
    return DeviceData(dataset, device, config.precision, train, val, test, fill.to(device), config.cuda_graphs)


def examples_of(images: Images, labels: Tensor, normalise: Normalisation) -> Examples:
    """Images and their labels on the labels' device; stored images stay where they are and are read batch by batch."""
    if isinstance(images, StoredImages):
        return StoredExamples(images, labels, normalise=normalise)
    return Examples(images.to(labels.device), labels, normalise=normalise)


def device_name(device: torch.device) -> str:
    """The device as a summary names it, with the GPU's product name."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
