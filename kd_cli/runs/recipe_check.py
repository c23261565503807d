"""The later keys of a training checked against its model and data, and what a report says of them."""

from __future__ import annotations

from kd_cli.config.values import RunConfig, TrainSpec
from kd_cli.data.source import Dataset
from kd_cli.errors import ConfigError
from kd_cli.learn.checkpointing import blocks_of
from kd_cli.learn.engine import Outcome
from kd_cli.runs.building import HARD, build_method, frozen_parts, trained_parameters
from kd_cli.runs.models import blank_module

LABELLED = ("sampling", "class_weights")  # keys that need labels
BY_CLASS = ("sampling", "label_smoothing")  # keys that need one class for each example


def check_training(spec: TrainSpec, dataset: Dataset, role: str) -> list[str]:
    """Sentences on what a training does otherwise than plainly. ConfigError for keys that its data or model exclude."""
    section = "teacher_training" if role == "teacher" else "training"
    for key in BY_CLASS:
        if key in spec.recipe and dataset.multilabel:
            hint = f"{section}.class_weights=balanced weighs the absence and the presence of each label"
            raise ConfigError(
                f"{section}.{key} is for data with classes, and {dataset.name} has independent labels",
                hint=hint if key == "sampling" else f"leave {section}.{key} out",
            )
    check_memory(spec, dataset, role, section)
    if not {"freeze", "lr_factors"} & set(spec.recipe):
        return []
    module, key = blank_module(spec, dataset, role=role), "freeze"
    try:
        frozen_parts(spec, module)
        key = "lr_factors"
        trained_parameters(module, build_method(HARD), spec)
    except ConfigError as error:
        raise ConfigError(f"{section}.{key}: {role} {spec.title}: {error.message}", hint=error.hint) from error
    if "freeze" not in spec.recipe:
        return []
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    total = sum(p.numel() for p in module.parameters())
    return [
        f"{section}.freeze={spec.recipe['freeze']}: {trained:,} of the {total:,} weights of {spec.title} are trained"
    ]


def check_memory(spec: TrainSpec, dataset: Dataset, role: str, section: str) -> None:
    """ConfigError for the keys that say what a step keeps in memory, and how, where the model has no use for them."""
    if not {"channels_last", "checkpointing"} & set(spec.recipe):
        return
    module = blank_module(spec, dataset, role=role)
    if "channels_last" in spec.recipe and not any(p.dim() == 4 for p in module.parameters()):
        raise ConfigError(
            f"{section}.channels_last is a layout of images and convolutions, and {spec.title} has no convolution",
            hint=f"leave {section}.channels_last out",
        )
    if "checkpointing" not in spec.recipe:
        return
    if spec.quantised:
        raise ConfigError(
            f"{section}.checkpointing calls each block twice in a step, and a quantised student measures its ranges in "
            "every call",
            hint=f"leave {section}.checkpointing or student.quantise out",
        )
    if not blocks_of(module):
        raise ConfigError(
            f"{section}.checkpointing computes blocks of layers a second time, and {spec.title} has none: it is "
            "a plain chain of layers",
            hint=f"leave {section}.checkpointing out",
        )


def check_together(config: RunConfig, *, labelled: bool) -> None:
    """ConfigError for keys of the students' training that peers, or a transfer set without labels, exclude."""
    for key in ("patience", "accumulate", "checkpointing"):
        if config.peers and key in config.student.recipe:
            raise ConfigError(f"peers take every step together, and training.{key} is given", hint=f"leave {key} out")
    for key in LABELLED:
        if key in config.student.recipe and not labelled:
            raise ConfigError(f"training.{key} needs the labels of the transfer set, and it has none")


def ended_early(title: str, spec: TrainSpec, outcome: Outcome) -> list[str]:
    """A sentence on a training that ended before its last epoch for want of a better result on validation data."""
    n, patience = len(outcome.history), spec.recipe.get("patience", 0)
    if not patience or n >= spec.epochs or outcome.diverged is not None:
        return []
    return [f"{title} ended after {n} of {spec.epochs} epochs: {patience} without a better validation accuracy"]
