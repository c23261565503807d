"""What a step keeps in memory: blocks computed again in the backward pass, images laid out channels last."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import made
import pytest
import torch
from conftest import TINY
from process import Ran
from torch import Tensor, nn

from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.checkpointing import blocks_of
from kd_cli.learn.engine import Interrupted, Outcome
from kd_cli.learn.learner import ModuleLearner
from kd_cli.learn.methods import Hard, Method, PerModelMethod, Weights
from kd_cli.learn.objective import Objective
from kd_cli.learn.outputs import Outputs
from kd_cli.learn.recipe import Recipe
from kd_cli.models.cifar import resnet, vgg
from kd_cli.models.cnn import cnn
from kd_cli.models.layers import Dropout
from kd_cli.models.mlp import mlp
from kd_cli.models.renormalised import Renormalised

ADAM = partial(torch.optim.AdamW, lr=0.01, fused=True)


class Block(nn.Module):
    """Statistics that move, random numbers of the learner's and of torch's generator, an inner module to look at."""

    def __init__(self, width: int, plain: float = 0.3) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.own, self.plain = Dropout(0.3), nn.Dropout(plain)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.plain(self.own(self.norm(self.conv(x)).relu()))
        return x + y


class Counting(Block):
    """A block that counts its calls."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def blocks(kind: Callable[[int], nn.Module] = Block) -> nn.Module:
    stem = [nn.Conv2d(1, 4, 3), nn.ReLU()]
    return nn.Sequential(*stem, kind(4), kind(4), nn.Flatten(), nn.Linear(64, made.CLASSES))


def learner(
    build: made.Build = blocks,
    *,
    method: Method | None = None,
    seed: int = 0,
    optimizer: made.Optimizer = ADAM,
    **recipe: Any,
) -> ModuleLearner:
    module = made.model(build, seed, dtype=torch.float32)
    objective = Objective(method or Hard(), made.some_weights(dtype=torch.float32))
    return ModuleLearner(module, optimizer(module.parameters()), seed=0, objective=objective, recipe=Recipe(**recipe))


def trained(
    build: made.Build = blocks, *, method: Method | None = None, keys: dict[str, Any] | None = None, **recipe: Any
) -> Outcome:
    own = learner(build, method=method, **recipe)
    weights, data = made.some_weights(dtype=torch.float32), made.examples(75, dtype=torch.float32)
    (outcome,) = made.train(own, method=own.method, weights=weights, data=data, **keys or {})
    return outcome


def same(one: Outcome, other: Outcome) -> bool:
    return all(torch.equal(t, other.state[name]) for name, t in one.state.items())


# ---------------------------------------------------------------- checkpointing


def test_blocks_computed_again_give_the_same_bytes_statistics_and_losses() -> None:
    plain, again = trained(), trained(checkpointing=True)
    assert same(plain, again)
    assert made.metrics(plain) == made.metrics(again)


class Inside(PerModelMethod):
    """Reads an output from within a block, and is trained on it too."""

    student_features = ("2.norm",)
    needs_teacher = False

    def loss(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> dict[str, Tensor]:
        within = student.features["2.norm"].square().mean()
        return {"loss": nn.functional.cross_entropy(student.logits, batch.labels) + within, "within": within}


def test_a_method_reads_what_is_within_a_block() -> None:
    plain, again = trained(method=Inside()), trained(method=Inside(), checkpointing=True)
    assert same(plain, again)
    assert made.metrics(plain) == made.metrics(again)


def test_only_what_enters_a_block_is_kept_for_the_backward_pass() -> None:
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    def numbers(**recipe: Any) -> int:
        kept.clear()
        one = learner(**recipe)
        with one.training("student", 1), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            one.outputs(made.images(16, dtype=torch.float32)[None])
        return sum(kept)

    assert numbers(checkpointing=True) < numbers() / 2


def test_a_block_that_changes_its_own_buffers_is_refused_in_words() -> None:
    trained(partial(blocks, Counting))
    with pytest.raises(ConfigError, match="Counting changes its buffer calls whenever it is called"):
        trained(partial(blocks, Counting), checkpointing=True)


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (partial(resnet, depth=14), ["BasicBlock"] * 6),
        (partial(vgg, blocks=[[8], [8, 8], [8], [8], [8]]), ["Sequential"] * 5),
        (partial(cnn, channels=[4, 4]), []),
        (partial(mlp, hidden=[8, 8]), []),
    ],
)
def test_the_blocks_of_a_network_are_its_repeated_parts(build: Callable[..., nn.Module], expected: list[str]) -> None:
    network = build(input_shape=(3, 16, 16), num_classes=4)
    assert [type(block).__name__ for block in blocks_of(network)] == expected
    wrapped = Renormalised(network, data_mean=[0] * 3, data_std=[1] * 3, mean=[0] * 3, std=[1] * 3)
    assert len(blocks_of(wrapped)) == (len(expected) or (1 if isinstance(network, nn.Sequential) else 0))


# ---------------------------------------------------------------- channels last


def test_channels_last_is_the_same_training_to_rounding() -> None:
    steady = partial(blocks, partial(Block, plain=0.0))  # torch's own dropout draws in the order of memory
    sgd = partial(torch.optim.SGD, lr=0.05)
    plain, last = trained(steady, optimizer=sgd), trained(steady, optimizer=sgd, channels_last=True)
    assert made.difference(plain.state, last.state) < 1e-4
    assert made.difference(plain.state, trained(steady, optimizer=sgd, seed=1).state) > 1e-2


def test_images_and_convolutions_are_laid_out_channels_last() -> None:
    one, seen = learner(channels_last=True), []
    one.module[2].conv.register_forward_hook(lambda module, inputs, output: seen.extend([inputs[0], module.weight]))
    one.logits(made.images(5, dtype=torch.float32))
    assert [tensor.is_contiguous(memory_format=torch.channels_last) for tensor in seen] == [True, True]
    assert [tensor.is_contiguous() for tensor in seen] == [False, False]


@pytest.mark.parametrize("recipe", [{"channels_last": True, "ema": 0.9}, {"checkpointing": True}])
def test_a_resumed_training_ends_with_the_same_bytes(recipe: dict[str, Any]) -> None:
    whole, kept = trained(**recipe), made.InMemory()
    with pytest.raises(Interrupted):
        trained(keys={"checkpoint": kept, "stopping": lambda: True}, **recipe)
    assert same(whole, trained(keys={"checkpoint": kept}, **recipe))


# ---------------------------------------------------------------- the command


def test_a_run_takes_both_and_refuses_what_has_no_use_for_them(kd_run: Callable[..., Ran]) -> None:
    small = [
        *(key for key in TINY if "student" not in key),
        "student=resnet8x4",
        "student.widths=[4,4,4,4]",
        "method=hard",
    ]
    ran = kd_run(*small, "training.epochs=1", "training.checkpointing=true", "training.channels_last=true")
    assert ran.code == 0, ran.err
    for key, words in (("checkpointing", "a plain chain of layers"), ("channels_last", "has no convolution")):
        refused = kd_run(*TINY, f"training.{key}=true")
        assert refused.code == 1
        assert words in refused.err
