"""Sound: filterbank frames against known tones, files read and resampled, folders of sounds."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from made_sound import made_digits, tone, write_wav

from kd_cli.data.audio import check_mels, import_audio, log_mel, mel_filters, read_sound, with_context
from kd_cli.data.audiofolder import audiofolder
from kd_cli.data.prepare import prepare
from kd_cli.data.spoken_digits import equal_parts, spoken_digits
from kd_cli.errors import ConfigError, DataError


def test_the_filters_corners_lie_evenly_on_the_mel_scale() -> None:
    filters = mel_filters(rate=8000, bins=4096, mels=24)
    peaks = filters.argmax(1).double() * 8000 / 4096
    mel = 2595 * (1 + peaks / 700).log10()
    step = 2595 * math.log10(1 + 4000 / 700) / 25
    torch.testing.assert_close(mel, step * torch.arange(1, 25, dtype=torch.float64), atol=2.0, rtol=0)
    assert float(filters.max()) <= 1
    neighbours = filters[:-1] + filters[1:]
    assert float(neighbours.max()) <= 1 + 1e-6  # where one falls the next one rises


@pytest.mark.parametrize("k", [3, 12, 20])
def test_a_tone_has_its_energy_in_the_filter_around_it(k: int) -> None:
    top = 2595 * math.log10(1 + 4000 / 700)
    frequency = 700 * (10 ** (top * (k + 1) / 25 / 2595) - 1)
    frames = log_mel(torch.from_numpy(tone(frequency, seconds=0.5)).float(), rate=8000, mels=24)
    assert frames.shape == (48, 24)  # 25 ms every 10 ms of 500 ms
    assert frames.argmax(1).unique().tolist() == [k]


def test_twice_the_amplitude_is_log_4_in_every_filter() -> None:
    waveform = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    louder = log_mel(2 * waveform, rate=8000, mels=24) - log_mel(waveform, rate=8000, mels=24)
    torch.testing.assert_close(louder, torch.full_like(louder, math.log(4)), atol=1e-4, rtol=0)


def test_a_sound_shorter_than_a_frame_is_one_frame_and_silence_is_finite() -> None:
    frames = log_mel(torch.zeros(10), rate=8000, mels=24)
    assert frames.shape == (1, 24)
    assert frames.isfinite().all()


def test_context_repeats_the_ends() -> None:
    frames = torch.tensor([[0.0], [1.0], [2.0]])
    assert with_context(frames, 1).tolist() == [[0, 0, 1], [0, 1, 2], [1, 2, 2]]


@pytest.mark.parametrize(
    ("frames", "states", "parts"), [(6, 3, [0, 0, 1, 1, 2, 2]), (4, 3, [0, 0, 1, 2]), (2, 3, [0, 1])]
)
def test_a_recording_is_divided_equally(frames: int, states: int, parts: list[int]) -> None:
    assert equal_parts(frames, states).tolist() == parts


def test_filters_narrower_than_the_spectrum_are_refused() -> None:
    check_mels(24, 8000)
    with pytest.raises(ConfigError, match="narrower"):
        check_mels(200, 8000)


def test_without_the_extra_the_error_names_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "soundfile", None)  # as Python marks a module that cannot be imported
    with pytest.raises(ConfigError, match="soundfile, which is not installed") as caught:
        spoken_digits(data_dir=made_digits(tmp_path, indices=1))
    assert "kd-cli[audio]" in str(caught.value.hint)


def test_missing_recordings_are_named_with_the_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="fsdd/recordings"):
        spoken_digits(data_dir=tmp_path)


# ---------------------------------------------------------------- files


@pytest.fixture
def soundfile() -> object:
    pytest.importorskip("scipy")
    pytest.importorskip("soundfile")
    return import_audio("soundfile")


def test_a_file_of_another_rate_and_two_channels_is_the_same_tone(soundfile: object, tmp_path: Path) -> None:
    left = tone(440, seconds=0.5, rate=44100)
    file = write_wav(tmp_path / "a.wav", np.stack([left, np.zeros_like(left)], 1), rate=44100)
    sound = read_sound(file, rate=8000)
    assert (sound.rate, sound.channels) == (44100, 2)
    expected = torch.from_numpy(tone(440, seconds=0.5) / 2).float()
    assert len(sound.waveform) == len(expected)
    inside = slice(200, -200)  # the filter rings at the ends
    torch.testing.assert_close(sound.waveform[inside], expected[inside], atol=2e-3, rtol=0)


def test_the_published_split_tests_on_indices_0_to_4_and_validates_on_whole_recordings(
    soundfile: object, tmp_path: Path
) -> None:
    dataset = prepare(spoken_digits(data_dir=made_digits(tmp_path)), val_fraction=0.25)
    assert dataset.classes == 30
    assert dataset.shape == (15 * 24,)
    assert {name.split("_")[2] for name in dataset.test.names} == {f"{k}.wav" for k in range(5)}
    assert {name.split("_")[2] for name in dataset.train.names} == {"5.wav", "6.wav"}
    assert not set(dataset.train.names) & set(dataset.val.names)
    assert set(dataset.val.names)
    assert any("equal division" in note for note in dataset.notes)
    words = {name: int(label) // 3 for name, label in zip(dataset.test.names, dataset.test.labels, strict=True)}
    assert all(word == int(name[0]) for name, word in words.items())


def test_the_split_by_speaker_tests_and_validates_on_other_speakers(soundfile: object, tmp_path: Path) -> None:
    source = spoken_digits(data_dir=made_digits(tmp_path, indices=1), split="speaker", test_speakers=["ann"])
    dataset = prepare(source, val_fraction=0.3)
    speakers = [{name.split("_")[1] for name in part.names} for part in (dataset.train, dataset.val, dataset.test)]
    assert [len(some) for some in speakers] == [1, 1, 1]
    assert len(set.union(*speakers)) == 3
    assert speakers[2] == {"ann"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"split": "both"}, "split is 'both'"),
        ({"split": "speaker", "test_speakers": ["eve"]}, "test_speakers names eve"),
        ({"split": "speaker", "test_speakers": []}, "0 of 3 speakers"),
        ({"states": 0}, "states is 0"),
    ],
)
def test_a_wrong_key_is_refused(words: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        spoken_digits(data_dir=made_digits(tmp_path, indices=1), **words)  # type: ignore[arg-type]


def test_a_folder_of_sounds_is_read_by_class_and_its_changes_are_named(soundfile: object, tmp_path: Path) -> None:
    for k in range(5):
        write_wav(tmp_path / "sounds" / "low" / f"{k}.wav", tone(300, seconds=0.3, rate=16000), rate=16000)
        write_wav(tmp_path / "sounds" / "high" / f"{k}.wav", tone(2000, seconds=0.1), rate=8000)
    samples = tone(2000, seconds=0.2, rate=16000)
    soundfile.write(tmp_path / "sounds" / "high" / "5.flac", samples, 16000)  # type: ignore[attr-defined]
    source = audiofolder(data_dir=tmp_path, root="sounds", sample_rate=16000, seconds=0.2, mels=20)
    assert source.class_names == ("high", "low")
    assert source.train_images.shape[1:] == (1, 18, 20)
    text = "\n".join(source.notes)
    assert "5 recordings are resampled to 16,000 samples a second, from 8,000" in text
    assert "5 recordings are longer than 0.2 s" in text
    assert "5 recordings are shorter than 0.2 s" in text
    assert "no test part: 2 of its 11 recordings test" in text
    middle = source.train_images[:, 0, 9].argmax(1)
    assert set(middle[source.train_labels == 1].tolist()).isdisjoint(middle[source.train_labels == 0].tolist())


def test_a_file_that_is_no_sound_is_named(soundfile: object, tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_wav(tmp_path / "sounds" / name / "1.wav", tone(300))
    (tmp_path / "sounds" / "b" / "2.wav").write_text("not a sound")
    with pytest.raises(DataError, match=r"2\.wav cannot be read as sound"):
        audiofolder(data_dir=tmp_path, root="sounds", sample_rate=8000, mels=20)


def test_a_folder_of_text_says_what_recordings_end_in(soundfile: object, tmp_path: Path) -> None:
    write_wav(tmp_path / "sounds" / "a" / "1.wav", tone(300))
    (tmp_path / "sounds" / "b").mkdir()
    with pytest.raises(DataError, match="has no recordings") as caught:
        audiofolder(data_dir=tmp_path, root="sounds", sample_rate=8000, mels=20)
    assert ".flac" in str(caught.value.hint)
