"""Students that lose weights while they are trained: what is refused, what they become, and what a report says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli import processes
from kd_cli.config.build import PARTIAL
from kd_cli.config.values import PRUNED, RunConfig, TrainSpec
from kd_cli.data.sentences import listed
from kd_cli.data.source import Dataset
from kd_cli.errors import ConfigError, first_line
from kd_cli.learn.blocks import close, logits_of
from kd_cli.learn.methods import Method
from kd_cli.learn.pruning import Pruning, masks_of, removed_of
from kd_cli.models import timm
from kd_cli.models.pruned import inside, units_of
from kd_cli.runs.building import stream_of
from kd_cli.runs.models import blank_module, build_module

MAGNITUDE = "student.prune={amount: %g, kind: magnitude} sets single weights of any model to 0"


def pruned_spec(spec: TrainSpec, dataset: Dataset) -> TrainSpec:
    """The spec of a student as training leaves it: its model without the units that are removed."""
    if spec.prune is None or spec.prune["kind"] == "magnitude":
        return spec
    network = inside(blank_module(spec, dataset, role=stream_of("student")))
    amount = spec.prune["amount"]
    widths = {one.made: one.count - removed_of(one.count, amount) for one in units_of(network)}
    model = {**spec.model, PARTIAL: True}
    if model["_target_"] == timm.TARGET and model.get("pretrained") is True:
        model["pretrained"] = timm.RECORDED  # its trained weights follow
    return replace(spec, name=spec.title, model={"_target_": PRUNED, "network": model, "widths": widths})


def check_pruned_run(config: RunConfig, method: Method) -> None:
    """ConfigError for what a run with a pruned student cannot have beside it."""
    spec = config.student
    if spec.prune is None:
        return
    others = {
        "training.keep=best": (spec.keep == "best", "an epoch before the end has a larger network"),
        "training.patience": ("patience" in spec.recipe, "training may then end before the pruning"),
        "training.freeze": ("freeze" in spec.recipe, "frozen weights would be removed"),
        "peers": (bool(config.peers), "peers take every step together"),
        "teacher.generations": (config.generations > 1, "the generations would have different sizes"),
        f"method={config.method_name}": (
            method.extends_student or method.replaces_modules,
            "it joins parts of student and teacher, whose sizes must stay",
        ),
        "torchrun": (processes.count() > 1, "a pruned student is trained by one process"),
    }
    for key, (given, why) in others.items():
        if given:
            raise ConfigError(f"student.prune does not go together with {key}: {why}", hint="leave one of them out")


def check_pruning(spec: TrainSpec, dataset: Dataset) -> list[str]:
    """A sentence on what a student will lose. ConfigError where the model has nothing that can be removed.

    Structured pruning is tried on the model with its initial weights: with units set to 0 and without them it must
    give the same logits.
    """
    if spec.prune is None:
        return []
    how = Pruning(**spec.prune)
    module = build_module(spec, dataset, role=stream_of("student")).eval()
    when = f"from {how.begin:.0%} to {how.end:.0%} of its training, alone and distilled"
    if how.kind == "magnitude":
        count = sum(gone.numel() for gone in masks_of(how, module).gone.values())
        if not count:
            raise ConfigError(f"student.prune: {spec.title} has no linear or convolutional layers with weights")
        return [
            f"student.prune: {how.amount:.0%} of the {count:,} weights in layers of {spec.title} become 0 {when}; its "
            "number of parameters, its file, its FLOPs and its latency stay those of the whole network"
        ]
    units = units_of(inside(module))
    if not units:
        raise ConfigError(
            f"student.prune removes hidden units and channels between layers that follow each other, and {spec.title} "
            "has none that can be removed without knowing how its modules are joined",
            hint=MAGNITUDE % how.amount,
        )
    before = sum(p.numel() for p in module.parameters())
    small = smaller(spec, dataset, module, how)
    removed = sum(removed_of(one.count, how.amount) for one in units)
    total, after = sum(one.count for one in units), sum(p.numel() for p in small.parameters())
    return [
        f"student.prune: {removed:,} of the {total:,} hidden units or channels of {listed([u.made for u in units], 3)} "
        f"are removed {when}; {spec.title} has {before:,} parameters before and {after:,} after it"
    ]


def smaller(spec: TrainSpec, dataset: Dataset, module: nn.Module, how: Pruning) -> nn.Module:
    """The network that a module becomes; ConfigError unless it computes what the module does with units at 0."""
    masks = masks_of(how, module)
    masks.prune(how.amount)
    state = masks.shipped({name: tensor.detach().clone() for name, tensor in module.state_dict().items()})
    with torch.no_grad():
        for name, factor in masks.factors():
            masks.parameters[name].mul_(factor)
    first = next(module.parameters())
    images = torch.linspace(-1, 1, 2 * math.prod(dataset.shape), dtype=first.dtype).sin().reshape(2, *dataset.shape)
    try:
        small = build_module(pruned_spec(spec, dataset), dataset, role=stream_of("student")).eval()
        small.load_state_dict(state)
        why = None if close(logits_of(small, images), logits_of(module, images)) else "its logits are others"
    except (RuntimeError, ValueError) as error:  # of its layers, which do not fit each other
        why = first_line(error)
    if why is not None:
        raise ConfigError(
            f"student.prune: {spec.title} does more with its layers than call them in turn; without their units {why}",
            hint=MAGNITUDE % how.amount,
        )
    return small


def pruned_report(spec: TrainSpec, dataset: Dataset, state: dict[str, Tensor]) -> dict[str, Any]:
    """What a summary says of a pruned model: how, the share that is gone, and the parameters that it began with."""
    assert spec.prune is not None
    whole = blank_module(spec, dataset, role=stream_of("student"))
    facts = {"kind": spec.prune["kind"], "parameters_before": sum(p.numel() for p in whole.parameters())}
    if spec.prune["kind"] == "magnitude":
        names = list(masks_of(Pruning(**spec.prune), whole).gone)
        counts = [(state[name].numel(), int((state[name] == 0).sum())) for name in names]
        return {**facts, "weights": sum(n for n, _ in counts), "zero": sum(zero for _, zero in counts)}
    units, left = units_of(inside(whole)), pruned_spec(spec, dataset).model["widths"]
    return {**facts, "units": sum(one.count for one in units), "left": sum(left.values())}


def pruned_note(report: dict[str, Any], title: str) -> list[str]:
    """A sentence on what a student has lost."""
    found = report.get("pruned")
    if found is None:
        return []
    if found["kind"] == "magnitude":
        share = found["zero"] / found["weights"]
        return [f"{title}: {found['zero']:,} of its {found['weights']:,} weights in layers are 0 ({share:.1%})"]
    return [
        f"{title}: {found['left']:,} of {found['units']:,} hidden units or channels are left, and "
        f"{report['parameters']:,} of {found['parameters_before']:,} parameters"
    ]
