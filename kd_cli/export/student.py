"""A trained student as a module: the preparation of its input, the network, its class names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.data.columns import Encoding
from kd_cli.data.source import Dataset
from kd_cli.data.stored import value_range
from kd_cli.errors import DataError

BYTES = 255
SLACK = 0.25  # how far from 0 to 1 pixels may lie: resampling overshoots
KINDS = ("bytes", "floats", "unknown")  # of the values of a data set; runs of older versions did not record them


class Student(nn.Module):
    """A trained student with the preparation of its input: images as the data set has them in, logits out.

    `mean` and `std` are per channel, of values from 0 to 1 where the data are images. `values` says what the training
    data were: bytes, which count as 0 to 1, or floats in `range`.
    """

    mean: Tensor
    std: Tensor
    mean_of_bytes: Tensor
    std_of_bytes: Tensor

    def __init__(
        self,
        network: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        classes: tuple[str, ...],
        input_shape: tuple[int, ...],
        dtype: torch.dtype,
        shift: list[float] | None = None,
        values: str = "unknown",
        range: tuple[float, float] | None = None,
        multilabel: bool = False,
        encoding: Encoding | None = None,
    ) -> None:
        super().__init__()
        self.network, self.multilabel, self.encoding = network, multilabel, encoding
        self.classes, self.input_shape, self.values, self.range = classes, input_shape, values, range
        self.register_buffer("shift", None if shift is None else torch.tensor(shift, dtype=dtype))
        per_channel = (-1, 1, 1) if len(input_shape) == 3 else (-1,)
        for name, numbers in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(list(numbers), dtype=dtype).reshape(per_channel))
            # rounded once, as in training: dividing bytes by 255 first would round twice
            scaled = torch.tensor([BYTES * number for number in numbers], dtype=dtype).reshape(per_channel)
            self.register_buffer(f"{name}_of_bytes", scaled, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        return self.mean.dtype

    def forward(self, images: Any) -> Tensor:
        """Images as the data set has them -> logits [B, classes].

        `images` are a tensor or array [B, *input_shape] or [*input_shape], a picture of PIL, or a list of these: bytes
        of any integer type, from 0 to 255, or floats in [0, 1]; floats as in training where the data were no images.
        Raises DataError for other shapes and values.
        """
        tracing = torch.jit.is_tracing()  # where sizes are recorded, so comparing them warns
        batch = images if tracing else as_batch(images, self.input_shape)
        if not (tracing or torch.compiler.is_compiling()):  # which follow no values
            self._check_values(batch)
        return self.unchecked(batch)

    def unchecked(self, batch: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, *input_shape] whose values are not looked at."""
        pixels = batch.to(self.mean.device, self.mean.dtype)
        if batch.is_floating_point():
            logits = self.network((pixels - self.mean) / self.std)
        else:
            logits = self.network((pixels - self.mean_of_bytes) / self.std_of_bytes)
        return logits if self.shift is None else logits + self.shift

    def probabilities(self, images: Any) -> Tensor:
        """Probabilities at T = 1, the temperature of all inference: [B, classes]; independent labels have their own."""
        logits = self(images)
        return logits.sigmoid() if self.multilabel else logits.softmax(-1)

    def encode(self, rows: Sequence[Mapping[str, Any]], *, allow_unknown: bool = False) -> Tensor:
        """Rows of a table by column name, as the student's data set had them -> its input [B, features].

        Values are numbers or texts; None, NaN and an empty text are missing. Raises DataError for a student of other
        data, for a row without one of the columns, for what is no number in a column of numbers, and for a category
        that no training row has; `allow_unknown` encodes the latter as none of the categories.
        """
        if self.encoding is None:
            raise DataError("this student was not trained on a table, so there are no columns to encode")
        return self.encoding.encode(rows, allow_unknown=allow_unknown)

    def _check_values(self, batch: Tensor) -> None:
        """DataError for values that the student was not trained on."""
        if batch.numel() == 0:
            return
        low, high = (float(value) for value in torch.aminmax(batch.detach()))
        found = f"values from {low:.6g} to {high:.6g}"
        if not batch.is_floating_point():
            if self.values == "floats" and batch.dtype != torch.uint8:
                raise DataError(
                    f"the input holds {_kind(batch)}, and this student was trained on floats{self._trained_range()}",
                    hint="convert them as the training data were converted",
                )
            if low < 0 or high > BYTES:
                raise DataError(f"the input holds {found}, and bytes go from 0 to 255", hint="floats go from 0 to 1")
            return
        if low != low or high != high or max(abs(low), abs(high)) == float("inf"):
            raise DataError("the input holds values that are infinite or not numbers")
        pixels = self.values == "bytes" or (self.range is not None and self.range[0] >= 0 and self.range[1] <= 1)
        if pixels and self.encoding is None and (low < -SLACK or high > 1 + SLACK):
            raise DataError(
                f"the input holds floats with {found}, and this student takes floats from 0 to 1, or bytes",
                hint="divide by 255 or pass uint8 for bytes; the student normalises its input itself",
            )

    def _trained_range(self) -> str:
        return "" if self.range is None else f" from {self.range[0]:.6g} to {self.range[1]:.6g}"


def with_preparation(network: nn.Module, data: Dataset, dtype: torch.dtype) -> Student:
    """A trained network on the CPU with the preparation of its input, as the data set's images are."""
    images = data.train.images
    return Student(
        network,
        mean=data.mean,
        std=data.std,
        classes=data.class_names,
        input_shape=data.shape,
        dtype=dtype,
        values="bytes" if images.dtype == torch.uint8 else "floats",
        range=value_range(images),
        multilabel=data.multilabel,
        encoding=data.encoding,
    ).eval()


def as_batch(images: Any, input_shape: tuple[int, ...]) -> Tensor:
    """Pictures, arrays or tensors, one or many, as one tensor [B, *input_shape]. DataError for other shapes."""
    if isinstance(images, (list, tuple)):  # torch.export of torch 2.6 does not know list | tuple
        if not images:
            raise DataError("there are no images in the input", hint="a list of pictures, arrays or tensors")
        return torch.cat([as_batch(image, input_shape) for image in images])
    found = images if isinstance(images, Tensor) else _as_tensor(images, input_shape)
    if found.dtype == torch.bool or found.is_complex():
        raise DataError(f"the input holds {_kind(found)}; it must hold bytes or floats")
    if found.shape[1:] == input_shape:
        return found
    if found.shape == input_shape:
        return found[None]
    raise DataError(
        f"the input has the shape {list(found.shape)}; this student takes [B, {', '.join(map(str, input_shape))}], "
        f"or one image {list(input_shape)}",
        hint="resize and arrange the images as those of its training",
    )


def _as_tensor(images: Any, input_shape: tuple[int, ...]) -> Tensor:
    """An array, or a picture of PIL, as a tensor with its channels before height and width."""
    import numpy as np

    if type(images).__module__.partition(".")[0] == "PIL":
        images = _pixels(images, input_shape)
    if not isinstance(images, np.ndarray):
        raise DataError(
            f"the input is a {type(images).__name__}; it must be a tensor, a NumPy array, a picture of PIL, or a list "
            "of these",
            hint="open a file with PIL.Image.open first" if isinstance(images, str) else None,
        )
    if images.dtype.kind not in "biuf":
        raise DataError(f"the input holds {images.dtype}; it must hold bytes or floats")
    if len(input_shape) == 3 and images.ndim >= 2 and images.shape[-3:] != input_shape:
        channels, height, width = input_shape
        if images.shape[-3:] == (height, width, channels):  # as pictures lie in NumPy
            images = np.moveaxis(images, -1, -3)
        elif channels == 1 and images.shape[-2:] == (height, width):
            images = np.expand_dims(images, -3)
    if images.dtype.kind == "u" and images.dtype.itemsize > 1:  # torch computes with few unsigned types
        images = images.astype(np.int64)
    return torch.from_numpy(np.array(images, dtype=images.dtype.newbyteorder("=")))


def _pixels(picture: Any, input_shape: tuple[int, ...]) -> Any:
    """A picture's bytes: turned by its EXIF tag, on white where it is transparent, in the student's colours."""
    import numpy as np
    from PIL import Image, ImageOps

    if len(input_shape) != 3 or input_shape[0] not in (1, 3):
        raise DataError(f"this student takes {list(input_shape)}, and a picture has 1 or 3 channels")
    picture = ImageOps.exif_transpose(picture)
    if picture.has_transparency_data:
        ground = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(ground, picture.convert("RGBA"))
    channels, height, width = input_shape
    if picture.size != (width, height):
        raise DataError(
            f"the picture is {picture.width}x{picture.height} pixels; this student takes {width}x{height}",
            hint=f"crop and resize it as its training data were: picture.resize(({width}, {height}))",
        )
    return np.asarray(picture.convert("L" if channels == 1 else "RGB"))


def _kind(images: Tensor) -> str:
    return str(images.dtype).removeprefix("torch.")
