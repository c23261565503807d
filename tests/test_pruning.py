"""Students that are pruned while they are trained: the schedule, what is removed, and that it does not ship."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import made
import pytest
import torch
from process import Ran
from torch import Tensor, nn

from kd_cli.config.check import check_pruning as check_key
from kd_cli.data.digits import digits
from kd_cli.data.prepare import prepare
from kd_cli.data.source import Source
from kd_cli.errors import ConfigError
from kd_cli.experiments.recorded import configuration
from kd_cli.learn.engine import Interrupted, Outcome
from kd_cli.learn.methods import Hard, SoftTargets, Theseus
from kd_cli.learn.objective import Objective
from kd_cli.learn.pruning import Pruning, PruningLearner, UnitMasks, removed_of, smallest
from kd_cli.learn.recipe import Recipe
from kd_cli.models.cifar import resnet, vgg, wide_resnet
from kd_cli.models.cifar_light import mobilenetv2, shufflenetv2
from kd_cli.models.cnn import cnn
from kd_cli.models.mlp import mlp
from kd_cli.models.pruned import pruned, units_of
from kd_cli.report.read import read_run
from kd_cli.runs.pruned import check_pruned_run, check_pruning

Build = Callable[..., nn.Module]
PICTURES: dict[str, Any] = {"input_shape": (3, 32, 32), "num_classes": 4}
SGD = functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=0.01)
STEPS = 10  # of the trainings below: 75 examples, batches of 16, two epochs


def bottleneck(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """A residual block of torchvision between two layers."""
    from torchvision.models.resnet import Bottleneck

    first, last = nn.Conv2d(input_shape[0], 16, 3, stride=4), nn.Linear(16, num_classes)
    return nn.Sequential(first, Bottleneck(16, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)


BUILDS: dict[str, tuple[Build, set[str]]] = {  # the layers whose units are removed
    "mlp": (functools.partial(mlp, hidden=[12, 10], dropout=0.5), {"1", "4"}),
    "cnn": (functools.partial(cnn, channels=[6, 8], hidden=10), {"0", "3", "7"}),
    "vgg": (
        functools.partial(vgg, blocks=[[4], [6], [6], [4], [8]]),
        {"block0.0", "block1.0", "block2.0", "block3.0", "block4.0"},
    ),
    "resnet": (functools.partial(resnet, depth=8), {"layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv1"}),
    "wide": (
        functools.partial(wide_resnet, depth=10, widen=1),
        {f"block{k}.layer.0.conv1" for k in (1, 2, 3)},
    ),
    "mobilenet": (functools.partial(mobilenetv2, width=1 / 4), set()),
    "bottleneck": (bottleneck, {"1.conv1", "1.conv2"}),
}


def with_numbers(network: nn.Module) -> nn.Module:
    """The network in eval mode with statistics and offsets that are not those of the start."""
    for name, tensor in network.state_dict().items():
        if "running" in name or name.endswith("bias"):
            tensor.copy_(torch.rand_like(tensor) + 0.5)
    return network.eval()


def test_the_share_follows_the_cubic_of_zhu_and_gupta() -> None:
    how = Pruning(0.8, begin=0.25, end=0.75, updates=4)
    assert [how.updates_at(t) for t in (0, 0.2, 0.25, 0.374, 0.375, 0.74, 0.75, 1)] == [0, 0, 0, 0, 1, 3, 4, 4]
    assert [how.share_after(k) for k in range(5)] == pytest.approx([0.8 * (1 - (1 - k / 4) ** 3) for k in range(5)])
    assert replace(how, schedule="linear").share_after(1) == pytest.approx(0.2)


def test_a_share_is_rounded_down_and_one_unit_stays() -> None:
    assert [removed_of(100, 0.29), removed_of(10, 0.55), removed_of(3, 0.99), removed_of(1, 0.9)] == [29, 5, 2, 0]


def test_the_smallest_go_and_what_is_gone_stays_gone() -> None:
    sizes, gone = torch.tensor([3.0, 0.0, 1.0, 2.0]), torch.tensor([True, False, False, False])
    assert smallest(sizes, gone, 2).tolist() == [True, True, False, False]


@pytest.mark.parametrize(("build", "paths"), BUILDS.values(), ids=BUILDS)
def test_a_network_without_the_units_computes_what_it_computes_with_them_at_0(build: Build, paths: set[str]) -> None:
    torch.manual_seed(0)
    whole = with_numbers(build(**PICTURES))
    masks = UnitMasks(whole)
    assert not paths or set(masks.gone) == paths
    masks.prune(0.5)
    assert all(gone.sum() == len(gone) // 2 for gone in masks.gone.values())
    state = masks.shipped({name: tensor.clone() for name, tensor in whole.state_dict().items()})
    images = torch.rand(2, *PICTURES["input_shape"])
    before = whole(images)
    with torch.no_grad():
        for name, factor in masks.factors():
            masks.parameters[name].mul_(factor)
    widths = {path: int((~gone).sum()) for path, gone in masks.gone.items()}
    small = pruned(network=build, widths=widths, **PICTURES).eval()
    small.load_state_dict(state)
    torch.testing.assert_close(small(images), whole(images), rtol=1e-4, atol=1e-4)
    assert (whole(images) - before).abs().max() > 1e-3  # what was removed took part
    assert sum(t.numel() for t in small.parameters()) < 0.8 * sum(t.numel() for t in whole.parameters())
    assert {path: small.get_submodule(path).weight.shape[0] for path in widths} == widths


def test_the_expanded_channels_of_a_mobilenet_go_with_their_depthwise_convolutions() -> None:
    units = units_of(mobilenetv2(width=1 / 4, **PICTURES))
    depthwise = [one for one in units if len(one.between) == 3]
    assert depthwise[0].made == "stage0.0.layers.0.0"
    assert depthwise[0].between == ("stage0.0.layers.0.1", "stage0.0.layers.1.0", "stage0.0.layers.1.1")
    assert depthwise[0].feed == "stage0.0.layers.2"


def test_layers_whose_outputs_are_added_or_shuffled_stay_whole() -> None:
    paths = {one.made for one in units_of(resnet(depth=8, **PICTURES))}
    assert not {path for path in paths if path.endswith(("conv2", "downsample.0"))}
    assert "conv1" not in paths  # its maps are added to those of the first block
    shuffled = {one.made for one in units_of(shufflenetv2(widths=(32, 64, 128), **PICTURES))}
    assert "stage1.1.branch.0.0" in shuffled  # feeds the depthwise convolution and the one behind it
    assert "stage1.1.branch.3.0" not in shuffled


@pytest.mark.parametrize("widths", [{"1": 0}, {"1": 13}, {"2": 4}], ids=["none", "more", "no layer"])
def test_widths_that_cannot_be_are_refused(widths: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="widths has"):
        pruned(network=functools.partial(mlp, hidden=[12]), widths=widths, **made.SIZES)


# ---------------------------------------------------------------- in training


def learner(how: Pruning, build: made.Build = made.small, **recipe: Any) -> PruningLearner:
    module = made.model(build)
    objective = Objective(Hard(), made.some_weights())
    own: Any = {"seed": 0, "objective": objective, "recipe": Recipe(**recipe)}
    return PruningLearner(module, SGD(module.parameters()), pruning=how, steps=STEPS, **own)


def trained(one: PruningLearner, **keys: Any) -> Outcome:
    (outcome,) = made.train(one, method=Hard(), **keys)
    return outcome


class Watched(PruningLearner):
    """Looks at the removed weights after each step."""

    shares: list[float]

    def update(self, rate: Any) -> None:
        super().update(rate)
        gone = self.masks.gone
        before = getattr(self, "before", gone)
        assert all((gone[path] | ~before[path]).all() for path in gone)  # none has come back
        self.before = {path: one.clone() for path, one in gone.items()}
        for p, tensors, factor in self.factors:
            zero = (factor == 0).expand_as(p)
            assert all(tensor[zero].eq(0).all() for tensor in tensors)
        share = torch.cat([one.flatten() for one in gone.values()]).double().mean()
        self.shares = [*getattr(self, "shares", []), float(share)]


@pytest.mark.parametrize("kind", ["structured", "magnitude"])
@pytest.mark.parametrize("recipe", [{}, {"ema": 0.9, "clip": 1.0}], ids=["plain", "averaged"])
def test_removed_weights_stay_0_whatever_momentum_and_weight_decay_do(kind: str, recipe: dict[str, Any]) -> None:
    one = learner(Pruning(0.5, kind=kind, begin=0.1, end=0.6, updates=3), **recipe)
    one.__class__ = Watched
    trained(one)
    assert one.shares[0] == 0  # type: ignore[attr-defined]
    assert one.shares == sorted(one.shares)  # type: ignore[attr-defined]
    assert one.shares[-1] == pytest.approx(0.5, abs=0.01)  # type: ignore[attr-defined]


def test_the_state_of_a_pruned_student_is_that_of_the_smaller_network() -> None:
    one = learner(Pruning(0.5))
    state = trained(one).state
    assert [tuple(state[name].shape) for name in ("1.weight", "3.weight", "5.weight")] == [(6, 36), (5, 6), (4, 5)]
    small = mlp(hidden=[6, 5], **made.SIZES).double()
    small.load_state_dict(state)
    images = made.images(4)
    torch.testing.assert_close(small(images), one.logits(images)[0])


def test_weights_of_one_magnitude_are_removed_in_every_layer_and_the_state_keeps_its_shapes() -> None:
    state = trained(learner(Pruning(0.9, kind="magnitude"), made.conv)).state
    for name, tensor in state.items():
        if name.endswith("weight"):
            assert int((tensor == 0).sum()) == int(0.9 * tensor.numel() + 1e-6)


@pytest.mark.parametrize("kind", ["structured", "magnitude"])
def test_a_resumed_training_ends_with_the_same_bytes(kind: str) -> None:
    make = functools.partial(learner, Pruning(0.5, kind=kind, begin=0.2, end=0.9, updates=6), made.conv, ema=0.9)
    whole, kept = trained(make()), made.InMemory()
    with pytest.raises(Interrupted):
        trained(make(), checkpoint=kept, stopping=lambda: True)
    assert any(gone.any() for gone in kept.state["learner"]["pruning"]["gone"].values())  # type: ignore[index]
    again = trained(make(), checkpoint=kept)
    assert made.difference(whole.state, again.state) == 0
    assert made.metrics(whole) == made.metrics(again)


# ---------------------------------------------------------------- configuration and runs


def test_a_number_is_the_share_and_other_keys_have_defaults() -> None:
    found = check_key("student.prune", 0.75)
    assert found == vars(Pruning(0.75))  # the defaults of both are the same
    assert check_key("student.prune", None) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1, "student.prune is 1; it must be above 0 and below 1"),
        ("half", "student.prune is 'half'; it must be a number"),
        ({"kind": "random"}, "student.prune.kind is 'random'; it must be structured or magnitude"),
        ({"amout": 0.5}, "there is no key 'student.prune.amout'"),
        ({"begin": 0.5, "end": 0.5}, "pruning must begin before it ends"),
    ],
)
def test_values_that_cannot_be_are_refused(value: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_key("student.prune", value)


def test_what_excludes_pruning_is_said_before_training() -> None:
    config = configuration(read_run(Path(__file__).parent / "old_run"))
    student = replace(config.student, prune=vars(Pruning(0.5)))
    check_pruned_run(replace(config, student=student), SoftTargets())
    excluded = {
        "training.keep=best": replace(config, student=replace(student, keep="best")),
        "training.patience": replace(config, student=replace(student, recipe={"patience": 3})),
        "training.freeze": replace(config, student=replace(student, recipe={"freeze": "1"})),
        "peers": replace(config, student=student, peers=(student, student)),
        "teacher.generations": replace(config, student=student, generations=2),
    }
    for key, one in excluded.items():
        with pytest.raises(ConfigError, match=f"student.prune does not go together with {key}: "):
            check_pruned_run(one, SoftTargets())
    with pytest.raises(ConfigError, match="whose sizes must stay"):
        check_pruned_run(replace(config, student=student), Theseus())


class Joined(nn.Module):
    """Layers in a chain, of which the network also reads what the first one gives."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 4))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images) + self.layers[1](images.flatten(1))[:, -4:]


def joined(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return Joined()


def own(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return made.Own()


@pytest.mark.parametrize(
    ("build", "said"), [(own, "has none that can be removed"), (joined, "does more with its layers than call them")]
)
def test_networks_whose_wiring_is_not_known_are_refused_and_take_magnitude(build: Build, said: str) -> None:
    config = configuration(read_run(Path(__file__).parent / "old_run"))
    images, labels = made.pictures(20, dtype=torch.float32)
    data = prepare(Source("made", images, labels, images, labels, tuple("abcd")), val_fraction=0.2)
    spec = replace(config.student, model={"_target_": f"test_pruning.{build.__name__}"}, prune=vars(Pruning(0.5)))
    with pytest.raises(ConfigError, match=said) as caught:
        check_pruning(spec, data)
    assert "kind: magnitude" in str(caught.value.hint)
    (note,) = check_pruning(replace(spec, prune=vars(Pruning(0.5, kind="magnitude"))), data)
    assert "its file, its FLOPs and its latency stay" in note


def test_a_run_ships_the_smaller_network_alone_and_distilled(tiny: Callable[..., Ran], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from kd_cli import load_student

    ran = tiny("student.prune=0.5", "student.hidden=[8]", "hydra.run.dir=pruned")
    for role in ("student", "student_alone"):
        assert ran.summary[role]["parameters"] == 64 * 4 + 4 + 4 * 10 + 10
        assert ran.summary[role]["flops"] == 2 * (64 * 4 + 4 * 10)
    assert ran.summary["student"]["pruned"]["left"] == 4
    assert sum("4 of the 8 hidden units" in note for note in ran.summary["notes"]) == 1
    weights = load_file(ran.run_dir / "student.safetensors")
    assert [list(tensor.shape) for tensor in weights.values()] == [[4], [4, 64], [10], [10, 4]]
    student = load_student(ran.run_dir)
    predictions = json.loads((ran.run_dir / "predictions.json").read_text())["student"]
    images = prepare(digits(data_dir=tmp_path), val_fraction=0.16666667).test.images
    assert student(images).argmax(1).tolist() == predictions
