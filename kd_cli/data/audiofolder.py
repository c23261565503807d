"""A user's own sounds as a data set: a folder of WAV or FLAC files per class, each file one example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kd_cli.data.audio import SOUNDS, Sound, check_mels, check_rate, is_sound, log_mel, read_sound
from kd_cli.data.folders import check_test_fraction, files_of, folder_of, source_of
from kd_cli.data.pictures import shown
from kd_cli.data.sentences import sentence
from kd_cli.data.source import Source
from kd_cli.data.tree import Kind, read_tree
from kd_cli.errors import ConfigError
from kd_cli.numeric import is_number

RECORDING = Kind("recording", frozenset(SOUNDS), is_sound, "libsndfile", "wav", ".wav or .flac")


@dataclass(frozen=True)
class SoundReading:
    """How recordings become spectrograms: samples a second, the seconds that are kept, Mel filters of a frame."""

    sample_rate: int
    seconds: float
    mels: int

    @property
    def length(self) -> int:
        """Samples of a recording."""
        return max(1, round(self.seconds * self.sample_rate))

    def sound(self, file: Path) -> Sound:
        """A file's waveform. Raises DataError, which names the file, if it cannot be read."""
        return read_sound(file, rate=self.sample_rate)

    def spectrogram(self, sound: Sound) -> Tensor:
        """A sound, cut or filled to the length with its middle kept, as log Mel frames: [1,frames,mels]."""
        over = len(sound.waveform) - self.length
        waveform = sound.waveform[max(0, over) // 2 :][: self.length]
        missing = self.length - len(waveform)
        waveform = torch.nn.functional.pad(waveform - waveform.mean(), (missing // 2, missing - missing // 2))
        return log_mel(waveform, rate=self.sample_rate, mels=self.mels)[None]


def audiofolder(
    *,
    data_dir: str | Path,
    root: str,
    sample_rate: int = 16000,
    seconds: float = 1.0,
    mels: int = 40,
    test_fraction: float = 0.2,
) -> Source:
    """Spectrograms [N,1,frames,mels] of sounds in a folder per class, under `root` or its parts train, test and val.

    Each file is mixed to one channel, resampled to `sample_rate` and cut or filled to `seconds`, its middle kept; a
    spectrogram is the logarithm of `mels` Mel filterbank energies every 10 ms. Parts and classes are found as
    `imagefolder` finds them. Raises ConfigError where the extra `audio` is missing, and DataError, which names the file
    that cannot be read.
    """
    check_rate(sample_rate)
    check_mels(mels, sample_rate)
    check_test_fraction(test_fraction)
    if not is_number(seconds) or not seconds > 0:
        raise ConfigError(f"seconds is {seconds!r}; it must be a number above 0")
    folder = folder_of(root, Path(data_dir).expanduser(), hint="give the folder that holds one folder per class")
    tree = read_tree(folder, RECORDING)
    files = files_of(tree)
    reading = SoundReading(sample_rate, seconds, mels)
    sounds = [reading.sound(file) for file in files]
    images = torch.stack([reading.spectrogram(sound) for sound in sounds])
    names = tuple(shown(file.relative_to(folder)) for file in files)
    said = [*tree.notes, *notes(sounds, reading.length, rate=sample_rate)]
    return source_of(folder, tree, images, names, test_fraction=test_fraction, said=said, noun="recording")


def notes(sounds: Sequence[Sound], length: int, *, rate: int) -> list[str]:
    """A sentence for each kind of change that was made to some recordings."""
    rates = sorted({sound.rate for sound in sounds if sound.rate != rate})
    found = (
        ("{n} {recordings} {is} resampled to {rate} samples a second, from {others}", [s.rate != rate for s in sounds]),
        ("{n} {recordings} {has} several channels, and their mean is used", [s.channels > 1 for s in sounds]),
        (
            "{n} {recordings} {is} longer than {seconds:g} s, and only the middle is used",
            [len(s.waveform) > length for s in sounds],
        ),
        (
            "{n} {recordings} {is} shorter than {seconds:g} s and {is} filled with silence on both sides",
            [len(s.waveform) < length for s in sounds],
        ),
    )
    words = {"rate": f"{rate:,}", "others": ", ".join(f"{own:,}" for own in rates), "seconds": length / rate}
    return [sentence(text, sum(which), **words) for text, which in found if any(which)]
