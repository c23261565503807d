"""Pruning leaves layers alone whose weight is not a parameter of their own, and counts a shared weight once."""

import pytest
from torch import nn
from torch.nn.utils import spectral_norm
from torch.nn.utils.parametrizations import weight_norm

from kd_cli.data.pictures import Reading, decode_content
from kd_cli.errors import DataError
from kd_cli.learn.pruning import Pruning, UnitMasks, masks_of
from kd_cli.models.pruned import units_of


@pytest.mark.parametrize("computed", [spectral_norm, weight_norm])
def test_layers_with_computed_weights_are_left_alone(computed):
    network = nn.Sequential(computed(nn.Linear(4, 6)), nn.ReLU(), nn.Linear(6, 3))
    assert units_of(network) == []
    assert list(masks_of(Pruning(0.5, "magnitude"), network).gone) == ["2.weight"]


def test_a_weight_that_two_layers_share_is_pruned_once():
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    network[2].weight = network[0].weight
    assert list(masks_of(Pruning(0.5, "magnitude"), network).gone) == ["0.weight", "4.weight"]
    masks = UnitMasks(network)
    masks.prune(0.5)
    assert [int(gone.sum()) for gone in masks.gone.values()] == [2, 2]


@pytest.mark.parametrize("content", [b"", b"no picture"])
def test_what_is_no_picture_is_refused_without_the_name_of_an_object(content):
    with pytest.raises(DataError, match=r"a\.jpg cannot be used: it is in none of the formats") as found:
        decode_content(content, "a.jpg", Reading(8, 3, (255, 255, 255)))
    assert "<" not in str(found.value)
