"""The configuration's keys: type, default and allowed values of each one, in one place.

Hydra checks the types of these dataclasses while it composes; `check.py` checks what a field's `Allowed` says.
Imports neither torch nor Hydra.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

PRECISIONS = ("float32", "tf32", "bfloat16", "float64")
COMBINE = ("geometric", "arithmetic")  # how an ensemble's distributions are averaged
LEAST_T, MOST_T = 1e-3, 1e4  # within these, soft targets are right to 0.1 % of the gradient in float32


@dataclass(frozen=True)
class Allowed:
    """The values that a key may have, and what an error message says about them.

    A number lies within the bounds; `above` and `below` exclude the bound itself.
    """

    choices: tuple[str, ...] = ()
    whole: bool = False  # an integer
    above: float | None = None
    least: float | None = None
    below: float | None = None
    most: float | None = None
    auto: bool = False  # or the word "auto"
    classes: bool = False  # a list of classes, by number or name
    view: bool = False  # what a model sees of an example: a size, columns, a normalisation
    normalisation: bool = False  # data, imagenet, none, or a mean and a standard deviation
    pruning: bool = False  # a share of the units, or a section of `Pruning`
    interval: bool = False  # a number of epochs, or of seconds: "30s"
    what: str = ""  # the quantity, where "a number" says too little
    example: str = ""  # shown in the hint
    hint_least: str = ""
    hint_most: str = ""


def allowed(**values: Any) -> dict[str, Any]:
    """Return a field's metadata with its `Allowed`."""
    return {"allowed": Allowed(**values)}


# The upper bounds are far beyond any use: a larger value is a slip that would exhaust memory or never end.
EPOCHS = allowed(whole=True, least=1, most=10**6)
BATCH = allowed(whole=True, least=1, most=10**9)
PIXELS = allowed(whole=True, least=0, most=256, what="a number of pixels")
SEED = allowed(whole=True, least=0, most=2**63 - 1)


RECIPE = (
    "patience",
    "ema",
    "accumulate",
    "clip",
    "freeze",
    "lr_factors",
    "sampling",
    "class_weights",
    "channels_last",
    "checkpointing",
)


BATCHNORM_PARTS = "batchnorm_parts"  # in a recipe: into how many parts a batch is divided for BatchNorm's statistics


@dataclass
class Training:
    epochs: int = field(default=30, metadata=EPOCHS)
    batch_size: int = field(default=128, metadata=BATCH)
    jitter: int = field(default=0, metadata=PIXELS)
    crop: int = field(default=0, metadata=PIXELS)
    flip: bool = False
    rotate: float = field(default=0.0, metadata=allowed(least=0, most=180, what="an angle in degrees", example="15"))
    shear: float = field(default=0.0, metadata=allowed(least=0, most=89, what="an angle in degrees", example="15"))
    scale: float = field(default=0.0, metadata=allowed(least=0, most=0.99, what="a share of the size", example="0.1"))
    keep: str = field(default="last", metadata=allowed(choices=("last", "best")))
    batchnorm: str = field(default="estimate", metadata=allowed(choices=("running", "estimate")))
    patience: int = field(default=0, metadata=allowed(whole=True, least=0, most=10**6, what="a number of epochs"))
    ema: float = field(default=0.0, metadata=allowed(least=0, below=1, what="a decay", example="0.999"))
    accumulate: int = field(default=1, metadata=allowed(whole=True, least=1, most=10**6, what="a number of batches"))
    clip: float = field(default=0.0, metadata=allowed(least=0, what="a norm", example="1.0"))
    freeze: str | None = None
    lr_factors: Any = None  # factors of the learning rate by a module's path: `check_lr_factors`
    sampling: str = field(default="shuffled", metadata=allowed(choices=("shuffled", "balanced")))
    class_weights: str = field(default="none", metadata=allowed(choices=("none", "balanced")))
    sync_batchnorm: bool = True
    channels_last: bool = False
    checkpointing: bool = False

    def recipe(self) -> dict[str, Any]:
        """Return the later keys that are not their defaults, for fingerprints made before there were such keys."""
        defaults = {f.name: f.default for f in dataclasses.fields(Training) if f.name in RECIPE}
        return {name: getattr(self, name) for name, default in defaults.items() if getattr(self, name) != default}


@dataclass
class TeacherTraining(Training):
    seed: int = field(default=0, metadata=SEED)
    label_smoothing: float = field(
        default=0.0, metadata=allowed(least=0, below=1, what="a share of the targets", example="0.1")
    )

    def recipe(self) -> dict[str, Any]:
        """Return the later keys that are not their defaults, those of the teacher alone included."""
        return super().recipe() | ({"label_smoothing": self.label_smoothing} if self.label_smoothing else {})


@dataclass
class Checkpoint:
    every: Any = field(default="30s", metadata=allowed(interval=True))


@dataclass
class Transfer:
    """The examples that the student is trained on; the default is all of the training data with its labels."""

    omit: list[Any] = field(default_factory=list, metadata=allowed(classes=True))
    only: list[Any] = field(default_factory=list, metadata=allowed(classes=True))
    fraction: float = field(default=1.0, metadata=allowed(above=0, most=1))
    labels: bool = True
    data: Any = None  # the `_target_` node of a data set
    correct_bias: bool = True

    def examples(self) -> dict[str, Any]:
        """Return what selects the examples, for fingerprints; empty for all of the training data."""
        facts = {"omit": self.omit, "only": self.only, "fraction": self.fraction, "data": self.data}
        return {name: value for name, value in facts.items() if value not in ([], 1.0, None)}


@dataclass
class Schema:
    """The top-level keys. The keys of a group's option are checked by the function that its `_target_` names."""

    teacher: Any = None
    student: Any = None
    dataset: Any = None
    method: Any = None
    T: Any = field(
        default=2.0,
        metadata=allowed(
            auto=True,
            above=0,
            least=LEAST_T,
            most=MOST_T,
            example="2",
            hint_least="below it the softened targets are one-hot",
            hint_most="above it float32 cannot tell the probabilities apart; "
            "method=logits is the exact limit of a high temperature",
        ),
    )
    peers: Any = None  # a number, or names of models: `check_peers`
    alpha: Any = field(default=1.0, metadata=allowed(auto=True, least=0, example="1"))
    beta: Any = field(default=0.5, metadata=allowed(least=0, example="0.5"))
    seed: int = field(default=0, metadata=SEED)
    device: str = "auto"
    precision: str = field(default="float32", metadata=allowed(choices=PRECISIONS))
    data_dir: str | None = None
    store_dir: str | None = None
    resume: str | None = None
    dry_run: bool = False
    fail_fast: bool = False
    cuda_graphs: bool = False
    diagnostics: bool = False
    latency: bool = True
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    transfer: Transfer = field(default_factory=Transfer)
    training: Training = field(default_factory=Training)
    optimizer: Any = None
    schedule: Any = None
    teacher_training: TeacherTraining = field(default_factory=TeacherTraining)
    teacher_optimizer: Any = None
    teacher_schedule: Any = None
    preset: Any = None
    experiment: Any = None
    after_sweep: Any = None
    instead: Any = None  # the `_target_` node of a function that is run in place of a training
    loss: Any = None  # the former name of `preset`; check.py says what to write instead


# Keys inside a group's option that kd-run reads itself, before the option's target receives the rest.


@dataclass
class TeacherKeys:
    checkpoint: str | None = None
    checkpoint_key: str | None = None  # which of several weights in the checkpoint's file
    normalize: Any = field(default="data", metadata=allowed(normalisation=True))
    input: Any = field(default=None, metadata=allowed(view=True))
    members: int = field(default=1, metadata=allowed(whole=True, least=1, most=1000))
    combine: str = field(default=COMBINE[0], metadata=allowed(choices=COMBINE))
    chain: Any = None  # models between teacher and student: `check_chain`
    generations: int = field(default=1, metadata=allowed(whole=True, least=1, most=100))


@dataclass
class Pruning:
    """The keys of `student.prune`."""

    amount: float = field(default=0.5, metadata=allowed(above=0, below=1, example="0.5"))
    kind: str = field(default="structured", metadata=allowed(choices=("structured", "magnitude")))
    schedule: str = field(default="cubic", metadata=allowed(choices=("cubic", "linear")))
    begin: float = field(default=0.1, metadata=allowed(least=0, below=1, what="a share of the training", example="0.1"))
    end: float = field(default=0.5, metadata=allowed(above=0, most=1, example="0.5"))
    updates: int = field(default=20, metadata=allowed(whole=True, least=1, most=10**6))


@dataclass
class StudentKeys:
    input: Any = field(default=None, metadata=allowed(view=True))  # of the student; the teacher has its own
    quantise: str | None = field(default=None, metadata=allowed(choices=("int8",)))
    prune: Any = field(default=None, metadata=allowed(pruning=True))


@dataclass
class DatasetKeys:
    val_fraction: float = field(default=0.1, metadata=allowed(least=0, below=1))
    positive: Any = None  # the class that becomes the one label of a single-logit head


@dataclass
class OptimizerKeys:
    lr: float = field(default=1e-3, metadata=allowed(above=0, example="0.001"))


NODES = ("teacher", "student", "dataset", "method", "optimizer", "schedule", "teacher_optimizer", "teacher_schedule")
OWN_KEYS = {
    "teacher": dataclasses.asdict(TeacherKeys()),
    "student": dataclasses.asdict(StudentKeys()),
}  # added to every option of the group
DATASET_KEYS = tuple(dataclasses.asdict(DatasetKeys()))  # for kd_cli.data.prepare, not for the function that reads
