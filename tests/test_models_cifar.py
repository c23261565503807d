"""The networks that papers train on CIFAR: the public ones' sizes, their shapes, a step of training, their layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from kd_cli.config.build import locate
from kd_cli.errors import ConfigError
from kd_cli.learn.layers import last_layer, stage_layers
from kd_cli.models.cifar import resnet, vgg, wide_resnet
from kd_cli.models.cifar_light import mobilenetv2, shufflenetv1, shufflenetv2

MODELS = Path(__file__).parent.parent / "conf" / "model"
PUBLIC = {  # parameters for 100 classes, counted in the code of Tian et al. (2020)
    "resnet20": 278_324,
    "resnet56": 861_620,
    "resnet110": 1_736_564,
    "resnet8x4": 1_233_540,
    "resnet32x4": 7_433_860,
    "wrn_16_2": 703_284,
    "wrn_40_1": 569_780,
    "wrn_40_2": 2_255_156,
    "vgg8": 3_965_028,
    "vgg13": 9_462_180,
    "mobilenetv2": 812_836,
    "shufflenetv1": 949_258,
    "shufflenetv2": 1_355_528,
}
CIFAR = {"input_shape": (3, 32, 32), "num_classes": 100}


def built(name: str, **inputs: object) -> nn.Module:
    """The model of a shipped YAML file."""
    node = yaml.safe_load((MODELS / f"{name}.yaml").read_text())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return locate(node.pop("_target_"))(**(CIFAR | inputs), **node)


@pytest.mark.parametrize("name", PUBLIC)
def test_the_parameters_are_as_many_as_the_public_networks_have(name: str) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in built(name).parameters()) == PUBLIC[name]


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 13), (3, 64, 64)])
def test_images_of_other_sizes_are_classified(name: str, shape: tuple[int, ...]) -> None:
    with torch.device("meta"), torch.no_grad():
        for training in (True, False):
            network = built(name, input_shape=shape, num_classes=7).train(training)
            assert network(torch.zeros(2, *shape)).shape == (2, 7)


@pytest.mark.parametrize("name", sorted(PUBLIC.keys() - {"resnet110", "resnet56", "wrn_40_1", "wrn_40_2"}))
def test_steps_of_training_reach_every_parameter_and_lower_the_loss(name: str) -> None:
    network = built(name, input_shape=(3, 16, 16), num_classes=5)
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(8) % 5
    optimizer = torch.optim.SGD(network.parameters(), lr=0.002)
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert not [key for key, value in network.named_parameters() if value.grad is None or not value.grad.any()]


RESNET = [("layer1", 32), ("layer2", 16), ("layer3", 8)]
WRN = [("block1", 32), ("block2", 16), ("relu", 8)]
VGG = [("block0", 32), ("block1", 16), ("block2", 8), ("block4", 4)]
STAGES = {  # where the last map of each size is, and the side of that size
    **dict.fromkeys(("resnet20", "resnet56", "resnet110", "resnet8x4", "resnet32x4"), RESNET),
    **dict.fromkeys(("wrn_16_2", "wrn_40_1", "wrn_40_2"), WRN),
    **dict.fromkeys(("vgg8", "vgg13"), VGG),
    "mobilenetv2": [("stage1", 16), ("stage2", 8), ("stage4", 4), ("conv2", 2)],
    "shufflenetv1": [("stem", 32), ("stage1", 16), ("stage2", 8), ("stage3", 4)],
    "shufflenetv2": [("stem", 32), ("stage1", 16), ("stage2", 8), ("conv2", 4)],
}


@pytest.mark.parametrize("name", PUBLIC)
def test_feature_methods_find_the_stages_and_the_last_map(name: str) -> None:
    with torch.device("meta"):
        network, images = built(name), torch.zeros(2, 3, 32, 32)
        found = [(layer.path.split(".")[0], layer.shape[1]) for layer in stage_layers(network, images)]
        assert found == STAGES[name]
        (last,) = last_layer(network, images)
        assert last.path == stage_layers(network, images)[-1].path


def test_parameters_of_teachers_have_the_names_of_the_published_weights() -> None:
    names = {
        "resnet32x4": ("layer2.0.downsample.1.weight", "layer3.4.bn2.running_var", "fc.weight"),
        "wrn_40_2": ("block2.layer.0.convShortcut.weight", "block3.layer.5.bn1.weight", "bn1.bias", "fc.bias"),
        "vgg13": ("block1.3.weight", "block4.4.num_batches_tracked", "classifier.weight"),
    }
    with torch.device("meta"):
        for name, keys in names.items():
            assert set(keys) <= built(name).state_dict().keys(), name


def test_a_residual_block_is_its_formula() -> None:
    network = resnet(input_shape=(3, 8, 8), num_classes=2, depth=8, widths=[4, 4, 6, 8]).eval()
    x = torch.randn(2, 4, 8, 8)
    first, halving = network.layer1[0], network.layer2[0]
    with torch.no_grad():
        inner = first.bn2(first.conv2(first.bn1(first.conv1(x)).clamp(min=0)))
        assert first(x).equal((inner + x).clamp(min=0))
        inner = halving.bn2(halving.conv2(halving.bn1(halving.conv1(x)).clamp(min=0)))
        assert halving(x).equal((inner + halving.downsample(x)).clamp(min=0))
    assert [len(network.layer1), len(network.layer2), len(network.layer3)] == [1, 1, 1]


BAD = {
    "depth is 21; it must be 6n \\+ 2: 8, 14, 20": lambda: resnet(depth=21, **CIFAR),
    "depth is 2;": lambda: resnet(depth=2, **CIFAR),
    "it must have four entries": lambda: resnet(depth=8, widths=[16, 32], **CIFAR),
    "depth is 18; it must be 6n \\+ 4: 10, 16, 22": lambda: wide_resnet(depth=18, widen=2, **CIFAR),
    "widen has 0": lambda: wide_resnet(depth=16, widen=0, **CIFAR),
    "a list of five lists": lambda: vgg(blocks=[[64], [128]], **CIFAR),
    r"blocks\[1\] is 3": lambda: vgg(blocks=[[64], 3, [5], [5], [5]], **CIFAR),
    "width is 0": lambda: mobilenetv2(width=0, **CIFAR),
    "which is 16": lambda: shufflenetv1(groups=4, **CIFAR),
    "even numbers": lambda: shufflenetv2(widths=[11, 22, 44], **CIFAR),
    "each must have three entries": lambda: shufflenetv2(widths=[10, 20], **CIFAR),
    "8x8 pixels or more, and these are 7x9": lambda: vgg(blocks=[[4]] * 5, input_shape=(3, 7, 9), num_classes=2),
    "needs images .* and these have the shape 64": lambda: mobilenetv2(input_shape=(64,), num_classes=2),
}


@pytest.mark.parametrize("message", BAD)
def test_keys_that_no_network_can_be_made_of_are_refused(message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BAD[message]()
