"""Measure what the project promises about speed. Everything that is compared runs side by side, in one process.

    python scripts/bench.py                       # about three minutes on two cores
    python scripts/bench.py --no-startup --rounds 11
    python scripts/bench.py --sweep               # students of a sweep, one by one against stacked
    python scripts/bench.py --data                # photos from the decoded file against torchvision's ImageFolder
    python scripts/bench.py --growth              # how the cost grows with examples, epochs, classes, students
    python scripts/bench.py --cohort              # students side by side: the options of bench_cohort.py
    python scripts/bench.py --export              # exported students beside PyTorch (needs the extra `export`)
    python scripts/bench.py --device cuda         # any of them on a GPU

Compared are epochs of one distillation: a 2x1200 teacher, a 2x800 student, soft and hard targets, the same optimiser.

    kd-cli         the project's own path: engine, learner and method, on resident tensors, teacher logits computed once
    plain loop     plain PyTorch on the same resident tensors and teacher logits, without metrics
    bare loop      plain PyTorch: torchvision's MNIST, ToTensor, Normalize, DataLoader, the teacher live
    torchdistill   its DistillationBox and KDLoss on the same DataLoader, where it is installed
    products       the matrix products of the student's step and nothing else, their outputs allocated as in training
    in place       the same into outputs that are there already

The floor of a step is what its products take in place, plus the bytes that it must move besides (the optimiser reads
and writes weights and two means, and reads gradients; the batch is gathered) over the bandwidth measured here.

The contenders take turns within each round, so that whatever else the machine does meets them all; a ratio is taken
within its round, and its median and range over the rounds are printed. MNIST is used where it is (--data-dir, KD_DATA),
else random images of its shape. Speed does not depend on what the images show.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import inspect
import itertools
import json
import math
import os
import platform
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import bench_data
import torch
import yaml
from bench_export import compare_exports
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset
from torchdistill_box import torchdistill_box

from kd_cli.commands import cores
from kd_cli.config.build import build
from kd_cli.config.options import conf_dir
from kd_cli.config.read import folder
from kd_cli.data.normalisation import Normalisation
from kd_cli.data.prepare import prepare
from kd_cli.data.torchvision import torchvision_dataset
from kd_cli.learn.batches import Examples, distinct
from kd_cli.learn.cuda_graphs import CudaGraphs, recorded_steps
from kd_cli.learn.engine import Plan, Training, fit
from kd_cli.learn.learner import NO_AUTOCAST, Autocast, Learner, ModuleLearner
from kd_cli.learn.methods import SoftTargets, Weights
from kd_cli.learn.objective import Objective
from kd_cli.learn.schedules import Constant
from kd_cli.learn.stacked.learner import StackedLearner
from kd_cli.learn.teachers import CachedTeacher, freeze
from kd_cli.runs.building import SMALL
from kd_cli.vision import import_torchvision

T, ALPHA, BETA = 2.0, 1.0, 0.5
CLASSES = 10
EPOCHS = 30  # of conf/config.yaml: what the one pass of the teacher is spread over
GOALS = {"bare loop": 2.4, "torchdistill": 2.4, "share": 0.8, "help": 3.0, "first step": 1.5}

Contender = Callable[[], None]  # one epoch


@dataclass(frozen=True)
class Setting:
    """What is the same for all contenders."""

    batch: int
    device: torch.device
    teacher: dict[str, Any]
    student: dict[str, Any]
    optimizer: dict[str, Any]
    images: Any  # torchvision's MNIST, cut to the epoch: PIL -> tensor, normalised, and the label
    train: Examples  # the same, resident

    @property
    def steps(self) -> int:
        return -(-len(self.train) // self.batch)

    def model(self, node: Mapping[str, Any], seed: int) -> nn.Module:
        torch.manual_seed(seed)
        built: nn.Module = build(dict(node), input_shape=self.train.shape, num_classes=CLASSES)
        return built.to(self.device)

    def live_teacher(self) -> nn.Module:
        return freeze(self.model(self.teacher, 0))

    def loader(self, workers: int) -> DataLoader[Any]:
        return DataLoader(self.images, self.batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device is cuda, and torch sees no GPU here")
    if args.epochs_alone:
        print(seconds_alone(args))
        return
    results: dict[str, Any] = {"machine": machine(args)}
    with tempfile.TemporaryDirectory(prefix="kd-bench-") as scratch:
        say_machine(results["machine"])
        if args.sweep:
            results["sweep"] = compare_sweeps(args, Path(scratch))
        elif args.parallel:
            results["parallel"] = compare_parallel(args)
        elif args.export:
            results["export"] = compare_exports(args)
        elif args.data:
            results["data"] = bench_data.measure(args)
        elif args.growth:
            results["growth"] = measure_growth(args)
        else:
            results["epoch"] = compare_epochs(args, Path(scratch))
            results["floor"] = [compare_floor(args, *case) for case in floor_cases(args)]
            if args.startup:
                results["startup"] = measure_startup(args, Path(scratch))
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Ratios of speed, measured side by side in one run.")
    add = parser.add_argument
    add("--examples", type=int, default=12_800, help="examples in an epoch (%(default)s)")
    add("--rounds", type=int, default=7, help="rounds in which every contender trains one epoch (%(default)s)")
    add("--threads", type=int, default=2, help="threads for torch (%(default)s)")
    add("--batch", type=int, default=128, help="examples in a step (%(default)s)")
    add("--teacher", default="bigmlp", help="a model of conf/model (%(default)s)")
    add("--student", default="smallmlp", help="a model of conf/model, fully connected (%(default)s)")
    add("--data-dir", help="folder that has MNIST; default KD_DATA, else ~/.cache/kd-cli/data")
    add("--json", type=Path, metavar="FILE", help="write the numbers, every round's too")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where to train (%(default)s)")
    add("--growth", action="store_true", help="measure how the cost grows instead")
    add("--sweep", action="store_true", help="measure stacks of students instead: 16 and 64 tinymlp, 16 smallmlp")
    add("--export", action="store_true", help="measure exported students instead: latency and size beside PyTorch")
    add("--data", action="store_true", help="measure training on photos against torchvision's ImageFolder instead")
    add("--pictures", metavar="DIR", help="with --data: a folder per class of photos; else they are made")
    add("--parallel", action="store_true", help="measure two trainings at once against one after the other instead")
    add("--epochs-alone", type=int, help=argparse.SUPPRESS)  # what --parallel runs: the seconds of so many epochs
    add("--no-startup", dest="startup", action="store_false", help="leave out start-up and the default run")
    args = parser.parse_args()
    for name in ("examples", "rounds", "threads", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be 1 or more")
    return args


def machine(args: argparse.Namespace) -> dict[str, Any]:
    packages = ("torch", "torchvision", "torchdistill", "hydra-core", "kd-cli", "onnxruntime")
    found = {name: version for name in packages if (version := installed(name))}
    where = f"cpu ({processor()}, {os.cpu_count()} cores)"
    if args.device == "cuda":
        where = f"cuda ({torch.cuda.get_device_name()}), {where}"
    return {
        "device": where,
        "threads": args.threads,
        "versions": {"python": platform.python_version(), **found},
    }


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def say_machine(found: Mapping[str, Any]) -> None:
    print(f"device    {found['device']}")
    print(f"threads   {found['threads']}")
    print("versions  " + ", ".join(f"{name} {version}" for name, version in found["versions"].items()), flush=True)


# ---------------------------------------------------------------- epochs


def compare_epochs(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Every contender's seconds in every round, and the cost that is paid once."""
    setting, origin, reading = prepare_setting(args, scratch)
    print(
        f"models    teacher {args.teacher} {setting.teacher['hidden']} to student {args.student} "
        f"{setting.student['hidden']}, T = {T:g}\n"
        f"training  {setting.optimizer['_target_']}, batch {setting.batch}, {args.rounds} rounds of an epoch of "
        f"{len(setting.train):,} examples of {origin}",
        flush=True,
    )
    start = time.perf_counter()
    teacher = cached_teacher(setting)
    logits = time.perf_counter() - start

    workers = quickest_workers(setting)
    contenders: dict[str, Contender] = {
        "kd-cli": our_epoch(setting, teacher),
        "products": products_alone(setting),
        "in place": products_alone(setting, reuse=True),
        "plain loop": plain_epoch(setting, teacher),
        "bare loop": bare_epoch(setting, workers),
    }
    if importlib.util.find_spec("torchdistill"):
        contenders["torchdistill"] = torchdistill_epoch(setting, workers)
    seconds = take_turns(contenders, args.rounds)
    once = {"teacher_logits": logits, "read_and_normalise": reading}
    say_epochs(seconds, once, len(setting.train), workers)
    return {
        "examples": len(setting.train),
        "batch": setting.batch,
        "workers": workers,
        "seconds": seconds,
        "once": once,
    }


SWEEPS = (("tinymlp", 16, 1.0), ("tinymlp", 64, 0.5), ("smallmlp", 16, 0.1))  # model, students, share of the examples


def compare_sweeps(args: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    """The students of a sweep over four temperatures and their seeds, trained one by one and as one stack.

    On a CPU large students gain nothing from a stack; a sweep measures that on the spot and trains them one by one.
    """
    setting, origin, _ = prepare_setting(args, scratch)
    teacher = cached_teacher(setting)
    print(f"\nan epoch of {origin}, batch {setting.batch}, {args.rounds} rounds; one by one / stacked\n")
    found = []
    for name, size, share in SWEEPS:
        n = max(setting.batch, int(share * len(setting.train)))
        part = replace(
            setting,
            student=read_node("model", name),
            train=setting.train.subset(torch.arange(n)),
        )
        contenders = {
            "one by one": students(part, teacher, size, stacked=False),
            "stacked": students(part, teacher, size, stacked=True),
            "one": students(part, teacher, 1, stacked=False),
            "products": products_alone(part, size=size, reuse=True),
        }
        seconds = take_turns(contenders, args.rounds)
        gain = ratios(seconds["one by one"], seconds["stacked"])
        times = ratios(seconds["stacked"], seconds["one"])
        share = ratios(seconds["products"], seconds["stacked"])
        print(
            f"{size:3} {name:9} stacked is faster by {spread(gain, '.2f')}, "
            f"takes {spread(times, '.1f')} times one student, "
            f"{spread(share, '.0%')} of the products' rate",
            flush=True,
        )
        found.append({"student": name, "students": size, "examples": n, "seconds": seconds})
    return found


def students(setting: Setting, teacher: CachedTeacher, size: int, *, stacked: bool) -> Contender:
    """An epoch of `size` students: four temperatures, each with size / 4 seeds."""
    temperatures = [float(2 ** (s % 4)) for s in range(size)]
    seeds = [s // 4 for s in range(size)]
    modules = [setting.model(setting.student, seed) for seed in seeds]

    def trained(of: Sequence[int]) -> Contender:
        rows = torch.tensor([(temperatures[s], ALPHA, BETA) for s in of], device=setting.device).T.contiguous()
        objective = Objective(SoftTargets(), Weights(*rows))
        learner = learn([modules[s] for s in of], setting.optimizer, [seeds[s] for s in of], objective)
        return training_epochs(learner, setting.train, objective, teacher, [seeds[s] for s in of], batch=setting.batch)

    if stacked:
        return trained(range(size))
    epochs = [trained([s]) for s in range(size)]

    def one_by_one() -> None:
        for epoch in epochs:
            epoch()

    return one_by_one


def training_epochs(
    learner: Learner,
    train: Examples,
    objective: Objective,
    teacher: CachedTeacher,
    seeds: Sequence[int],
    *,
    batch: int,
    epochs: int = 1,
) -> Contender:
    """Epochs as a run trains them, metrics included. Nothing is validated or written."""
    plan = Plan(epochs=epochs, batch_size=batch, schedule=Constant())
    nothing = train.subset(torch.arange(0))
    training = Training(train, nothing, "student", list(seeds), plan, objective, teacher)

    def run() -> None:
        fit(learner, training, recorder=recorder_on(train.device))

    return run


def objective_of(size: int, device: torch.device) -> Objective:
    """Soft and hard targets for students alike."""
    return Objective(SoftTargets(), Weights(*(torch.full((size,), x, device=device) for x in (T, ALPHA, BETA))))


def recorder_on(device: torch.device) -> CudaGraphs | None:
    return CudaGraphs(device) if device.type == "cuda" else None


def learn(
    modules: Sequence[nn.Module],
    optimizer: Mapping[str, Any],
    seeds: Sequence[int],
    objective: Objective,
    autocast: Autocast = NO_AUTOCAST,
) -> Learner:
    """Students as a run trains them: several, and small fully connected ones, as a stack, others as a module."""
    if len(modules) == 1 and sum(p.numel() for p in modules[0].parameters()) > SMALL:
        built = build(dict(optimizer), modules[0].parameters())
        return ModuleLearner(modules[0], built, seed=seeds[0], objective=objective, autocast=autocast)
    hyper: list[dict[str, float]] = [{}] * len(modules)
    return StackedLearner(
        modules, lambda groups: build(dict(optimizer), groups), hyper=hyper, seeds=seeds, autocast=autocast
    )


def prepare_setting(args: argparse.Namespace, scratch: Path) -> tuple[Setting, str, float]:
    """The data, resident and as torchvision reads it; its name; and the seconds to make an epoch of it resident."""
    vision = import_torchvision()
    root, origin = folder(args.data_dir, "KD_DATA", "data"), "MNIST"
    raw = Path("MNIST", "raw")
    if not (root / raw / "train-images-idx3-ubyte").is_file():
        root, origin = scratch, "made data of MNIST's shape"
        write_made_mnist(root / raw, args.examples)
    start = time.perf_counter()
    data = prepare(torchvision_dataset(data_dir=root, name="MNIST"), val_fraction=0)
    device = torch.device(args.device)
    train = Examples(
        data.train.images[: args.examples].to(device),
        data.train.labels[: args.examples].to(device),
        normalise=Normalisation(data.mean, data.std, torch.float32),
    )
    reading = (time.perf_counter() - start) * len(train) / len(data.train)

    steps = [vision.transforms.ToTensor(), vision.transforms.Normalize(data.mean, data.std)]
    pictures = vision.datasets.MNIST(root, train=True, transform=vision.transforms.Compose(steps))
    setting = Setting(
        batch=args.batch,
        device=device,
        teacher=read_node("model", args.teacher),
        student=read_node("model", args.student),
        optimizer=read_node("optimizer", "adamw"),
        images=Subset(pictures, range(len(train))),
        train=train,
    )
    return setting, origin, reading


def write_made_mnist(raw: Path, examples: int) -> None:
    """Random images and labels in MNIST's file format, so that the loops compared read what they always read."""
    raw.mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    for prefix, n in (("train", examples), ("t10k", 16)):
        images = torch.randint(256, (n, 28, 28), generator=draw, dtype=torch.uint8)
        labels = torch.randint(CLASSES, (n,), generator=draw, dtype=torch.uint8)
        for tensor, kind in ((images, "images"), (labels, "labels")):
            header = [0x800 + tensor.dim(), *tensor.shape]
            content = b"".join(number.to_bytes(4, "big") for number in header) + tensor.numpy().tobytes()
            (raw / f"{prefix}-{kind}-idx{tensor.dim()}-ubyte").write_bytes(content)


def read_node(group: str, name: str) -> dict[str, Any]:
    return dict(yaml.safe_load((conf_dir() / group / f"{name}.yaml").read_text(encoding="utf-8")))


def cached_teacher(setting: Setting) -> CachedTeacher:
    teacher = setting.live_teacher()
    with torch.no_grad():
        return CachedTeacher(torch.cat([teacher(images) for images in setting.train.in_order()]))


def our_epoch(setting: Setting, teacher: CachedTeacher) -> Contender:
    """An epoch as a run trains it. Nothing is validated or written, as in the others."""
    objective = objective_of(1, setting.device)
    learner = learn([setting.model(setting.student, 1)], setting.optimizer, [0], objective)
    return training_epochs(learner, setting.train, objective, teacher, [0], batch=setting.batch)


def plain_epoch(setting: Setting, teacher: CachedTeacher) -> Contender:
    """A loop written by hand on what kd-cli works with: resident tensors, cached teacher logits, no metrics."""
    student, batch = setting.model(setting.student, 1).train(), setting.batch
    optimizer = build(setting.optimizer, student.parameters())
    images, labels = setting.train.first(len(setting.train)), setting.train.labels
    soft_targets = F.softmax(teacher.logits_MNC[0] / T, dim=1)

    def epoch() -> None:
        for index in torch.randperm(len(labels), device=setting.device).split(batch):
            logits = student(images[index])
            soft = F.cross_entropy(logits / T, soft_targets[index])
            loss = ALPHA * T**2 * soft + BETA * F.cross_entropy(logits, labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def bare_epoch(setting: Setting, workers: int) -> Contender:
    """The loop that one writes by hand. It keeps no metrics at all."""
    teacher, student = setting.live_teacher(), setting.model(setting.student, 1).train()
    optimizer = build(setting.optimizer, student.parameters())
    loader = setting.loader(workers)

    def epoch() -> None:
        for images, labels in loader:
            images, labels = images.to(setting.device), labels.to(setting.device)
            with torch.no_grad():
                soft_targets = F.softmax(teacher(images) / T, dim=1)
            logits = student(images)
            soft = F.kl_div(F.log_softmax(logits / T, dim=1), soft_targets, reduction="batchmean")
            loss = ALPHA * T**2 * soft + BETA * F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def quickest_workers(setting: Setting) -> int:
    """The number of DataLoader processes with which the bare loop is fastest here."""
    seconds = {}
    for workers in (0, 2, 4, 8, 16) if setting.device.type == "cuda" else (0, 2):
        seconds[workers] = min(take_turns({"": bare_epoch(setting, workers)}, 1)[""])
    return min(seconds, key=seconds.__getitem__)


def torchdistill_epoch(setting: Setting, workers: int) -> Contender:
    name, kwargs = setting.optimizer["_target_"], {k: v for k, v in setting.optimizer.items() if k != "_target_"}
    networks = setting.live_teacher(), setting.model(setting.student, 1)
    optimizer = {"key": name.rpartition(".")[2], "kwargs": kwargs}
    loader = {"batch_size": setting.batch, "num_workers": workers, "persistent_workers": workers > 0}
    return torchdistill_box(
        networks, setting.images, loader, optimizer, {"T": T, "alpha": ALPHA, "beta": BETA}, setting.device
    )


def products_alone(setting: Setting, *, size: int = 1, reuse: bool = False) -> Contender:
    """The matrix products of the student's steps: forward, for each weight, and for the input of all layers but one.

    Their outputs are new tensors, as they must be in training, or with `reuse` always the same ones, which spares the
    allocation too.
    """
    step = products(widths_of(setting), setting.batch, size, torch.float32, setting.device, reuse=reuse)

    def epoch() -> None:
        for _ in range(setting.steps):
            step()

    return epoch


def widths_of(setting: Setting) -> list[int]:
    return [math.prod(setting.train.shape), *setting.student["hidden"], CLASSES]


def products(
    widths: Sequence[int], batch: int, size: int, dtype: torch.dtype, device: torch.device, *, reuse: bool
) -> Contender:
    """The products of one step of `size` models, in one call for all of them as a stack makes it."""

    def made(*shape: int) -> torch.Tensor:
        shape = (size, *shape) if size > 1 else shape
        return torch.randn(shape, device=device).to(dtype)

    product = torch.mm if size == 1 else torch.bmm
    layers = [
        (made(batch, fan_in), made(width, fan_in), made(batch, width)) for fan_in, width in itertools.pairwise(widths)
    ]
    outputs = [tuple(torch.empty_like(t) if reuse else None for t in layer) for layer in layers]

    def step() -> None:
        kept = []  # all results of a step are alive together, as in training
        for (x, weight, _), (_, _, y) in zip(layers, outputs, strict=True):
            kept.append(product(x, weight.mT, out=y))
        for i in reversed(range(len(layers))):
            (x, weight, grad), (grad_x, grad_weight, _) = layers[i], outputs[i]
            kept.append(product(grad.mT, x, out=grad_weight))
            if i:
                kept.append(product(grad, weight, out=grad_x))

    return step


# ---------------------------------------------------------------- the floor


def floor_cases(args: argparse.Namespace) -> list[tuple[int, str]]:
    """Batch sizes and precisions; bfloat16 only where the processor or the GPU computes in it."""
    has_bfloat16 = args.device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return [(batch, precision) for batch in (128, 512) for precision in ("float32", *["bfloat16"] * has_bfloat16)]


def compare_floor(args: argparse.Namespace, batch: int, precision: str) -> dict[str, Any]:
    """A step of the student against its floor, and where the rest of it goes: all in milliseconds of a step."""
    device, dtype = torch.device(args.device), getattr(torch, precision)
    student = read_node("model", args.student)
    widths = [784, *student["hidden"], CLASSES]
    step = Stepping(student, made_examples(60_000, CLASSES, device), batch, precision)
    product = products(widths, batch, 1, dtype, device, reuse=True)
    alone = replayed(lambda: repeat(product, step.count), device)
    repeat(step, 3)  # on a GPU the third is recorded
    numbers = sum((a + 1) * b for a, b in itertools.pairwise(widths))
    copied = torch.randn(5 * numbers, device=device)  # as much as an optimiser's tensors and the gradients
    target = torch.empty_like(copied)
    contenders: dict[str, Contender] = {
        "step": lambda: waited(step, device),
        "products": lambda: waited(alone, device),
        "copy": lambda: waited(lambda: repeat(lambda: target.copy_(copied), step.count), device),
    }
    seconds = take_turns(contenders, 3 * args.rounds)
    moved = 4 * (7 * numbers + 2 * batch * widths[0])
    floors = [
        one + copy * moved / (8 * len(copied)) for one, copy in zip(seconds["products"], seconds["copy"], strict=True)
    ]
    share, of_products = ratios(floors, seconds["step"]), ratios(seconds["products"], seconds["step"])
    parts = step.parts() if device.type == "cpu" else {"gaps": 1e3 * gaps(step) / step.count}
    milliseconds = {name: 1e3 * statistics.median(values) / step.count for name, values in seconds.items()}
    print(
        f"\nstep of {args.student}, batch {batch}, {precision}: {milliseconds['step']:.2f} ms; "
        f"{spread(share, '.0%')} of the floor's rate, {spread(of_products, '.0%')} of the products' in place\n"
        f"  floor {1e3 * statistics.median(floors) / step.count:.2f} ms: products {milliseconds['products']:.2f} and "
        f"{moved / 1e6:.0f} MB at {8e-9 * len(copied) / (statistics.median(seconds['copy']) / step.count):.0f} GB/s\n"
        f"  parts  {', '.join(f'{name} {value:.2f}' for name, value in parts.items())}",
        flush=True,
    )
    return {"batch": batch, "precision": precision, "seconds": seconds, "floor": floors, "parts": parts}


def repeat(step: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        step()


def waited(work: Callable[[], Any], device: torch.device) -> None:
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()


def replayed(work: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """The same work without its launches, on a GPU: what the floor is made of must not wait for Python either."""
    if device.type != "cuda":
        return work
    recorder = CudaGraphs(device)
    recorder.run(lambda: repeat(work, 2))
    return recorder.record(work, [])


def gaps(step: Stepping, blocks: int = 20) -> float:
    """Seconds of a block in which the GPU computes nothing: its time, less that of its kernels."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiled:
        repeat(step, blocks)
        torch.cuda.synchronize()
    busy = sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6
    start = time.perf_counter()
    repeat(step, blocks)
    torch.cuda.synchronize()
    return (time.perf_counter() - start - busy) / blocks


class Stepping:
    """Steps of a training of one student, a block of them at a call, and where their time goes."""

    def __init__(self, node: Mapping[str, Any], train: Examples, batch: int, precision: str) -> None:
        classes, device = int(train.labels.max()) + 1, train.device
        self.objective, self.train = objective_of(1, device), train
        self.learner = made_learner(node, [0], self.objective, device, precision)
        teacher = CachedTeacher(torch.randn(len(train), classes, device=device))
        plan = Plan(epochs=1, batch_size=batch, schedule=Constant())
        training = Training(train, train.subset(torch.arange(0)), "student", [0], plan, self.objective, teacher)
        self.count = training.steps_of_block
        self.steps = recorded_steps(self.learner, teacher, self.objective, recorder_on(device))
        shape = (len(distinct([0])), self.count * batch)
        self.draws = itertools.cycle([torch.randint(len(train), shape, device=device) for _ in range(16)])
        self.sizes, self.rates = (batch,) * self.count, [1.0] * self.count

    def __call__(self) -> None:
        self.steps(self.train.blocks(next(self.draws), self.sizes), self.rates)

    def places(self) -> dict[str, tuple[Any, str]]:
        """The parts of a step, by the object and the method that do it."""
        learner = self.learner
        if isinstance(learner, StackedLearner):
            form = learner._closed_form(self.objective)
            places = {"forward": (learner, "_logits"), "loss": (form, "gradient")}
            return places | {"backward": (learner.network, "backward"), "optimiser": (learner, "optimizer_step")}
        places = {"forward": (learner, "outputs"), "loss": (self.objective.method, "forward")}
        return places | {"backward": (torch.Tensor, "backward"), "optimiser": (learner.optimizer, "step")}

    def parts(self, blocks: int = 8) -> dict[str, float]:
        """Mean milliseconds of a step's parts on a CPU; `rest` is gathering, sums of losses, Python."""
        places = self.places()
        found: dict[str, list[float]] = {name: [] for name in places}

        def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
            def measured(*args: Any) -> Any:
                start = time.perf_counter()
                result = call(*args)
                found[name].append(time.perf_counter() - start)
                return result

            return measured

        were = {name: getattr(owner, method) for name, (owner, method) in places.items()}
        for name, (owner, method) in places.items():
            setattr(owner, method, timed(name, were[name]))
        start = time.perf_counter()
        repeat(self, blocks)
        mean = (time.perf_counter() - start) / (blocks * self.count)
        for name, (owner, method) in places.items():
            setattr(owner, method, were[name])
        parts = {name: 1e3 * sum(values) / (blocks * self.count) for name, values in found.items()}
        return {**parts, "rest": 1e3 * mean - sum(parts.values())}


def made_learner(
    node: Mapping[str, Any],
    seeds: Sequence[int],
    objective: Objective,
    device: torch.device,
    precision: str = "float32",
    classes: int = CLASSES,
) -> Learner:
    torch.manual_seed(0)
    modules = [build(dict(node), input_shape=(1, 28, 28), num_classes=classes).to(device) for _ in seeds]
    return learn(modules, read_node("optimizer", "adamw"), seeds, objective, Autocast(device, precision))


def made_examples(n: int, classes: int, device: torch.device) -> Examples:
    labels = torch.arange(n, device=device) % classes
    return Examples(torch.randn(n, 1, 28, 28, device=device), labels)


# ---------------------------------------------------------------- two trainings on one machine


def seconds_alone(args: argparse.Namespace) -> float:
    """Seconds of epochs of the student in this process."""
    device = torch.device(args.device)
    step = Stepping(read_node("model", args.student), made_examples(60_000, CLASSES, device), args.batch, "float32")
    blocks = -(-args.epochs_alone * args.examples // (args.batch * step.count))
    repeat(step, 3)  # on a GPU the third is recorded
    print("ready", flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    waited(lambda: repeat(step, blocks), device)
    return time.perf_counter() - start


# Begins a script as the command begins, so that processes find each other.
AS_COMMAND = """
import os, pathlib, runpy, sys
from kd_cli.commands import cores
cores.share(os.environ)
del sys.argv[0]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def compare_parallel(args: argparse.Namespace) -> dict[str, list[float]]:
    """Two trainings in two processes, at once and one after the other: do they take each other's cores away?"""
    words = ["--epochs-alone", "2", "--examples", str(args.examples), "--student", args.student]
    words += ["--batch", str(args.batch), "--device", args.device, "--threads", str(args.threads)]
    command = [sys.executable, "-c", AS_COMMAND, str(Path(__file__).resolve()), *words]

    environment = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}  # each finds its own

    def together(n: int) -> float:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        running = [subprocess.Popen(command, env=environment, **pipes) for _ in range(n)]
        try:
            for one in running:
                while (line := one.stdout.readline()).strip() != "ready":  # start-up is not counted, nor the other's
                    if not line:
                        sys.exit(f"a training ended with exit code {one.wait()}")
            for one in running:
                one.stdin.write("\n")
                one.stdin.flush()
            return max(float(one.communicate()[0]) for one in running)
        finally:
            for one in running:
                one.kill()

    found: dict[str, list[float]] = {"one after the other": [], "at once": []}
    for _ in range(args.rounds):
        found["one after the other"].append(together(1) + together(1))
        found["at once"].append(together(2))
    longer = ratios(found["at once"], found["one after the other"])
    print(
        f"\ntwo trainings of {args.student} at once take {spread(longer, '.2f')} times as long as one after the other"
    )
    return found


# ---------------------------------------------------------------- growth


def measure_growth(args: argparse.Namespace) -> dict[str, Any]:
    """The cost of training against its size: each line should be straight, and where it bends it is said why."""
    device = torch.device(args.device)
    tiny, small = read_node("model", "tinymlp"), read_node("model", "smallmlp")

    def epochs(node: Mapping[str, Any], n: int, times: int, classes: int, size: int) -> Contender:
        objective, examples = objective_of(size, device), made_examples(n, classes, device)
        learner = made_learner(node, range(size), objective, device, classes=classes)
        teacher = CachedTeacher(torch.randn(n, classes, device=device))
        return training_epochs(learner, examples, objective, teacher, range(size), batch=args.batch, epochs=times)

    lines: dict[str, dict[int, Contender]] = {
        "examples (smallmlp, 1 epoch)": {n: epochs(small, n, 1, 10, 1) for n in (1280, 2560, 5120, 10240)},
        "epochs (smallmlp, 1,280 examples)": {n: epochs(small, 1280, n, 10, 1) for n in (1, 2, 4, 8)},
        "classes (tinymlp, 1,280 examples)": {n: epochs(tiny, 1280, 1, n, 1) for n in (10, 100, 1000, 10000)},
        "students in a stack (tinymlp, 1,280 examples)": {n: epochs(tiny, 1280, 1, 10, n) for n in (1, 4, 16, 64, 256)},
    }
    found: dict[str, Any] = {}
    for name, contenders in lines.items():
        seconds = take_turns({str(n): run for n, run in contenders.items()}, args.rounds)
        medians = {int(n): statistics.median(values) for n, values in seconds.items()}
        print(f"\n{name}")
        for n, value in medians.items():
            print(f"  {n:7,}   {value:8.3f} s   {1e6 * value / n:10.1f} µs each")
        found[name] = seconds
    return found


def take_turns(contenders: Mapping[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender's epoch in each round, after an epoch that warms up. Each round starts with another."""
    names = list(contenders)
    for name in names:
        contenders[name]()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start = time.perf_counter()
            contenders[name]()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def say_epochs(seconds: Mapping[str, list[float]], once: Mapping[str, float], examples: int, workers: int) -> None:
    rates = {name: examples / statistics.median(values) for name, values in seconds.items()}
    ours = seconds["kd-cli"]
    print(f"\n{'':14}examples/s   kd-cli is faster by (median, range)")
    for name in ("kd-cli", "plain loop", "bare loop", "torchdistill"):
        if name not in seconds:
            print(f"{name:14}not installed: pip install torchdistill")
            continue
        note = "" if name == "kd-cli" else versus(seconds[name], ours, name)
        if name in ("bare loop", "torchdistill"):
            note += f"   DataLoader with {workers} workers"
        print(f"{name:14}{rates[name]:10,.0f}   {note}".rstrip())
    print(f"{'products':14}{rates['products']:10,.0f}   the student's matrix products alone, outputs allocated")
    print(f"{'in place':14}{rates['in place']:10,.0f}   the same into outputs that are there already")
    print(
        f"\nshare of the products' rate: {spread(ratios(seconds['products'], ours), '.0%')}   goal {GOALS['share']:.0%}"
    )

    logits, epoch = once["teacher_logits"], statistics.median(ours)
    print(
        f"once: {logits:.2f} s for the teacher's logits ({logits / epoch:.1f} epochs), "
        f"{once['read_and_normalise']:.2f} s to read and normalise"
    )
    for name in ("bare loop", "torchdistill"):
        if name in seconds:
            counted = {
                epochs: statistics.median(
                    t * epochs / (o * epochs + sum(once.values())) for t, o in pairs(seconds, name)
                )
                for epochs in (1, EPOCHS)
            }
            ratios_of = ", ".join(f"{ratio:.2f} in {plural(epochs)}" for epochs, ratio in counted.items())
            print(f"with that counted, faster than {name} by {ratios_of}")
    sys.stdout.flush()


def versus(theirs: Sequence[float], ours: Sequence[float], name: str) -> str:
    return spread(ratios(theirs, ours), ".2f") + (f"   goal {GOALS[name]}" if name in GOALS else "")


def pairs(seconds: Mapping[str, list[float]], name: str) -> Iterator[tuple[float, float]]:
    return zip(seconds[name], seconds["kd-cli"], strict=True)


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(numerators, denominators, strict=True)]


def spread(values: Sequence[float], form: str) -> str:
    return f"{statistics.median(values):{form}} ({min(values):{form}}–{max(values):{form}})"


def plural(epochs: int) -> str:
    return f"{epochs} epoch" if epochs == 1 else f"{epochs} epochs"


# ---------------------------------------------------------------- start-up, and what a run does besides training


def measure_startup(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Seconds until something is ready to work, and where the default run's seconds go."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "KD_STORE": str(scratch / "store")}
    script = Path(sys.executable).with_name("kd-run")
    kd_run = [str(script)] if script.is_file() else [sys.executable, "-m", "kd_cli"]
    python = [sys.executable, "-c"]
    commands = {
        "import hydra": [*python, "import hydra"],
        "import torch": [*python, "import os, torch; os._exit(0)"],
        "kd-run --help": [*kd_run, "--help"],
        "first step": [*python, f"{inspect.getsource(traced_run)}\ntraced_run(stop=True)"],
    }

    def starter(command: list[str]) -> Contender:
        return lambda: wait_for(command, scratch, environment)

    seconds = take_turns({name: starter(command) for name, command in commands.items()}, args.rounds)
    print("\nstart-up, seconds (median, range)")
    for name, values in seconds.items():
        print(f"  {name:14}{spread(values, '.2f')}")
    ratio = ratios(seconds["kd-run --help"], seconds["import hydra"])
    print(
        f"  kd-run --help takes {spread(ratio, '.2f')} times as long as import hydra   goal at most {GOALS['help']:g}"
    )
    runs = {store: default_run(scratch / store, environment) for store in ("empty store", "filled store")}
    ratio = ratios(seconds["first step"], seconds["import torch"])
    print(
        f"  kd-run's first training step comes {spread(ratio, '.2f')} times as late as import torch ends   "
        f"goal at most {GOALS['first step']:g}"
    )
    for store, found in runs.items():
        say_run(store, found)
    return {"seconds": seconds, "default_run": runs}


def wait_for(command: Sequence[str], cwd: Path, environment: Mapping[str, str]) -> str:
    done = subprocess.run(command, cwd=cwd, env=dict(environment), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[:200]}\nexited with {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def default_run(work: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """`kd-run` in a new folder: its wall-clock seconds, those of training by role, and the others by stage."""
    work.mkdir()
    begun = time.time()
    said = wait_for([sys.executable, "-c", f"{inspect.getsource(traced_run)}\ntraced_run()"], work, environment)
    total = time.time() - begun
    report = json.loads(said.splitlines()[-1])
    (summary,) = (json.loads(file.read_text(encoding="utf-8")) for file in work.glob("outputs/*/*/summary.json"))
    training = {
        role: summary[role]["seconds"]
        for role in ("teacher", "student_alone", "student")
        if summary[role] and not summary[role]["from_store"]
    }
    stages = {"interpreter": report["begun"] - begun, **report["stages"]}
    stages["exit"] = begun + total - report["ended"]
    # What the hooks around training hold besides the epochs themselves: building models, metrics between epochs.
    stages["around training"] = stages.pop("training", 0.0) - sum(training.values())
    stages["the rest"] = total - sum(stages.values()) - sum(training.values())
    return {"total": total, "training": training, "stages": stages}


def traced_run(stop: bool = False) -> None:
    """Run `kd-run` in this process and print, as the last line, the seconds of its stages; or `stop` at the first step.

    Its source is run by an interpreter of its own, so it imports what it needs, and nothing before its clock runs.
    """
    import time

    begun = time.time()
    import functools
    import importlib
    import json
    import os
    import sys

    stages: dict = {}
    inner = [0.0]  # seconds that stages within the open ones have taken for themselves

    def stage(name, function):
        @functools.wraps(function)
        def timed(*args, **kwargs):
            if stop and name == "training":
                os._exit(0)
            start = time.perf_counter()
            inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = time.perf_counter() - start
                stages[name] = stages.get(name, 0.0) + took - inner.pop()
                inner[-1] += took

        return timed

    # Functions and classes' methods by where they are defined. What has moved is counted with the rest.
    watched = {
        "data": ("runs.device_data.load_device_data",),
        "checks": ("runs.models.check_shape",),
        "training": ("learn.engine.fit",),
        "evaluation": ("learn.engine.validate", "runs.models.predict_module", "metrics.evaluate_logits"),
        "FLOPs": ("runs.models.forward_flops",),
        "models": ("runs.models.build_module", "runs.models.load_module"),
        "optimizer": ("runs.building.make_optimizer",),
        "pictures, page": (
            "runs.pictures.pictures",
            "storage.run_dir.RunDir.write_pictures",
            "report.pages.write_run_page",
        ),
        "run directory": tuple(
            f"storage.run_dir.RunDir.{name}" for name in ("append_metrics", "write_student", "write_summary")
        ),
        "store": (
            "storage.store.Store.put",
            "storage.store.Store.get",
            "storage.store.Entry.weights",
            "storage.store.Entry.outputs",
        ),
    }

    def watch():
        ours = [module for name, module in sys.modules.items() if name.startswith("kd_cli.")]
        for name, paths in watched.items():
            for path in paths:
                found = None
                holder = path.split(".")
                for split in range(len(holder), 0, -1):
                    module = sys.modules.get("kd_cli." + ".".join(holder[:split]))
                    if module is not None:
                        for part in holder[split:]:
                            found, owner = getattr(found or module, part, None), found
                        break
                if found is None:
                    continue
                timed = stage(name, found)
                for where in [owner] if owner is not None else ours:
                    for key in [key for key, value in vars(where).items() if value is found]:
                        setattr(where, key, timed)

    sys.argv = ["kd-run"]
    hydra = stage("import hydra", importlib.import_module)("hydra._internal.hydra")
    run_job = hydra.run_job

    def job(*args, **kwargs):
        for module in ("torch", "kd_cli.runs.run_many"):
            stage(f"import {module.partition('.')[0]}", importlib.import_module)(module)
        watch()
        return stage("the rest", run_job)(*args, **kwargs)

    hydra.run_job = job
    from kd_cli.commands import kd_run as cli

    stage("compose", cli.entry)()
    stages.pop("the rest", None)
    print(json.dumps({"begun": begun, "ended": time.time(), "stages": stages}))


def say_run(store: str, found: Mapping[str, Any]) -> None:
    training = sum(found["training"].values())
    roles = ", ".join(f"{role.replace('_', ' ')} {seconds:.2f}" for role, seconds in found["training"].items())
    print(f"\ndefault run, {store}: {found['total']:.2f} s")
    print(f"  training     {training:.2f}   {roles}")
    print(f"  all else     {found['total'] - training:.2f}")
    for name, seconds in sorted(found["stages"].items(), key=lambda item: -item[1]):
        print(f"    {name:20}{seconds:.2f}")


def as_the_command() -> None:
    """Continue with the environment and the allocator of kd-run; libraries read their variables when they load."""
    environment = dict(os.environ)
    cores.share(environment)
    if environment != dict(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)
    cores.keep_memory()


if __name__ == "__main__":
    as_the_command()
    if "--cohort" in sys.argv:  # everything else on the command line is for that script
        sys.argv.remove("--cohort")
        runpy.run_path(str(Path(__file__).with_name("bench_cohort.py")), run_name="__main__")
    else:
        main()
