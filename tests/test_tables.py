"""`dataset=table`: columns, missing values, classes and parts read from files, encoded as the training part says."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from process import Ran
from sklearn.datasets import load_wine

from kd_cli import load_student
from kd_cli.data.columns import Column, Encoding, fit_encoding
from kd_cli.data.prepare import prepare, unlabelled
from kd_cli.data.source import Source
from kd_cli.data.table import table
from kd_cli.errors import ConfigError, DataError
from kd_cli.export.run_data import dataset_of
from kd_cli.export.ship import metadata_of

NAN = float("nan")


def write(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n")
    return path


def read(path: Path, **keys: Any) -> Source:
    return table(data_dir=path.parent, file=str(path), **{"target": "class", **keys})


@pytest.fixture
def people(tmp_path: Path) -> Path:
    """Eight rows with numbers, categories, missing values and their parts."""
    rows = [
        *("1,10,red,a,train", "2,20,blue,b,train", "3,,red,a,train", "6,30,,b,train"),
        *("1,10,red,a,valid", "100,40,green,b,valid", "2,?,blue,a,Test", ",20,red,b,Test"),
    ]
    return write(tmp_path / "people.csv", "age,size,colour,class,part", *rows)


def test_the_encoding_is_that_of_the_training_part(people: Path) -> None:
    data = prepare(read(people, split="part"), val_fraction=0.1)
    age = (torch.tensor([1.0, 2.0, 3.0, 6.0]) - 3) / 3.5**0.5
    size = torch.tensor([-1.0, 0.0, 0.0, 1.0]) * 1.5**0.5
    #        age     size  size missing  blue  red  colour missing
    expected = [
        [age[0], size[0], 0, 0, 1, 0],
        [age[1], size[1], 0, 1, 0, 0],
        [age[2], 0, 1, 0, 1, 0],
        [age[3], size[3], 0, 0, 0, 1],
    ]
    torch.testing.assert_close(data.train.images, torch.tensor(expected), rtol=1e-6, atol=1e-6)
    assert data.train.labels.tolist() == [0, 1, 0, 1]
    assert data.val.images[1].tolist() == pytest.approx([97 / 3.5**0.5, 2 * 1.5**0.5, 0, 0, 0, 0], rel=1e-6)
    assert data.test.images[1].tolist() == pytest.approx([0, 0, 0, 0, 1, 0])
    assert data.mean == (0.0,) * 6
    assert data.std == (1.0,) * 6
    notes = " ".join(data.notes)
    assert "1 validation row has a category of colour that no training row has: encoded as none of them" in notes
    assert "1 test row has no value of age, which no training row lacks: encoded as the training mean" in notes
    assert "1 column is categorical: colour" in notes


def test_rows_by_name_are_encoded_as_the_file_was(people: Path) -> None:
    data = prepare(read(people, split="part"), val_fraction=0.1)
    with people.open() as file:
        rows = list(csv.DictReader(file))
    encoding = Encoding.from_record(json.loads(json.dumps(data.encoding.record())))
    assert torch.equal(encoding.encode(rows[:4]), data.train.images)
    assert torch.equal(encoding.encode(rows[4:6], allow_unknown=True), data.val.images)
    typed = [{"age": 6, "size": NAN, "colour": None}, {"age": 6.0, "size": 30, "colour": "red"}]
    encoded = encoding.encode(typed).tolist()
    assert encoded[0] == pytest.approx([3 / 3.5**0.5, 0, 1, 0, 0, 1])
    assert encoded[1] == pytest.approx([3 / 3.5**0.5, 1.5**0.5, 0, 0, 1, 0])
    for row, said in (
        ({"age": 1, "colour": "red"}, "row 0 has no column 'size'"),
        ({"age": "old", "size": 1, "colour": "red"}, "column 'age': 'old' is no finite number"),
        ({"age": 1, "size": 1, "colour": "gren"}, "no training row has 'gren'; they have blue, red"),
    ):
        with pytest.raises(DataError, match=said):
            encoding.encode([row])
    with pytest.raises(DataError, match="must be a list of mappings"):
        encoding.encode({"age": 1})  # type: ignore[arg-type]


def test_standardised_features_have_mean_0_and_deviation_1_also_far_from_0() -> None:
    rows = 1e9 + torch.arange(100, dtype=torch.float64)[:, None]
    encoding, notes = fit_encoding([Column("time")], rows)
    features, unseen = encoding.encode_read(rows, [Column("time")])
    assert features.mean().item() == pytest.approx(0, abs=1e-6)
    assert features.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert not notes
    assert not unseen


def test_columns_that_are_constant_in_the_training_part_are_left_out() -> None:
    rows = torch.tensor([[1.0, 5.0, 0.0, NAN], [2.0, 5.0, 0.0, NAN]], dtype=torch.float64)
    columns = [Column("a"), Column("b"), Column("c", ("x", "y")), Column("d")]
    encoding, notes = fit_encoding(columns, rows)
    assert [column.name for column in encoding.columns] == ["a"]
    assert notes == ["3 columns have the same value in every training row and are left out: b, c, d"]
    with pytest.raises(DataError, match="nothing to learn from"):
        fit_encoding(columns[1:2], rows[:, 1:2])


def test_classes_that_are_numbers_keep_their_order_and_rows_without_a_class_are_left_out(tmp_path: Path) -> None:
    source = read(
        write(tmp_path / "t.csv", "x,class", *(f"{i},{c}" for i, c in enumerate([10, 9, "", 10, 9, "NA"] * 4)))
    )
    assert source.class_names == ("9", "10")
    assert len(source.train_labels) + len(source.test_labels) == 16
    assert "8 rows of t.csv are left out, where class is missing ('NA', nothing)" in source.notes


def test_parts_are_drawn_class_by_class_where_no_column_names_them(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "x,class", *(f"{i},{'ab'[i % 4 == 0]}" for i in range(100)), "7,rare")
    source = read(path, test_fraction=0.2)
    assert source.test_labels.bincount(minlength=3).tolist() == [15, 5, 0]
    assert source.train_labels.bincount().tolist() == [60, 20, 1]
    notes = prepare(source, val_fraction=0.1).notes
    assert "t.csv has no test part: 20 of its 101 rows test, the same share of each class" in notes
    assert "no test examples: class rare" in notes


def test_free_text_is_left_out_unless_it_is_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", "x;name;class", *(f"{i};person {i};{'ab'[i % 2]}" for i in range(30)))
    source = read(path)
    assert [column.name for column in source.columns] == ["x"]
    assert any("1 column of free text is left out: name (30 texts in 30 rows)" in note for note in source.notes)
    assert "the columns of t.csv are separated by ';'" in source.notes
    assert [column.name for column in read(path, categorical=["name"]).columns] == ["x", "name"]


def test_keys_choose_columns_and_missing_values(tmp_path: Path) -> None:
    rows = (f"{i},{(-999, 2.5)[i % 2]},{80000 + i % 3},{i},{'ab'[i % 2]}" for i in range(20))
    path = write(tmp_path / "t.csv", ",size,postcode,number,class", *rows)
    source = read(path, categorical=["postcode"], ignore=["number"], missing=[-999])
    assert source.columns == (Column("size"), Column("postcode", ("80000", "80001", "80002")))
    assert "10 values are missing by dataset.missing" in source.notes
    assert any("has no name and is left out" in note for note in source.notes)


BAD = {
    "empty": (("",), {}, "t.csv is empty, or its first line is"),
    "no rows": (("x,class",), {}, "column names and no rows"),
    "duplicated header": (("x,x,class", "1,2,a"), {}, "several columns called 'x'"),
    "no header": (("1,2,3", "4,5,6"), {"target": "3"}, "first line of t.csv holds numbers: 1, 2, 3"),
    "ragged": (("x,class", "1,a", "1,2,b"), {}, "line 3: 3 values for 2 columns"),
    "no target": (("x,klass", "1,a", "2,b"), {}, "dataset.target is 'class', and the table has no such column"),
    "one class": (("x,class", "1,a", "2,a"), {}, "one class only, 'a'"),
    "a quantity": (("x,class", *(f"1,{i}.5" for i in range(40))), {}, "40 different values in 40 rows, too many"),
    "decimal commas": (("x;class", "1,5;a", "2,5;b"), {}, "line 2: column 'x' has decimal commas: 1,5"),
    "infinite": (("x,class", "1,a", "inf,b"), {}, "line 3: column 'x' has inf, no finite number"),
    "a word": (("x,class", *("1,a", "2,b") * 9, "old,a"), {}, "line 20: column 'x' has 'old' among numbers; 1 of 19"),
    "no columns": (("x,class", "1,a", "2,b"), {"ignore": ["x"]}, "no column beside class"),
    "a part": (("x,class,s", "1,a,train", "2,b,later"), {"split": "s"}, "line 3: 'later' in column 's' names no part"),
    "no training": (("x,class,s", "1,a,test", "2,b,test"), {"split": "s"}, "names no row for training"),
    "two rows": (("x,class", "1,a", "2,b"), {}, "leaves 0 to test on"),
    "quote": (("x,class", '"1,a'), {}, "cannot be read as CSV"),
    "list": (("x,class", "1,a", "2,b"), {"ignore": "x"}, "must be a list of columns"),
    "twice": (("x,class", "1,a", "2,b"), {"ignore": ["class"]}, "both name the column 'class'"),
    "fraction": (("x,class", "1,a", "2,b"), {"test_fraction": 1}, "above 0 and below 1"),
}


@pytest.mark.parametrize(("rows", "keys", "said"), BAD.values(), ids=BAD)
def test_a_bad_table_is_refused_by_line_and_column(
    tmp_path: Path, rows: tuple[str, ...], keys: dict[str, Any], said: str
) -> None:
    with pytest.raises((DataError, ConfigError), match=said):
        read(write(tmp_path / "t.csv", *rows), **keys)


def test_files_that_are_no_tables_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="there is no file"):
        table(data_dir=tmp_path, file="none.csv", target="class")
    (tmp_path / "t.csv").write_bytes(b"x,class\n\xff,a\n")
    with pytest.raises(DataError, match="not UTF-8"):
        read(tmp_path / "t.csv")
    with pytest.raises(DataError, match="a table is CSV or Parquet") as refused:
        read(write(tmp_path / "t.xlsx", "PK"))
    assert refused.value.hint == "pandas.read_excel('t.xlsx').to_csv('t.csv', index=False)"
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(DataError, match="needs pyarrow") as refused:
        read(write(tmp_path / "t.parquet", "PAR1"))
    assert "kd-cli[tables]" in str(refused.value.hint)


def test_a_parquet_file_is_read_as_the_same_table_in_csv(people: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet, csv_files = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow.csv")
    as_csv = prepare(read(people, split="part"), val_fraction=0.1)
    options = csv_files.ConvertOptions(null_values=["", "?"], strings_can_be_null=True)
    parquet.write_table(csv_files.read_csv(people, convert_options=options), people.with_suffix(".parquet"))
    data = prepare(read(people.with_suffix(".parquet"), split="part"), val_fraction=0.1)
    assert torch.equal(data.train.images, as_csv.train.images)
    assert data.fingerprint == as_csv.fingerprint
    nested = pyarrow.table({"x": [[1], [2]], "class": ["a", "b"]})
    parquet.write_table(nested, people.with_name("nested.parquet"))
    with pytest.raises(DataError, match=r"column 'x': list<.*> is neither numbers nor texts"):
        read(people.with_name("nested.parquet"))
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read(write(people.with_name("bad.parquet"), "PAR1"))


def test_a_table_is_no_transfer_set_of_another(people: Path) -> None:
    with pytest.raises(DataError, match=r"transfer\.data is the table people"):
        unlabelled(read(people, split="part"))


def test_a_run_on_a_table_ships_a_student_that_takes_its_rows(kd_run: Callable[..., Ran], tmp_path: Path) -> None:
    wine = load_wine()
    rows = [
        ",".join(map(str, [*row, "dry" if i % 3 else "", label]))
        for i, (row, label) in enumerate(zip(wine.data, wine.target, strict=True))
    ]
    write(tmp_path / "wine.csv", ",".join([*wine.feature_names, "taste", "class"]), *rows)
    ran = kd_run(*TINY, "dataset=table", f"dataset.file={tmp_path}/wine.csv", "dataset.target=class")
    assert ran.code == 0, ran.err
    assert "wine.csv has no test part: 36 of its 178 rows test, the same share of each class" in ran.err
    assert ran.summary["dataset"]["name"] == "wine"
    student = load_student(ran.run_dir)
    data = prepare(read(tmp_path / "wine.csv"), val_fraction=0.1)
    assert data.fingerprint == ran.summary["dataset"]["fingerprint"]
    wrong = student(data.test.images).argmax(-1) != data.test.labels
    assert int(wrong.sum()) == ran.summary["student"]["test"]["errors"]
    with (tmp_path / "wine.csv").open() as file:
        by_name = student.encode(list(csv.DictReader(file)))
    assert {tuple(row) for row in data.test.images.tolist()} <= {tuple(row) for row in by_name.tolist()}
    assert dataset_of(ran.run_dir, ran.summary).fingerprint == data.fingerprint
    names = [column["name"] for column in metadata_of(ran.run_dir, ran.summary, student)["columns"]]
    assert names == [*wine.feature_names, "taste"]


def test_a_dry_run_says_what_is_found(kd_run: Callable[..., Ran], people: Path) -> None:
    keys = ["dataset=table", f"dataset.file={people}", "dataset.target=class", "dataset.split=part", "dry_run=true"]
    ran = kd_run(*TINY, *keys)
    assert ran.code == 0, ran.err
    assert (
        "people: 4 training, 2 validation, 2 test examples of 6 features float32, 0.0 MB; 2 classes (a, b), "
        "2 to 2 training examples each" in ran.err
    )
    assert "1 column is categorical: colour" in ran.err
    assert "to train" in ran.out
