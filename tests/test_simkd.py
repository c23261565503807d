"""SimKD: the student that takes over the teacher's classifier, its loss, what is shipped, and what is refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import made
import numpy
import pytest
import torch
from made_features import big, random, ready
from process import Ran, Running
from safetensors.torch import load_file
from test_own_methods import KILLED
from torch import Tensor, nn
from torch.nn import functional as F

from kd_cli import losses
from kd_cli.data.digits import digits
from kd_cli.errors import ConfigError
from kd_cli.export.forms import onnx_bytes, pt2_bytes, run_onnx, run_pt2
from kd_cli.export.load import load_student
from kd_cli.export.student import Student
from kd_cli.learn.batches import Batch
from kd_cli.learn.learner import ModuleLearner
from kd_cli.learn.methods import Method, Scheduled, SimKD, SoftTargets, Sum
from kd_cli.learn.objective import Objective
from kd_cli.learn.outputs import Outputs
from kd_cli.learn.teachers import LiveTeacher
from kd_cli.models.cnn import cnn
from kd_cli.models.extended import ExtendedStudent, extended_student


class Pooled(nn.Module):
    """A network with a forward of its own, whose last map is pooled and classified by one linear layer."""

    def __init__(self, input_shape: tuple[int, ...] = made.SHAPE, num_classes: int = made.CLASSES) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(input_shape[0], 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        self.fc = nn.Linear(6, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.act(self.norm(self.conv(images))).mean((2, 3)))


def moved_pooled(seed: int = 9) -> nn.Module:
    """A `Pooled` whose statistics are not those of the start."""
    teacher = made.model(Pooled, seed)
    teacher.train()(made.images(75))
    return teacher.eval()


def extended(build: Callable[..., nn.Module], method: SimKD, teacher: nn.Module, seed: int = 0) -> ExtendedStudent:
    plan = method.extension(made.model(lambda: build(**made.SIZES), seed), teacher, made.images(2))
    student = made.model(lambda: extended_student(student=build, **made.SIZES, **plan), seed)
    assert isinstance(student, ExtendedStudent)
    method.adopt(student, teacher)
    return student


small_cnn = partial(cnn, channels=[3, 4], hidden=8)


# ---------------------------------------------------------------- the network


def test_a_sequence_ends_at_its_last_map() -> None:
    student = extended(small_cnn, SimKD(), moved_pooled())
    alone = made.model(lambda: small_cnn(**made.SIZES))
    assert isinstance(alone, nn.Sequential)
    assert isinstance(student.backbone, nn.Sequential)
    assert [type(layer) for layer in student.backbone] == [type(layer) for layer in alone][: len(student.backbone)]
    assert not any(isinstance(layer, nn.Linear | nn.Flatten) for layer in student.backbone)
    for name, value in student.backbone.state_dict().items():
        assert value.equal(alone.state_dict()[name])  # the initial weights are those of the student alone


def test_what_follows_the_map_in_another_network_is_dropped() -> None:
    student = extended(Pooled, SimKD(), moved_pooled())
    assert isinstance(student.backbone.get_submodule("fc"), nn.Identity)
    images = made.images(5)
    student.eval()
    backbone = student.backbone
    assert isinstance(backbone, Pooled)
    features = backbone.act(backbone.norm(backbone.conv(images)))
    by_hand = F.linear(student.projector(features).mean((2, 3)), student.classifier.weight, student.classifier.bias)
    torch.testing.assert_close(student(images), by_hand)


def test_a_student_with_the_teachers_map_answers_as_the_teacher() -> None:
    teacher = moved_pooled()
    student = extended(Pooled, SimKD(), teacher)
    student.backbone.load_state_dict({k: v for k, v in teacher.state_dict().items() if not k.startswith("fc")})
    student.projector = nn.Identity()
    images = made.images(5)
    torch.testing.assert_close(student.eval()(images), teacher(images))


def test_the_projector_has_a_bottleneck_and_the_classifier_is_not_trained() -> None:
    student = extended(small_cnn, SimKD(factor=3), moved_pooled())
    shapes = [tuple(layer.weight.shape) for layer in student.projector.children() if isinstance(layer, nn.Conv2d)]
    assert shapes == [(2, 4, 1, 1), (2, 2, 3, 3), (6, 2, 1, 1)]
    assert not any(p.requires_grad for p in student.classifier.parameters())
    assert all(p.requires_grad for p in student.backbone.parameters())


# ---------------------------------------------------------------- the loss


def test_the_loss_is_the_mean_squared_difference_of_the_maps() -> None:
    method, teacher = SimKD(weight=3), moved_pooled()
    student = extended(small_cnn, method, teacher)
    ready(method, student, teacher)
    assert list(method.student_features) == ["projector"]
    (path,) = method.teacher_features
    ours, theirs, logits = random(1, 4, 6, 2, 2), random(1, 4, 6, 4, 4, seed=1), random(1, 4, made.CLASSES, seed=2)
    labels = torch.tensor([[0, 1, 2, 3]])
    terms = method(
        Outputs(logits, {"projector": ours}),
        Outputs(logits, {path: theirs}),
        Batch(labels, labels, labels),
        made.some_weights(alpha=[0.7], beta=[0.4]),
    )
    pooled = theirs.unflatten(-1, (2, 2)).unflatten(-3, (2, 2)).mean((-1, -3))
    by_hand = (ours - pooled).square().mean()
    hard = losses.hard_cross_entropy(logits[0], labels[0])
    torch.testing.assert_close(terms["map"][0], by_hand)
    torch.testing.assert_close(terms["loss"][0], 0.7 * 3 * by_hand + 0.4 * hard)


def test_training_moves_all_but_the_classifier() -> None:
    method, teacher = SimKD(), moved_pooled()
    student = extended(small_cnn, method, teacher)
    ready(method, student, teacher)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01, weight_decay=0.1)
    learner = ModuleLearner(student, optimizer, seed=0, objective=Objective(method, made.some_weights()))
    live = LiveTeacher([teacher])
    live.read_features(method.teacher_features)
    (outcome,) = made.train(learner, teacher=live, method=method)
    for name, value in outcome.state.items():
        assert value.equal(before[name]) == name.startswith("classifier")
    assert outcome.history[1]["map_loss"] < outcome.history[0]["map_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pt2", "onnx"])
@pytest.mark.parametrize(("build", "own"), [(small_cnn, [3, 4]), (Pooled, [6])], ids=["sequence", "hook"])
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")
def test_an_exported_student_holds_the_projector_and_the_teachers_classifier(
    build: Callable[..., nn.Module], own: list[int], form: str, tmp_path: Path
) -> None:
    teacher = moved_pooled().float()
    network = extended(build, SimKD(), moved_pooled()).float().requires_grad_(False)
    shape, classes = made.SHAPE, tuple(map(str, range(made.CLASSES)))
    numbers = {"mean": [0.5] * shape[0], "std": [0.25] * shape[0], "values": "bytes"}
    student = Student(network, **numbers, classes=classes, input_shape=shape, dtype=torch.float32).eval()
    path = tmp_path / f"student.{form}"
    if form == "onnx":
        onnx = pytest.importorskip("onnx")
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
        path.write_bytes(onnx_bytes(student, {}))
        constants = [onnx.numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer]
    else:
        path.write_bytes(pt2_bytes(student))
        constants = [value.numpy() for value in torch.export.load(path).state_dict.values()]
    weight = teacher.state_dict()["fc.weight"].numpy()
    assert any(numpy.array_equal(one, known) for one in constants for known in (weight, weight.T))
    kernels = sorted(len(one) for one in constants if one.ndim == 4)  # of the student's own layers, and the projector's
    assert kernels == sorted(
        [*own, *(layer.out_channels for layer in network.projector if isinstance(layer, nn.Conv2d))]
    )
    images = torch.randint(0, 256, (5, *shape), dtype=torch.uint8)
    found = (run_onnx if form == "onnx" else run_pt2)(path)(images)
    torch.testing.assert_close(found, student(images), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- what it cannot do


def linear_net(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, num_classes))


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (small_cnn, big, "the teacher's 9 is not one of 5"),
        (linear_net, Pooled, "SimKD needs a map \\[B,C,H,W\\] of the student"),
        (small_cnn, lambda: linear_net(**made.SIZES), "SimKD needs a map \\[B,C,H,W\\] of the teacher"),
    ],
)
def test_networks_without_such_a_map_are_refused(
    student: Callable[..., nn.Module], teacher: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        extended(student, SimKD(), made.model(teacher))


@pytest.mark.parametrize(
    "make", [lambda: Sum(a=SimKD(), b=SoftTargets()), lambda: Scheduled(SimKD()), lambda: SimKD(factor=0)]
)
def test_it_is_no_part_of_another_method(make: Callable[[], Method]) -> None:
    with pytest.raises(ConfigError, match=r"cannot be a part of another method|method.factor is 0"):
        make()


# ---------------------------------------------------------------- runs

NET = """
from torch import nn


def pooled(input_shape, num_classes, width=6):
    layers = nn.Conv2d(input_shape[0], width, 3), nn.BatchNorm2d(width), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
"""
SIMKD = [
    *("method=simkd", "beta=0", "teacher=pooled", "student=cnn", "student.channels=[4,6]", "student.hidden=8"),
    *("training.epochs=3", "teacher_training.epochs=1", "training.batch_size=250", "device=cpu"),
]


def test_a_run_ships_backbone_projector_and_the_teachers_classifier(
    kd_run: Callable[..., Ran], own_code: Callable[..., list[str]]
) -> None:
    flags = own_code({"net.py": NET, "model/pooled": "# pooled\n_target_: net.pooled\nwidth: 6\n"})
    ran = kd_run(*flags, *SIMKD)
    assert ran.code == 0, ran.err
    shipped = load_file(ran.run_dir / "student.safetensors")
    (stored,) = (
        weights
        for path in Path(os.environ["KD_STORE"]).glob("*/weights.safetensors")
        if "5.weight" in (weights := load_file(path))
    )
    assert shipped["classifier.weight"].equal(stored["5.weight"])
    assert shipped["classifier.bias"].equal(stored["5.bias"])
    parameters = {name: t for name, t in shipped.items() if "running" not in name and "num_batches" not in name}
    report = ran.summary["student"]
    assert sum(t.numel() for t in parameters.values()) == report["parameters"]
    assert report["flops"] != ran.summary["student_alone"]["flops"]
    said = "the shipped student is its network up to the last map (262 parameters), a projector (141) and the teacher's"
    assert sum(note.startswith(said) for note in ran.summary["notes"]) == 1
    student = load_student(ran.run_dir)  # without trust: the teacher's code is not needed
    source = digits(data_dir="")
    logits = torch.cat([student(part) for part in source.test_images.split(100)])
    assert int((logits.argmax(-1) != source.test_labels).sum()) == report["test"]["errors"]


def test_a_killed_run_goes_on_to_the_same_bytes(
    start: Callable[..., Running], own_code: Callable[..., list[str]], tmp_path: Path
) -> None:
    files = {"net.py": NET, "model/pooled": "# pooled\n_target_: net.pooled\nwidth: 6\n"}
    work = tmp_path / "work"
    flags = own_code(files, folder=work)
    argv = [*flags, *SIMKD, "checkpoint.every=1", "hydra.run.dir=out", "store_dir=store"]
    whole = start(*argv, folder=work).wait()
    assert whole.code == 0, whole.err
    weights = (work / "out/student.safetensors").read_bytes()
    shutil.rmtree(work)
    own_code(files, folder=work)
    at = 1 + 3 + 2  # the teacher's epoch, the student alone's three, the student's second
    killed = start(*argv, folder=work, prelude=KILLED.format(at=at)).wait()
    assert killed.code == -9
    assert start("resume=out", folder=work).wait().code == 0
    assert (work / "out/student.safetensors").read_bytes() == weights


def test_a_teacher_with_hidden_layers_behind_its_map_is_refused_before_training(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run(*SIMKD[:2], "teacher=cnn", "student=cnn", "device=cpu")
    assert ran.code != 0
    assert "SimKD takes over a teacher's classifier of its last map's mean" in ran.err
    assert "epochs in" not in ran.err
