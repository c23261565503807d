"""Run configurations: the teacher, the student alone, the distilled student, what they are worth."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kd_cli.errors import CheckpointError, ConfigError, Diverged
from kd_cli.learn.augment import Augment
from kd_cli.learn.engine import Examples, Outcome, Plan, fit
from kd_cli.learn.methods import Hard, Method, Weights
from kd_cli.learn.randomness import global_stream
from kd_cli.learn.step import Autocast, SoloLearner
from kd_cli.learn.teachers import CachedTeacher, LiveTeacher, Teacher, batches, freeze
from kd_cli.metrics import agreement, evaluate_logits, gap_closed
from kd_cli.runs.config import RunConfig, TrainSpec, build, fingerprint
from kd_cli.runs.files import checksum
from kd_cli.runs.progress import Progress, describe
from kd_cli.runs.rundir import RunDir
from kd_cli.runs.store import Entry, Store
from kd_cli.zoo.data import Dataset, normalise, prepare

log = logging.getLogger(__name__)

Report = dict[str, Any]


# ---------------------------------------------------------------- the data and the machine


@dataclass(frozen=True)
class Bench:
    """A data set on a device, in the precision of a run: what models are trained and tested on."""

    dataset: Dataset
    device: torch.device
    precision: str
    train: Examples
    val: Examples
    test: Examples
    fill: Tensor  # a black pixel, normalised: [C]

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.precision)


def dtype_of(precision: str) -> torch.dtype:
    """The type of weights and images; bfloat16 and tf32 are arithmetic on float32 weights."""
    return torch.float64 if precision == "float64" else torch.float32


def resolve_device(name: str) -> torch.device:
    """The device of a name. ConfigError when the machine has none such."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device is {name!r}", hint="device=auto, cpu, cuda, cuda:1 or mps") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"device is {name}, and torch sees no GPU here", hint="device=auto or device=cpu")
        if (device.index or 0) >= torch.cuda.device_count():
            raise ConfigError(f"device is {name}, and there are {torch.cuda.device_count()} GPUs, counted from 0")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device is mps, and torch sees no such device here", hint="device=auto or device=cpu")
    elif device.type not in ("cpu", "mps"):
        raise ConfigError(f"device is {name!r}", hint="device=auto, cpu, cuda, cuda:1 or mps")
    return device


def set_precision(precision: str, device: torch.device) -> None:
    """Choose the arithmetic of float32 matrix products on the GPU."""
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError(f"precision is tf32, which {device.type} does not have", hint="precision=float32")
    if device.type == "mps" and precision == "float64":
        raise ConfigError("precision is float64, which mps does not have", hint="device=cpu")
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")


def load_bench(config: RunConfig) -> Bench:
    """Read the data set and lay it on the device."""
    device = resolve_device(config.device)
    set_precision(config.precision, device)
    source = build(config.dataset, where="dataset", data_dir=config.data_dir)
    dataset = prepare(source, val_fraction=config.val_fraction)
    dtype = dtype_of(config.precision)

    def examples(split: Any) -> Examples:
        images = normalise(split.images, dataset.mean, dataset.std, dtype)
        return Examples(images.to(device), split.labels.to(device))

    black = torch.zeros(1, *dataset.shape, dtype=dataset.train.images.dtype)
    fill = normalise(black, dataset.mean, dataset.std, dtype).flatten(2)[0, :, 0] if black.ndim == 4 else torch.zeros(1)
    return Bench(
        dataset, device, config.precision, *map(examples, (dataset.train, dataset.val, dataset.test)), fill.to(device)
    )


# ---------------------------------------------------------------- models


def build_module(spec: TrainSpec, dataset: Dataset, *, role: str, device: torch.device | str = "cpu") -> nn.Module:
    """The model of a spec with its initial weights, which depend on the seed and the role alone."""
    where = "teacher" if role == "teacher" else "student"
    # Built on the CPU: the same weights on every device.
    with global_stream(spec.seed, role, "init"):
        module = build(spec.model, where=where, input_shape=dataset.shape, num_classes=dataset.classes)
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{where}: {spec.model['_target_']} gave a {type(module).__name__}, not a torch.nn.Module")
    return module.to(device, dtype_of(spec.precision))


def check_shape(spec: TrainSpec, dataset: Dataset, *, role: str) -> None:
    """Try the model on one blank image, without memory for its weights. ConfigError when they do not fit."""
    where = "teacher" if role == "teacher" else "student"
    wanted = f"images {tuple(dataset.shape)} and {dataset.classes} classes"
    try:
        with torch.device("meta"):
            module = build(spec.model, where=where, input_shape=dataset.shape, num_classes=dataset.classes)
            logits = freeze(module)(torch.zeros(2, *dataset.shape))
    except NotImplementedError:
        return  # an operation that needs real numbers; training will tell
    except (RuntimeError, ValueError) as error:
        message = str(error).splitlines()[0]
        raise ConfigError(
            f"{where}={spec.name} does not take the data of {dataset.name} ({wanted}): {message}",
            hint=f"choose another {where}, or set its sizes to the data's",
        ) from error
    if tuple(logits.shape) != (2, dataset.classes):
        raise ConfigError(
            f"{where}={spec.name} gives {tuple(logits.shape)} for 2 images of {dataset.name}; it must be "
            f"(2, {dataset.classes}): one logit for each class"
        )


def load_module(spec: TrainSpec, state: dict[str, Tensor], bench: Bench, *, role: str) -> nn.Module:
    """The model with trained weights, frozen, on the bench's device."""
    module = build_module(spec, bench.dataset, role=role, device=bench.device)
    module.load_state_dict(state)
    return freeze(module)


def read_checkpoint(path: Path, spec: TrainSpec, dataset: Dataset) -> dict[str, Tensor]:
    """The user's own weights for a model: safetensors, or a state dict read without unpickling code.

    CheckpointError when they are unreadable or those of another architecture.
    """
    path = path.expanduser()
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"teacher.checkpoint={path} cannot be read as weights: {str(error).splitlines()[0] if str(error) else error!r}",
            hint="save the weights alone, safetensors.torch.save_file(model.state_dict(), FILE) or "
            "torch.save(model.state_dict(), FILE); a pickled model would run code of its own and is refused",
        ) from error
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"teacher.checkpoint={path} holds no state dict (names and tensors)", hint="save model.state_dict()"
        )
    with torch.device("meta"):
        module = build(spec.model, where="teacher", input_shape=dataset.shape, num_classes=dataset.classes)
    expected = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not in the model" for name in found if name not in expected]
    problems += [
        f"{name} is {found[name]}, the model's is {expected[name]}"
        for name in expected
        if name in found and found[name] != expected[name]
    ]
    if problems:
        more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        raise CheckpointError(
            f"teacher.checkpoint={path} does not fit teacher={spec.name} on {dataset.name} "
            f"({dataset.classes} classes): {'; '.join(problems[:3])}{more}",
            hint="give the architecture that these weights come from, e.g. teacher=smallmlp teacher.hidden=[300,300]",
        )
    return state


def forward_flops(module: nn.Module, image: Tensor) -> int:
    """Floating-point operations of one image's forward pass (a multiply-add is two)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(image[None])
    return int(counter.get_total_flops())


@torch.no_grad()
def predict_module(module: nn.Module, images: Tensor, autocast: Autocast) -> Tensor:
    """Logits at T = 1, on the CPU, in float32 at least."""
    with autocast():
        logits = torch.cat([module(batch) for batch in batches(images)])
    return (logits if logits.dtype == torch.float64 else logits.float()).cpu()


# ---------------------------------------------------------------- training


@dataclass(frozen=True)
class Lesson:
    """One model to train: how, and on what loss."""

    spec: TrainSpec
    method: Method
    T: float
    alpha: float
    beta: float


def train(bench: Bench, lesson: Lesson, *, role: str, title: str, teacher: Teacher | None = None) -> Outcome:
    """Train one model. `role` names its random streams and its rows in metrics.jsonl; title what a person reads."""
    spec = lesson.spec
    stream = "teacher" if role == "teacher" else "student"
    module = build_module(spec, bench.dataset, role=stream, device=bench.device)
    where = "teacher_optimizer" if role == "teacher" else "optimizer"
    optimizer = build(spec.optimizer, module.parameters(), where=where)
    learner = SoloLearner(module, optimizer, seed=spec.seed, autocast=Autocast(bench.device, bench.precision))
    plan = Plan(
        epochs=spec.epochs,
        batch_size=spec.batch_size,
        schedule=build(spec.schedule, where=where.replace("optimizer", "schedule")),
        augment=Augment(**spec.augment),
        fill=bench.fill,
    )
    weights = Weights(*(torch.tensor([x], dtype=bench.dtype, device=bench.device) for x in weighing(lesson)))
    observer = Progress(title, spec.epochs)
    (outcome,) = fit(
        learner,
        bench.train,
        bench.val,
        role=stream,
        seeds=[spec.seed],
        plan=plan,
        method=lesson.method,
        weights=weights,
        teacher=teacher,
        observer=observer,
    )
    outcome.history = [{**row, "role": role} for row in outcome.history]
    if outcome.diverged is None:
        last = outcome.history[-1:]
        log.info("%s: %s in %.1f s, %s", title, plural(spec.epochs, "epoch"), outcome.seconds, describe(last))
    return outcome


def weighing(lesson: Lesson) -> tuple[float, float, float]:
    return lesson.T, lesson.alpha, lesson.beta


def diverged(role: str, outcome: Outcome) -> Diverged:
    """The error that says where the loss stopped being a number, and what to try."""
    prefix = "teacher_" if role == "teacher" else ""
    return Diverged(
        f"{role.replace('_', ' ')}: the loss is not a finite number in epoch {outcome.diverged}",
        hint=f"try a smaller {prefix}optimizer.lr, {prefix}schedule.warmup=0.1, or smaller alpha and beta",
    )


def report_of(spec: TrainSpec, module: nn.Module, bench: Bench, logits: Tensor, outcome: Outcome | None) -> Report:
    """What a summary says of a trained model, its test results included."""
    test = evaluate_logits(logits, bench.dataset.test.labels)
    return {
        "name": spec.name,
        "parameters": sum(p.numel() for p in module.parameters()),
        "flops": forward_flops(module, bench.test.images[0]),
        "epochs": spec.epochs if outcome else None,  # None: weights that the user brought
        "seconds": round(outcome.seconds, 3) if outcome else 0.0,
        "test": vars(test).copy(),
    }


def obtain(
    store: Store, facts: dict[str, Any], make: Callable[[], tuple[Report, dict[str, Tensor], dict[str, Tensor], list]]
) -> tuple[Entry, bool]:
    """The store's entry for these facts, made under its lock when it is not there; and whether it was there."""
    key = fingerprint(facts)
    entry = store.get(key)
    if entry is not None:
        return entry, True
    with store.lock([key]):
        entry = store.get(key)  # another process may have made it while we waited
        if entry is not None:
            return entry, True
        report, weights, outputs, history = make()
        return store.put(key, weights=weights, outputs=outputs, report=report, history=history, facts=facts), False


def obtain_teacher(config: RunConfig, bench: Bench, store: Store, rundir: RunDir) -> tuple[Entry, bool]:
    """The teacher from the store, from the user's checkpoint, or trained now."""
    spec, data = config.teacher, bench.dataset.fingerprint
    autocast = Autocast(bench.device, bench.precision)

    def finish(state: dict[str, Tensor], outcome: Outcome | None) -> Any:
        module = load_module(spec, state, bench, role="teacher")
        outputs = {
            "train": predict_module(module, bench.train.images, autocast),
            "test": predict_module(module, bench.test.images, autocast),
        }
        report = report_of(spec, module, bench, outputs["test"], outcome)
        return report, state, outputs, outcome.history if outcome else []

    if config.checkpoint is not None:
        path = Path(config.checkpoint).expanduser()
        state = read_checkpoint(path, spec, bench.dataset)
        facts = {"kind": "checkpoint", "file": checksum(path), "model": spec.model, "data": data}
        facts |= {"precision": spec.precision, "code": spec.identity(data)["code"][0]}
        return obtain(store, facts, lambda: finish(state, None))

    def make() -> Any:
        lesson = Lesson(spec, Hard(), T=1.0, alpha=0.0, beta=1.0)
        outcome = train(bench, lesson, role="teacher", title=f"teacher {spec.name}")
        if outcome.diverged is not None:
            rundir.append_metrics(outcome.history)
            raise diverged("teacher", outcome)
        return finish(outcome.state, outcome)

    return obtain(store, {"kind": "teacher", **spec.identity(data)}, make)


def obtain_alone(config: RunConfig, bench: Bench, store: Store, rundir: RunDir) -> tuple[Entry, bool]:
    """The student alone: same architecture, seed, data and budget, taught by the true labels."""
    spec = config.student

    def make() -> Any:
        lesson = Lesson(spec, Hard(), T=1.0, alpha=0.0, beta=1.0)
        outcome = train(bench, lesson, role="student_alone", title=f"student {spec.name} alone")
        if outcome.diverged is not None:
            rundir.append_metrics(outcome.history)
            raise diverged("student_alone", outcome)
        module = load_module(spec, outcome.state, bench, role="student")
        logits = predict_module(module, bench.test.images, Autocast(bench.device, bench.precision))
        return report_of(spec, module, bench, logits, outcome), outcome.state, {"test": logits}, outcome.history

    return obtain(store, {"kind": "alone", **spec.identity(bench.dataset.fingerprint)}, make)


# ---------------------------------------------------------------- a run


def run(config: RunConfig, path: Path, *, command: str) -> dict[str, Any]:
    """One run from its configuration to its summary, in the directory `path`.

    Raises KdError for what a person can mend; Diverged after a summary that says so.
    """
    method: Method = build(config.method, where="method")
    rundir = RunDir(path)
    store = Store(config.store_dir)
    bench = load_bench(config)
    dataset = bench.dataset
    check_shape(config.student, dataset, role="student")
    if method.needs_teacher:
        check_shape(config.teacher, dataset, role="teacher")
    summary: dict[str, Any] = {
        "status": "running",
        "command": command,
        "dataset": {
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "train": len(dataset.train),
            "val": len(dataset.val),
            "test": len(dataset.test),
            "classes": dataset.classes,
            "split": dataset.split_rule,
        },
        "teacher": None,
        "student_alone": None,
        "student": None,
        "gap_closed": None,
        "T": config.T,
        "alpha": config.alpha,
        "beta": config.beta,
        "method": config.method_name,
        "seed": config.student.seed,
        "device": device_name(bench.device),
        "precision": config.precision,
        "versions": versions(),
    }
    try:
        _stages(config, method, bench, store, rundir, summary)
    except Diverged as error:
        summary |= {"status": "diverged", "cause": error.message}
        rundir.write_summary(summary)
        raise
    summary["status"] = "completed"
    rundir.write_summary(summary)
    return summary


def _stages(
    config: RunConfig, method: Method, bench: Bench, store: Store, rundir: RunDir, summary: dict[str, Any]
) -> None:
    dataset, spec = bench.dataset, config.student
    teacher_test = None
    teacher: Teacher | None = None
    if method.needs_teacher:
        entry, from_store = obtain_teacher(config, bench, store, rundir)
        rundir.append_metrics(entry.history)
        summary["teacher"] = stored_report(entry, from_store)
        outputs = entry.outputs()
        teacher_test = outputs["test"]
        if Augment(**spec.augment).enabled:
            teacher = LiveTeacher(load_module(config.teacher, entry.weights(), bench, role="teacher"))
        else:
            teacher = CachedTeacher(outputs["train"].to(bench.device))

    def with_agreement(report: Report, logits: Tensor) -> Report:
        agree = agreement(logits, teacher_test) if teacher_test is not None else None
        return {**report, "test": {**report["test"], "agreement": agree}}

    entry, from_store = obtain_alone(config, bench, store, rundir)
    rundir.append_metrics(entry.history)
    summary["student_alone"] = with_agreement(stored_report(entry, from_store), entry.outputs()["test"])

    lesson = Lesson(spec, method, config.T, config.alpha, config.beta)
    title = f"student {spec.name} by {config.method_name}"
    outcome = train(bench, lesson, role="student", title=title, teacher=teacher)
    rundir.append_metrics(outcome.history)
    if outcome.diverged is not None:
        raise diverged("student", outcome)
    module = load_module(spec, outcome.state, bench, role="student")
    logits = predict_module(module, bench.test.images, Autocast(bench.device, bench.precision))
    facts = {
        "kind": "student",
        **spec.identity(dataset.fingerprint),
        "method": config.method,
        "weights": weighing(lesson),
        "teacher": summary["teacher"] and summary["teacher"]["fingerprint"],
    }
    report = {
        "fingerprint": fingerprint(facts),
        **report_of(spec, module, bench, logits, outcome),
        "from_store": False,
    }
    summary["student"] = with_agreement(report, logits)
    if summary["teacher"] is not None:
        errors = (summary[role]["test"]["errors"] for role in ("teacher", "student_alone", "student"))
        summary["gap_closed"] = gap_closed(*errors)
    rundir.write_student(
        outcome.state,
        {
            "model": spec.model,
            "name": spec.name,
            "input_shape": list(dataset.shape),
            "classes": list(dataset.class_names),
            "mean": list(dataset.mean),
            "std": list(dataset.std),
            "precision": spec.precision,
        },
    )


def stored_report(entry: Entry, from_store: bool) -> Report:
    return {"fingerprint": entry.fingerprint, **entry.report, "from_store": from_store}


def device_name(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def versions() -> dict[str, str]:
    """The versions that a result depends on."""
    found = {"python": platform.python_version()}
    for package in ("kd-cli", "torch", "torchvision", "hydra-core", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"
