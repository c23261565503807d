"""Specialists beside a generalist (Hinton 2015, section 5), and their joint prediction distilled into one student."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.config.values import RunConfig
from kd_cli.errors import ConfigError
from kd_cli.experiments.clusters import clusters
from kd_cli.experiments.recorded import completed, configuration, stored
from kd_cli.experiments.specialist_pages import page
from kd_cli.learn.engine import fit
from kd_cli.learn.methods import Weights
from kd_cli.learn.objective import Objective
from kd_cli.learn.specialists import (
    Classes,
    Committee,
    SoftOutside,
    SpecialistLoss,
    SpecialistTraining,
    covariance,
    families_found,
    from_generalist,
)
from kd_cli.learn.stacked.learner import why_not
from kd_cli.learn.teachers import LiveTeacher, Teacher
from kd_cli.numeric import is_number, is_whole
from kd_cli.report.read import Run
from kd_cli.runs.building import HARD, TrainingTask, make_learner, make_optimizer, make_plan, make_training
from kd_cli.runs.device_data import DeviceData, load_device_data
from kd_cli.runs.models import build_module, load_module, predict_module
from kd_cli.storage.files import write_json, write_text
from kd_cli.storage.store import Store

log = logging.getLogger(__name__)

COMBINE = ("arithmetic", "geometric")  # q minimises KL(p, q) or KL(q, p)
OUTSIDE = ("dustbin", "soft")  # what specialists learn of classes that they do not own
TOLERANCE = 1e-5  # of the joint prediction's probabilities
Results = dict[str, Any]


def specialists(
    folder: Path,
    *,
    count: int = 4,
    size: int | None = None,
    best: int = 1,
    cluster_T: float = 1.0,
    epochs: int = 10,
    outside: str = "dustbin",
    distil: bool = True,
    combine: str = "arithmetic",
) -> list[Path]:
    """Train specialists of each run's teacher, the generalist, and compare accuracy without and with them.

    `count` clusters of classes come from K-means on the columns of the covariance of the generalist's predictions on
    the training part, at the temperature `cluster_T`; a specialist has a cluster's classes, or with `size` the classes
    nearest to its centre. Each is trained for `epochs` epochs with the teacher's recipe. Those active for an image have
    one of the generalist's `best` likeliest classes. `outside="soft"` gives specialists all classes, and the
    generalist's soft targets at the run's T for those that they do not own (section 6.1). With `distil`, q is distilled
    into the run's student as the generalist was. `combine="geometric"` minimises KL(q, p) in place of KL(p, q). Writes
    specialists.json and specialists.html into the folder. Raises ConfigError and DataError.
    """
    runs = completed(folder)
    config = configuration(runs[0])
    data = load_device_data(config)
    team = Team(count, size, best, cluster_T, epochs, outside, distil, combine)
    team.check(data)
    store = Store(config.store_dir)
    found = [of_run(run, data, store, team) for run in runs]
    table = {
        "dataset": data.dataset.name,
        "classes": list(data.dataset.class_names),
        "families": families(data.dataset.class_names),
        **vars(team),
        "runs": found,
    }
    write_json(folder / "specialists.json", table)
    write_text(folder / "specialists.html", page(table))
    return [folder / "specialists.html", folder / "specialists.json"]


@dataclass(frozen=True)
class Team:
    """Which specialists there are, and how they are trained and asked: the keys of `specialists`."""

    count: int
    size: int | None
    best: int
    cluster_T: float
    epochs: int
    outside: str
    distil: bool
    combine: str

    def check(self, data: DeviceData) -> None:
        """Raise ConfigError for keys that the data's classes do not allow."""
        classes = data.dataset.classes
        if data.dataset.multilabel:
            raise ConfigError("specialists are of classes, and the data have independent labels")
        for key, value, most in (
            ("count", self.count, classes - 1),
            ("size", 1 if self.size is None else self.size, classes - 1),
            ("best", self.best, classes),
            ("epochs", self.epochs, 10**6),
        ):
            if not is_whole(value) or not 1 <= value <= most:
                raise ConfigError(f"after_sweep.{key} is {value!r}; it must be a whole number from 1 to {most:,}")
        if not is_number(self.cluster_T) or self.cluster_T <= 0:
            raise ConfigError(f"after_sweep.cluster_T is {self.cluster_T!r}; it must be a number above 0")
        if self.outside not in OUTSIDE:
            raise ConfigError(f"after_sweep.outside is {self.outside!r}; it must be {' or '.join(OUTSIDE)}")

        if self.combine not in COMBINE:
            raise ConfigError(f"after_sweep.combine is {self.combine!r}; it must be {' or '.join(COMBINE)}")

    @property
    def whole(self) -> bool:
        """Whether specialists have logits of all classes."""
        return self.outside == "soft"


def of_run(run: Run, data: DeviceData, store: Store, team: Team) -> Results:
    """The results of one run's generalist with specialists."""
    config = configuration(run)
    entry = stored(store, run.summary["teacher"]["fingerprint"], run)
    generalist = load_module(config.teacher, entry.weights(), data, role="teacher")
    predictions = (entry.outputs()["train"] / team.cluster_T).softmax(1)
    groups = clusters(covariance(predictions), team.count, size=team.size, seed=config.teacher.seed)
    counts = torch.bincount(data.dataset.train.labels, minlength=data.dataset.classes)
    classes = Classes.of(groups, counts)
    modules = train_specialists(config, data, generalist, classes, team)
    committee = Committee(
        generalist, modules, classes, best=team.best, tolerance=TOLERANCE, whole=team.whole, combine=team.combine
    )
    found: Results = {"seed": run.seed, "groups": [list(some) for some in groups]}
    if (known := families(data.dataset.class_names)) is not None:
        found |= families_found(groups, known)
    for part, examples in (("val", data.val), ("test", data.test)):
        if len(examples):
            p = predict_module(generalist, examples).softmax(1)
            q = committee.joined(p, torch.stack([predict_module(module, examples) for module in modules]))
            found[part] = compared(p, q, examples.labels.cpu(), classes)
    for name, role in (("student_alone", "student_alone"), ("student_of_generalist", "student")):
        found[name] = run.test(role, "accuracy")
    if team.distil:
        logits = distilled(config, data, committee)
        found["student_of_q"] = share(logits.argmax(1) == data.test.labels.cpu())
    log.info("%s: %d specialists: %s", run.path.name, len(modules), brief(found))
    return found


def brief(found: Results) -> str:
    """The results of a run in a line."""
    test = found["test"]
    words = [f"test accuracy {test['generalist']:.2%}, with specialists {test['with_specialists']:.2%}"]
    if "student_of_q" in found:
        words.append(f"one student of q {found['student_of_q']:.2%}")
    return ", ".join(words)


# ---------------------------------------------------------------- training


def train_specialists(
    config: RunConfig, data: DeviceData, generalist: nn.Module, classes: Classes, team: Team
) -> list[nn.Module]:
    """The specialists of these classes, started from the generalist: as one stack where the architecture allows it."""
    size = data.dataset.classes if team.whole else classes.size
    local = replace(data.dataset, class_names=tuple(f"logit {k}" for k in range(size)))
    spec = replace(config.teacher, epochs=team.epochs)
    weights = generalist.state_dict()
    modules = []
    for own in classes.own:
        module = build_module(spec, local, role="specialist", device=data.device)
        try:
            state = {name: from_generalist(weights[name], t, own) for name, t in module.state_dict().items()}
        except ValueError as error:
            raise ConfigError(
                f"teacher={config.teacher.name} cannot start a specialist: a weight of shape {error}",
                hint="a model whose last layer alone depends on the number of classes",
            ) from error
        module.load_state_dict(state)
        modules.append(module)
    probe = make_optimizer(TrainingTask(spec, HARD), "teacher", modules[0].parameters())
    reason = why_not(modules[0], probe, data.train.first(1)[0])
    every = range(len(modules))
    if reason is not None:
        log.info("specialists are trained one after another: %s", reason)
    for part in [every] if reason is None else [[m] for m in every]:
        teacher = LiveTeacher([generalist]) if team.whole else None
        train_together(config, data, [modules[m] for m in part], classes.some(part), part, team, teacher)
    return modules


def train_together(
    config: RunConfig,
    data: DeviceData,
    modules: Sequence[nn.Module],
    classes: Classes,
    numbers: Sequence[int],
    team: Team,
    teacher: Teacher | None,
) -> None:
    """Train specialists of these classes, each on its own sample; their modules get the trained weights.

    `numbers` are theirs among all of a run, which their random numbers depend on.
    """
    seeds = [1000 * (config.teacher.seed + 1) + m for m in numbers]
    tasks = [TrainingTask(replace(config.teacher, epochs=team.epochs, seed=seed), HARD) for seed in seeds]
    ones = torch.ones(len(numbers), dtype=data.dtype, device=data.device)
    method = SoftOutside(classes) if team.whole else SpecialistLoss(classes)
    objective = Objective(method.to(data.device), Weights(number(config.T) * ones, ones, ones))
    learner = make_learner(data, tasks, "teacher", modules, objective)
    training = SpecialistTraining(
        data.train,
        data.val.subset(torch.arange(0)),  # whose labels are of all classes
        "specialist",
        seeds,
        replace(make_plan(data, tasks[0].spec, "teacher"), keep_best=False),
        objective,
        teacher,
        owned=classes.owned(),
    )
    for module, outcome in zip(modules, fit(learner, training), strict=True):
        module.load_state_dict(outcome.state)


def number(value: float | str) -> float:
    """T or alpha of a run. Raises ConfigError for auto, which stands for several."""
    if isinstance(value, str):
        raise ConfigError("specialists need numbers for T and alpha, not auto")
    return value


def distilled(config: RunConfig, data: DeviceData, committee: Committee) -> Tensor:
    """Test logits [M,C] of the run's student, distilled from the joint prediction q with the run's T and weights."""
    T, alpha = number(config.T), number(config.alpha)
    task = TrainingTask(config.student, config.method, T=T, alpha=alpha, beta=config.beta)
    learner, training = make_training(data, [task], "student", teacher=committee)
    (outcome,) = fit(learner, training)
    return predict_module(load_module(config.student, outcome.state, data, role="student"), data.test)


# ---------------------------------------------------------------- results


def compared(p: Tensor, q: Tensor, labels: Tensor, classes: Classes) -> Results:
    """Accuracy of the generalist's p and of q [N,C] on labels [N]: overall, within specialists' classes, by cover."""
    right, now = p.argmax(1) == labels, q.argmax(1) == labels
    covers = classes.owned().sum(0)[labels]
    inside = [inside_own(probabilities, labels, classes) for probabilities in (p, q)]
    return {
        "examples": len(labels),
        "generalist": share(right),
        "with_specialists": share(now),
        "conditional_generalist": inside[0],
        "conditional_with_specialists": inside[1],
        "by_cover": [
            {
                "specialists": k,
                "examples": int((covers == k).sum()),
                "generalist_right": int(right[covers == k].sum()),
                "with_right": int(now[covers == k].sum()),
            }
            for k in sorted(set(covers.tolist()))
        ],
    }


def inside_own(probabilities: Tensor, labels: Tensor, classes: Classes) -> float:
    """Accuracy among the examples of a specialist's classes with predictions restricted to them, over specialists."""
    right = total = 0
    for own in classes.own:
        index = torch.tensor(own)
        mine = torch.isin(labels, index)
        right += int((index[probabilities[mine][:, index].argmax(1)] == labels[mine]).sum())
        total += int(mine.sum())
    return right / total


def share(which: Tensor) -> float:
    return float(which.double().mean())


def families(class_names: Sequence[str]) -> list[int] | None:
    """The family of each class where names are FAMILY-CLASS, as Omniglot's alphabets are; else None."""
    heads = [name.rpartition("-")[0] for name in class_names]
    if not all(heads) or len(set(heads)) < 2:
        return None
    order = sorted(set(heads))
    return [order.index(head) for head in heads]
