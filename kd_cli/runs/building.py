"""What a training needs, built from its configuration: the plan, learner, method, weights and optimiser."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.config.build import PARTIAL, build, locate
from kd_cli.config.fingerprint import fingerprint
from kd_cli.config.schema import BATCHNORM_PARTS
from kd_cli.config.values import Node, TrainSpec
from kd_cli.data.source import Dataset
from kd_cli.errors import ConfigError
from kd_cli.learn.augment import Augment
from kd_cli.learn.batches import Batch, batch_sizes
from kd_cli.learn.cohort import Cohort
from kd_cli.learn.divided import DividedLearner
from kd_cli.learn.engine import Plan, Training
from kd_cli.learn.learner import Autocast, Learner, ModuleLearner, UniformLearner
from kd_cli.learn.methods import FunctionMethod, Method, Setting, Weights
from kd_cli.learn.methods.per_model import is_loss_function
from kd_cli.learn.objective import Objective, SideBySide
from kd_cli.learn.optimizers import without_compiler
from kd_cli.learn.outputs import sample_outputs
from kd_cli.learn.peers import Peers
from kd_cli.learn.processes import Processes
from kd_cli.learn.pruning import Pruning, PruningLearner
from kd_cli.learn.randomness import global_stream
from kd_cli.learn.recipe import Recipe, freeze_up_to
from kd_cli.learn.replacement import Replacement, ReplacingLearner
from kd_cli.learn.stacked.closed_forms import has_closed_form
from kd_cli.learn.stacked.learner import ELEMENTWISE, StackedLearner
from kd_cli.learn.stacked.structure import is_trained_dense
from kd_cli.learn.teachers import Teacher
from kd_cli.losses import balanced_label_weights, balanced_weights
from kd_cli.runs.device_data import DeviceData
from kd_cli.runs.models import build_module
from kd_cli.runs.parameters import trained_parameters

PER_MODEL = ("lr", "weight_decay")  # optimiser options that may differ between the models of a stack
SMALL = 500_000  # parameters up to which one dense network's closed form is more than 15 % faster than autograd
HARD: Node = {"_target_": "kd_cli.learn.methods.Hard"}
BINARY_HARD: Node = {"_target_": "kd_cli.learn.methods.BinaryHard"}


@dataclass(frozen=True)
class TrainingTask:
    """One model to train: how, and on what loss."""

    spec: TrainSpec
    method: Node
    T: float = 1.0
    alpha: float = 0.0
    beta: float = 1.0
    start: Callable[[], dict[str, Tensor]] | None = None  # gives the weights to begin with, in place of random ones

    def stack_key(self) -> str:
        """A fingerprint that two tasks share when they can be trained in one stack."""
        return fingerprint(self.stack_facts())

    def stack_facts(self) -> dict[str, Any]:
        """What must be equal for two tasks to be trained in one stack: all but each model's own numbers."""
        facts = self.spec.identity("")
        optimizer = {key: value for key, value in self.spec.optimizer.items() if key not in PER_MODEL}
        return {**facts, "seed": None, "optimizer": optimizer, "method": without_stackable_keys(self.method)}

    def hyper(self) -> dict[str, float]:
        """The optimiser options that may differ between the models of a stack, with this task's values."""
        return {key: self.spec.optimizer[key] for key in PER_MODEL if key in self.spec.optimizer}


def stackable_keys(method: Node) -> Sequence[str]:
    """The keys of a method that may differ between the models of a stack, as the method declares them."""
    target = locate(method["_target_"])
    return target.stackable if isinstance(target, type) and issubclass(target, Method) else ()


def without_stackable_keys(node: Any) -> Any:
    """A method's node, and the methods' nodes in it, without the keys that may differ between the models of a stack."""
    if not isinstance(node, dict) or "_target_" not in node:
        return node
    differing = stackable_keys(node)
    return {key: without_stackable_keys(value) for key, value in node.items() if key not in differing}


def stream_of(role: str) -> str:
    """The name of the random streams: the student alone and the distilled student share theirs."""
    return role if role in ("teacher", "assistant") else "student"


def key_of(section: str, role: str) -> str:
    """The configuration's key for a section of a role's training."""
    return f"teacher_{section}" if role == "teacher" else section


def make_plan(data: DeviceData, spec: TrainSpec, role: str, *, diagnostics: bool = False) -> Plan:
    return Plan(
        epochs=spec.epochs,
        batch_size=spec.batch_size,
        schedule=build(spec.schedule, where=key_of("schedule", role)),
        augment=Augment(**spec.augment),
        fill=data.fill,
        keep_best=spec.keep == "best",
        accumulate=spec.recipe.get("accumulate", 1),
        patience=spec.recipe.get("patience", 0),
        balanced=spec.recipe.get("sampling") == "balanced",
        estimate_batchnorm=spec.batchnorm == "estimate",
        diagnostics=diagnostics,
        loss_balance=role == "student",
    )


def recipe_of(spec: TrainSpec) -> Recipe:
    """What a model's training does beside plain steps."""
    return Recipe(**{key: value for key, value in spec.recipe.items() if key in Recipe.__dataclass_fields__})


def why_recipe_not(spec: TrainSpec) -> str | None:
    """Why models with this recipe are trained one by one and not in a stack, or None."""
    keys = [f"training.{key}" for key in spec.recipe if key not in ("sampling", "label_smoothing")]
    keys += ["student.prune"] if spec.prune is not None else []
    return f"{', '.join(keys)} {'is' if len(keys) == 1 else 'are'} for one model" if keys else None


def make_optimizer(task: TrainingTask, role: str, parameters: Any) -> torch.optim.Optimizer:
    with without_compiler():
        return build(task.spec.optimizer, parameters, where=key_of("optimizer", role))


def of_labels(dataset: Dataset, spec: TrainSpec) -> Node:
    """The method of a model that learns from the labels alone: a teacher, a student alone."""
    if smoothing := spec.recipe.get("label_smoothing"):
        return {"_target_": "kd_cli.learn.methods.LabelSmoothing", "smoothing": smoothing}
    return BINARY_HARD if dataset.multilabel else HARD


def check_recipe(spec: TrainSpec, role: str) -> None:
    """Build what a training needs beside the model, so that a mistake is found before anything is trained."""
    build(spec.schedule, where=key_of("schedule", role))
    make_optimizer(TrainingTask(spec, HARD), role, [nn.Parameter(torch.zeros(1))])


def build_method(node: Node) -> Method:
    """The method of a configuration: a `Method`, or a plain loss function of `student`, `teacher`, `labels`."""
    target = locate(node["_target_"])
    if is_loss_function(target):
        loss = build({**node, PARTIAL: True}, where="method")
        return FunctionMethod(loss.func, **loss.keywords)
    method = build({key: with_partial_functions(value) for key, value in node.items()}, where="method")
    if not isinstance(method, Method):
        raise ConfigError(
            f"method._target_={node['_target_']} gives a {type(method).__name__}, which is no method",
            hint="derive from kd_cli.learn.methods.Method, or give a function of student, teacher and labels",
        )
    return method


def with_partial_functions(node: Any) -> Any:
    """A node in a method's node; one of a loss function is built as a partial, as its arguments come in training."""
    if not isinstance(node, dict) or "_target_" not in node:
        return node
    node = {key: with_partial_functions(value) for key, value in node.items()}
    return {**node, PARTIAL: True} if is_loss_function(locate(node["_target_"])) else node


def make_training(
    data: DeviceData,
    tasks: Sequence[TrainingTask],
    role: str,
    *,
    teacher: Teacher | None = None,
    diagnostics: bool = False,
    processes: Processes | None = None,
) -> tuple[UniformLearner, Training]:
    """The models of these tasks as one learner, and what they are trained on. Several tasks make a stack.

    Several `processes` divide the batches of one model.
    """
    spec = tasks[0].spec
    plan = make_plan(data, spec, role, diagnostics=diagnostics)
    modules = [build_module(task.spec, data.dataset, role=stream_of(role), device=data.device) for task in tasks]
    frozen = frozen_parts(spec, modules[0])
    objective = make_objective(data, tasks)
    if teacher is not None:
        if objective.method.chooses_layers:
            objective.method.choose_layers(modules[0], teacher.modules[0], data.train.first(2))
        teacher.read_features(objective.method.teacher_features)
        if objective.method.extends_student:
            for module in modules:
                objective.method.adopt(module, teacher.modules[0])
    setting = make_setting(objective.method, modules[0], teacher, data, plan)
    with global_stream(spec.seed, stream_of(role), "method", device=data.device):
        objective.method.setup(setting)
    objective.method.to(data.device, data.dtype)
    replacement = None
    if teacher is not None and objective.method.replaces_modules:
        replacement = Replacement(*objective.method.cut(modules[0], teacher.modules[0], data.train.first(2)))
        frozen, teacher = replacement.frozen, None  # the teacher takes part in the steps and is not asked
    learner = make_learner(
        data, tasks, role, modules, objective, frozen=frozen, replacement=replacement, processes=processes
    )
    seeds = [task.spec.seed for task in tasks]
    return learner, Training(data.train, data.val, stream_of(role), seeds, plan, objective, teacher)


def make_cohort(
    data: DeviceData,
    stacks: Sequence[Sequence[TrainingTask]],
    role: str,
    *,
    teacher: Teacher | None = None,
    diagnostics: bool = False,
    workers: int = 1,
) -> tuple[Learner, Training]:
    """The models of several stacks as learners side by side, and what they are trained on; one stack by itself.

    `workers` stacks take their steps at once.
    """
    made = [make_training(data, tasks, role, teacher=teacher, diagnostics=diagnostics) for tasks in stacks]
    if len(made) == 1:
        return made[0]
    trainings = [training for _, training in made]
    if teacher is not None:
        read = (path for training in trainings for path in training.objective.method.teacher_features)
        teacher.read_features(list(dict.fromkeys(read)))
    objective = SideBySide.of([training.objective for training in trainings])
    cohort = Cohort([learner for learner, _ in made], data.device, workers=workers)
    return cohort, replace(trainings[0], objective=objective)


def make_peers(
    data: DeviceData,
    peers: Sequence[Sequence[TrainingTask]],
    role: str,
    *,
    teacher: Teacher | None = None,
    diagnostics: bool = False,
) -> tuple[Learner, Training]:
    """Models that learn from each other, one task for each, on the batches of the first one's seed."""
    tasks = [task for (task,) in peers]
    plan = make_plan(data, tasks[0].spec, role, diagnostics=diagnostics)
    objective = make_objective(data, tasks)
    learners = []
    for task in tasks:
        module = build_module(task.spec, data.dataset, role=stream_of(role), device=data.device)
        if task.start is not None:
            module.load_state_dict(task.start())
        frozen = frozen_parts(task.spec, module)
        plain = make_objective(data, [replace(task, method=HARD)])  # features and parameters are the objective's: none
        optimizer = make_optimizer(task, role, trained_parameters(module, plain.method, task.spec))
        autocast = Autocast(data.device, data.precision)
        own: Any = {"autocast": autocast, "recipe": recipe_of(task.spec), "frozen": frozen}
        learners.append(ModuleLearner(module, optimizer, seed=task.spec.seed, objective=plain, **own))
    objective.method.setup(make_setting(objective.method, learners[0].module, teacher, data, plan))
    objective.method.to(data.device, data.dtype)
    seeds = [tasks[0].spec.seed]
    training = Training(data.train, data.val, stream_of(role), seeds, plan, objective, teacher)
    return Peers(learners, data.device), training


def frozen_parts(spec: TrainSpec, module: nn.Module) -> Sequence[nn.Module]:
    """Freeze a model as its recipe says; return the frozen parts."""
    path = spec.recipe.get("freeze")
    return [] if path is None else freeze_up_to(module, path)


def make_learner(
    data: DeviceData,
    tasks: Sequence[TrainingTask],
    role: str,
    modules: Sequence[nn.Module],
    objective: Objective,
    *,
    frozen: Sequence[nn.Module] = (),
    replacement: Replacement | None = None,
    processes: Processes | None = None,
) -> UniformLearner:
    """Several models as a stack; one as an ordinary module, unless its closed form is faster."""
    autocast = Autocast(data.device, data.precision)
    if processes is not None or (len(tasks) == 1 and not closed_form_pays(tasks[0], modules[0], objective)):
        spec = tasks[0].spec
        trained = trained_parameters(modules[0], objective.method, spec)
        optimizer = make_optimizer(tasks[0], role, trained)
        own: Any = {"autocast": autocast, "recipe": recipe_of(spec), "frozen": frozen}
        own |= {"seed": spec.seed, "objective": objective}
        if replacement is not None:
            chance = objective.method.probability
            return ReplacingLearner(modules[0], optimizer, replacement=replacement, probability=chance, **own)
        if spec.prune is not None:
            per_epoch = -(-len(batch_sizes(len(data.train), spec.batch_size)) // spec.recipe.get("accumulate", 1))
            pruning = Pruning(**spec.prune)
            return PruningLearner(modules[0], optimizer, pruning=pruning, steps=spec.epochs * per_epoch, **own)
        if processes is None:
            return ModuleLearner(modules[0], optimizer, **own)
        synced = BATCHNORM_PARTS not in spec.recipe
        return DividedLearner(modules[0], optimizer, processes=processes, sync_batchnorm=synced, **own)
    return StackedLearner(
        modules,
        lambda groups: make_optimizer(tasks[0], role, groups),
        hyper=[task.hyper() for task in tasks],
        seeds=[task.spec.seed for task in tasks],
        autocast=autocast,
    )


def closed_form_pays(task: TrainingTask, module: nn.Module, objective: Objective) -> bool:
    """Whether one model is trained by its closed form: a small dense network, where it takes 0.4 to 0.7 of the time."""
    return (
        why_recipe_not(task.spec) is None
        and is_trained_dense(module)
        and sum(p.numel() for p in module.parameters()) <= SMALL
        and locate(task.spec.optimizer["_target_"]) in ELEMENTWISE
        and has_closed_form(objective.method)
    )


def make_objective(data: DeviceData, tasks: Sequence[TrainingTask]) -> Objective:
    """The tasks' methods as one, with their temperatures and weights."""
    methods = [build_method(task.method) for task in tasks]
    rows = [(task.T, task.alpha, task.beta) for task in tasks]
    weights = Weights(*torch.tensor(rows, dtype=data.dtype, device=data.device).T.contiguous())
    method = type(methods[0]).stack(methods)
    if tasks[0].spec.recipe.get("class_weights") == "balanced":
        labels = data.train.labels
        multilabel = data.dataset.multilabel
        by_class = balanced_label_weights(labels) if multilabel else balanced_weights(labels, data.dataset.classes)
        method.weigh_classes(by_class.to(data.dtype))
    return Objective(method, weights)


def make_setting(method: Method, student: nn.Module, teacher: Teacher | None, data: DeviceData, plan: Plan) -> Setting:
    """What the method is shown of the training before it begins: sizes, and the outputs for two examples."""
    train = data.train
    index = (torch.arange(2, device=train.device) % len(train))[None]
    batch = Batch(index, train.images(index), train.labels[index])
    return Setting(
        classes=data.dataset.classes,
        examples=len(train),
        smallest_batch=min(batch_sizes(len(train), plan.batch_size)),
        student=sample_outputs(student, batch.images[0], method.student_features, role="student"),
        multilabel=data.dataset.multilabel,
        teacher=None if teacher is None else teacher(batch, torch.ones(1, dtype=torch.float32, device=train.device)),
    )
