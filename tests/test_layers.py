"""The layers that feature methods find in a network by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from kd_cli.learn.layers import Layer, last_layer, stage_layers
from kd_cli.models.cnn import cnn
from kd_cli.models.mlp import mlp
from kd_cli.models.torchvision import torchvision_model

DIGITS = {"input_shape": (1, 28, 28), "num_classes": 10}


def paths(layers: list[Layer]) -> list[str]:
    return [layer.path for layer in layers]


def blank(side: int, channels: int = 3) -> Tensor:
    return torch.zeros(2, channels, side, side)


# ---------------------------------------------------------------- the families


def test_a_cnn_has_a_map_of_each_size_and_its_last_is_the_one_that_is_flattened() -> None:
    network, images = cnn(channels=[3, 4], dropout=0.5, **DIGITS), blank(28, 1)
    assert [(layer.path, layer.shape) for layer in stage_layers(network, images)] == [
        *(("1", (3, 28, 28)), ("4", (4, 14, 14)), ("5", (4, 7, 7))),
    ]
    assert paths(last_layer(network, images)) == ["5"]


def test_an_mlp_has_its_hidden_layers_before_their_dropout() -> None:
    network, images = mlp(hidden=[5, 6], dropout=0.5, input_dropout=0.2, **DIGITS), blank(28, 1)
    assert [type(network[int(path)]).__name__ for path in paths(stage_layers(network, images))] == ["ReLU", "ReLU"]
    assert [layer.shape for layer in stage_layers(network, images)] == [(5,), (6,)]
    assert paths(last_layer(network, images)) == paths(stage_layers(network, images))[-1:]


def test_a_network_without_a_hidden_layer_has_none() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    assert last_layer(network, blank(28, 1)) == stage_layers(network, blank(28, 1)) == []


FAMILIES = {  # the last map, then the last map of each size
    "resnet18": ["layer4", "relu", "layer1", "layer2", "layer3", "layer4"],
    "resnet50": ["layer4", "relu", "layer1", "layer2", "layer3", "layer4"],
    "mobilenet_v2": ["features", "features.1", "features.3", "features.6", "features.13", "features"],
    "mobilenet_v3_small": ["features", "features.0", "features.1", "features.3", "features.8", "features"],
    "shufflenet_v2_x0_5": ["conv5", "conv1", "maxpool", "stage2", "stage3", "conv5"],
    "efficientnet_b0": ["features", "features.1", "features.2", "features.3", "features.5", "features"],
    "vgg11": [
        *("features", "features.1", "features.4", "features.9", "features.14", "features.19", "features"),
    ],
    "convnext_tiny": ["features", "features.2.0", "features.4.0", "features.6.0", "features"],
    "densenet121": [
        *("features", "features.relu0", "features.transition1.conv", "features.transition2.conv"),
        *("features.transition3.conv", "features"),
    ],
    "vit_b_16": ["encoder", "conv_proj"],  # tokens are the last, and no map of a size
    "swin_t": ["permute", "features.0.0", "permute"],  # between them the channels come last: no maps
}


@pytest.mark.parametrize("name", FAMILIES)
def test_torchvisions_families(name: str) -> None:
    side = 224 if name.startswith(("vit", "swin")) else 64
    with torch.device("meta"):
        network, images = torchvision_model(input_shape=(3, side, side), num_classes=10, name=name), blank(side)
        assert [*paths(last_layer(network, images)), *paths(stage_layers(network, images))] == FAMILIES[name]


def test_a_network_that_is_wrapped_for_images_of_one_channel_is_looked_into() -> None:
    with torch.device("meta"):
        network = torchvision_model(input_shape=(1, 28, 28), num_classes=10, name="resnet18")
        assert paths(last_layer(network, blank(28, 1))) == ["network.layer4"]


# ---------------------------------------------------------------- a user's own


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.act = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 5, 3, 2, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.second(self.act(self.first(x))))


class Net(nn.Module):
    """A module with a forward of its own, which calls its ReLU twice, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(), nn.Linear(5, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).mean((2, 3)))


def test_a_single_module_with_a_forward_of_its_own_is_looked_into_for_its_stages() -> None:
    network = Net()
    assert paths(last_layer(network, blank(16))) == ["backbone"]
    assert paths(stage_layers(network, blank(16))) == ["backbone.first", "backbone"]  # `act` is called twice


def test_looking_leaves_the_network_as_it_was() -> None:
    network = cnn(channels=[3], dropout=0.5, **DIGITS)
    network[0].eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    stage_layers(network, blank(28, 1))
    assert not any(module._forward_hooks for module in network.modules())
    assert [module.training for module in network] == [False] + [True] * (len(network) - 1)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_the_choice_does_not_depend_on_the_weights() -> None:
    found = [paths(stage_layers(cnn(channels=[3, 4], **DIGITS), torch.randn(2, 1, 28, 28))) for _ in range(3)]
    assert found[0] == found[1] == found[2]
