"""What a classifier sees of three classes, projected onto the plane through their templates (Müller et al. 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_cli.errors import DataError
from kd_cli.experiments.recorded import configuration, stored
from kd_cli.learn.batches import Examples
from kd_cli.learn.layers import last_layer
from kd_cli.learn.outputs import FeatureHooks
from kd_cli.report.figures import Figure
from kd_cli.report.read import Run
from kd_cli.report.svg.scatter import Cloud, scatter_chart
from kd_cli.report.svg.small import legend
from kd_cli.runs.device_data import DeviceData
from kd_cli.runs.models import load_module
from kd_cli.storage.store import Store

DRAWN = 100  # test examples of each class
THREE = (0, 1, 2)  # the classes that are drawn


@torch.no_grad()
def penultimate(module: nn.Module, examples: Examples) -> Tensor:
    """What a network's classifier sees of all examples, in eval mode: [N,D]; maps as the mean over their positions."""
    layer = last_layer(module, examples.first(2))
    if not layer:
        raise DataError("the teacher has no layer in front of its classifier", hint="a teacher with hidden layers")
    hooks = FeatureHooks(module, [layer[0].path], role="teacher")
    found = []
    for images in examples.in_order():
        module.eval()(images)
        (features,) = hooks.take().values()
        found.append(features.flatten(2).mean(2) if features.ndim > 2 else features)
    hooks.remove()
    return torch.cat(found)


def templates(module: nn.Module, classes: int) -> Tensor:
    """The weights of a network's last linear layer, a row for each class: [C,D]. Raises DataError without one."""
    found = [part for part in module.modules() if isinstance(part, nn.Linear) and part.out_features == classes]
    if not found:
        raise DataError("the teacher has no linear classifier, whose weights are templates of the classes")
    return found[-1].weight.detach()


def plane(of_three: Tensor) -> tuple[Tensor, Tensor]:
    """The first of three templates [3,D], and an orthonormal basis [2,D] of the plane through all three.

    The first direction goes from the first template to the second, the other one to the side of the third.
    """
    start, a, b = of_three.double()
    first = nn.functional.normalize(a - start, dim=0)
    rest = (b - start) - ((b - start) @ first) * first
    return start, torch.stack([first, nn.functional.normalize(rest, dim=0)])


def projected(features: Tensor, of_three: Tensor) -> Tensor:
    """Places [N,2] of features [N,D] in the plane through three templates [3,D], of which the first is at (0, 0)."""
    start, basis = plane(of_three)
    return (features.double() - start) @ basis.T


def projection_figure(smoothing: float, run: Run, data: DeviceData, classes: Sequence[int] = THREE) -> Figure:
    """A run's teacher: the first test examples of three classes in the plane through the classes' templates."""
    config = configuration(run)
    entry = stored(Store(config.store_dir), run.summary["teacher"]["fingerprint"], run)
    module = load_module(config.teacher, entry.weights(), data, role="teacher")
    labels, names = data.dataset.test.labels, data.dataset.class_names
    weights = templates(module, len(names))
    places = projected(penultimate(module, data.test), weights[list(classes)])
    clouds = []
    for k, c in enumerate(classes):
        mine = places[(labels == c).nonzero()[:DRAWN, 0]]
        clouds.append(Cloud(names[c], [(float(x), float(y)) for x, y in mine], f"c{k}"))
    title = f"Three classes before the classifier, label smoothing {smoothing:g}"
    note = (
        f"The first {DRAWN} test examples of each class, seed {run.seed}: what the classifier sees, projected onto the "
        "plane through the three classes' templates, the rows of its weights (Müller et al. 2019)."
    )
    said = legend([(cloud.name, cloud.colour, "block") for cloud in clouds])
    return Figure(title, scatter_chart(clouds, title=title), note, said)
