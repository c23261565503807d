"""What cannot be trained as a stack, and the reason that is given."""

from __future__ import annotations

from collections.abc import Callable

import made
import pytest
import torch
from stacks import ADAMW, FUSED, SGD
from torch import Tensor, nn

from kd_cli.learn.methods import Hard, Setting, SoftTargets
from kd_cli.learn.stacked.learner import why_method_not, why_not
from kd_cli.models.layers import Dropout


def reason(module: nn.Module, optimizer: made.Optimizer = SGD) -> str | None:
    return why_not(module, optimizer(module.parameters()), made.images(1, dtype=torch.float32)[0])


def test_what_stacks_has_no_reason_against_it() -> None:
    for build in (made.small, made.big, made.conv, made.Own):
        for optimizer in (SGD, ADAMW, FUSED):
            assert reason(made.model(build, dtype=torch.float32), optimizer) is None


def test_running_statistics_do_not_stack() -> None:
    found = reason(made.model(made.Moody, dtype=torch.float32))
    assert found is not None
    assert "BatchNorm2d" in found
    assert "running statistics" in found


def test_an_optimiser_that_looks_at_all_weights_at_once_does_not_stack() -> None:
    found = reason(made.model(made.small, dtype=torch.float32), torch.optim.LBFGS)
    assert found is not None
    assert "LBFGS" in found


class OwnAdam(torch.optim.Adam):
    pass


def test_an_optimiser_of_the_users_own_does_not_stack() -> None:
    found = reason(made.model(made.small, dtype=torch.float32), OwnAdam)
    assert found is not None
    assert "OwnAdam" in found


@pytest.mark.parametrize("dropout", [nn.Dropout, Dropout])
def test_dropout_in_a_forward_of_the_users_own_does_not_stack(dropout: Callable[[float], nn.Module]) -> None:
    class Net(made.Own):
        def __init__(self) -> None:
            super().__init__()
            self.drop = dropout(0.5)

        def forward(self, images: Tensor) -> Tensor:
            return self.drop(super().forward(images))

    found = reason(Net())
    assert found is not None
    assert "Net" in found
    assert "dropout" in found


def test_weights_that_the_forward_does_not_use_do_not_stack() -> None:
    class Net(made.Own):
        def __init__(self) -> None:
            super().__init__()
            self.spare = nn.Linear(2, 2)

    found = reason(Net())
    assert found is not None
    assert "does not use" in found


def test_weights_that_are_not_trained_do_not_stack() -> None:
    module = made.small()
    next(module.parameters()).requires_grad_(False)
    found = reason(module)
    assert found is not None
    assert "not trained" in found


def test_a_forward_that_torch_cannot_map_does_not_stack() -> None:
    class Net(made.Own):
        def forward(self, images: Tensor) -> Tensor:
            logits = super().forward(images)
            return logits if logits.sum() > 0 else -logits

    found = reason(Net())
    assert found is not None
    assert "vmap" in found


def test_layers_that_share_weights_do_not_stack() -> None:
    linear = nn.Linear(36, 36)
    module = nn.Sequential(nn.Flatten(), linear, nn.ReLU(), linear)
    said = why_not(module, SGD(module.parameters()), torch.zeros(made.SHAPE))
    assert said == "Sequential has layers that share weights"


class Projecting(SoftTargets):
    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        self.projection = nn.Linear(setting.classes, setting.classes)


class Reading(SoftTargets):
    student_features = ("1",)


def test_a_method_with_parameters_or_features_does_not_stack() -> None:
    projecting = Projecting()
    projecting.setup(made.a_setting(projecting, made.model(made.small)))
    assert why_method_not(projecting) == "Projecting has parameters of its own"
    assert why_method_not(Reading()) == "Reading reads features"
    assert why_method_not(SoftTargets()) is None
    assert why_method_not(Hard()) is None
