"""kd-predict says of a file what training's evaluation says of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from made_sound import tone, write_wav
from PIL import Image
from process import Ran

from kd_cli.commands import kd_predict
from kd_cli.commands.kd_predict import row_of
from kd_cli.errors import DataError
from kd_cli.export.predict import Prediction, Predictor, background_in, confusion, predictions

CLASSES = ("bird", "cat")


@pytest.fixture(autouse=True)
def own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command adds the current folder to the paths that are searched."""
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """JPEG files that are not square, a few for each class and part."""
    noise = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 9)):
        for name in CLASSES:
            folder = tmp_path / "pictures" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 255, (20 + i, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return tmp_path / "pictures"


def table_model(multilabel: bool = False) -> Predictor:
    """Logits are the numbers of a row."""
    return Predictor(lambda rows: rows, (2,), CLASSES, multilabel, "white")


@pytest.mark.slow
def test_predictions_are_those_of_the_evaluation(
    tiny: Callable[..., Ran], pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = tiny("dataset=imagefolder", f"dataset.root={pictures}", "dataset.image_size=8")
    capsys.readouterr()
    kd_predict.main([str(ran.run_dir), str(pictures / "test"), "--format", "json", "--batch", "4"])
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    errors = sum(row["class"] != Path(row["file"]).parent.name for row in rows)
    assert len(rows) == 18
    assert errors == ran.summary["student"]["test"]["errors"]
    assert f"{errors} of 18 are wrong" in said.err
    right = np.mean([row["top"][Path(row["file"]).parent.name] for row in rows])
    nll = -np.mean([np.log(row["top"][Path(row["file"]).parent.name]) for row in rows])
    assert nll == pytest.approx(ran.summary["student"]["test"]["nll"], abs=1e-4)
    assert 0 < right < 1


@pytest.mark.slow
def test_recordings_are_predicted_as_they_were_evaluated(
    tiny: Callable[..., Ran], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("soundfile")
    noise = np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        for name, pitch in (("low", 300), ("high", 1200)):
            for i in range(count):
                sound = tone(pitch + 40 * i, seconds=0.1 + 0.02 * i, rate=8000 if i % 2 else 16000)
                rate = 8000 if i % 2 else 16000
                write_wav(
                    tmp_path / "sounds" / part / name / f"{i}.wav",
                    sound + 0.2 * noise.standard_normal(len(sound)),
                    rate=rate,
                )
    reading = ["dataset.sample_rate=8000", "dataset.seconds=0.2", "dataset.mels=12"]
    ran = tiny("dataset=audiofolder", f"dataset.root={tmp_path / 'sounds'}", *reading)
    capsys.readouterr()
    kd_predict.main([str(ran.run_dir), str(tmp_path / "sounds" / "test"), "--format", "json", "--batch", "5"])
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    labels = [Path(row["file"]).parent.name for row in rows]
    test = ran.summary["student"]["test"]
    assert len(rows) == 12
    assert f"{test['errors']} of 12 are wrong" in said.err
    nll = -np.mean([np.log(row["top"][label]) for row, label in zip(rows, labels, strict=True)])
    assert nll == pytest.approx(test["nll"], abs=1e-4)


def test_rows_of_a_table_are_predicted_and_a_heading_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("length,width\n0,1\n2,0\n\n0.5,0.25\n")
    found = list(predictions(table_model(), [file], batch=2))
    assert [one.name.rpartition(":")[2] for one in found] == ["2", "3", "5"]
    expected = torch.tensor([[0.0, 1.0], [2.0, 0.0], [0.5, 0.25]]).softmax(-1)
    torch.testing.assert_close(torch.stack([one.probabilities for one in found]), expected)
    for text in ("1,2\n3\n", "1,2\n3,x\n", "1,2\n3,nan\n"):
        file.write_text(text)
        with pytest.raises(DataError, match="line 2"):
            list(predictions(table_model(), [file], batch=2))


def test_independent_labels_are_those_above_one_half() -> None:
    model = table_model(multilabel=True)
    probabilities = model.probabilities(torch.tensor([[1.0, 2.0], [-1.0, -2.0]]))
    rows = [row_of(Prediction("a", None, p), model, top=2) for p in probabilities]
    assert [row["class"] for row in rows] == ["bird;cat", ""]
    assert rows[0]["top"] == {"cat": pytest.approx(0.880797), "bird": pytest.approx(0.731059)}


def test_confusions_are_counted_where_every_example_has_a_label() -> None:
    yes, no = torch.tensor([0.9, 0.1]), torch.tensor([0.2, 0.8])
    found = [Prediction("a", 0, yes), Prediction("b", 0, no), Prediction("c", 1, no)]
    matrix = confusion(found, 2)
    assert matrix is not None
    assert matrix.tolist() == [[1, 1], [0, 1]]
    assert confusion([*found, Prediction("d", None, no)], 2) is None


@pytest.mark.parametrize(("name", "said"), [("a.wav", "none of the pictures"), ("none.png", "does not exist")])
def test_what_is_no_picture_is_refused(name: str, said: str, tmp_path: Path) -> None:
    if name == "a.wav":
        (tmp_path / name).write_bytes(b"RIFF")
    with pytest.raises(DataError, match=said):
        list(predictions(table_model(), [tmp_path / name], batch=2))


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(SystemExit, match="neither the directory of a run"):
        kd_predict.main([str(tmp_path / "weights.bin"), str(tmp_path)])


@pytest.mark.parametrize(
    ("metadata", "wanted"),
    [({}, "white"), ({"background": "black"}, "black"), ({"background": "[1, 2, 3]"}, [1, 2, 3])],
)
def test_the_background_of_a_file_is_a_name_or_numbers(metadata: dict[str, str], wanted: object) -> None:
    assert background_in(metadata) == wanted
