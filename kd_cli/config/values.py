"""A run's configuration as plain values: all that the rooms below know of it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kd_cli.config.fingerprint import code_version, fingerprint
from kd_cli.config.schema import Transfer

Node = dict[str, Any]  # a `_target_` and its arguments

AUTO_T = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 8.0, 10.0, 20.0)  # the temperatures that T=auto tries
AUTO_ALPHA = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)  # the weights that alpha=auto tries
FORMAT = 3  # raised when weights trained by an older version of this code must not be used again
PRUNED = "kd_cli.models.pruned.pruned"  # what wraps the model of a student that has lost units
QUANTISED = "kd_cli.models.quantised.quantised"  # what student.quantise=int8 wraps a model with
WITHOUT_BATCHNORM = {"kd_cli.models.mlp.mlp", "kd_cli.models.cnn.cnn"}  # of the shipped models


@dataclass(frozen=True)
class TrainSpec:
    """A model and how it is trained: with the data, everything that its weights depend on."""

    name: str  # the option's name: bigmlp, torchvision
    model: Node
    epochs: int
    batch_size: int
    augment: dict[str, Any]
    optimizer: Node
    schedule: Node
    seed: int
    precision: str
    keep: str = "last"
    batchnorm: str = "estimate"
    recipe: dict[str, Any] = field(default_factory=dict)  # the keys of `schema.RECIPE` that are not their defaults
    normalize: Any = "data"  # how the model wants its input: data, imagenet, none, or {mean, std}
    prune: dict[str, Any] | None = None  # the keys of `schema.Pruning`
    input: dict[str, Any] | None = None  # what it sees of an example: {size: 7} or {columns: [0, 1]}; None is all

    @property
    def title(self) -> str:
        """The model's name in tables and logs: that in its own keys (torchvision's resnet18), else the option's."""
        name = self.model.get("name")
        return name if isinstance(name, str) and name else self.name

    @property
    def quantised(self) -> bool:
        """Whether the model simulates int8."""
        return bool(self.model["_target_"] == QUANTISED)

    def identity(self, data: str) -> dict[str, Any]:
        """Return the facts that the model's fingerprint is made of; `data` is the data set's own fingerprint."""
        facts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del facts["name"]  # which does not change the weights
        if self.model["_target_"] in WITHOUT_BATCHNORM:
            facts["batchnorm"] = "running"  # which changes nothing there, and their fingerprints stay
        absent: dict[str, Any] = {
            "keep": "last",
            "batchnorm": "running",
            "normalize": "data",
            "input": None,
            "prune": None,
            "recipe": {},
        }
        for key, value in absent.items():
            if facts[key] == value:
                del facts[key]  # absent from the fingerprints made before the key existed
        code = code_version([self.model, self.optimizer, self.schedule])
        return {**facts, "data": data, "format": FORMAT, "code": code}


@dataclass(frozen=True)
class RunConfig:
    """One run, checked."""

    teacher: TrainSpec
    checkpoint: str | None
    checkpoint_key: str | None
    members: int
    combine: str
    student: TrainSpec
    transfer: Transfer
    diagnostics: bool
    cuda_graphs: bool
    dataset: Node
    val_fraction: float
    positive: str | int | None
    method_name: str
    method: Node
    T: float | str  # "auto": chosen on validation data
    alpha: float | str
    beta: float
    device: str
    precision: str
    data_dir: Path
    store_dir: Path
    every: tuple[int, float] = (1, 0.0)  # epochs or seconds between two saved states
    peers: tuple[TrainSpec, ...] = ()  # the students that learn from each other, of which the first is `student`
    chain: tuple[TrainSpec, ...] = ()  # assistants between teacher and student, each taught by the one before
    generations: int = 1  # trainings of the student's architecture; those before the last are the `chain`
    latency: bool = True  # measure how long teacher and student take
    resume: bool = False  # keep a finished run that the directory holds, repeat an unfinished one
    record: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)  # what run.json keeps for reports

    def data_key(self) -> str:
        """Return a key that is equal for runs with the same data on the same device and the same store."""
        return fingerprint(
            [
                *(self.dataset, self.val_fraction, self.positive, self.device, self.precision, self.cuda_graphs),
                *(str(self.data_dir), str(self.store_dir)),
            ]
        )

    def own_code(self) -> dict[str, str]:
        """Return the user's own modules that models, method, optimisers and schedules come from, with checksums."""
        specs = [self.teacher, self.student, *self.peers, *self.chain]
        return code_version([self.method, *([spec.model, spec.optimizer, spec.schedule] for spec in specs)])

    def links(self) -> list[RunConfig]:
        """Return the run as one teacher and one student at a time: each of the `chain`, and last the run's student."""
        own = [replace(self, student=spec, chain=(), peers=()) for spec in self.chain]
        links = [*own, replace(self, chain=())]
        first, *others = links
        taught = [
            replace(link, teacher=before.student, checkpoint=None, checkpoint_key=None, members=1)
            for before, link in zip(links, others, strict=False)
        ]
        return [first, *taught]

    def teacher_as_peer(self) -> TrainSpec:
        """Return the teacher's model as one more of the peers, trained as they are."""
        seed = self.student.seed + len(self.peers)
        teacher = self.teacher
        return replace(self.student, name=teacher.name, model=teacher.model, normalize=teacher.normalize, seed=seed)

    def settings(self) -> list[tuple[float, float]]:
        """Return the pairs of T and alpha to train: one pair, or the grid that "auto" chooses from."""
        temperatures = AUTO_T if isinstance(self.T, str) else (self.T,)
        alphas = AUTO_ALPHA if isinstance(self.alpha, str) else (self.alpha,)
        return [(T, alpha) for T in temperatures for alpha in alphas]
