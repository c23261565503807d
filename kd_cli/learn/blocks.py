"""Two networks cut into the same number of blocks, so that a block of one can take the place of the other's.

A block is a run of modules that follow each other: it ends at a module that is named by its path, and begins behind the
block before it, the first one at the input. What follows the last block is the network's rest, its classifier.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd_cli.errors import ConfigError, first_line
from kd_cli.learn.layers import Layer, stage_layers, trace
from kd_cli.learn.outputs import check_paths
from kd_cli.models.arguments import by
from kd_cli.models.renormalised import Renormalised

AUTO = "auto"
CLOSE = 1e-4  # relative difference of logits of the same network, run block by block

Ends = str | Sequence[str]  # "auto", or the paths of the modules that the blocks end at


@dataclass(frozen=True)
class Cut:
    """A network in blocks: for each one the paths of its modules, and those of the modules that follow the last one."""

    network: nn.Module
    blocks: tuple[tuple[str, ...], ...]
    rest: tuple[str, ...]

    def modules(self, paths: Sequence[str]) -> list[nn.Module]:
        return [self.network.get_submodule(path) for path in paths]

    def block(self, number: int) -> nn.Sequential:
        """The modules of a block as one."""
        return nn.Sequential(*self.modules(self.blocks[number]))


def cut_pair(
    student: nn.Module, teacher: nn.Module, images: Tensor, student_ends: Ends, teacher_ends: Ends
) -> tuple[Cut, Cut]:
    """Cut student and teacher into blocks whose ends agree in their sizes, tried on a few images `[B,...]`.

    "auto" takes the last map of each spatial size, or the hidden layers of networks without maps; of a teacher with
    more of them than the student has, as many as the student has, evenly spread. Raises ConfigError.
    """
    student, teacher = inner(student), inner(teacher)
    ours = ends_of(student, images, student_ends, "student")
    theirs = ends_of(teacher, images, teacher_ends, "teacher")
    if teacher_ends == AUTO and len(theirs) > len(ours):
        theirs = [theirs[-(-(k + 1) * len(theirs) // len(ours)) - 1] for k in range(len(ours))]
    if len(ours) != len(theirs):
        raise ConfigError(
            f"the student has {len(ours)} blocks, which end at {paths_of(ours)}, and the teacher {len(theirs)}, which "
            f"end at {paths_of(theirs)}",
            hint="a student that is no deeper than the teacher; or name as many ends of blocks in both: "
            "method.student_blocks, method.teacher_blocks",
        )
    for k, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        if own.shape != other.shape:
            raise ConfigError(
                f"block {k + 1} of {len(ours)} ends in {by(torch.Size(own.shape))} numbers in the student (at "
                f"{own.path}) and in {by(torch.Size(other.shape))} in the teacher (at {other.path}): one cannot take "
                "the other's place",
                hint="a student of the teacher's widths with fewer layers; or other ends of blocks: "
                "method.student_blocks, method.teacher_blocks",
            )
    cuts = cut(student, [layer.path for layer in ours]), cut(teacher, [layer.path for layer in theirs])
    for role, one in zip(("student", "teacher"), cuts, strict=True):
        check_runs_by_blocks(one, images, role)
    check_rests(*cuts)
    return cuts


def inner(module: nn.Module) -> nn.Module:
    """A network without the normalisation of its own around it."""
    return module.network if isinstance(module, Renormalised) else module


def ends_of(network: nn.Module, images: Tensor, ends: Ends, role: str) -> list[Layer]:
    """The layers that the blocks of a network end at. Raises ConfigError."""
    if isinstance(ends, str):
        found = stage_layers(network, images)
        if not found:
            raise ConfigError(
                f"the {role} has neither maps nor hidden layers to end blocks at",
                hint=f"method.{role}_blocks names the modules that its blocks end at",
            )
        return found
    check_paths(network, ends, role=role)
    called = [layer.path for layer in trace(network, images)]
    if missing := [path for path in ends if path not in called]:
        raise ConfigError(f"the {role}'s {missing[0]} is not called once with the examples, and cannot end a block")
    if [path for path in called if path in ends] != list(ends):
        raise ConfigError(f"method.{role}_blocks is {list(ends)}; the network calls them in another order")
    layers = {layer.path: layer for layer in trace(network, images)}
    return [layers[path] for path in ends]


def cut(network: nn.Module, ends: Sequence[str]) -> Cut:
    """The network's modules, divided after each of the `ends`."""
    blocks: list[tuple[str, ...]] = []
    current: list[str] = []
    for path in units(network, "", ends):
        current.append(path)
        if path in ends:
            blocks.append(tuple(current))
            current = []
    return Cut(network, tuple(blocks), tuple(current))


def units(parent: nn.Module, prefix: str, ends: Sequence[str]) -> Iterator[str]:
    """The paths of the network's children in order, and in place of a child that an end lies in, of its children."""
    for name, child in parent.named_children():
        path = prefix + name
        if any(end.startswith(f"{path}.") for end in ends):
            yield from units(child, f"{path}.", ends)
        else:
            yield path


@contextlib.contextmanager
def placed(cut: Cut, blocks: Mapping[int, nn.Module]) -> Iterator[None]:
    """A context in which other modules stand in for some blocks of the network, by their numbers."""
    kept: list[tuple[nn.Module, str, nn.Module]] = []
    for number, block in blocks.items():
        for k, path in enumerate(cut.blocks[number]):
            parent_path, _, name = path.rpartition(".")
            parent = cut.network.get_submodule(parent_path)
            kept.append((parent, name, parent.get_submodule(name)))
            parent._modules[name] = block if k == 0 else nn.Identity()
    try:
        yield
    finally:
        for parent, name, own in kept:
            parent._modules[name] = own


def check_runs_by_blocks(one: Cut, images: Tensor, role: str) -> None:
    """ConfigError unless the network is its blocks one after the other, and then its rest."""
    expected = logits_of(one.network, images)
    blocks = {k: one.block(k) for k in range(len(one.blocks))}
    why = None
    with placed(one, blocks):
        try:
            found = logits_of(one.network, images)
            if found.shape != expected.shape or not close(found, expected):
                why = "its logits are others when they are run one after the other"
        except Exception as error:  # the network itself has run: it does more with its modules than call them in turn
            why = first_line(error)
    if why is not None:
        ends = ", ".join(block[-1] for block in one.blocks)
        raise ConfigError(
            f"the modules of the {role} up to {ends} do not simply follow each other: {why}",
            hint=f"name modules in method.{role}_blocks that everything passes through",
        )


def check_rests(student: Cut, teacher: Cut) -> None:
    """ConfigError unless the teacher's weights behind its last block fit the student."""
    ours, theirs = weights_of_rest(student), weights_of_rest(teacher)
    shapes = [[[tuple(t.shape) for t in part.state_dict().values()] for part in parts] for parts in (ours, theirs)]
    names = [[list(part.state_dict()) for part in parts] for parts in (ours, theirs)]
    if shapes[0] != shapes[1] or names[0] != names[1]:
        said = [", ".join(by(torch.Size(shape)) for part in parts for shape in part) or "nothing" for parts in shapes]
        raise ConfigError(
            f"behind its last block the student has weights of the sizes {said[0]} and the teacher {said[1]}; the "
            "student takes them over from the teacher",
            hint="let the last block end at the logits: the last path of method.student_blocks and "
            "method.teacher_blocks",
        )


def weights_of_rest(one: Cut) -> list[nn.Module]:
    """The modules with weights or statistics behind the last block."""
    return [module for module in one.modules(one.rest) if module.state_dict()]


def paths_of(layers: Sequence[Layer]) -> str:
    return ", ".join(layer.path for layer in layers)


@torch.no_grad()
def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """The logits in eval mode; the modules' modes are as before."""
    modes = {module: module.training for module in network.modules()}
    try:
        logits: Tensor = network.eval()(images)
    finally:
        for module, training in modes.items():
            module.training = training
    return logits


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= CLOSE * expected.abs().max().clamp(min=CLOSE))
