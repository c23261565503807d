"""Features: outputs of inner modules, collected by forward hooks for the methods that name them."""

from __future__ import annotations

import made
import pytest
import torch
from made_features import setting
from torch import Tensor, nn

from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods import Method, Terms, Weights
from kd_cli.learn.methods.hints import Hints
from kd_cli.learn.outputs import FeatureHooks, Outputs, check_paths, sample_outputs
from kd_cli.learn.teachers import LiveTeacher
from kd_cli.losses import hard_cross_entropy


class Tuple(nn.Module):
    """A layer that returns two tensors."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class First(nn.Module):
    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        return pair[0]


def with_tuple() -> nn.Module:
    return nn.Sequential(nn.Flatten(), Tuple(), First(), nn.Linear(36, made.CLASSES))


class Unused(made.Own):
    """A network with a module that its forward pass leaves out."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(2, 2)


# ---------------------------------------------------------------- hooks


def test_hooks_keep_the_outputs_of_inner_modules_until_they_are_taken() -> None:
    module, images = made.model(made.Own), made.images(5)
    hooks = FeatureHooks(module, ["first", "norm"], role="student")
    module(images)
    found = hooks.take()
    first = module.first(images.flatten(1))
    assert found.keys() == {"first", "norm"}
    assert torch.equal(found["first"], first)
    assert torch.equal(found["norm"], module.norm(first))
    assert found["norm"].requires_grad
    hooks.take()  # of the calls above
    assert hooks.take() == {}


def test_a_path_that_does_not_exist_is_refused_with_the_nearest_ones() -> None:
    with pytest.raises(ConfigError, match=r"the student has no module 'layers\.fist'") as caught:
        check_paths(nn.ModuleDict({"layers": made.Own()}), ["layers.fist"], role="student")
    assert (caught.value.hint or "").startswith("the nearest: layers.first")
    with pytest.raises(ConfigError, match="the teacher has no module 'zzz'") as caught:
        FeatureHooks(made.Own(), ["zzz"], role="teacher")
    assert caught.value.hint == "it has first, norm, last"


def test_a_module_that_returns_a_tuple_is_refused() -> None:
    module = with_tuple()
    hooks = FeatureHooks(module, ["1"], role="teacher")
    module(made.images(2, dtype=torch.float32))
    with pytest.raises(ConfigError, match="teacher: the module '1' returns a tuple; a feature must be a tensor"):
        hooks.take()


@pytest.mark.parametrize(
    ("build", "path", "message"),
    [(with_tuple, "1", "returns a tuple"), (Unused, "spare", "does not reach its module 'spare'")],
)
def test_what_gives_no_feature_is_refused_before_training(build: made.Build, path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sample_outputs(build(), made.images(2, dtype=torch.float32), [path], role="student")


def test_sample_outputs_have_a_leading_axis_and_leave_the_network_as_it_was() -> None:
    module = made.model(made.Moody).train()
    before = {name: t.clone() for name, t in module.state_dict().items()}
    found = sample_outputs(module, made.images(2), ["layers.0", "layers.3"], role="student")
    assert found.logits.shape == (1, 2, made.CLASSES)
    assert {path: tuple(x.shape) for path, x in found.features.items()} == {
        "layers.0": (1, 2, 3, 4, 4),
        "layers.3": (1, 2, 48),
    }
    assert module.training
    assert made.difference(before, dict(module.state_dict())) == 0
    assert not any(part._forward_hooks for part in module.modules())


# ---------------------------------------------------------------- in training


class Reading(Method):
    """A user's method that compares features, and remembers what it was called with."""

    student_features = ("first",)
    teacher_features = ("layers.3",)

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Outputs, Outputs]] = []

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        assert teacher is not None
        self.calls.append((student, teacher))
        hint = (student.features["first"] - teacher.features["layers.3"][..., :9]).square().mean((1, 2))
        hard = hard_cross_entropy(student.logits, batch.labels)
        return {"loss": weights.alpha * hint + weights.beta * hard, "hint": hint, "hard": hard}


def test_features_of_student_and_live_teacher_reach_the_method() -> None:
    method, module = Reading(), made.model(made.Moody, 9)
    teacher = LiveTeacher([module])
    teacher.read_features(method.teacher_features)
    learner = made.solo(made.Own, method=method)
    outcome = made.train(learner, teacher=teacher, method=method)[0]
    assert len(method.calls) == 10
    for (student, answers), size in zip(method.calls, [16, 16, 16, 16, 11] * 2, strict=True):
        assert student.logits.shape == answers.logits.shape == (1, size, made.CLASSES)
        assert student.features["first"].shape == (1, size, 9)
        assert student.features["first"].requires_grad
        assert answers.features["layers.3"].shape == (1, size, 48)
        assert not answers.features["layers.3"].requires_grad
    assert [row["hint_loss"] for row in outcome.history][1] < outcome.history[0]["hint_loss"]


def test_a_loss_of_features_trains_the_layers_up_to_them_and_no_others() -> None:
    method = Reading()
    teacher = LiveTeacher([made.model(made.Moody, 9)])
    teacher.read_features(method.teacher_features)
    before, weights = made.model(made.Own), made.some_weights(alpha=[1], beta=[0])
    state = made.train(made.solo(made.Own, method=method), teacher=teacher, method=method, weights=weights)[0].state
    moved = {name for name, t in before.state_dict().items() if not torch.equal(t, state[name])}
    assert {"first.weight", "first.bias"} <= moved
    # AdamW's weight decay alone moves the rest
    for name in ("last.weight", "norm.weight"):
        torch.testing.assert_close(state[name], before.state_dict()[name] * (1 - 0.01 * 0.01) ** 10)


def test_an_output_that_the_next_layer_overwrites_is_named() -> None:
    def network(inplace: bool) -> nn.Module:
        torch.manual_seed(0)
        layers = nn.Conv2d(1, 3, 3), nn.ReLU(inplace=inplace), nn.Flatten(), nn.Linear(48, made.CLASSES)
        return nn.Sequential(*layers).double()

    method = Hints(student_layers=["0"], teacher_layers=["0"])
    found = setting(method, network(False), network(True))
    assert found.teacher is not None
    assert (found.student.overwritten, found.teacher.overwritten) == (frozenset(), {"0"})
    assert found.student.features["0"].min() < 0
    assert torch.equal(found.student.features["0"].relu(), found.teacher.features["0"])
    method.setup(found)
    assert method.notes[1:] == ["Hints reads the teacher's 0 as the layer behind it leaves it, which works in place"]
