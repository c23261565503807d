"""Pictures decoded into tensors of one size."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd_cli.errors import DataError

# By a file's content, not its name. PIL knows many more; that of EPS starts Ghostscript, which runs programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")


def decode_all(pictures: dict[str, list[Path]], size: int, channels: int) -> tuple[Tensor, Tensor]:
    """Decode all pictures -> [N, channels, size, size] uint8 and their labels [N], class by class."""
    from PIL import Image

    files = [file for found in pictures.values() for file in found]
    counts = torch.tensor([len(found) for found in pictures.values()])
    images = torch.empty(len(files), channels, size, size, dtype=torch.uint8)

    def decode(i: int) -> None:
        images[i] = _decode(files[i], size, channels)

    workers = min(8, os.cpu_count() or 1)  # PIL decodes and scales without holding the interpreter
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("ignore", UserWarning)  # PIL's remarks on odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for _ in pool.map(decode, range(len(files))):
            pass
    return images, torch.repeat_interleave(torch.arange(len(pictures)), counts)


def _decode(file: Path, size: int, channels: int) -> Tensor:
    """One picture -> [channels, size, size]. Raises DataError that names the file."""
    from PIL import Image

    try:
        with Image.open(file, formats=FORMATS) as opened:
            if opened.mode.startswith(("I", "F")):
                raise ValueError("it has more than 8 bits per channel, which a conversion would cut off")
            picture = opened.convert("RGB" if channels == 3 else "L")
        width, height = picture.size
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        # the centre first and then the scale: the same picture, and a very long one needs no more memory
        square = picture.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side))
    except Exception as error:  # a damaged file raises whatever its decoder likes
        raise DataError(
            f"the picture {file} cannot be used: {error or type(error).__name__}", hint="repair it or take it away"
        ) from error
    pixels = torch.from_numpy(np.array(square))
    return pixels.unsqueeze(0) if channels == 1 else pixels.permute(2, 0, 1)
