"""Measure what it gains to train the students of a sweep side by side. All is compared in one process, in turns.

    python scripts/bench_cohort.py --data cifar10-jpeg/train    # folders of JPEG files, one for each class
    python scripts/bench_cohort.py                              # random images of CIFAR-10's shape
    python scripts/bench_cohort.py --student mobilenet_v3_small --teacher resnet18

Eight temperatures of one student are taught live by one teacher, with crop and flip, for an epoch:

    side by side   one cohort: a batch is fetched, augmented and answered by the teacher once for all
    in turn        the same cohort, one student's step after the other instead of as many at once as there are threads
    one by one     the same students, each trained alone by the same engine
    alone          one of them
    plain PyTorch  the same one in a loop written by hand on the same resident tensors, without metrics
    torchdistill   the same one in torchdistill's box on a DataLoader of the files, where it is installed

The contenders take turns within each round; a ratio is taken within its round, and its median and range over the rounds
are printed. Speed does not depend on what the images show, nor on the teacher's weights, which are random.

--limits measures instead what any arrangement could gain at most: the teacher's pass t and the student's step s, on all
threads and on one. One teacher's pass for n students takes (t + n s) where n runs take n (t + s); threads that lose
nothing to each other take (t + n s) / threads of the times on one thread.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench import Contender, as_the_command, installed, machine, ratios, say_machine, spread, take_turns
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Subset
from torchdistill_box import torchdistill_box

from kd_cli.data.normalisation import Normalisation
from kd_cli.learn.augment import Augment
from kd_cli.learn.batches import Examples, batch_sizes, draw_augmentation, draw_order
from kd_cli.learn.cohort import Cohort
from kd_cli.learn.cuda_graphs import PlainSteps
from kd_cli.learn.engine import Observer, Plan, Training, train_epoch
from kd_cli.learn.learner import Learner, ModuleLearner
from kd_cli.learn.methods import SoftTargets, Weights
from kd_cli.learn.objective import Objective, SideBySide
from kd_cli.learn.randomness import global_stream
from kd_cli.learn.schedules import Constant
from kd_cli.learn.teachers import LiveTeacher, freeze
from kd_cli.models.torchvision import torchvision_model

TEMPERATURES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0)
ALPHA, BETA, RATE = 1.0, 0.5, 0.05
SHAPE, CLASSES = (3, 32, 32), 10
MEAN, DEVIATION = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]  # of CIFAR-10's training images
AUGMENT = Augment(crop=4, flip=True)
LIMIT_STEPS = 10  # in a round of --limits
GOALS = {("shufflenet_v2_x0_5", "resnet34"): "3.0", ("mobilenet_v3_small", "resnet18"): "1.8"}  # for eight


@dataclass(frozen=True)
class Setting:
    """What is the same for all contenders."""

    student: str
    teacher: str
    temperatures: Sequence[float]
    batch: int
    train: Examples
    files: Any | None  # the same pictures as torchvision reads them, for a DataLoader

    def network(self, name: str, seed: int) -> nn.Module:
        with global_stream(seed, name):
            return torchvision_model(input_shape=SHAPE, num_classes=CLASSES, name=name)

    def live_teacher(self) -> nn.Module:
        return freeze(self.network(self.teacher, 1))

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(module.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    setting, origin = prepare(args)
    say_machine(found := machine(args))
    if args.limits:
        say_limits(limits(setting, args.threads, args.rounds), len(setting.temperatures), args.threads)
        return
    n = len(setting.temperatures)
    temperatures = ", ".join(f"{T:g}" for T in setting.temperatures)
    print(
        f"models    {n} {args.student} taught live by {args.teacher}, T = {temperatures}\n"
        f"training  SGD, batch {args.batch}, crop and flip, {args.rounds} rounds of an epoch of {len(setting.train):,} "
        f"examples of {origin}",
        flush=True,
    )
    contenders: dict[str, Contender] = {
        "side by side": side_by_side(setting, workers=args.threads),
        "in turn": side_by_side(setting, workers=1),
        "one by one": one_by_one(setting, setting.temperatures),
        "alone": one_by_one(setting, setting.temperatures[:1]),
        "plain PyTorch": plain_loop(setting),
    }
    if setting.files is not None and installed("torchdistill"):
        contenders["torchdistill"] = torchdistill_epoch(setting)
    seconds = take_turns(contenders, args.rounds)
    say(seconds, n, GOALS.get((args.student, args.teacher), "") if n == len(TEMPERATURES) else "")
    if args.json:
        args.json.write_text(json.dumps({"machine": found, "seconds": seconds}, indent=2) + "\n", encoding="utf-8")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What students side by side gain, as ratios measured in one run.")
    add = parser.add_argument
    add("--data", type=Path, help="folders of 32x32 colour pictures, one for each class; default: random images")
    add("--examples", type=int, default=640, help="examples in an epoch (%(default)s)")
    add("--students", type=int, default=len(TEMPERATURES), help="how many students (%(default)s)")
    add("--student", default="shufflenet_v2_x0_5", help="one of torchvision's models (%(default)s)")
    add("--teacher", default="resnet34", help="one of torchvision's models (%(default)s)")
    add("--batch", type=int, default=64, help="examples in a step (%(default)s)")
    add("--rounds", type=int, default=3, help="rounds in which every contender trains one epoch (%(default)s)")
    add("--threads", type=int, default=2, help="threads for torch (%(default)s)")
    add("--limits", action="store_true", help="measure what sharing and threads could gain at most instead")
    add("--json", type=Path, metavar="FILE", help="write the numbers, every round's too")
    args = parser.parse_args()
    args.device = "cpu"
    for name in ("examples", "students", "rounds", "threads", "batch"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} is {getattr(args, name)}; it must be 1 or more")
    if args.students > len(TEMPERATURES):
        parser.error(f"--students is {args.students}; there are {len(TEMPERATURES)} temperatures")
    return args


def prepare(args: argparse.Namespace) -> tuple[Setting, str]:
    """The examples on the device as bytes, and where they are from."""
    files = None
    if args.data is not None:
        files, images, labels = pictures(args.data, args.examples)
    else:
        images = torch.randint(0, 256, (args.examples, *SHAPE), dtype=torch.uint8)
        labels = torch.arange(args.examples) % CLASSES
    normalise = Normalisation(torch.tensor(MEAN), torch.tensor(DEVIATION), torch.float32)
    train = Examples(images, labels, normalise=normalise)
    temperatures = TEMPERATURES[: args.students]
    setting = Setting(args.student, args.teacher, temperatures, args.batch, train, files)
    return setting, "made data of CIFAR-10's shape" if files is None else f"{args.data.name}, JPEG files"


def pictures(folder: Path, n: int) -> tuple[Any, Tensor, Tensor]:
    """`n` pictures of a folder, evenly spaced: as torchvision's augmented data set, and as bytes with labels."""
    from torchvision import datasets, transforms
    from torchvision.transforms.functional import pil_to_tensor

    moved = [transforms.RandomCrop(SHAPE[1], padding=4), transforms.RandomHorizontalFlip()]
    normalised = [transforms.ToTensor(), transforms.Normalize(MEAN, DEVIATION)]
    augmented = datasets.ImageFolder(str(folder), transforms.Compose([*moved, *normalised]))
    some = [k * len(augmented) // n for k in range(n)]
    plain = [(augmented.loader(path), label) for path, label in (augmented.samples[k] for k in some)]
    images = torch.stack([pil_to_tensor(image) for image, _ in plain])
    return Subset(augmented, some), images, torch.tensor([label for _, label in plain])


# ---------------------------------------------------------------- the contenders, an epoch each


def student(setting: Setting, T: float) -> tuple[ModuleLearner, Objective]:
    module = setting.network(setting.student, 0)
    objective = Objective(SoftTargets(), Weights(*(torch.tensor([value]) for value in (T, ALPHA, BETA))))
    return ModuleLearner(module, setting.optimizer(module), seed=0, objective=objective), objective


def trained(setting: Setting, learner: Learner, objective: Objective, teacher: LiveTeacher) -> None:
    """One epoch by the engine; nothing is validated or written."""
    plan = Plan(1, setting.batch, Constant(), AUGMENT)
    nothing = setting.train.subset(torch.arange(0))
    training = Training(setting.train, nothing, "student", [0], plan, objective, teacher)
    train_epoch(learner, training, 1, PlainSteps(learner, teacher, objective), Observer())
    for part in learner.parts:
        part.sums.means(len(setting.train))


def side_by_side(setting: Setting, *, workers: int) -> Contender:
    pairs = [student(setting, T) for T in setting.temperatures]
    cohort = Cohort([learner for learner, _ in pairs], torch.device("cpu"), workers=workers)
    objective, teacher = SideBySide.of([one for _, one in pairs]), LiveTeacher([setting.live_teacher()])
    return lambda: trained(setting, cohort, objective, teacher)


def one_by_one(setting: Setting, temperatures: Sequence[float]) -> Contender:
    pairs, teacher = [student(setting, T) for T in temperatures], LiveTeacher([setting.live_teacher()])

    def epoch() -> None:
        for learner, objective in pairs:
            trained(setting, learner, objective, teacher)

    return epoch


def plain_loop(setting: Setting) -> Contender:
    """Ordinary PyTorch for one student, on the same resident tensors."""
    teacher, module, train, T = (
        setting.live_teacher(),
        setting.network(setting.student, 0),
        setting.train,
        TEMPERATURES[0],
    )
    optimizer, n = setting.optimizer(module), len(setting.train)

    def epoch() -> None:
        module.train()
        order, draws = draw_order(n, [0], "student", 1)[0], draw_augmentation(AUGMENT, n, [0], "student", 1)
        assert draws is not None
        start = 0
        for size in batch_sizes(n, setting.batch):
            part = slice(start, start := start + size)
            images = AUGMENT.apply(train.images(order[None, part])[0], draws[0, part])
            with torch.no_grad():
                soft_targets = F.softmax(teacher(images) / T, dim=1)
            logits = module(images)
            soft = F.kl_div(F.log_softmax(logits / T, dim=1), soft_targets, reduction="batchmean")
            loss = ALPHA * T**2 * soft + BETA * F.cross_entropy(logits, train.labels[order[part]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def torchdistill_epoch(setting: Setting) -> Contender:
    networks = setting.live_teacher(), setting.network(setting.student, 0)
    optimizer = {"key": "SGD", "kwargs": {"lr": RATE, "momentum": 0.9, "weight_decay": 5e-4}}
    loader, weights = (
        {"batch_size": setting.batch, "num_workers": 0},
        {"T": TEMPERATURES[0], "alpha": ALPHA, "beta": BETA},
    )
    return torchdistill_box(networks, setting.files, loader, optimizer, weights, torch.device("cpu"))


# ---------------------------------------------------------------- what could be gained at most


def limits(setting: Setting, threads: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of the teacher's pass, t, and of the student's step, s, on all threads, and on one, t1 and s1."""
    teacher, module = setting.live_teacher(), setting.network(setting.student, 0)
    optimizer = setting.optimizer(module)
    images, labels = torch.randn(setting.batch, *SHAPE), torch.arange(setting.batch) % CLASSES
    soft_targets = torch.full((setting.batch, CLASSES), 1 / CLASSES)

    def answer() -> None:
        with torch.no_grad():
            teacher(images)

    def step() -> None:
        logits = module.train()(images)
        soft = F.kl_div(F.log_softmax(logits, dim=1), soft_targets, reduction="batchmean")
        optimizer.zero_grad()
        (ALPHA * soft + BETA * F.cross_entropy(logits, labels)).backward()
        optimizer.step()

    def repeated(work: Contender, used: int) -> Contender:
        def run() -> None:
            torch.set_num_threads(used)
            for _ in range(LIMIT_STEPS):
                work()

        return run

    parts = {"t": (answer, threads), "s": (step, threads), "t1": (answer, 1), "s1": (step, 1)}
    seconds = take_turns({name: repeated(*part) for name, part in parts.items()}, rounds)
    torch.set_num_threads(threads)
    return {name: [one / LIMIT_STEPS for one in values] for name, values in seconds.items()}


def say_limits(seconds: dict[str, list[float]], n: int, threads: int) -> None:
    for name, what in (("t", "the teacher's pass"), ("s", "the student's step")):
        many, one = ([1000 * value for value in seconds[key]] for key in (name, name + "1"))
        print(f"{what:20}{spread(many, '.1f')} ms on {threads} threads, {spread(one, '.1f')} ms on one")
    rows = list(zip(*(seconds[name] for name in ("t", "s", "t1", "s1")), strict=True))
    shared = [n * (t + s) / (t + n * s) for t, s, _, _ in rows]
    ideal = [n * (t + s) * threads / (t1 + n * s1) for t, s, t1, s1 in rows]
    print(f"{n} students at most, one teacher's pass for all: {spread(shared, '.2f')} times as fast as one by one")
    print(f"and on threads that lose nothing to each other: {spread(ideal, '.2f')}")


# ---------------------------------------------------------------- results


def say(seconds: dict[str, list[float]], n: int, goal: str) -> None:
    def row(name: str, values: Sequence[float], goal: str = "") -> None:
        print(f"{name:52}{spread(values, '.2f')}{goal and f'   goal {goal}'}")

    print("\nratios of times, median (range)")
    row(f"{n} students one by one / side by side", ratios(seconds["one by one"], seconds["side by side"]), goal)
    row(f"{n} students one by one / side by side, in turn", ratios(seconds["one by one"], seconds["in turn"]))
    row("one student alone / plain PyTorch", ratios(seconds["alone"], seconds["plain PyTorch"]), "1.02")
    if "torchdistill" in seconds:
        theirs = [n * one for one in seconds["torchdistill"]]
        row(f"{n} times torchdistill's run of one / side by side", ratios(theirs, seconds["side by side"]), "3.5")
    else:
        print("torchdistill: not measured, which needs --data and `pip install torchdistill`")


if __name__ == "__main__":
    as_the_command()
    main()
