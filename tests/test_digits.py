"""The digits: the real ones, and parts that share no hand."""

import hashlib

import numpy as np
import pytest
import torch

from kd_cli.data.digits import SHEETS, digits, digits_table
from kd_cli.data.prepare import prepare
from kd_cli.errors import ConfigError


@pytest.fixture(scope="module", params=["hand", "random"])
def source(request):
    return digits(data_dir="unused", split=request.param)


def test_the_digits_are_real_and_split_by_hand():
    source = digits(data_dir="unused")
    assert source.train_images.shape == (1281, 1, 8, 8)
    assert source.test_images.shape == (516, 1, 8, 8)
    data = prepare(source, val_fraction=0.16666667)
    assert (len(data.train), len(data.val), len(data.test)) == (1023, 258, 516)
    assert data.fingerprint == "0d5c1c537a70ef49f8a4d20146c53acd"


def test_the_split_of_earlier_versions_is_an_option():
    source = digits(data_dir="unused", split="random")
    assert source.train_images.shape == (1200, 1, 8, 8)
    assert source.test_images.shape == (597, 1, 8, 8)
    data = prepare(source, val_fraction=0.16666667)
    assert (len(data.train), len(data.val), len(data.test)) == (1000, 200, 597)
    assert data.fingerprint == "c6664f227376bda3b419870caf67ac95"


def test_every_part_has_every_digit_and_none_twice(source):
    assert source.train_images.dtype == torch.float32
    assert source.train_images.aminmax() == (0, 1)
    data = prepare(source, val_fraction=0.16666667)
    assert all(min(counts) > 0 for counts in data.class_counts().values())
    rows = torch.cat([part.images.flatten(1) for part in (data.train, data.val, data.test)])
    assert len(rows.unique(dim=0)) == 1797


def test_a_sheet_begins_where_the_form_begins_again():
    labels = digits_table()[:, 64].tolist()
    form = labels[:130]
    for begin, end in zip(SHEETS, [*SHEETS[1:], 1797], strict=True):
        sheet = labels[begin:end]
        expected = iter(form)
        out_of_order = sum(digit not in expected for digit in sheet)  # what the form has not got there or later
        assert out_of_order <= 1
        assert 122 <= len(sheet) <= 130


def test_whole_sheets_validate():
    data = prepare(digits(data_dir="unused"), val_fraction=0.16666667)
    rows = {tuple(image): i for i, image in enumerate(digits_table()[:, :64] / 16)}
    sheets = [
        {int(np.searchsorted(SHEETS, rows[tuple(image)], side="right")) for image in part.images.flatten(1).tolist()}
        for part in (data.train, data.val, data.test)
    ]
    assert [len(found) for found in sheets] == [8, 2, 4]
    assert set.union(*sheets) == set(range(1, 15))


def test_another_split_is_refused():
    with pytest.raises(ConfigError, match="split is 'writer'; it must be hand or random"):
        digits(data_dir="unused", split="writer")


def test_the_table_has_the_bytes_of_what_scikit_learn_loads() -> None:
    # of np.column_stack([load_digits().data, load_digits().target]) with scikit-learn 1.9.1
    table = digits_table()
    assert (table.shape, table.dtype) == ((1797, 65), np.float64)
    assert (
        hashlib.sha256(table.tobytes()).hexdigest()
        == "30aa855cd90427ff3c4996b3f40109597c57049f8a038cc52db1efeac8ad2e26"
    )


def test_every_digit_of_the_table_is_in_a_part(source) -> None:
    images = torch.cat([source.train_images, source.test_images])
    labels = torch.cat([source.train_labels, source.test_labels])
    found = torch.cat([images.flatten(1) * 16, labels[:, None]], 1).double()
    assert sorted(found.tolist()) == sorted(digits_table().tolist())
