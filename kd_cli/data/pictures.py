"""Picture files decoded into squares of one size: upright, opaque, 8 bits, in colour or grey."""

from __future__ import annotations

import enum
import io
import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import torch
from torch import Tensor

from kd_cli.cpus import usable
from kd_cli.data.reading_progress import ReadingProgress
from kd_cli.data.sentences import sentence
from kd_cli.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

# By a file's content, not its name. PIL knows many more; that of EPS starts Ghostscript, which runs programs.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "SGI", "TIFF", "WEBP")
LARGE = 512  # pixels on the shorter side; smaller pictures are decoded in full, in about a millisecond
GREY_MODES = ("1", "L", "I", "F")  # beginnings: LA and I;16 too
HEAD = 1 << 16  # bytes of a file in which a JPEG's sizes are looked for
JPEG_PLAIN = (0xE0, 0xEE, 0xDB, 0xC4, 0xDD, 0xFE)  # segments: JFIF, Adobe, tables, restarts, a comment
DARK = 4096  # of 65,536: 12-bit pictures in 16-bit files stay below


@dataclass(frozen=True)
class Reading:
    """How pictures are decoded: pixels per side, 3 channels or 1, and the colour under transparent pixels."""

    size: int
    channels: int
    background: tuple[int, int, int]


FACTS = np.uint16  # the type of an array of `Fact`s


class Fact(enum.IntFlag):
    """What was done to a picture, beside scaling it down."""

    TURNED = 1
    TRANSPARENT = 2
    SIXTEEN_BITS = 4
    DARK = 8
    CMYK = 16
    CROPPED = 32
    ENLARGED = 64
    FRAMES = 128
    GREY = 256
    SCALED = 512


SAID = {
    Fact.TURNED: "{n} {pictures} {is} turned as {its} EXIF orientation says",
    Fact.TRANSPARENT: "{n} {pictures} {is} transparent and {is} laid on the colour {background} (key background)",
    Fact.SIXTEEN_BITS: "{n} {pictures} {has} 16 bits per channel, scaled to 8 (65,535 becomes 255)",
    Fact.DARK: "{n} {pictures} of 16 bits {uses} less than a sixteenth of {its} range and {is} nearly black",
    Fact.CMYK: "{n} CMYK {pictures} {is} converted to RGB without {its} colour profile",
    Fact.CROPPED: "{n} {pictures} {is} not square, and only the square in the centre is used",
    Fact.ENLARGED: "{n} {pictures} {is} smaller than {size} pixels and {is} enlarged",
    Fact.FRAMES: "{n} {pictures} {has} several frames, and only the first is used",
    Fact.GREY: "{n} {pictures} {is} grey and {is} read as three equal channels (key channels)",
    Fact.SCALED: "{n} {pictures} {is} decoded at a half, a quarter or an eighth of {its} size, the least that is twice "
    "{size} pixels: faster, and not to the same bytes as the whole scaled down",
}


def notes(facts: np.ndarray, reading: Reading) -> list[str]:
    """A sentence for each kind of change that the facts [N] of some pictures name, with the number of pictures."""
    counts = {fact: int((facts & fact.value != 0).sum()) for fact in Fact}
    background = "#{:02x}{:02x}{:02x}".format(*reading.background)
    return [sentence(SAID[f], n, size=reading.size, background=background) for f, n in counts.items() if n]


def formats() -> list[str]:
    """The names of those of FORMATS that this Pillow can read."""
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def is_picture(file: Path) -> bool:
    """Whether the content of a file is one of FORMATS, whatever its name."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            Image.open(file, formats=formats()).close()
    except Image.DecompressionBombError:
        return True  # decoding refuses it by name
    except Exception:  # whatever a decoder makes of something that is no picture
        return False
    return True


def decode_all(files: Sequence[Path], reading: Reading) -> tuple[Tensor, np.ndarray]:
    """Decode pictures -> [N, channels, size, size] uint8, and for each the `Fact`s of what was done to it: [N].

    Raises DataError, which names the picture that cannot be read.
    """
    from PIL import Image

    images = torch.empty(len(files), reading.channels, reading.size, reading.size, dtype=torch.uint8)
    facts = np.zeros(len(files), dtype=FACTS)

    def decode_one(i: int) -> None:
        images[i], facts[i] = decode(files[i], reading)

    workers = min(8, usable())  # PIL decodes and scales without holding the interpreter
    progress = ReadingProgress("decoded", "pictures", len(files))
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool, progress:
        warnings.simplefilter("ignore", UserWarning)  # PIL's remarks on odd metadata
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        for _ in pool.map(decode_one, range(len(files))):
            progress.add(1)
    return images, facts


def decode(file: str | Path, reading: Reading) -> tuple[Tensor, int]:
    """One picture -> [channels, size, size] uint8, and what was done to it. Raises DataError that names the file."""
    try:
        with open(file, "rb") as opened:
            pixels, facts = _decoded(opened, reading)
    except Exception as error:  # a damaged file raises whatever its decoder likes
        raise DataError(
            f"the picture {shown(file)} cannot be used: {error or type(error).__name__}",
            hint="repair it or take it away",
        ) from error
    return pixels, int(facts)


def decode_content(content: bytes, name: str, reading: Reading) -> tuple[Tensor, int]:
    """The content of a picture's file, as `decode` does it. Raises DataError with the name."""
    try:
        pixels, facts = _decoded(io.BytesIO(content), reading)
    except Exception as error:  # damaged content raises whatever its decoder likes
        raise DataError(f"the picture {name} cannot be used: {error or type(error).__name__}") from error
    return pixels, int(facts)


def _decoded(file: BinaryIO, reading: Reading) -> tuple[Tensor, int]:
    """The picture in an open file, [channels, size, size], and what was done to it."""
    from PIL import Image, UnidentifiedImageError

    head = file.read(HEAD)
    if (size := small_jpeg(head)) is not None:
        try:
            picture = Image.frombytes("RGB", size, head + file.read(), "jpeg", "RGB", "")
        except (ValueError, OSError):  # damaged: the long way says how
            pass
        else:
            cropped, enlarged = size[0] != size[1], min(size) < reading.size
            facts = cropped * Fact.CROPPED.value + enlarged * Fact.ENLARGED.value
            return _fitted(picture, reading), facts
    file.seek(0)
    try:
        with Image.open(file, formats=formats()) as opened:
            pixels, found = _squared(opened, reading)
    except UnidentifiedImageError as error:  # PIL's words name the object that was opened
        raise ValueError("it is in none of the formats that can be read, or damaged") from error
    return pixels, int(found)


def small_jpeg(head: bytes) -> tuple[int, int] | None:
    """The width and height of a JPEG in colour that is below LARGE and says nothing of how it is to be shown.

    Opening it with all that it may say takes as long as decoding it. None for every other file, and where `head`, the
    beginning of the file, ends before the picture's data.
    """
    if head[:2] != b"\xff\xd8":
        return None
    at, size = 2, None
    while at + 10 <= len(head) and head[at] == 0xFF:
        marker, length = head[at + 1], int.from_bytes(head[at + 2 : at + 4], "big")
        if marker == 0xDA:  # the picture's data begin
            return size
        if marker in (0xC0, 0xC1, 0xC2):  # its frame: bits, height, width, components
            bits, components = head[at + 4], head[at + 9]
            size = int.from_bytes(head[at + 7 : at + 9], "big"), int.from_bytes(head[at + 5 : at + 7], "big")
            if bits != 8 or components != 3 or not 0 < min(size) < LARGE or max(size) > 2 * LARGE:
                return None
        elif marker not in JPEG_PLAIN:  # EXIF, several pictures, another coding
            return None
        at += 2 + length
    return None


def square_of(picture: Image.Image, reading: Reading) -> Tensor:
    """A picture of PIL -> [channels, size, size] uint8."""
    return _squared(picture, reading)[0]


def _squared(opened: Image.Image, reading: Reading) -> tuple[Tensor, Fact]:
    """The centre of a picture in the reading's size and channels, [channels, size, size], and what was done to it."""

    facts = Fact(0)
    if getattr(opened, "is_animated", False):  # only the classes of formats with frames have it
        facts |= Fact.FRAMES
    side = min(opened.size)
    if opened.size != (side, side):
        facts |= Fact.CROPPED
    if side < reading.size:
        facts |= Fact.ENLARGED
    if reading.channels == 3 and opened.mode.startswith(GREY_MODES):
        facts |= Fact.GREY
    if side >= LARGE:
        # A JPEG decoder scales by 1/2, 1/4 or 1/8 in a fraction of the time, to no less than twice the size.
        whole = opened.size
        opened.draft(opened.mode, (2 * reading.size, 2 * reading.size))
        if opened.size != whole:
            facts |= Fact.SCALED
    upright, turned = _upright(opened)
    eight_bits, depth = _eight_bits(upright, opened.format)
    opaque, transparent = _opaque(eight_bits, reading.background)
    facts |= turned | depth | transparent | (Fact.CMYK if opaque.mode == "CMYK" else Fact(0))
    return _fitted(opaque, reading), facts


def _fitted(opaque: Image.Image, reading: Reading) -> Tensor:
    """The centre of an upright picture in the reading's size and channels, [channels, size, size]."""
    from PIL import Image

    mode = "RGB" if reading.channels == 3 else "L"
    picture = opaque if opaque.mode == mode else opaque.convert(mode)
    width, height = picture.size
    if (width, height) != (reading.size, reading.size):
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        # The centre first and then the scale: the same picture, and a very long one needs no more memory.
        picture = picture.resize(
            (reading.size, reading.size), Image.Resampling.BILINEAR, box=(left, top, left + side, top + side)
        )
    pixels = torch.from_numpy(np.array(picture))
    return pixels.unsqueeze(0) if reading.channels == 1 else pixels.permute(2, 0, 1)


def shown(path: str | Path) -> str:
    """A path as text that can be printed and written: bytes that are no UTF-8 become U+FFFD."""
    return os.fsencode(path).decode("utf-8", "replace")


def _upright(picture: Image.Image) -> tuple[Image.Image, Fact]:
    """The picture turned as its EXIF orientation says; a damaged tag says nothing."""
    from PIL import ExifTags, ImageOps

    try:
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # whatever Pillow makes of damaged metadata
        orientation = 1
    if orientation not in range(2, 9):
        return picture, Fact(0)
    return ImageOps.exif_transpose(picture), Fact.TURNED


def _eight_bits(picture: Image.Image, kind: str | None) -> tuple[Image.Image, Fact]:
    """The picture with 8 bits per channel. Raises ValueError for floats and 32 bits, whose range is unknown."""
    from PIL import Image

    # Pillow opens PGM files of more than 8 bits as mode "I", and older versions do so with PNG files of 16 bits.
    if picture.mode.startswith("I;16") or (picture.mode == "I" and kind in ("PPM", "PNG")):
        values = np.asarray(picture).astype(np.uint32)
        facts = Fact.SIXTEEN_BITS | (Fact.DARK if values.max() < DARK else Fact(0))
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)), facts
    if picture.mode.startswith(("I", "F")):
        raise ValueError("it has more than 16 bits per channel, and its range is not known; convert it to 8 bits")
    return picture, Fact(0)


def _opaque(picture: Image.Image, background: tuple[int, int, int]) -> tuple[Image.Image, Fact]:
    """The picture laid on a ground of one colour, if any of its pixels is transparent."""
    from PIL import Image

    if not picture.has_transparency_data:
        return picture, Fact(0)
    with_alpha = picture.convert("LA" if picture.mode == "La" else picture.mode).convert("RGBA")
    if with_alpha.getchannel("A").getextrema()[0] == 255:
        return with_alpha, Fact(0)
    ground = Image.new("RGBA", with_alpha.size, (*background, 255))
    ground.alpha_composite(with_alpha)
    return ground, Fact.TRANSPARENT
