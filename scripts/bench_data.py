"""Measure training on photos: from the decoded file of `dataset.keep=disk` against torchvision's ImageFolder.

    python scripts/bench.py --data --pictures photos        # a folder per class of 64x64 JPEGs; else they are made
    python scripts/bench.py --data --examples 20000 --rounds 3

One epoch of the same small student, the same optimiser and batches, plain cross-entropy:

    kd-cli         the engine on the decoded file; normalised batch by batch
    first pass     the same with the decoding before it, and the reading that measures the data set
    streamed       the engine with `dataset.keep=none`
    ImageFolder    plain PyTorch: ImageFolder, ToTensor, Normalize, DataLoader with the quickest of several settings

The contenders take turns within each round; a ratio is taken within its round. The processor's time, workers included,
hardly depends on what else the machine does, and decides where all cores are busy.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import random
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset

from kd_cli.config.build import build
from kd_cli.data.folders import imagefolder
from kd_cli.data.normalisation import Normalisation
from kd_cli.data.prepare import prepare
from kd_cli.data.room import cores
from kd_cli.data.source import Dataset
from kd_cli.learn.cuda_graphs import recorded_steps
from kd_cli.learn.engine import Observer, Plan, Training, train_epoch
from kd_cli.learn.learner import ModuleLearner
from kd_cli.learn.methods import Hard, Weights
from kd_cli.learn.objective import Objective
from kd_cli.learn.schedules import Constant
from kd_cli.runs.device_data import examples_of
from kd_cli.vision import import_torchvision

SIZE, BATCH, CLASSES = 64, 128, 10
TRIED = 2000  # pictures, about, with which settings of the loader are tried
STUDENTS: Mapping[str, dict[str, Any]] = {
    "tinymlp": {"_target_": "kd_cli.models.mlp.mlp", "hidden": [30, 30]},
    "cnn": {"_target_": "kd_cli.models.cnn.cnn", "channels": [8, 16], "hidden": 64},
}
GOALS = {"kd-cli": 3.0, "first pass": 1.0}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Print and return the seconds of each contender's epochs, and how many times as long ImageFolder takes."""
    with tempfile.TemporaryDirectory(prefix="kd-bench-data-") as scratch:
        root = Path(args.pictures).resolve() if args.pictures else make_photos(Path(scratch) / "photos", args.examples)
        found: dict[str, Any] = {}
        for student in STUDENTS:
            found[student] = compare(root, Path(scratch), student, args.rounds)
    return found


def compare(root: Path, scratch: Path, student: str, rounds: int) -> dict[str, Any]:
    """The contenders in turns, with one student."""
    data_dir = scratch / "data"
    kept = dataset(root, data_dir, "disk")
    streamed = dataset(root, data_dir, "none")
    n = len(kept.train)

    def first_pass() -> None:
        shutil.rmtree(data_dir)
        epoch(dataset(root, data_dir, "disk"), student)

    folder, setting = quickest_loader(root, kept, student)
    contenders: dict[str, Callable[[], None]] = {
        "kd-cli": lambda: epoch(kept, student),
        "first pass": first_pass,
        "streamed": lambda: epoch(streamed, student),
        "ImageFolder": folder,
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    processor: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            started, used = time.perf_counter(), processor_seconds()
            contender()
            seconds[name].append(time.perf_counter() - started)
            processor[name].append(processor_seconds() - used)
    print(f"\n{student}: {n:,} training photos of {SIZE}x{SIZE}, {cores()} cores; ImageFolder: {setting}")
    print(f"{'':12} {'pictures/s':>10}  {'ImageFolder takes, times as long':34}  of the processor's time")
    for name, own in seconds.items():
        goal = f"goal {GOALS[name]:g}" if name in GOALS else ""
        first = f"{spread(seconds['ImageFolder'], own)} {goal}"
        second = spread(processor["ImageFolder"], processor[name])
        print(f"{name:12} {n / statistics.median(own):10,.0f}  {first:34}  {second}", flush=True)
    return {"examples": n, "setting": setting, "seconds": seconds, "processor": processor}


def spread(theirs: list[float], ours: list[float]) -> str:
    """Median and range of the rounds' ratios."""
    ratios = [one / other for one, other in zip(theirs, ours, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def processor_seconds() -> float:
    """Seconds of processor time of this process, its worker processes and those that have ended."""
    times = os.times()
    total = times.user + times.system + times.children_user + times.children_system
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError):  # no Linux, or just ended
            fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def dataset(root: Path, data_dir: Path, keep: str) -> Dataset:
    """The photos as the command reads them; all of them but a twentieth train, as they do in the ImageFolder."""
    source = imagefolder(data_dir=data_dir, root=str(root), image_size=SIZE, keep=keep, test_fraction=0.05)
    return prepare(source, val_fraction=0.0)


def epoch(data: Dataset, student: str) -> None:
    """One epoch by the project's engine."""
    normalise = Normalisation(data.mean, data.std, torch.float32)
    train, val = (examples_of(split.images, split.labels, normalise) for split in (data.train, data.val))
    module = model(student)
    objective = Objective(Hard(), Weights(T=torch.ones(1), alpha=torch.zeros(1), beta=torch.ones(1)))
    learner = ModuleLearner(module, optimizer(module), seed=0, objective=objective)
    training = Training(train, val, "bench", [0], Plan(1, BATCH, Constant()), objective)
    train_epoch(learner, training, 1, recorded_steps(learner, None, objective, None), Observer())


def quickest_loader(root: Path, data: Dataset, student: str) -> tuple[Callable[[], None], str]:
    """An epoch of plain PyTorch on an ImageFolder of the same pictures, with the quickest loader, and its setting.

    The pictures become floats in the workers, as is usual, or stay bytes until the batch is normalised.
    """
    torchvision = import_torchvision()
    transforms = torchvision.transforms
    floats = transforms.Compose([transforms.ToTensor(), transforms.Normalize(data.mean, data.std)])
    forms = {"floats": floats, "bytes": transforms.PILToTensor()}
    normalise = Normalisation(data.mean, data.std, torch.float32)

    def contender(form: str, workers: int, ahead: int, every: int = 1) -> Callable[[], None]:
        whole = torchvision.datasets.ImageFolder(str(root), forms[form])
        place = {str(Path(path).relative_to(root)): i for i, (path, _) in enumerate(whole.samples)}
        train = Subset(whole, [place[name] for name in data.train.names[::every]])
        keys = {"num_workers": workers, "prefetch_factor": ahead, "persistent_workers": True}
        loader = DataLoader(train, BATCH, shuffle=True, **keys)
        return lambda: plain_epoch(loader, student, normalise if form == "bytes" else None)

    warnings.filterwarnings("ignore", "This DataLoader will create", UserWarning)  # more workers than cores are tried
    every = max(1, len(data.train) // TRIED)
    found: dict[tuple[str, int, int], float] = {}
    for form in forms:
        for workers, ahead in ((cores(), 2), (cores(), 8), (2 * cores(), 2)):
            tried = contender(form, workers, ahead, every)
            tried()  # the workers begin
            started = time.perf_counter()
            tried()
            found[form, workers, ahead] = time.perf_counter() - started
    form, workers, ahead = min(found, key=found.__getitem__)
    return contender(form, workers, ahead), f"{form} from {workers} workers, {ahead} batches ahead of each"


def plain_epoch(loader: DataLoader[Any], student: str, normalise: Normalisation | None) -> None:
    """One epoch of plain PyTorch."""
    module = model(student).train()
    adam = optimizer(module)
    for images, labels in loader:
        adam.zero_grad()
        F.cross_entropy(module(images if normalise is None else normalise(images)), labels).backward()
        adam.step()


def model(student: str) -> nn.Module:
    torch.manual_seed(0)
    built: nn.Module = build(dict(STUDENTS[student]), input_shape=(3, SIZE, SIZE), num_classes=CLASSES)
    return built


def optimizer(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(module.parameters(), lr=1e-3, fused=True)


def make_photos(root: Path, n: int) -> Path:
    """`n` JPEGs of smooth random colours in ten folders, about as large as photos of that size."""
    rng, noise = random.Random(0), torch.Generator().manual_seed(0)
    for i in range(n):
        coarse = torch.randint(0, 256, (9, 9, 3), dtype=torch.uint8, generator=noise)
        folder = root / f"class{i % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(coarse.numpy()).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
        picture.save(folder / f"{i}.jpg", quality=rng.choice((80, 85, 90)))
    return root
