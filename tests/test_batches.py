"""Examples on a device: bytes that are normalised batch by batch, or normalised images that are kept."""

from __future__ import annotations

import made
import pytest
import torch
from torch import Tensor

from kd_cli.data.normalisation import Normalisation
from kd_cli.learn.augment import Augment
from kd_cli.learn.batches import Augmented, Examples
from kd_cli.learn.engine import Outcome
from kd_cli.learn.methods import Hard
from kd_cli.learn.randomness import generator
from kd_cli.learn.stacked.learner import StackedLearner

NORMALISE = Normalisation((0.3,), (0.2,), torch.float32)
AUGMENTS = {"still": Augment(), "augmented": Augment(jitter=1, flip=True, rotate=10)}


def stored(n: int = 75) -> tuple[Tensor, Tensor]:
    """Images of bytes, and labels."""
    images, labels = made.pictures(n, dtype=torch.float32)
    return (images * 40 + 128).clamp(0, 255).to(torch.uint8), labels


def both(n: int = 75) -> tuple[Examples, Examples]:
    """The same examples as bytes and as floats."""
    images, labels = stored(n)
    return (
        Examples(images, labels, normalise=NORMALISE, keep_floats=0),
        Examples(images, labels, normalise=NORMALISE),
    )


def test_bytes_take_a_quarter_of_the_memory_of_floats() -> None:
    as_bytes, as_floats = both()
    assert as_bytes.nbytes == 75 * 36
    assert as_floats.nbytes == 4 * as_bytes.nbytes


def test_floats_are_kept_up_to_the_limit_and_bytes_beyond_it() -> None:
    images, labels = stored()
    limit = 75 * 36 * 4
    for keep_floats, nbytes in ((limit, limit), (limit - 1, limit // 4)):
        assert Examples(images, labels, normalise=NORMALISE, keep_floats=keep_floats).nbytes == nbytes


@pytest.mark.parametrize("augment", AUGMENTS)
def test_batches_of_bytes_and_of_floats_are_the_same_bit_for_bit(augment: str) -> None:
    order = torch.stack([torch.randperm(75, generator=generator(seed, "order")) for seed in (0, 1)])
    draws = torch.stack([AUGMENTS[augment].draw(75, generator(seed, "draws")) for seed in (0, 1)])
    augmented = Augmented(AUGMENTS[augment], draws, fill=NORMALISE(torch.zeros(1, 1, 1, 1)).flatten())
    blocks = [list(examples.blocks(order, [32, 32, 11], augmented)) for examples in both()]
    assert [batch.images.shape for batch in blocks[0]] == [(2, n, 1, 6, 6) for n in (32, 32, 11)]
    for mine, other in zip(*blocks, strict=True):
        assert mine.images.dtype == other.images.dtype == torch.float32
        assert torch.equal(mine.images, other.images)
        assert torch.equal(mine.labels, other.labels)
        assert torch.equal(mine.index, other.index)


def test_every_way_of_reading_images_gives_the_normalised_ones() -> None:
    images, labels = stored()
    expected = (images.float() / 255 - 0.3) / 0.2
    index = torch.tensor([[4, 0, 9], [1, 1, 74]])
    for examples in both():
        assert (len(examples), examples.shape) == (75, (1, 6, 6))
        torch.testing.assert_close(examples.images(index), expected[index])
        torch.testing.assert_close(examples.first(5), expected[:5])
        torch.testing.assert_close(torch.cat(list(examples.in_order(32))), expected)
        part = examples.subset(torch.tensor([7, 3]))
        torch.testing.assert_close(part.first(2), expected[[7, 3]])
        assert torch.equal(part.labels, labels[[7, 3]])
    one, other = both()
    assert torch.equal(one.images(index), other.images(index))
    assert torch.equal(torch.cat(list(one.in_order(32))), torch.cat(list(other.in_order(64))))


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("kind", ["module", "stack"])
def test_training_on_bytes_and_on_floats_is_the_same_bit_for_bit(kind: str, augment: str) -> None:
    def train(examples: Examples) -> list[Outcome]:
        size = 2 if kind == "stack" else 1
        modules = [made.model(made.conv, seed, torch.float32) for seed in range(size)]
        learner = (
            StackedLearner(modules, made.adamw, hyper=[{}] * size, seeds=range(size))
            if kind == "stack"
            else made.learner_of(modules[0])
        )
        weights = made.some_weights(*[[1.0] * size] * 3, dtype=torch.float32)
        plan = made.a_plan(augment=AUGMENTS[augment])
        return made.train(learner, seeds=range(size), method=Hard(), weights=weights, plan=plan, data=examples)

    for one, other in zip(*map(train, both()), strict=True):
        assert made.difference(one.state, other.state) == 0
        assert made.metrics(one) == made.metrics(other)


def test_examples_without_a_normalisation_are_used_as_they_are() -> None:
    images = made.images(9)
    assert torch.equal(Examples(images, torch.zeros(9)).first(9), images)


def test_no_examples_have_no_batches() -> None:
    images, labels = stored(0)
    for keep_floats in (0, 1000):
        empty = Examples(images, labels, normalise=NORMALISE, keep_floats=keep_floats)
        assert len(empty) == 0
        assert empty.shape == (1, 6, 6)
        assert list(empty.in_order()) == []
