"""Sound: files read as waveforms of one sample rate, and the log Mel filterbank frames of a waveform."""

from __future__ import annotations

import functools
import importlib
import math
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from kd_cli.data.pictures import shown
from kd_cli.errors import ConfigError, DataError
from kd_cli.numeric import is_number, is_whole

SOUNDS = {".aif", ".aiff", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav"}  # what libsndfile reads
WINDOW = 0.025  # seconds of sound in a frame, and
HOP = 0.010  # from a frame's beginning to the next one's, as recognisers usually have them
SILENCE = 1e-10  # added to each filter's energy: digital silence is -23 then, and no infinity


@dataclass(frozen=True)
class Sound:
    """A recording: its mono waveform [samples], and what it was in its file."""

    waveform: Tensor
    rate: int  # samples a second in the file
    channels: int  # in the file


def import_audio(name: str) -> ModuleType:
    """Import a package of the extra `audio`. Raises ConfigError that names the extra where it is missing."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"reading sound needs {name.partition('.')[0]}, which is not installed", hint="pip install 'kd-cli[audio]'"
        ) from error
    except OSError as error:  # soundfile without its library
        raise ConfigError(
            f"{name.partition('.')[0]} is installed and cannot be loaded: {error}",
            hint="pip install --force-reinstall soundfile, whose wheels contain libsndfile",
        ) from error


def is_sound(file: Path) -> bool:
    """Whether the content of a file is sound that can be read, whatever its name."""
    soundfile = import_audio("soundfile")
    try:
        soundfile.info(file)
    except soundfile.LibsndfileError:
        return False
    return True


def read_sound(file: Path, *, rate: int) -> Sound:
    """A file as a mono waveform at `rate` samples a second: the mean of its channels, resampled by a polyphase filter.

    Raises DataError, which names the file, if it cannot be read or has no samples.
    """
    soundfile = import_audio("soundfile")
    try:
        samples, own = soundfile.read(file, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise DataError(
            f"{shown(file)} cannot be read as sound: {error}", hint="remove it, or convert it to WAV or FLAC"
        ) from error
    if not len(samples):
        raise DataError(f"{shown(file)} has no samples", hint="remove it")
    waveform = samples.mean(1)
    if own != rate:
        common = math.gcd(own, rate)
        resample = import_audio("scipy.signal").resample_poly
        waveform = resample(waveform.astype(np.float64), rate // common, own // common)
    if not np.isfinite(waveform).all():
        raise DataError(f"{shown(file)} holds samples that are infinite or not numbers", hint="remove it")
    return Sound(torch.from_numpy(waveform.astype(np.float32)), own, samples.shape[1])


def log_mel(waveform: Tensor, *, rate: int, mels: int) -> Tensor:
    """The logarithm of Mel filterbank energies of a waveform [samples]: [frames, mels].

    Frames of 25 ms under a Hamming window, every 10 ms, of the sound without its mean; a shorter sound is one frame,
    filled with zeros. Power spectrum, triangular filters (`mel_filters`), natural logarithm.
    """
    size, hop = round(WINDOW * rate), round(HOP * rate)
    waveform = waveform - waveform.mean()
    if len(waveform) < size:
        waveform = torch.nn.functional.pad(waveform, (0, size - len(waveform)))
    frames = waveform.unfold(0, size, hop) * torch.hamming_window(size, periodic=False)
    bins = 1 << (size - 1).bit_length()
    power = torch.fft.rfft(frames, bins).abs().square() / bins
    return (power @ mel_filters(rate=rate, bins=bins, mels=mels).T + SILENCE).log()


@functools.lru_cache(maxsize=4)
def mel_filters(*, rate: int, bins: int, mels: int) -> Tensor:
    """Triangles over the spectrum's frequencies, [mels, bins/2+1], whose corners lie evenly on the Mel scale.

    The Mel scale is 2595 log10(1 + f / 700), from 0 to half of the sample rate; a triangle's peak is 1.
    """
    top = 2595 * math.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (torch.linspace(0, top, mels + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = torch.linspace(0, rate / 2, bins // 2 + 1, dtype=torch.float64)
    below, centre, above = (corners[k : mels + k, None] for k in range(3))
    rising, falling = (frequencies - below) / (centre - below), (above - frequencies) / (above - centre)
    return torch.minimum(rising, falling).clamp(min=0).float()


def with_context(frames: Tensor, context: int) -> Tensor:
    """Frames [N,F] beside the `context` frames before and after each: [N, (2 context + 1) F]; ends are repeated."""
    offsets = torch.arange(-context, context + 1)
    index = (torch.arange(len(frames))[:, None] + offsets).clamp(0, len(frames) - 1)
    return frames[index].flatten(1)


def check_mels(mels: int, rate: int) -> None:
    """Raise ConfigError for a number of filters that the spectrum cannot fill."""
    if not is_whole(mels) or mels < 1:
        raise ConfigError(f"mels is {mels!r}; it must be a whole number, 1 or more")
    bins = 1 << (round(WINDOW * rate) - 1).bit_length()
    if not (mel_filters(rate=rate, bins=bins, mels=mels).sum(1) > 0).all():
        raise ConfigError(
            f"mels is {mels}, and at {rate} samples a second the lowest filters are narrower than the spectrum's steps",
            hint="fewer mels; 24 at 8,000 samples a second and 40 at 16,000 are usual",
        )


def check_rate(rate: int) -> None:
    """Raise ConfigError for a sample rate that is none."""
    if not is_number(rate) or not is_whole(rate) or rate < 1000:
        raise ConfigError(f"sample_rate is {rate!r}; it must be a whole number of samples a second, 1000 or more")
