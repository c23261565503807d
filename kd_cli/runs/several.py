"""A run by several processes: the first one does what a run does, the others take part in its trainings.

Process 0 reads the command line, holds the locks and writes all files. Before each training it sends the others what
they need to build the same model, data and teacher; between trainings they wait.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kd_cli.config.schema import BATCHNORM_PARTS
from kd_cli.config.values import RunConfig, TrainSpec
from kd_cli.data.source import Dataset
from kd_cli.errors import ConfigError
from kd_cli.learn.batches import batch_sizes
from kd_cli.learn.divided import DividedLearner, batch_norms
from kd_cli.learn.engine import Checkpoint, Training, fit
from kd_cli.learn.processes import Processes, ProcessLost
from kd_cli.learn.teachers import CachedTeacher, LiveTeacher, MappedTeacher, Teacher
from kd_cli.processes import Place
from kd_cli.runs.building import TrainingTask, build_method, make_training
from kd_cli.runs.device_data import DeviceData, load_device_data
from kd_cli.runs.models import blank_module, load_module
from kd_cli.runs.transfer import transfer_set

States = list[dict[str, Tensor]]


@dataclass(frozen=True)
class Taught:
    """A teacher as it is sent: its logits for the examples, or the weights of its members and their spec."""

    combine: str
    logits: Tensor | None = None
    spec: TrainSpec | None = None
    states: States | None = None

    @classmethod
    def of(cls, teacher: Teacher | None, spec: TrainSpec | None) -> Taught | None:
        """A run's teacher; `spec` is that of its members, where they run live."""
        if isinstance(teacher, CachedTeacher):
            return cls(teacher.combine, logits=teacher.logits_MNC.cpu())
        if isinstance(teacher, MappedTeacher):  # its files need not be there for a process of another machine
            return cls(teacher.combine, logits=torch.stack([member[teacher.rows] for member in teacher.members]))
        if isinstance(teacher, LiveTeacher):
            states = [{name: t.cpu() for name, t in module.state_dict().items()} for module in teacher.modules]
            return cls(teacher.combine, spec=spec, states=states)
        return None

    def teacher(self, data: DeviceData) -> Teacher:
        """The teacher in the process that received it."""
        if self.logits is not None:
            return CachedTeacher(self.logits.to(data.device), combine=self.combine)
        assert self.spec is not None
        assert self.states is not None
        modules = [load_module(self.spec, state, data, role="teacher") for state in self.states]
        return LiveTeacher(modules, combine=self.combine)


@dataclass(frozen=True)
class Work:
    """A training as it is sent to the other processes."""

    config: RunConfig
    on_transfer_set: bool  # else on all training data
    task: TrainingTask
    role: str
    taught: Taught | None
    diagnostics: bool


class Leader:
    """Process 0 of several: lets the others take part in each training."""

    def __init__(self, processes: Processes, place: Place) -> None:
        self.processes, self.place = processes, place
        self.within = False  # a training, in which the others wait for nothing but its next exchange

    @property
    def size(self) -> int:
        return self.processes.size

    def placed(self, config: RunConfig) -> RunConfig:
        """A run's configuration with this process's own device."""
        return replace(config, device=device_of(config.device, self.place))

    def train(self, work: Work, data: DeviceData, teacher: Teacher | None, **keys: Any) -> list[Any]:
        """Train as `fit` does, together with the other processes; `keys` are those of `fit`."""
        self.within = True
        self.processes.from_first(work)
        try:
            outcomes = take_part(self.processes, work, data, teacher, **keys)
        except KeyboardInterrupt:  # at the end of an epoch, in all processes
            self.within = False
            raise
        self.within = False
        return outcomes

    def end(self) -> None:
        """Let the other processes end, unless they are in a training that failed here: they end with an error."""
        if not self.within:
            with contextlib.suppress(ProcessLost):
                self.processes.from_first(None)
            self.processes.leave()


@contextlib.contextmanager
def leading(place: Place) -> Iterator[Leader]:
    """A block in which this process leads the others, which end with it."""
    leader = Leader(Processes.join(place.rank, place.size), place)
    try:
        yield leader
    finally:
        leader.end()


def follow(place: Place) -> int:
    """Take part in the trainings of process 0 until it ends; return the exit status of this process."""
    for one in (signal.SIGINT, signal.SIGTERM):  # process 0 decides when a training stops
        signal.signal(one, signal.SIG_IGN)
    logging.getLogger("kd_cli").addHandler(logging.NullHandler())
    logging.getLogger("kd_cli").propagate = False  # process 0 says the same
    warnings.simplefilter("ignore")
    try:
        processes = Processes.join(place.rank, place.size)
        known: dict[str, DeviceData] = {}
        while (work := processes.from_first(None)) is not None:
            with contextlib.suppress(KeyboardInterrupt):  # process 0 has stopped it
                take_part(processes, work, *received(work, place, known))
        processes.leave()
    except ProcessLost:
        return 1  # process 0 has said why, or is about to
    except Exception as error:
        print(f"process {place.rank} of {place.size}: {type(error).__name__}: {error}", file=sys.stderr)
        raise
    return 0


def received(work: Work, place: Place, known: dict[str, DeviceData]) -> tuple[DeviceData, Teacher | None]:
    """The data and the teacher of a training in another process than the first; `known` are the data read so far."""
    device = "cuda" if work.config.device.startswith("cuda") else work.config.device  # that of process 0 has a number
    config = replace(work.config, device=device_of(device, place))
    key = config.data_key()
    if key not in known:
        known[key] = load_device_data(config)
    data = known[key]
    if work.on_transfer_set:
        data = replace(data, train=transfer_set(config, data).examples)
    return data, None if work.taught is None else work.taught.teacher(data)


def take_part(
    processes: Processes,
    work: Work,
    data: DeviceData,
    teacher: Teacher | None,
    *,
    checkpoint: Checkpoint | None = None,
    stopping: Callable[[], bool] = lambda: False,
    **keys: Any,
) -> list[Any]:
    """Train one model in all processes at once; process 0 has a checkpoint and knows whether to stop."""
    learner, training = make_divided(processes, work, data, teacher)
    learner.start_alike()
    return fit(
        learner,
        training,
        checkpoint=SharedCheckpoint(processes, checkpoint),
        stopping=lambda: bool(processes.from_first(stopping())),
        **keys,
    )


def make_divided(
    processes: Processes, work: Work, data: DeviceData, teacher: Teacher | None
) -> tuple[DividedLearner, Training]:
    """The learner of a training in one of its processes, and what it is trained on."""
    learner, training = make_training(
        data, [work.task], work.role, teacher=teacher, diagnostics=work.diagnostics, processes=processes
    )
    assert isinstance(learner, DividedLearner)
    return learner, training


class SharedCheckpoint:
    """A checkpoint that process 0 reads and writes, and from which all processes continue."""

    def __init__(self, processes: Processes, own: Checkpoint | None) -> None:
        self.processes, self.own = processes, own

    def load(self) -> dict[str, Any] | None:
        state: dict[str, Any] | None = self.processes.from_first(None if self.own is None else self.own.load())
        return state

    def due(self, epoch: int) -> bool:
        return self.own is not None and self.own.due(epoch)

    def save(self, state: dict[str, Any]) -> None:
        if self.own is not None:
            self.own.save(state)


def device_of(name: str, place: Place) -> str:
    """The device of a process: one GPU for each process of a machine, or the CPU. Raises ConfigError."""
    if not (name.startswith("cuda") or (name == "auto" and torch.cuda.is_available())):
        return name
    if name not in ("auto", "cuda"):
        raise ConfigError(f"device is {name}, and each process has a GPU of its own", hint="device=cuda")
    if place.on_machine >= torch.cuda.device_count():
        raise ConfigError(
            f"process {place.on_machine} of this machine has no GPU: there are {torch.cuda.device_count()}",
            hint="torchrun --nproc-per-node= with their number, or device=cpu",
        )
    torch.cuda.set_device(place.on_machine)
    return f"cuda:{place.on_machine}"


def check_divided(config: RunConfig, dataset: Dataset, size: int, *, examples: int) -> list[str]:
    """Sentences on what several processes do otherwise than one. ConfigError for what they cannot train.

    `examples` is the size of the transfer set.
    """
    if config.peers:
        raise ConfigError(
            f"peers learn from each other in one process, and torchrun has started {size}",
            hint="kd-run peers=..., without torchrun",
        )
    if build_method(config.method).replaces_modules:
        raise ConfigError(
            f"method={config.method_name} trains a student in its teacher's place in one process, and torchrun has "
            f"started {size}",
            hint="kd-run, without torchrun",
        )
    if config.cuda_graphs:
        raise ConfigError("cuda_graphs=true records the steps of one process", hint="cuda_graphs=false")
    notes = [f"{size} processes train together, each with its part of every batch: one process's result to rounding"]
    trained = [("training", spec, examples) for spec in (config.student, *config.chain)]
    if config.checkpoint is None:
        trained.append(("teacher_training", config.teacher, len(dataset.train)))
    for section, spec, n in trained:
        if "checkpointing" in spec.recipe:
            raise ConfigError(
                f"{section}.checkpointing computes blocks again in one process, and torchrun has started {size}",
                hint=f"leave {section}.checkpointing out: each process holds a part of a batch",
            )
        if BATCHNORM_PARTS in spec.recipe and batch_norms(blank_module(spec, dataset, role="student")):
            smallest = min(batch_sizes(n, spec.batch_size))
            if smallest // size < 2:
                raise ConfigError(
                    f"{section}.sync_batchnorm=false, and a batch of {smallest} examples leaves a process of {size} "
                    f"with {smallest // size}: BatchNorm needs two",
                    hint=f"{section}.sync_batchnorm=true, or another {section}.batch_size",
                )
            notes.append(
                f"BatchNorm of {spec.title} normalises by each process's part of a batch "
                f"({section}.sync_batchnorm=false): the result depends on the number of processes"
            )
    return notes
