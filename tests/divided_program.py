"""Started by torchrun in each of several processes: trains models alone and divided, and prints how far they differ."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kd_cli.learn.augment import Augment
from kd_cli.learn.batches import Examples
from kd_cli.learn.divided import DividedLearner
from kd_cli.learn.engine import Plan, Training, fit
from kd_cli.learn.learner import ModuleLearner
from kd_cli.learn.methods import FunctionMethod, Method, Setting, SoftTargets, Weights
from kd_cli.learn.methods.hints import Hints
from kd_cli.learn.methods.similarity import Similarity
from kd_cli.learn.objective import Objective
from kd_cli.learn.outputs import sample_outputs
from kd_cli.learn.processes import Processes
from kd_cli.learn.recipe import Recipe
from kd_cli.learn.schedules import Constant
from kd_cli.learn.teachers import CachedTeacher, LiveTeacher, Teacher
from kd_cli.models.layers import Dropout
from kd_cli.processes import launched

torch.set_num_threads(1)
EXAMPLES, BATCH = 43, 20  # in batches of 20, 20 and 3: with 4 processes one of them has no part of the last


def images() -> Examples:
    made = torch.Generator().manual_seed(0)
    return Examples(torch.randn(EXAMPLES, 2, 6, 6, generator=made), torch.randint(3, (EXAMPLES,), generator=made))


def plain() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def dropped() -> nn.Module:
    hidden = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Dropout(0.3), Dropout(0.2), nn.Linear(16, 3))
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), hidden)


def normalised_by_batch(student: Any, teacher: Any, labels: Any, T: float, alpha: float, beta: float) -> Any:
    """A user's loss that couples the examples of a batch without saying so, and draws random numbers."""
    same = student.softmax(1) @ student.softmax(1).T
    return (same - torch.eye(len(same))).square().mean() * torch.rand(()) + student.square().mean()


def soft() -> Method:
    return SoftTargets()


Case = tuple[Callable[[], nn.Module], Callable[[], Method], dict[str, Any]]
CASES: dict[str, Case] = {
    "plain": (plain, soft, {}),
    "augmented, taught live": (plain, soft, {"augment": Augment(jitter=2, flip=True), "live": True}),
    "dropout": (dropped, soft, {}),
    "batchnorm": (normalised, soft, {}),
    "batchnorm of each part": (normalised, soft, {"sync": False}),
    "accumulated, clipped, averaged": (plain, soft, {"recipe": Recipe(ema=0.9, accumulate=2, clip=0.5)}),
    "similarity": (plain, lambda: Similarity(["0"], ["0"]), {"live": True}),
    "hints": (plain, lambda: Hints(["0"], ["1"], weight=0.1), {"live": True}),
    "coupled, random loss": (plain, lambda: FunctionMethod(normalised_by_batch), {}),
}


def trained(case: str, processes: Processes | None) -> dict[str, Any]:
    make, method_of, keys = CASES[case]
    torch.manual_seed(7)
    module, method, train = make(), method_of(), images()
    torch.manual_seed(8)
    network = normalised()
    teacher: Teacher = LiveTeacher([network])
    if not keys.get("live"):
        with torch.no_grad():
            teacher = CachedTeacher(network.eval()(train.first(EXAMPLES)))
    else:
        teacher.read_features(method.teacher_features)
    two = train.first(2)
    student = sample_outputs(module, two, method.student_features, role="student")
    shown = sample_outputs(network, two, method.teacher_features, role="teacher")
    torch.manual_seed(9)
    method.setup(Setting(classes=3, examples=EXAMPLES, smallest_batch=3, student=student, teacher=shown))
    objective = Objective(method, Weights(*(torch.tensor([x]) for x in (2.0, 1.0, 0.5))))
    parameters = [*module.parameters(), *method.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    recipe = keys.get("recipe", Recipe())
    plan = Plan(3, BATCH, Constant(), keys.get("augment", Augment()), accumulate=recipe.accumulate)
    own: dict[str, Any] = {"seed": 5, "objective": objective, "recipe": recipe}
    if processes is None:
        learner = ModuleLearner(module, optimizer, **own)
    else:
        learner = DividedLearner(module, optimizer, processes=processes, sync_batchnorm=keys.get("sync", True), **own)
        learner.start_alike()
    (outcome,) = fit(learner, Training(train, train, "student", [5], plan, objective, teacher))
    state = {**outcome.state, **{f"method.{name}": t for name, t in method.state_dict().items()}}
    rows = [{key: row[key] for key in ("loss", "train_accuracy", "val_accuracy", "val_nll")} for row in outcome.history]
    return {"state": state, "rows": rows}


def difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of a weight or a buffer, or of a metric relative to it where it is above 1."""
    assert one["state"].keys() == other["state"].keys()
    tensors = [(a - other["state"][name]).abs().max().item() for name, a in one["state"].items()]
    metrics = [
        abs(a[key] - b[key]) / max(1, abs(a[key])) for a, b in zip(one["rows"], other["rows"], strict=True) for key in a
    ]
    return max(*tensors, *metrics)


def main() -> None:
    place = launched()
    assert place is not None
    processes = Processes.join(place.rank, place.size)
    found = {}
    for case in CASES:
        divided = trained(case, processes)
        first = processes.from_first(divided["state"])
        bytes_equal = all(torch.equal(t, first[name]) for name, t in divided["state"].items())
        alike = processes.from_first(None) is None and bytes_equal
        found[case] = {"difference": difference(divided, trained(case, None)), "alike": alike}
    every = [None] * place.size
    torch.distributed.all_gather_object(every, found)
    processes.leave()
    if place.leads:
        json.dump(every, sys.stdout)


if __name__ == "__main__":
    main()
