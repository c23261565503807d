"""Teachers that are answers: files matched by key or by order, scikit-learn's classifiers, ONNX models."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from process import Ran
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from kd_cli.answers.base import LEAST, as_logits
from kd_cli.answers.from_file import FileAnswers, keys_of
from kd_cli.answers.from_onnx import OnnxAnswers
from kd_cli.answers.from_sklearn import SklearnAnswers
from kd_cli.data.digits import digits
from kd_cli.data.prepare import prepare
from kd_cli.data.source import Dataset, Source
from kd_cli.data.table import table
from kd_cli.errors import CheckpointError, ConfigError, DataError


@pytest.fixture(scope="module")
def data() -> Dataset:
    """Twenty training examples of two features, of which some validate, and five to test on; classes a, b and c."""
    own = torch.Generator().manual_seed(0)
    labels = torch.arange(25) % 3
    rows = torch.nn.functional.one_hot(labels, 3)[:, :2] + 0.1 * torch.randn(25, 2, generator=own)
    names = ("a", "b", "c")
    return prepare(Source("made", rows[:20], labels[:20], rows[20:], labels[20:], names), val_fraction=0.2)


def probabilities(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(1)


def write_csv(path: Path, heads: list[str], rows: list[list[Any]]) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([heads, *rows])
    return str(path)


def test_probabilities_are_logits_whose_softmax_they_are() -> None:
    p = probabilities(7)
    logits, notes = as_logits(p, kind="auto", multilabel=False, where="x")
    torch.testing.assert_close(logits.softmax(1), p.float())
    assert "taken for probabilities" in notes[0]
    logits, notes = as_logits(torch.tensor([[1.0, 0.0]]), kind="probabilities", multilabel=False, where="x")
    assert logits[0].tolist() == pytest.approx([0, float(np.log(LEAST))])
    assert notes == ["x: 1 of 2 probabilities are below 1e-06 and count as 1e-06"]
    several = torch.tensor([[0.9, 0.8, 0.1]])
    torch.testing.assert_close(as_logits(several, kind="auto", multilabel=True, where="x")[0].sigmoid(), several)


def test_logits_are_taken_as_they_are() -> None:
    values = 5 * torch.randn(7, 3, dtype=torch.float64)
    logits, notes = as_logits(values, kind="auto", multilabel=False, where="x")
    assert torch.equal(logits, values.float())
    assert "taken for logits" in notes[0]


@pytest.mark.parametrize(
    ("values", "kind", "said"),
    [
        ([[0.9, 0.9], [0.5, 0.5]], "auto", "those to example 0 sum to 1.8"),
        ([[0.5, 0.5], [float("nan"), 0.0]], "auto", "the answers to example 1 hold values that are infinite"),
        ([[2.0, -1.0]], "probabilities", "teacher.kind is probabilities, and from -1 to 2"),
        ([[0.2, 0.2]], "probabilities", "those to example 0 do not sum to 1"),
    ],
)
def test_values_that_are_neither_are_refused(values: list[list[float]], kind: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        as_logits(torch.tensor(values), kind=kind, multilabel=False, where="x")


@pytest.mark.parametrize("ending", ["npy", "safetensors", "csv"])
def test_answers_by_order_are_those_of_the_published_training_part(data: Dataset, tmp_path: Path, ending: str) -> None:
    p, path = probabilities(20), tmp_path / f"soft.{ending}"
    if ending == "npy":
        np.save(path, p.numpy())
    elif ending == "safetensors":
        save_file({"train": p, "test": probabilities(5, seed=1)}, path)
    else:
        write_csv(path, ["c", "a", "b"], [[repr(float(row[k])) for k in (2, 0, 1)] for row in p])
    given = FileAnswers(answers=str(path)).answer(data)
    torch.testing.assert_close(given.train.softmax(1), p[data.train.rows].float())
    assert len(data.train) < 20
    notes = " ".join(given.notes)
    assert f"training examples, matched by order; example {keys_of(data.train)[0]}, labelled " in notes
    if ending == "safetensors":
        torch.testing.assert_close(given.test.softmax(1), probabilities(5, seed=1).float())
    else:
        assert given.test is None
        assert "no answers to the test examples" in notes
        np.save(tmp_path / "test.npy", probabilities(5, seed=1).numpy())
        tested = FileAnswers(answers=str(path), test_answers=str(tmp_path / "test.npy")).answer(data)
        torch.testing.assert_close(tested.test.softmax(1), probabilities(5, seed=1).float())


def test_answers_by_key_may_come_in_any_order(data: Dataset, tmp_path: Path) -> None:
    p = probabilities(20)
    rows = [[i, *map(float, p[i])] for i in torch.randperm(20, generator=torch.Generator().manual_seed(3)).tolist()]
    path = write_csv(tmp_path / "soft.csv", ["key", "a", "b", "c"], rows)
    given = FileAnswers(answers=path).answer(data)
    torch.testing.assert_close(given.train.softmax(1), p[data.train.rows].float())
    assert any("rows of soft.csv are of no training or test example" in note for note in given.notes)
    lacking = write_csv(tmp_path / "few.csv", ["key", "a", "b", "c"], rows[:15])
    with pytest.raises(DataError, match=r"has no answers to \d of \d+ training examples"):
        FileAnswers(answers=lacking).answer(data)
    twice = write_csv(tmp_path / "twice.csv", ["key", "a", "b", "c"], [*rows, rows[0]])
    with pytest.raises(DataError, match="more than once"):
        FileAnswers(answers=twice).answer(data)


def test_a_tables_answers_cover_its_parts_by_row_and_by_key(tmp_path: Path) -> None:
    rows = [[f"p{i}", i % 5, "" if i == 3 else "ab"[i % 2]] for i in range(40)]
    file = write_csv(tmp_path / "t.csv", ["id", "x", "class"], rows)
    data = prepare(table(data_dir=tmp_path, file=file, target="class", key="id"), val_fraction=0.1)
    right = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)[torch.arange(40) % 2]
    np.save(tmp_path / "soft.npy", right.numpy())
    shuffled = [[row[0], *map(float, right[i])] for i, row in enumerate(rows)][::-1]
    keyed = write_csv(tmp_path / "soft.csv", ["key", "a", "b"], shuffled)
    for answers in (str(tmp_path / "soft.npy"), keyed):
        given = FileAnswers(answers=answers).answer(data)
        assert torch.equal(given.train.argmax(1), data.train.labels)
        assert torch.equal(given.test.argmax(1), data.test.labels)
    assert keys_of(data.train)[:3] == tuple(f"p{i}" for i in data.train.rows[:3].tolist())
    np.save(tmp_path / "short.npy", right[:39].numpy())
    with pytest.raises(DataError, match=r"short.npy has 39 rows, and t has 40 rows"):
        FileAnswers(answers=str(tmp_path / "short.npy")).answer(data)


def test_answers_in_the_wrong_order_are_said_to_be_near_chance(data: Dataset, tmp_path: Path) -> None:
    labels = torch.arange(20) % 3
    right = torch.full((20, 3), 0.1, dtype=torch.float64)
    right[torch.arange(20), labels] = 0.8
    np.save(tmp_path / "right.npy", right.numpy())
    notes = FileAnswers(answers=str(tmp_path / "right.npy")).answer(data).notes
    assert f"agree with the labels of {len(data.train)} of {len(data.train)} training examples" in " ".join(notes)
    np.save(tmp_path / "turned.npy", right.roll(1, 1).numpy())
    notes = FileAnswers(answers=str(tmp_path / "turned.npy")).answer(data).notes
    assert "teacher.answers are near chance" in notes[-1]


def test_files_of_other_things_are_refused(data: Dataset, tmp_path: Path) -> None:
    def refused(write: Callable[[Path], Any], name: str, said: str) -> None:
        write(tmp_path / name)
        with pytest.raises((DataError, ConfigError), match=said):
            FileAnswers(answers=str(tmp_path / name)).answer(data)

    refused(lambda path: np.save(path, np.zeros((20, 4))), "wide.npy", "answers for 4 classes, and the data have 3")
    refused(lambda path: np.save(path, np.zeros(20)), "flat.npy", "it must hold floats")
    refused(lambda path: np.save(path, np.zeros(20, dtype=int)), "labels.npy", "holds int64; it must hold floats")
    refused(lambda path: np.save(path, np.array([{}]), allow_pickle=True), "object.npy", "cannot be read")
    refused(lambda path: np.save(path, probabilities(19).numpy()), "short.npy", "19 rows, and made has 20 training")
    refused(lambda path: path.write_bytes(b"x"), "bad.safetensors", "cannot be read")
    refused(lambda path: save_file({"x": torch.ones(1), "y": torch.ones(1)}, path), "two.safetensors", "called x, y")
    refused(lambda path: path.write_text("a,b,d\n1,0,0\n"), "d.csv", "a column 'd', which is no class")
    refused(lambda path: path.write_text("a,b\n1,0\n"), "ab.csv", "no column for the class 'c'")
    refused(lambda path: path.write_text("a,b,c\n1,0,x\n"), "x.csv", "line 2: column 'c' has 'x', no number")
    refused(lambda path: path.write_text(""), "soft.json", "it must be a file of")
    with pytest.raises(ConfigError, match="there is no such file"):
        FileAnswers(answers="none.csv")
    with pytest.raises(ConfigError, match=r"teacher\.kind is 'logit'"):
        FileAnswers(answers="none.csv", kind="logit")


def test_a_classifier_of_sklearn_answers_as_when_it_is_fitted_by_hand(data: Dataset) -> None:
    teacher = SklearnAnswers(estimator="LogisticRegression", options={"C": 0.5})
    given = teacher.answer(data, seed=0, normalize="data")

    def features(images: Tensor) -> Any:
        return ((images - torch.tensor(data.mean)) / torch.tensor(data.std)).numpy()

    own = LogisticRegression(C=0.5).fit(features(data.train.images), data.train.labels.numpy())
    expected = own.predict_proba(features(data.test.images))
    np.testing.assert_allclose(given.test.softmax(1).numpy(), expected, atol=1e-5)
    assert ("C", "0.5") in teacher.facts()["parameters"]


def test_a_class_without_training_examples_has_no_probability(data: Dataset) -> None:
    rows = Source(
        "made", torch.randn(20, 2), torch.arange(20) % 2 * 2, torch.randn(3, 2), torch.arange(3), ("a", "b", "c")
    )
    given = SklearnAnswers(estimator="GaussianNB").answer(prepare(rows, val_fraction=0), seed=0, normalize="data")
    assert given.train.softmax(1)[:, 1].tolist() == pytest.approx([LEAST] * 20, rel=1e-4)


def test_a_random_classifier_takes_the_teachers_seed(data: Dataset) -> None:
    def train(seed: int) -> Tensor:
        options = {"n_estimators": 5}
        return (
            SklearnAnswers(estimator="RandomForestClassifier", options=options)
            .answer(data, seed=seed, normalize="data")
            .train
        )

    assert torch.equal(train(1), train(1))
    assert not torch.equal(train(1), train(2))


@pytest.mark.parametrize(
    ("estimator", "options", "said"),
    [
        ("RandomForest", {}, "which is no classifier of scikit-learn"),
        ("LinearSVC", {}, "LinearSVC, which has no predict_proba"),
        ("LogisticRegression", {"c": 1}, "do not suit LogisticRegression"),
        ("no_such_package.Classifier", {}, "there is no module no_such_package"),
        ("sklearn.linear_model.Logistic", {}, "has no class Logistic"),
        ("os.system", {"command": "true"}, "has no class system"),
    ],
)
def test_what_is_no_classifier_is_refused(estimator: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SklearnAnswers(estimator=estimator, options=options)


def onnx_file(path: Path, weight: Tensor, *, batch: int | str = "batch", softmax: bool = False) -> str:
    """A linear model [F,C] in a .onnx file."""
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    features, classes = weight.shape
    given = onnx.numpy_helper.from_array(weight.float().numpy(), "weight")
    nodes = [helper.make_node("MatMul", ["images", "weight"], ["logits"])]
    nodes += [helper.make_node("Softmax", ["logits"], ["shares"], axis=1)] * softmax
    ends = [helper.make_tensor_value_info(name, kind, [batch, classes]) for name in ["logits", "shares"][: 1 + softmax]]
    start = helper.make_tensor_value_info("images", kind, [batch, features])
    graph = helper.make_graph(nodes, "linear", [start], ends, [given])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return str(path)


def test_an_onnx_model_answers_for_normalised_images(data: Dataset, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    weight = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))
    normalised = (data.test.images - torch.tensor(data.mean)) / torch.tensor(data.std)
    for batch in ("batch", 1, 4):
        teacher = OnnxAnswers(checkpoint=onnx_file(tmp_path / "m.onnx", weight, batch=batch))
        teacher.check(data)
        given = teacher.answer(data, seed=0, normalize="data")
        torch.testing.assert_close(given.test, normalised @ weight)
    given = teacher.answer(data, seed=0, normalize="none")
    torch.testing.assert_close(given.test, data.test.images @ weight)
    both = OnnxAnswers(checkpoint=onnx_file(tmp_path / "s.onnx", weight, softmax=True), output="shares")
    torch.testing.assert_close(both.answer(data, seed=0, normalize="data").test, (normalised @ weight).log_softmax(1))
    with pytest.raises(CheckpointError, match="does not take the data of made"):
        OnnxAnswers(checkpoint=onnx_file(tmp_path / "w.onnx", torch.randn(5, 3))).check(data)
    with pytest.raises(CheckpointError, match=r"gives \[2, 4\] as logits for 2 examples of 3 classes"):
        OnnxAnswers(checkpoint=onnx_file(tmp_path / "c.onnx", torch.randn(2, 4))).check(data)
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(CheckpointError, match="cannot be read as ONNX"):
        OnnxAnswers(checkpoint=str(tmp_path / "bad.onnx"))
    with pytest.raises(ConfigError, match=r"teacher\.output is 'x', and m\.onnx gives logits"):
        OnnxAnswers(checkpoint=str(tmp_path / "m.onnx"), output="x")


def test_students_learn_from_a_file_as_from_the_network_that_wrote_it(
    kd_run: Callable[..., Ran], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    ran = kd_run(*TINY)
    outputs = load_file(Path(os.environ["KD_STORE"]) / ran.summary["teacher"]["fingerprint"] / "outputs.safetensors")
    data = prepare(digits(data_dir=tmp_path), val_fraction=0.16666667)
    rows = [[key, *row] for key, row in zip(keys_of(data.train), outputs["train"].tolist(), strict=True)]
    write_csv(tmp_path / "soft.csv", ["key", *data.class_names], rows)
    own = [word for word in TINY if not word.startswith("teacher")]
    taught = kd_run("teacher=file", f"teacher.answers={tmp_path}/soft.csv", *own)
    assert taught.code == 0, taught.err
    assert taught.summary["student"]["test"]["errors"] == ran.summary["student"]["test"]["errors"]
    assert (taught.run_dir / "student.safetensors").read_bytes() == (ran.run_dir / "student.safetensors").read_bytes()
    assert taught.summary["teacher"]["test"] is None
    assert taught.summary["gap_closed"] is None
    assert "matched by key; example" in " ".join(taught.summary["notes"])
    assert "the teacher's own are not known" in taught.out
    assert (taught.run_dir / "report.html").is_file()
    for argument, said in (
        ("training.jitter=1", "students' are augmented (training.jitter=1)"),
        ("method=hints", "method=hints reads the teacher's features, and teacher=file has answers only"),
        ("transfer.data=kmnist", "teacher=file answers for the training data, and transfer.data is given"),
    ):
        refused = kd_run("teacher=file", f"teacher.answers={tmp_path}/soft.csv", *own, argument)
        assert refused.code == 1
        assert said in refused.err
