"""What the methods that read inner layers share: which layers are paired, their shapes, and vectors of unit length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kd_cli.errors import ConfigError
from kd_cli.learn.layers import Layer, last_layer, stage_layers
from kd_cli.learn.methods.base import Setting
from kd_cli.learn.methods.per_model import PerModelMethod
from kd_cli.learn.outputs import Outputs
from kd_cli.losses import single_precision
from kd_cli.models.arguments import by
from kd_cli.numeric import is_number

AUTO = "auto"
Layers = str | int | Sequence[str | int]  # module paths: one, several, or "auto"
Pair = tuple[Tensor, Tensor]  # the student's and the teacher's output [B,...] of one pair of layers


class FeatureMethod(PerModelMethod):
    """A method of one student that compares outputs of the student's layers with outputs of the teacher's.

    `student_layers` and `teacher_layers` are module paths, paired in their order, or `auto`: `find` then lists the
    layers of a network, and they are paired from the last one backwards. A subclass reads the outputs with `pairs` and
    the shapes of one example's outputs from `shapes`, which `setup` fills.
    """

    has_T = False
    needs_labels = False
    weight: float = 1.0  # of the method's term, on top of alpha

    def __init__(self, student_layers: Layers = AUTO, teacher_layers: Layers = AUTO) -> None:
        super().__init__()
        self.named = {"student": paths(student_layers), "teacher": paths(teacher_layers)}
        self.chooses_layers = None in self.named.values()
        self.student_features, self.teacher_features = (found or () for found in self.named.values())
        self.shapes: list[tuple[torch.Size, torch.Size]] = []
        self.notes: list[str] = []
        if not self.chooses_layers:
            self.check_number()

    def own_weights(self) -> Mapping[str, float]:
        return {"weight": self.weight}

    def find(self, module: nn.Module, images: Tensor) -> list[Layer]:
        """The layers that `auto` means in a network."""
        return last_layer(module, images)

    def chosen(self, pairs: list[tuple[Layer, Layer]]) -> list[tuple[Layer, Layer]]:
        """Those pairs, of layers that were found in both networks, that the method reads; all of them by default."""
        return pairs

    def choose_layers(self, student: nn.Module, teacher: nn.Module, images: Tensor) -> None:
        ours, theirs = (
            self._found(role, module, images) for role, module in (("student", student), ("teacher", teacher))
        )
        if isinstance(ours[0], Layer) and isinstance(theirs[0], Layer):
            n = min(len(ours), len(theirs))
            pairs = self.chosen(list(zip(ours[-n:], theirs[-n:], strict=True)))
            ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
        elif isinstance(ours[0], Layer):
            ours = ours[-len(theirs) :]
        else:
            theirs = theirs[-len(ours) :]
        self.student_features, self.teacher_features = (
            [layer.path if isinstance(layer, Layer) else layer for layer in layers] for layers in (ours, theirs)
        )
        self.check_number()

    def _found(self, role: str, module: nn.Module, images: Tensor) -> list[Layer] | list[str]:
        if (named := self.named[role]) is not None:
            return named
        if found := self.find(module, images):
            return found
        names = [path for path, _ in module.named_modules() if path]
        raise ConfigError(
            f"{type(self).__name__} finds no layer of the {role} to read: neither a map nor a hidden layer",
            hint=f"method.{role}_layers=PATH; the {role} has {', '.join(names[:12])}",
        )

    def check_number(self) -> None:
        """Raise ConfigError where the student's and the teacher's layers are not as many, or none."""
        ours, theirs = len(self.student_features), len(self.teacher_features)
        if ours != theirs or not ours:
            raise ConfigError(
                f"{type(self).__name__} compares pairs of layers, and there are {ours} of the student and {theirs} of "
                "the teacher",
                hint="method.student_layers=[PATH,...] and method.teacher_layers=[PATH,...] of the same length",
            )

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        assert setting.teacher is not None
        examples = setting.student.logits.shape[1]
        sides = []
        for role, names, outputs in (
            ("student", self.student_features, setting.student),
            ("teacher", self.teacher_features, setting.teacher),
        ):
            sides.append([outputs.features[path].shape[1:] for path in names])
            for path, shape in zip(names, sides[-1], strict=True):
                if not 2 <= len(shape) <= 4 or shape[0] != examples:
                    raise ConfigError(
                        f"the {role}'s module {path!r} gives {list(shape)} for {examples} examples; a feature is a map "
                        "[B,C,H,W], tokens [B,N,D] or a vector [B,D]",
                        hint=f"another module in method.{role}_layers",
                    )
        self.shapes = [(ours[1:], theirs[1:]) for ours, theirs in zip(*sides, strict=True)]
        self.notes = [
            f"{type(self).__name__}: the student's {ours} ({by(shapes[0])}) learns from the teacher's {theirs} "
            f"({by(shapes[1])})"
            for ours, theirs, shapes in zip(self.student_features, self.teacher_features, self.shapes, strict=True)
        ]
        self.notes += [
            f"{type(self).__name__} reads the {role}'s {path} as the layer behind it leaves it, which works in place"
            for role, outputs in (("student", setting.student), ("teacher", setting.teacher))
            if self.named[role] is not None  # whoever names a layer may mean it before its ReLU
            for path in sorted(outputs.overwritten)
        ]

    def need_maps(self) -> None:
        """Raise ConfigError where a layer gives no map `[B,C,H,W]`."""
        for role, names, side in (("student", self.student_features, 0), ("teacher", self.teacher_features, 1)):
            for path, shapes in zip(names, self.shapes, strict=True):
                if len(shapes[side]) != 3:
                    raise ConfigError(
                        f"{type(self).__name__} compares maps [B,C,H,W], and the {role}'s {path} gives "
                        f"{by(shapes[side])} for an example",
                        hint="convolutional networks, or a method that compares vectors: method=feature",
                    )

    def pairs(self, student: Outputs, teacher: Outputs | None) -> list[Pair]:
        """The outputs of the paired layers, in float32 at least."""
        assert teacher is not None
        return [
            (single_precision(student.features[ours]), single_precision(teacher.features[theirs]))
            for ours, theirs in zip(self.student_features, self.teacher_features, strict=True)
        ]


class Stages(FeatureMethod):
    """A feature method whose `auto` is the last map of each spatial size, or all hidden layers."""

    def find(self, module: nn.Module, images: Tensor) -> list[Layer]:
        return stage_layers(module, images)


def paths(layers: Layers) -> list[str] | None:
    """Module paths of a configuration's value, None for `auto`. Raises ConfigError."""
    if layers == AUTO:
        return None
    several = isinstance(layers, Sequence) and not isinstance(layers, str)
    found = [str(path) for path in layers] if several else [str(layers)]  # type: ignore[union-attr]
    if not found or AUTO in found or layers is None:
        raise ConfigError(f"layers are {layers!r}; they must be auto, a module path or a list of module paths")
    return found


def embed(x: Tensor) -> Tensor:
    """One vector per example, `[B,D]`: a map's mean over its positions, the mean of tokens `[B,N,D]`."""
    if x.ndim == 4:
        return x.mean((2, 3))
    return x.mean(1) if x.ndim == 3 else x


def width(shape: torch.Size) -> int:
    """The numbers of the vector at one position: a map's channels, the last dimension of tokens and vectors."""
    return shape[0] if len(shape) == 3 else shape[-1]


def same_size(a: Tensor, b: Tensor) -> Pair:
    """Two maps `[B,C,H,W]`, the larger one pooled by means to the height and the width of the smaller."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    a, b = (x if x.shape[2:] == size else F.adaptive_avg_pool2d(x, size) for x in (a, b))
    return a, b


def unit_rows(x: Tensor) -> Tensor:
    """Rows `[...,N,D]` of unit length; one shorter than 1e-4 of the mean length is divided by that instead.

    The bound keeps the gradient of a row near 0 finite. It depends on the rows' own scale: 0 has no direction.
    """
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    least = (1e-4 * length.detach().mean(-2, keepdim=True)).clamp(min=torch.finfo(x.dtype).tiny ** 0.5)
    return x / torch.maximum(length, least)


def positive(key: str, value: float, *, zero: bool = False) -> float:
    """A weight of the configuration. Raises ConfigError unless it is finite and above 0, or 0 where that is allowed."""
    if not is_number(value) or value < 0:
        raise ConfigError(f"method.{key} is {value!r}; it must be a number {'of at least' if zero else 'above'} 0")
    if value == 0 and not zero:
        raise ConfigError(f"method.{key} is 0; it must be above 0", hint="alpha=0 switches the term off")
    return float(value)


def one_of(key: str, value: object, allowed: Sequence[str]) -> str:
    """A choice of the configuration. Raises ConfigError for any other."""
    if value not in allowed:
        raise ConfigError(f"method.{key} is {value!r}; it must be {' or '.join(allowed)}")
    return str(value)
