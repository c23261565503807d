"""The Free Spoken Digit Dataset as frames of speech, as an acoustic model is trained on them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kd_cli.data.audio import check_mels, log_mel, read_sound, with_context
from kd_cli.data.pictures import shown
from kd_cli.data.sentences import listed
from kd_cli.data.source import Source
from kd_cli.errors import ConfigError, DataError
from kd_cli.numeric import is_whole

RATE = 8000  # samples a second of every recording
TEST_INDEX = 5  # recordings 0 to 4 of each speaker and digit are the published test part
NAME = re.compile(r"(\d)_(\w+)_(\d+)\.wav")
FOLDERS = ("fsdd/recordings", "free-spoken-digit-dataset/recordings", "recordings")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


@dataclass(frozen=True)
class Recording:
    """A file of the data set: a digit, who spoke it, and for which time."""

    file: Path
    digit: int
    speaker: str
    index: int


def spoken_digits(
    *,
    data_dir: str | Path,
    mels: int = 24,
    context: int = 7,
    states: int = 3,
    split: str = "index",
    test_speakers: Sequence[str] = ("theo", "yweweler"),
) -> Source:
    """Frames of spoken digits [N, (2 context + 1) mels], log Mel filterbank energies; their classes are states.

    A frame's class is the digit and which of its `states` equal parts of the recording the frame lies in: a stand-in
    for the states that a recogniser's alignment would give. Frames have the name of their recording. `split="index"`
    tests, as published, on recordings 0 to 4 of each speaker and digit, and whole recordings validate;
    `split="speaker"` tests on `test_speakers`, and whole speakers validate. Raises ConfigError and DataError.
    """
    check_mels(mels, RATE)
    for key, value, least in (("context", context, 0), ("states", states, 1)):
        if not is_whole(value) or value < least:
            raise ConfigError(f"{key} is {value!r}; it must be a whole number, {least} or more")
    recordings = find_recordings(Path(data_dir).expanduser())
    tested = test_part(recordings, split, test_speakers)
    speakers = sorted({recording.speaker for recording in recordings})
    images, labels, names, groups, tests = [], [], [], [], []
    for number, recording in enumerate(recordings):
        sound = read_sound(recording.file, rate=RATE)
        frames = log_mel(sound.waveform, rate=RATE, mels=mels)
        images.append(with_context(frames, context))
        labels.append(recording.digit * states + equal_parts(len(frames), states))
        names += [shown(recording.file.name)] * len(frames)
        group = speakers.index(recording.speaker) if split == "speaker" else number
        groups.append(torch.full((len(frames),), group))
        tests.append(torch.full((len(frames),), recording in tested))
    test = torch.cat(tests)
    every, targets = torch.cat(images), torch.cat(labels)
    return Source(
        name="spoken_digits",
        train_images=every[~test],
        train_labels=targets[~test],
        test_images=every[test],
        test_labels=targets[test],
        class_names=tuple(f"{digit}{k + 1}" for digit in DIGITS for k in range(states)),
        groups=torch.cat(groups)[~test],
        train_names=tuple(name for name, held in zip(names, test.tolist(), strict=True) if not held),
        test_names=tuple(name for name, held in zip(names, test.tolist(), strict=True) if held),
        notes=[
            f"frame targets are an equal division of each recording into {states} states of its digit, a stand-in for "
            "a recogniser's alignment"
        ],
    )


def equal_parts(frames: int, states: int) -> Tensor:
    """Which of `states` equal parts each of a recording's frames lies in: [frames]."""
    return torch.arange(frames) * states // frames


def find_recordings(data_dir: Path) -> list[Recording]:
    """The recordings below `data_dir`, by name. Raises DataError where there are none, or digits are missing."""
    folder = next((data_dir / name for name in FOLDERS if (data_dir / name).is_dir()), None)
    if folder is None:
        raise DataError(
            f"there is no folder {data_dir / FOLDERS[0]} with the recordings of the Free Spoken Digit Dataset",
            hint="get the recordings from github.com/Jakobovski/free-spoken-digit-dataset into that folder; "
            "data_dir=DIR or KD_DATA names another data_dir",
        )
    found = [(file, NAME.fullmatch(file.name)) for file in sorted(folder.glob("*.wav"))]
    recordings = [Recording(file, int(name[1]), name[2], int(name[3])) for file, name in found if name]
    if missing := set(range(10)) - {recording.digit for recording in recordings}:
        raise DataError(
            f"{shown(folder)} has no recordings of {listed([DIGITS[digit] for digit in sorted(missing)])}",
            hint="files are called digit_speaker_index.wav, such as 7_jackson_32.wav",
        )
    return recordings


def test_part(recordings: Sequence[Recording], split: str, test_speakers: Sequence[str]) -> set[Recording]:
    """The recordings that test. Raises ConfigError for another split, or speakers that leave nobody to train on."""
    if split == "index":
        return {recording for recording in recordings if recording.index < TEST_INDEX}
    if split != "speaker":
        raise ConfigError(f"split is {split!r}; it must be index or speaker")
    speakers = sorted({recording.speaker for recording in recordings})
    chosen = [test_speakers] if isinstance(test_speakers, str) else list(test_speakers)
    if unknown := [name for name in chosen if name not in speakers]:
        raise ConfigError(f"test_speakers names {listed(unknown)}; the speakers are {listed(speakers)}")
    if not 0 < len(set(chosen)) < len(speakers):
        raise ConfigError(
            f"test_speakers has {len(set(chosen))} of {len(speakers)} speakers; there must be some to test on and some "
            "to train on"
        )
    return {recording for recording in recordings if recording.speaker in chosen}
