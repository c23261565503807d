"""Small recordings: tones whose pitch tells the digit, in files as the Free Spoken Digit Dataset has them."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np


def write_wav(file: Path, waveform: np.ndarray, *, rate: int = 8000) -> Path:
    """A waveform [samples] or [samples, channels] from -1 to 1 as a WAV file of 16 bits."""
    file.parent.mkdir(parents=True, exist_ok=True)
    samples = np.round(waveform * 32767).astype("<i2")
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1 if samples.ndim == 1 else samples.shape[1])
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(samples.tobytes())
    return file


def tone(frequency: float, *, seconds: float = 0.12, rate: int = 8000) -> np.ndarray:
    """A sine of half the range: [samples]."""
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def made_digits(folder: Path, *, speakers: tuple[str, ...] = ("ann", "bob", "cy"), indices: int = 7) -> Path:
    """The data directory of made recordings, `indices` of each digit by each speaker: each rises from a pitch."""
    random = np.random.default_rng(0)
    for digit in range(10):
        for s, speaker in enumerate(speakers):
            for index in range(indices):
                base = 300 + 250 * digit + 40 * s
                parts = [tone(base + 80 * k, seconds=0.05) for k in range(3)]
                noisy = np.concatenate(parts) + 0.02 * random.standard_normal(1200)
                write_wav(folder / "fsdd" / "recordings" / f"{digit}_{speaker}_{index}.wav", noisy)
    return folder
