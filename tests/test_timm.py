"""timm's models by name; skipped where timm is not installed, but for the message that says so."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from process import Ran
from torch import nn

from kd_cli.errors import ConfigError
from kd_cli.export.load import load_student, network_of
from kd_cli.models.building import prepared
from kd_cli.models.timm import RECORDED, TARGET, Pretrained, Resized, notes_on_timm, timm_model


def test_without_timm_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError, match="timm cannot be imported") as caught:
        timm_model(input_shape=(3, 32, 32), num_classes=10, name="resnet18")
    assert "pip install 'kd-cli[timm]'" in str(caught.value.hint)


@pytest.fixture
def _timm(monkeypatch: pytest.MonkeyPatch) -> None:
    from kd_cli.vision import import_torchvision

    import_torchvision()
    pytest.importorskip("timm")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def logits(network: nn.Module, *shape: int) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(network.eval()(torch.rand(2, *shape)).shape)


@pytest.mark.usefixtures("_timm")
@pytest.mark.parametrize("name", ["resnet10t", "vit_tiny_patch16_224", "mobilenetv3_small_050"])
def test_a_model_takes_grey_and_colour_images_of_the_datas_size(name: str) -> None:
    network = timm_model(input_shape=(1, 32, 32), num_classes=7, name=name)
    assert logits(network, 1, 32, 32) == (2, 7)
    assert type(network).__module__.startswith("timm.")


@pytest.mark.usefixtures("_timm")
def test_image_size_resizes_the_images_for_the_network() -> None:
    network = timm_model(input_shape=(3, 20, 20), num_classes=7, name="vit_tiny_patch16_224", image_size=48)
    assert isinstance(network, Resized)
    assert network.network.patch_embed.img_size == (48, 48)
    assert logits(network, 3, 20, 20) == (2, 7)


@pytest.mark.usefixtures("_timm")
@pytest.mark.parametrize(
    ("keys", "said", "hint"),
    [
        ({"name": "resnet81"}, "has no model of that name", "resnet"),
        ({"name": "resnet18.nope"}, "has no weights 'nope' of resnet18", "a1_in1k"),
        ({"name": "resnet18", "pretrained": "yes"}, "pretrained is 'yes'", None),
        ({"name": "resnet18", "image_size": 0}, "image_size has 0", None),
    ],
)
def test_what_timm_does_not_have_is_refused(keys: dict[str, object], said: str, hint: str | None) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        timm_model(input_shape=(3, 32, 32), num_classes=10, **keys)  # type: ignore[arg-type]
    assert hint is None or hint in str(caught.value.hint)


@pytest.mark.usefixtures("_timm")
def test_weights_that_cannot_be_loaded_are_an_error_that_names_other_ways() -> None:
    with pytest.raises(ConfigError, match="the pretrained weights for resnet18 could not be loaded") as caught:
        timm_model(input_shape=(3, 32, 32), num_classes=10, name="resnet18", pretrained=True)
    assert "teacher.checkpoint=FILE" in str(caught.value.hint)


@pytest.mark.usefixtures("_timm")
def test_a_pretrained_model_sees_its_own_size_and_normalisation() -> None:
    keys = {"name": "vit_tiny_patch16_224", "pretrained": RECORDED}
    built = timm_model(input_shape=(1, 20, 20), num_classes=7, **keys)  # type: ignore[arg-type]
    assert isinstance(built, Pretrained)
    assert (built.image_size, built.network.patch_embed.img_size) == ((224, 224), (224, 224))
    seen: list[torch.Tensor] = []
    built.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module = prepared(built, target=TARGET, shape=(1, 20, 20), classes=7, data_mean=(0.2,), data_std=(0.4,))
    white = torch.full((1, 1, 20, 20), (1.0 - 0.2) / 0.4)  # as the data are normalised
    with torch.no_grad():
        module.eval()(white)
    torch.testing.assert_close(seen[0], torch.full((1, 1, 224, 224), (1.0 - 0.5) / 0.5))
    said = notes_on_timm({**keys, "pretrained": True}, shape=(1, 20, 20), classes=7, normalize="data")
    assert "sees images of 224x224 pixels, which those of 20x20 are resized to" in said
    # A trained network is rebuilt without a download.
    again = network_of(
        {"_target_": TARGET, "name": "vit_tiny_patch16_224", "pretrained": True},
        module.state_dict(),
        shape=(1, 20, 20),
        classes=7,
        normalize="data",
        view=None,
        statistics=((0.2,), (0.4,)),
        dtype=torch.float32,
    )
    with torch.no_grad():
        assert torch.equal(again(white), module(white))


@pytest.mark.slow
@pytest.mark.usefixtures("_timm")
def test_a_run_with_a_student_of_timm_is_loaded_again(kd_run: Callable[..., Ran], tmp_path: Path) -> None:
    ran = kd_run(
        *("teacher=tinymlp", "student=timm", "student.name=test_resnet", "dataset=digits", "device=cpu"),
        *("training.epochs=1", "teacher_training.epochs=1", "training.batch_size=512"),
    )
    assert ran.code == 0, ran.err
    assert ran.summary["student"]["name"] == "test_resnet"
    student = load_student(ran.run_dir)
    assert student(torch.zeros(1, 1, 8, 8)).shape == (1, 10)
