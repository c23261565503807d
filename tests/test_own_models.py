"""Users' models: outputs of every shape, weights that are shared, softmax at the end, sizes that do not fit."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from process import Ran
from torch import Tensor, nn

from kd_cli.errors import ConfigError
from kd_cli.learn.stacked.learner import why_not
from kd_cli.models.outputs import described, take_logits
from kd_cli.models.renormalised import Renormalised, normalisation_of
from kd_cli.models.torchvision import torchvision_model
from kd_cli.runs.model_notes import output_notes
from kd_cli.runs.models import check_inputs, forward_flops
from kd_cli.vision import import_torchvision

NETS = """
import collections, dataclasses
import torch
from torch import nn

@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor

Named = collections.namedtuple("Named", "features prediction")

class Net(nn.Module):
    def __init__(self, how, classes):
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(64, 12), nn.Linear(12, classes)

    def forward(self, x):
        h = self.first(x.flatten(1)).relu()
        z = self.last(h)
        return {
            "tensor": lambda: z,
            "pair": lambda: (z, h),
            "swapped": lambda: (h, z),
            "list": lambda: [z],
            "twins": lambda: (z, 2 * z),
            "training": lambda: (z, h) if self.training else z,
            "evaluation": lambda: z if self.training else {"out": z, "aux": 3 * z},
            "dictionary": lambda: {"hidden": h, "logits": z},
            "unnamed": lambda: {"a": h, "b": z},
            "dataclass": lambda: Output(z, h),
            "named": lambda: Named(h, z),
            "none": lambda: {"hidden": h, "loss": h.sum()},
            "text": lambda: "x",
            "softmax": lambda: z.softmax(-1),
            "sigmoid": lambda: z.sigmoid(),
            "log_softmax": lambda: z.log_softmax(-1),
            "constant": lambda: 0 * z,
        }[self.how]()

def net(*, input_shape, num_classes, how):
    return Net(how, num_classes)

class Tied(nn.Module):
    def __init__(self, how, classes):
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, classes)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        if how == "module":
            self.b = self.a
        elif how == "weight":
            self.b.weight = self.a.weight
        else:
            self.blocks = nn.ModuleList([self.a, self.b])

    def forward(self, x):
        return self.last(self.b(self.a(self.first(x.flatten(1)).relu()).relu()).relu())

def tied(*, input_shape, num_classes, how):
    return Tied(how, num_classes)
"""


@pytest.fixture
def own(kd_run: Callable[..., Ran], tmp_path: Path) -> Callable[..., Ran]:
    """Run the smallest run with a model of one's own as student or teacher."""
    (tmp_path / "own_nets_of_a_test.py").write_text(NETS)
    folder = tmp_path / "conf" / "model"
    folder.mkdir(parents=True)
    for name in ("net", "tied"):
        (folder / f"{name}.yaml").write_text(f"# own\n_target_: own_nets_of_a_test.{name}\nhow: tensor # kind\n")

    def run(*argv: str, role: str = "student", model: str = "net") -> Ran:
        small = [word for word in TINY if not word.startswith(role) or word.startswith("teacher_")]
        return kd_run("--config-dir", "conf", *small, f"{role}={model}", *argv, "store_dir=store")

    return run


# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("pair", "returns a tuple of 2, of which the first is taken as the logits"),
        ("swapped", "of which the second is taken as the logits"),
        ("list", "a list of 1, of which the first"),
        ("twins", "a tuple of 2, of which the first"),
        ("training", "of which the first is taken as the logits, in training only"),
        ("evaluation", "a dict with out, aux, of which 'out' is taken as the logits, in evaluation only"),
        ("dictionary", "a dict with hidden, logits, of which 'logits'"),
        ("unnamed", "a dict with a, b, of which 'b'"),
        ("dataclass", "an object of the class Output, of which 'logits'"),
        ("named", "a Named with features, prediction, of which 'prediction'"),
    ],
)
def test_logits_are_taken_from_what_a_model_returns_and_that_is_said(
    own: Callable[..., Ran], how: str, said: str
) -> None:
    ran = own(f"student.how={how}")
    assert ran.code == 0, ran.err
    assert any(said in note for note in ran.summary["notes"])
    assert said in ran.out + ran.err
    plain = own("student.how=tensor")
    assert not plain.summary["notes"]
    assert ran.summary["student"]["test"] == plain.summary["student"]["test"]
    assert ran.summary["student_alone"]["test"] == plain.summary["student_alone"]["test"]


def test_a_sweep_and_a_teacher_take_logits_too(own: Callable[..., Ran]) -> None:
    sweep = own("-m", "student.how=pair", "seed=0,1", "hydra.sweep.dir=sweep")
    assert sweep.code == 0, sweep.err
    ran = own("teacher.how=dictionary", "training.jitter=1", role="teacher")  # augmented: the teacher answers live
    assert ran.code == 0, ran.err
    assert any(note.startswith("teacher net returns a dict") for note in ran.summary["notes"])


@pytest.mark.parametrize("how", ["none", "text"])
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_without_logits_is_refused_before_anything_is_trained(
    own: Callable[..., Ran], tmp_path: Path, role: str, how: str
) -> None:
    ran = own(f"{role}.how={how}", role=role)
    assert ran.code == 1
    assert "no tensor in it is [batch, 10]" in ran.err
    assert "hint: " in ran.err
    assert "Traceback" not in ran.err
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_googlenet_of_torchvision_itself_gives_its_logits() -> None:
    with torch.device("meta"):
        network = import_torchvision().models.googlenet(num_classes=7, init_weights=True)
        images = torch.empty(2, 3, 64, 64)
    assert described(network.forward(images), 7)[0].shape == (2, 7)
    assert take_logits(network, 7)(images).shape == (2, 7)


def test_taking_logits_leaves_a_tensor_and_the_names_of_weights_as_they_are() -> None:
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    names, x = list(plain.state_dict()), torch.rand(2, 4)
    before = plain(x)
    assert take_logits(plain, 3)(x).equal(before)
    assert list(plain.state_dict()) == names


# ---------------------------------------------------------------- probabilities


@pytest.mark.parametrize(
    ("how", "said"),
    [("softmax", "ends in a softmax"), ("sigmoid", "as after a sigmoid"), ("constant", "the same outputs for every")],
)
@pytest.mark.parametrize("role", ["student", "teacher"])
def test_outputs_that_are_no_logits_are_noticed(own: Callable[..., Ran], role: str, how: str, said: str) -> None:
    ran = own(f"{role}.how={how}", role=role)
    assert ran.code == 0, ran.err
    assert any(said in note and role in note for note in ran.summary["notes"])
    assert said in ran.out + ran.err


def test_logits_and_logarithms_of_probabilities_are_no_reason_for_a_note() -> None:
    logits = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    assert not output_notes(logits, title="teacher")
    assert not output_notes(logits.log_softmax(-1), title="teacher")  # the softmax at T of both is the same
    assert output_notes(logits.softmax(-1), title="teacher")


# ---------------------------------------------------------------- shared weights


@pytest.mark.parametrize("how", ["module", "weight", "list"])
@pytest.mark.parametrize("form", ["sweep", "T=auto", "members"])
@pytest.mark.slow
def test_models_that_share_weights_do_not_stack_and_that_is_said(own: Callable[..., Ran], how: str, form: str) -> None:
    if form == "members":
        ran = own("teacher.members=2", f"teacher.how={how}", role="teacher", model="tied")
    else:
        argv = ["-m", "seed=0,1", "hydra.sweep.dir=sweep"] if form == "sweep" else ["T=auto"]
        ran = own(*argv, f"student.how={how}", model="tied")
    assert ran.code == 0, ran.err
    way = "side by side on the same batches" if form == "T=auto" else "run one by one"  # the others' seeds differ
    assert f"{way}: Tied has layers that share weights" in ran.out + ran.err


def test_a_tied_weight_is_a_reason_not_to_stack_and_a_layer_used_twice_is_none() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.a(x).tanh())

    tied = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    tied[2].weight = tied[0].weight
    for module, reason in ((Twice(), None), (tied, "Sequential has layers that share weights")):
        assert why_not(module, torch.optim.SGD(module.parameters(), 0.1), torch.rand(4)) == reason


# ---------------------------------------------------------------- sizes and operations


@pytest.mark.parametrize(
    ("name", "size"), [("vit_b_16", 32), ("maxvit_t", 224), ("inception_v3", 75), ("alexnet", 64), ("vgg11", 32)]
)
def test_the_hint_for_small_images_is_the_smallest_usual_size_that_works(name: str, size: int) -> None:
    with pytest.raises(ConfigError, match=f"{name} cannot take images of the shape 1x8x8") as caught:
        torchvision_model(input_shape=(1, 8, 8), num_classes=10, name=name)
    assert caught.value.hint is not None
    assert f"image_size={size} " in caught.value.hint
    with torch.device("meta"):
        torchvision_model(input_shape=(1, 8, 8), num_classes=10, name=name, image_size=size)


def test_a_network_too_large_for_the_default_data_is_refused_in_two_lines(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run(*[word for word in TINY if "student" not in word], "student=torchvision", "student.name=alexnet")
    assert ran.code == 1
    assert "error: alexnet cannot take images of the shape 1x8x8" in ran.err
    assert "hint: student.image_size=64 " in ran.err
    assert "Traceback" not in ran.err


def recurrent(kind: type[nn.RNNBase], **keys: Any) -> nn.Module:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = kind(8, 16, batch_first=True, **keys)
            self.out = nn.Linear(16 * (1 + self.rnn.bidirectional), 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.rnn(x)[0][:, -1])

    return Last()


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)
        self.encoder, self.out = nn.TransformerEncoder(layer, 1), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(x).mean(1))


# A multiply-add is two. Of a recurrent layer: steps * gates * hidden * (input + hidden).
COUNTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "LSTM": (lambda: recurrent(nn.LSTM), (8, 8), 2 * 8 * 4 * 16 * (8 + 16) + 2 * 160),
    "GRU": (lambda: recurrent(nn.GRU), (8, 8), 2 * 8 * 3 * 16 * (8 + 16) + 2 * 160),
    "LSTM of two layers and directions": (
        lambda: recurrent(nn.LSTM, num_layers=2, bidirectional=True),
        (8, 8),
        2 * 2 * 8 * 4 * 16 * ((8 + 16) + (32 + 16)) + 2 * 320,
    ),
    # four projections of 8x8, two products of attention, and 8x32 and back, for 8 positions
    "TransformerEncoder": (Encoder, (8, 8), 2 * 8 * (4 * 64 + 2 * 8 * 8 + 2 * 256) + 2 * 80),
    "convolution": (
        lambda: nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 36, 10)),
        (1, 8, 8),
        2 * 36 * 9 * 5 + 2 * 1800,
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_operations_are_counted_where_torch_fuses_them(name: str) -> None:
    build, shape, flops = COUNTED[name]
    module = build().eval()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert forward_flops(module, torch.rand(shape)) == flops
    assert all(value.equal(before[key]) for key, value in module.state_dict().items())


def test_a_vision_transformer_has_the_operations_of_its_paper() -> None:
    network = import_torchvision().models.vit_b_16(image_size=32, num_classes=10).eval()
    assert forward_flops(network, torch.rand(3, 32, 32)) == 855_002_112


def test_a_forward_that_needs_numbers_is_counted_as_it_runs() -> None:
    class Needs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if float(x.sum()) >= 0 else self.a(self.a.weight)

    assert forward_flops(Needs(), torch.ones(4)) == 24


# ---------------------------------------------------------------- normalisation


def test_a_renormalised_network_sees_its_own_normalisation() -> None:
    pixels = torch.rand(5, 3, 4, 4)
    data, own = ((0.4, 0.5, 0.6), (0.2, 0.3, 0.4)), normalisation_of("imagenet", data_mean=(0,) * 3, data_std=(1,) * 3)
    assert own is not None

    def normal(mean: Any, std: Any) -> Tensor:
        return (pixels - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1)

    module = Renormalised(nn.Identity(), data_mean=data[0], data_std=data[1], mean=own[0], std=own[1])
    torch.testing.assert_close(module(normal(*data)), normal(*own))
    assert normalisation_of("data", data_mean=data[0], data_std=data[1]) is None
    assert normalisation_of("none", data_mean=data[0], data_std=data[1]) == ([0.0] * 3, [1.0] * 3)
    assert normalisation_of({"mean": 0.5, "std": [1, 2, 4]}, data_mean=data[0], data_std=data[1]) == (
        [0.5] * 3,
        [1.0, 2.0, 4.0],
    )


@pytest.mark.parametrize(
    ("forward", "said"),
    [
        ("images, extra", "its forward takes images, extra, and it is called with one input, the images"),
        ("images, *, mask", "its forward takes images, mask, and it is called with one input, the images"),
        ("", "its forward takes no input"),
        ("images, extra=None", None),
        ("*inputs", None),
    ],
)
def test_a_model_of_several_inputs_is_refused_in_words(forward: str, said: str | None) -> None:
    space: dict[str, Any] = {"nn": nn}
    exec(f"class Own(nn.Module):\n    def forward({f'self, {forward}'.rstrip(', ')}):\n        return 0", space)
    if said is None:
        check_inputs(space["Own"](), where="student=own")
        return
    with pytest.raises(ConfigError, match=f"student=own: {re.escape(said)}"):
        check_inputs(space["Own"](), where="student=own")
