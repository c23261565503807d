"""The student learns the teacher's last map and takes over the teacher's classifier (SimKD)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.layers import Layer, last_layer, trace
from kd_cli.learn.methods.base import Terms, Weights
from kd_cli.learn.methods.features import AUTO, FeatureMethod, positive, same_size
from kd_cli.learn.outputs import Outputs
from kd_cli.models.arguments import by
from kd_cli.numeric import is_whole

CLOSE = 1e-4  # relative difference of logits that are computed in another order


class SimKD(FeatureMethod):
    """`alpha * weight * L_map + beta * L_hard`; Chen et al. 2022 (Knowledge Distillation with the Reused Classifier).

    The student that is trained and shipped is the student's network up to its last map, a projector with a bottleneck
    of `1 / factor` of the teacher's channels, and the teacher's classifier, which stays as it is. `L_map` is the mean
    over all elements of the squared difference of the projected and the teacher's last map, the larger one pooled to
    the size of the smaller. The authors' recipe has no other term: `beta=0`.
    """

    extends_student = True

    def __init__(
        self, student_layer: str = AUTO, teacher_layer: str = AUTO, factor: int = 2, weight: float = 1.0
    ) -> None:
        super().__init__("projector", teacher_layer)
        if not is_whole(factor) or factor < 1:
            raise ConfigError(f"method.factor is {factor!r}; it must be a whole number of at least 1")
        self.student_layer, self.teacher_layer, self.factor = str(student_layer), str(teacher_layer), factor
        self.weight = positive("weight", weight)

    def extension(self, student: nn.Module, teacher: nn.Module, images: Tensor) -> dict[str, Any]:
        ours = self._map("student", student, images)
        theirs = self._map("teacher", teacher, images)
        classifier = self._classifier(teacher, theirs, images)
        return {
            "layer": ours.path,
            "dropped": after(student, ours, images),
            "channels": ours.shape[0],
            "width": theirs.shape[0],
            "hidden": max(1, theirs.shape[0] // self.factor),
            "bias": classifier.bias is not None,
        }

    def adopt(self, student: nn.Module, teacher: nn.Module) -> None:
        _, classifier = last_linear(teacher)
        student.get_submodule("classifier").load_state_dict(classifier.state_dict())

    def _map(self, role: str, module: nn.Module, images: Tensor) -> Layer:
        """The layer of the student or the teacher whose output is the last map. Raises ConfigError."""
        named = self.student_layer if role == "student" else self.teacher_layer
        called = {layer.path: layer for layer in trace(module, images)}
        found = last_layer(module, images) if named == AUTO else [called[named]] if named in called else []
        if not found or len(found[0].shape) != 3:
            has = (
                f"{found[0].path} gives {by(torch.Size(found[0].shape))} for an example" if found else "it has no such"
            )
            raise ConfigError(
                f"SimKD needs a map [B,C,H,W] of the {role} (method.{role}_layer={named}), and {has}",
                hint="a convolutional network, or a method that compares vectors: method=feature",
            )
        return found[0]

    def _classifier(self, teacher: nn.Module, layer: Layer, images: Tensor) -> nn.Linear:
        """The teacher's last linear layer. Raises ConfigError unless it classifies the mean of the map."""
        path, linear = last_linear(teacher)
        kept: list[Tensor] = []
        hook = teacher.get_submodule(layer.path).register_forward_hook(lambda _m, _a, output: kept.append(output))
        modes = {module: module.training for module in teacher.modules()}
        try:
            with torch.no_grad():
                logits = teacher.eval()(images)
                pooled = kept[0].mean((2, 3))
                again = linear(pooled) if pooled.shape[-1] == linear.in_features else None
        finally:
            hook.remove()
            for module, training in modes.items():
                module.training = training
        if again is None or not bool((again - logits).abs().max() <= CLOSE * logits.abs().max().clamp(min=CLOSE)):
            raise ConfigError(
                f"SimKD takes over a teacher's classifier of its last map's mean, and the teacher's {path} is not one "
                f"of {layer.path} ({by(torch.Size(layer.shape))})",
                hint="a teacher whose last map is pooled and classified by one linear layer, as in ResNets; or "
                "method.teacher_layer",
            )
        return linear

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        ((ours, theirs),) = self.pairs(student, teacher)
        error = F.mse_loss(*same_size(ours, theirs))
        hard = self.hard_loss(student.logits, batch.labels)
        return {"loss": weights.alpha * self.weight * error + weights.beta * hard, "map": error, "hard": hard}


def last_linear(module: nn.Module) -> tuple[str, nn.Linear]:
    """The last linear layer of a network, and its path. Raises ConfigError where there is none."""
    found = [(path, part) for path, part in module.named_modules() if isinstance(part, nn.Linear)]
    if not found:
        raise ConfigError("SimKD takes over the teacher's classifier, and the teacher has no linear layer")
    return found[-1]


def after(module: nn.Module, layer: Layer, images: Tensor) -> list[str]:
    """The modules with parameters that a network calls after a layer, without those inside other ones of them."""
    called = trace(module, images)
    place = next(i for i, one in enumerate(called) if one.path == layer.path)
    paths = [
        one.path
        for one in called[place + 1 :]
        if any(True for _ in one.module.parameters()) and not layer.path.startswith(f"{one.path}.")
    ]
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]
