"""Small JPEGs are decoded without all that opening them costs, to the same pixels and facts."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kd_cli.data import pictures
from kd_cli.data.pictures import Reading, decode_content, small_jpeg
from kd_cli.errors import DataError

RANDOM = np.random.default_rng(0)
COLOURS = Image.fromarray(RANDOM.integers(0, 256, (40, 30, 3), dtype=np.uint8))
TURNED = Image.Exif()
TURNED[274] = 6


def jpeg(picture: Image.Image = COLOURS, **keys: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", **keys)
    return file.getvalue()


QUICK = {
    "plain": jpeg(),
    "square": jpeg(COLOURS.crop((0, 0, 30, 30))),
    "enlarged": jpeg(COLOURS.crop((0, 0, 9, 11))),
    "progressive": jpeg(progressive=True),
    "without subsampling": jpeg(subsampling=0, quality=95),
    "a comment": jpeg(comment=b"made for a test"),
    "restarts": jpeg(restart_marker_blocks=1),
    "RGB": jpeg(keep_rgb=True),
}
OPENED = {
    "grey": jpeg(COLOURS.convert("L")),
    "CMYK": jpeg(COLOURS.convert("CMYK")),
    "turned": jpeg(exif=TURNED),
    "a profile": jpeg(icc_profile=b"none"),
    "large": jpeg(COLOURS.resize((700, 800))),
    "PNG": b"\x89PNG",
    "nothing": b"",
}


@pytest.mark.parametrize("kind", QUICK)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_small_jpeg_is_the_same_picture_as_when_it_is_opened(kind, channels, monkeypatch):
    reading = Reading(16, channels, (255, 255, 255))
    assert small_jpeg(QUICK[kind]) == Image.open(io.BytesIO(QUICK[kind])).size
    pixels, facts = decode_content(QUICK[kind], kind, reading)
    monkeypatch.setattr(pictures, "small_jpeg", lambda head: None)
    opened, found = decode_content(QUICK[kind], kind, reading)
    assert torch.equal(pixels, opened)
    assert facts == found


@pytest.mark.parametrize("kind", OPENED)
def test_what_says_more_or_is_another_picture_is_opened(kind):
    assert small_jpeg(OPENED[kind]) is None


@pytest.mark.parametrize("end", [2, 5, 12, 200, 620, -40])
def test_a_damaged_small_jpeg_is_refused_in_the_words_of_one_that_is_opened(end, monkeypatch):
    reading, content = Reading(16, 3, (255, 255, 255)), QUICK["plain"][:end]
    with pytest.raises(DataError) as quick:
        decode_content(content, "a.jpg", reading)
    monkeypatch.setattr(pictures, "small_jpeg", lambda head: None)
    with pytest.raises(DataError) as opened:
        decode_content(content, "a.jpg", reading)
    assert str(quick.value).split(" at 0x")[0] == str(opened.value).split(" at 0x")[0]
