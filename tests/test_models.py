"""The models: shapes, parameters, regularisation, and what is said of keys that no model can be made of."""

import inspect
import math
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from kd_cli.config.build import locate
from kd_cli.errors import ConfigError
from kd_cli.models.cnn import cnn
from kd_cli.models.layers import Dropout, constrain_max_norm
from kd_cli.models.mlp import mlp
from kd_cli.models.torchvision import torchvision_model
from kd_cli.vision import import_torchvision, repair_torchvision

CONF = Path(__file__).parent.parent / "conf"
NAMES = import_torchvision().models.list_models(module=import_torchvision().models)
ONE_PER_FAMILY = ["alexnet", "densenet121", "googlenet", "inception_v3", "maxvit_t", "regnet_y_400mf", "vit_b_32"]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(autouse=True)
def _same_weights_every_time():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def no_memory():
    """Parameters and buffers without data, so that the largest architectures are built at once."""
    hooks = nn.modules.module
    handles = [
        hooks.register_module_parameter_registration_hook(
            lambda module, name, p: None if p is None else nn.Parameter(p.to("meta"), p.requires_grad)
        ),
        hooks.register_module_buffer_registration_hook(lambda module, name, b: None if b is None else b.to("meta")),
    ]
    yield
    for handle in handles:
        handle.remove()


# ---------------------------------------------------------------- dropout


def test_dropout_depends_on_its_generator_and_on_nothing_else():
    layer, x = Dropout(0.5, generator(3)), torch.ones(4, 100)
    first = layer(x)
    torch.rand(7)
    layer.generator.manual_seed(3)
    before = torch.get_rng_state()
    assert layer(x).equal(first)
    assert torch.get_rng_state().equal(before)
    assert not layer(x).equal(first)  # the generator has moved on


def test_dropout_keeps_the_expectation():
    for p in (0.001, 0.2, 0.5, 0.9):
        kept = Dropout(p, generator(0))(torch.ones(1_000_003, dtype=torch.float64))
        assert kept.unique().tolist() == [0, pytest.approx(1 / (1 - p), rel=1e-4)]
        assert kept.mean().item() == pytest.approx(1, abs=4 * math.sqrt(p / (1 - p) / 1e6))
        assert (kept == 0).double().mean().item() == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / 1e6))
        for k in range(4):  # the four numbers of one draw are alike
            assert kept[k::4].mean().item() == pytest.approx(1, abs=8 * math.sqrt(p / (1 - p) / 1e6))


def test_dropout_hands_back_its_input_in_evaluation_and_at_zero():
    x = torch.ones(3)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0)(x) is x


def test_dropout_passes_gradients_where_it_passes_values():
    x = torch.ones(50, requires_grad=True)
    y = Dropout(0.5, generator(0))(x)
    y.sum().backward()
    assert x.grad.equal(y.detach())


# ---------------------------------------------------------------- mlp


def test_the_papers_mlps_have_their_known_sizes():
    assert count(mlp(input_shape=(1, 28, 28), num_classes=10, hidden=[800, 800])) == 1_276_810
    assert count(mlp(input_shape=(1, 28, 28), num_classes=10, hidden=[1200, 1200])) == 2_395_210


def test_an_mlp_is_a_plain_sequence_with_dropout_where_it_is_asked_for():
    network = mlp(input_shape=(1, 8, 8), num_classes=10, hidden=[30, 20], dropout=0.5, input_dropout=0.2)
    assert type(network) is nn.Sequential
    kinds = [type(layer).__name__ for layer in network]
    assert kinds == ["Flatten", "Dropout", "Linear", "ReLU", "Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    assert [layer.p for layer in network if isinstance(layer, Dropout)] == [0.2, 0.5, 0.5]
    assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_an_mlp_without_hidden_layers_is_a_linear_classifier():
    assert count(mlp(input_shape=(64,), num_classes=10, hidden=[])) == 650


def test_max_norm_bounds_the_weights_that_feed_hidden_units():
    network = mlp(input_shape=(9,), num_classes=4, hidden=[8, 7], dropout=0.5, max_norm=3)
    assert network.max_norm == {"1.weight": 3.0, "4.weight": 3.0}
    names = dict(network.named_parameters())
    assert [names[name].shape for name in network.max_norm] == [(8, 9), (7, 8)]
    assert not hasattr(mlp(input_shape=(9,), num_classes=4, hidden=[8]), "max_norm")


def test_max_norm_shortens_long_rows_and_leaves_short_ones():
    weight = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]], requires_grad=True)
    constrain_max_norm({"w": weight, "other": torch.ones(1)}, {"w": 1.0})
    torch.testing.assert_close(weight.detach(), torch.tensor([[0.6, 0.8], [0.3, 0.4], [0.0, 0.0]]))


def test_max_norm_of_a_stack_is_that_of_each_model():
    stacked = torch.randn(3, 5, 7, generator=generator(0))
    alone = stacked.clone()
    constrain_max_norm({"w": stacked}, {"w": 1.5})
    for weight in alone:
        constrain_max_norm({"w": weight}, {"w": 1.5})
    assert stacked.equal(alone)
    assert stacked.norm(dim=-1).max() <= 1.5 + 1e-6


# ---------------------------------------------------------------- cnn


def test_a_cnn_maps_images_to_logits():
    network = cnn(input_shape=(3, 32, 32), num_classes=10, dropout=0.5)
    assert type(network) is nn.Sequential
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert not any("running" in name for name, _ in network.named_buffers())


def test_a_cnn_takes_images_whose_sides_are_no_power_of_two():
    network = cnn(input_shape=(1, 7, 29), num_classes=3, channels=[4, 5], hidden=6)
    assert network(torch.zeros(2, 1, 7, 29)).shape == (2, 3)


def test_an_image_too_small_for_the_halvings_is_refused():
    with pytest.raises(ConfigError, match=r"channels has 4 entries; .* at least 16x16 for that, and is 8x8") as caught:
        cnn(input_shape=(1, 8, 8), num_classes=10, channels=[4, 4, 4, 4])
    assert caught.value.hint == "give at most 3 entries"


def test_a_cnn_needs_images():
    with pytest.raises(ConfigError, match=r"needs images .* have the shape 64"):
        cnn(input_shape=(64,), num_classes=10)


@pytest.mark.parametrize(
    ("builder", "keys", "said"),
    [
        (mlp, {"hidden": [0]}, "hidden has 0; it must be a whole number, 1 or more"),
        (mlp, {"hidden": [3.5]}, "hidden has 3.5"),
        (mlp, {"hidden": [True]}, "hidden has True"),
        (mlp, {"hidden": 300}, "hidden is 300; it must be a list"),
        (mlp, {"hidden": "300"}, "hidden is '300'; it must be a list"),
        (mlp, {"hidden": [3], "dropout": 1}, "dropout is 1; it must be a number, at least 0 and below 1"),
        (mlp, {"hidden": [3], "input_dropout": -0.1}, "input_dropout is -0.1"),
        (mlp, {"hidden": [3], "dropout": float("nan")}, "dropout is nan"),
        (mlp, {"hidden": [3], "max_norm": 0}, "max_norm is 0; it must be null or a number above 0"),
        (cnn, {"channels": [4, -1]}, "channels has -1"),
        (cnn, {"hidden": 0}, "hidden has 0"),
        (cnn, {"dropout": "half"}, "dropout is 'half'"),
        (torchvision_model, {"name": "resnet18", "pretrained": "yes"}, "pretrained is 'yes'"),
        (torchvision_model, {"name": "resnet18", "image_size": 0}, "image_size has 0"),
    ],
)
def test_keys_outside_their_range_are_refused(builder, keys, said):
    with pytest.raises(ConfigError, match=said):
        builder(input_shape=(1, 8, 8), num_classes=10, **keys)


# ---------------------------------------------------------------- torchvision


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_one_architecture_of_each_unusual_family_gives_one_tensor(name, no_memory):
    network = torchvision_model(input_shape=(3, 224, 224), num_classes=7, name=name).eval()
    with torch.device("meta"):
        assert network(torch.empty(1, 3, 224, 224)).shape == (1, 7)


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ONE_PER_FAMILY])
def test_every_other_architecture_gives_one_tensor(name, no_memory):
    network = torchvision_model(input_shape=(3, 224, 224), num_classes=7, name=name).eval()
    with torch.device("meta"):
        assert network(torch.empty(1, 3, 224, 224)).shape == (1, 7)


def test_a_network_for_colour_takes_grey_images_repeated():
    network = torchvision_model(input_shape=(1, 28, 28), num_classes=10, name="resnet18").eval()
    grey = torch.rand(2, 1, 28, 28)
    with torch.no_grad():
        assert network(grey).equal(network.network(grey.repeat(1, 3, 1, 1)))


def test_colour_images_need_no_wrapper():
    network = torchvision_model(input_shape=(3, 32, 32), num_classes=10, name="resnet18")
    assert type(network).__name__ == "ResNet"
    assert network.training  # as a fresh module is


def test_images_are_resized_for_the_network_where_asked():
    keys = {"input_shape": (1, 8, 8), "num_classes": 4, "name": "alexnet"}
    with pytest.raises(ConfigError, match="alexnet cannot take images of the shape 1x8x8") as caught:
        torchvision_model(**keys)
    assert "image_size=64" in caught.value.hint
    network = torchvision_model(**keys, image_size=64).eval()
    with torch.no_grad():
        assert network(torch.rand(2, 1, 8, 8)).shape == (2, 4)


def test_a_transformer_is_made_for_the_images_it_gets(no_memory):
    for size in (32, 64):
        network = torchvision_model(input_shape=(3, size, size), num_classes=4, name="vit_b_32")
        assert network.encoder.pos_embedding.shape[1] == (size // 32) ** 2 + 1


def test_an_unknown_architecture_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="no classification model of that name") as caught:
        torchvision_model(input_shape=(3, 32, 32), num_classes=10, name="resnet81")
    assert "resnet18" in caught.value.hint


def test_images_with_two_channels_are_refused():
    with pytest.raises(ConfigError, match=r"needs images \[1 or 3, height, width\], and these have the shape 2x32x32"):
        torchvision_model(input_shape=(2, 32, 32), num_classes=10, name="resnet18")


# ---------------------------------------------------------------- pretrained weights


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Where torch keeps downloads, empty, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    return tmp_path / "hub" / "checkpoints"


def published(hub: Path, name: str, **options) -> dict[str, torch.Tensor]:
    """Put random weights for 1,000 classes where torch looks for the published ones."""
    tv = import_torchvision().models
    state = tv.get_model(name, weights=None, **options).state_dict()
    torch.save(state, hub / Path(tv.get_model_weights(name).DEFAULT.url).name)
    return state


@pytest.mark.parametrize("classes", [10, 1000])
def test_pretrained_weights_are_kept_but_for_another_head(hub, classes):
    state = published(hub, "squeezenet1_1")
    keys = {"input_shape": (3, 64, 64), "num_classes": classes, "name": "squeezenet1_1"}
    own = torchvision_model(**keys, pretrained=True).state_dict()
    differing = [key for key in state if not own[key].equal(state[key])]
    assert differing == ([] if classes == 1000 else ["classifier.1.weight", "classifier.1.bias"])


def test_pretrained_auxiliary_heads_are_left_out(hub):
    state = published(hub, "googlenet", init_weights=False, aux_logits=True)
    network = torchvision_model(input_shape=(1, 64, 64), num_classes=10, name="googlenet", pretrained=True).network
    assert network.transform_input
    assert network.conv1.conv.weight.equal(state["conv1.conv.weight"])
    assert not any("aux" in key for key in network.state_dict())


def test_the_old_names_in_densenets_file_are_understood(hub):
    state = published(hub, "densenet121")
    file = next(hub.iterdir())
    old = {key.replace("norm1.", "norm.1.").replace("conv2.", "conv.2."): value for key, value in state.items()}
    assert old.keys() != state.keys()
    torch.save(old, file)
    own = torchvision_model(input_shape=(3, 64, 64), num_classes=10, name="densenet121", pretrained=True).state_dict()
    assert all(own[key].equal(state[key]) for key in state if not key.startswith("classifier"))


def test_pretrained_weights_for_another_image_size_are_refused(hub, no_memory):
    published(hub, "squeezenet1_0")  # any file of tensors: what counts is that shapes are compared
    tv = import_torchvision().models
    torch.save({"encoder.pos_embedding": torch.zeros(1, 50, 768)}, hub / Path(tv.ViT_B_32_Weights.DEFAULT.url).name)
    with pytest.raises(ConfigError, match=r"do not fit: encoder.pos_embedding is 1x50x768.*1x2x768") as caught:
        torchvision_model(input_shape=(3, 32, 32), num_classes=10, name="vit_b_32", pretrained=True)
    assert "image_size=224" in caught.value.hint


def test_a_file_that_lacks_weights_is_refused(hub):
    tv = import_torchvision().models
    torch.save({}, hub / Path(tv.SqueezeNet1_1_Weights.DEFAULT.url).name)
    with pytest.raises(ConfigError, match="the pretrained weights for squeezenet1_1 lack classifier"):
        torchvision_model(input_shape=(3, 64, 64), num_classes=10, name="squeezenet1_1", pretrained=True)


def test_weights_that_cannot_be_downloaded_are_named_with_the_ways_on(hub):
    with pytest.raises(ConfigError, match="the pretrained weights for resnet18 could not be downloaded") as caught:
        torchvision_model(input_shape=(3, 64, 64), num_classes=10, name="resnet18", pretrained=True)
    assert "pretrained=false" in caught.value.hint
    assert "teacher.checkpoint=FILE" in caught.value.hint


def test_pretrained_weights_run_no_code(hub, tmp_path):
    class Trap:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "sprung",))

    tv = import_torchvision().models
    torch.save({"features.0.weight": Trap()}, hub / Path(tv.SqueezeNet1_1_Weights.DEFAULT.url).name)
    with pytest.raises(ConfigError, match="could not be"):
        torchvision_model(input_shape=(3, 64, 64), num_classes=10, name="squeezenet1_1", pretrained=True)
    assert not (tmp_path / "sprung").exists()


# ---------------------------------------------------------------- the YAML files that ship

SHIPPED = sorted([*(CONF / "model").glob("*.yaml"), *(CONF / "dataset").glob("*.yaml")])


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}={file.stem}")
def test_every_key_of_a_shipped_file_has_a_reader_and_a_comment(file):
    lines = file.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert all(" # " in line for line in lines[2:])
    node = yaml.safe_load(file.read_text())
    builder = locate(node.pop("_target_"))
    if file.parent.name == "dataset":
        assert 0 <= node.pop("val_fraction") < 1  # 0 where the data have a validation part of their own
        assert node.pop("positive", None) is None
    given = ["data_dir"] if file.parent.name == "dataset" else ["input_shape", "num_classes"]
    parameters = inspect.signature(builder).parameters
    assert set(parameters) - set(given) == set(node)
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters.values())


@pytest.mark.parametrize("file", sorted((CONF / "model").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_model_takes_the_digits(file):
    if file.stem == "timm":
        repair_torchvision()
        pytest.importorskip("timm")
    node = yaml.safe_load(file.read_text())
    builder = locate(node.pop("_target_"))
    network = builder(input_shape=(1, 8, 8), num_classes=10, **node).eval()
    with torch.no_grad():
        assert network(torch.rand(2, 1, 8, 8)).shape == (2, 10)
