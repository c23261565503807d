from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kd_cli.config.check import check_fields
from kd_cli.config.schema import Training
from kd_cli.errors import ConfigError
from kd_cli.learn.augment import Augment


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.arange(1, math.prod(shape) + 1).view(shape).to(dtype)


def moves(*numbers: int) -> Tensor:
    """Draws for one image that is moved and not bent: down, right, mirrored."""
    return torch.tensor([[*numbers, 0, 0, 1]], dtype=torch.float32)


def slowly(images: Tensor, draws: Tensor, fill: Tensor) -> Tensor:
    """Pixel by pixel, as the docstring says it."""
    H, W = images.shape[-2:]
    out = torch.empty_like(images)
    for b, (down, right, mirrored) in enumerate(draws[:, :3].long().tolist()):
        for y in range(H):
            for x in range(W):
                from_y, from_x = y - down, (W - 1 - x if mirrored else x) - right
                inside = 0 <= from_y < H and 0 <= from_x < W
                out[b, :, y, x] = images[b, :, from_y, from_x] if inside else fill.to(images.dtype)
    return out


@pytest.mark.parametrize(
    "augment",
    [
        Augment(jitter=2),
        Augment(crop=4),
        Augment(flip=True),
        Augment(jitter=1, crop=2, flip=True),
        Augment(jitter=9),  # further than the picture is wide
    ],
    ids=str,
)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.uint8])
def test_each_example_moves_by_its_own_draw_exactly_as_a_slow_loop_moves_it(
    augment: Augment, channels: int, dtype: torch.dtype
) -> None:
    images = pictures(12, channels, 5, 7).remainder(251).to(dtype)
    draws = augment.draw(12, generator())
    fill = torch.arange(channels) + 3.0
    moved = augment.apply(images, draws, fill=fill)
    assert moved.dtype == dtype
    assert torch.equal(moved, slowly(images, draws, fill))


def test_a_shift_goes_down_and_right_and_fills_what_comes_in() -> None:
    image = torch.tensor([[[[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]]]])
    moved = Augment(jitter=1).apply(image, moves(1, -1, 0), fill=-0.5)
    assert moved.tolist() == [[[[-0.5, -0.5, -0.5], [2.0, 3.0, -0.5], [5.0, 6.0, -0.5]]]]


def test_a_flip_mirrors_left_and_right_and_nothing_else() -> None:
    image = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]])
    augment = Augment(flip=True)
    assert augment.apply(image, moves(0, 0, 1)).tolist() == [[[[2.0, 1.0], [4.0, 3.0]]]]
    assert torch.equal(augment.apply(image, moves(0, 0, 0)), image)


def test_black_is_zero_unless_said_otherwise_and_may_differ_by_channel() -> None:
    image, gone = torch.ones(1, 3, 2, 2), moves(2, 0, 0)
    augment = Augment(jitter=2)
    assert augment.apply(image, gone).unique().tolist() == [0.0]
    filled = augment.apply(image, gone, fill=torch.tensor([-1.0, -2.0, -3.0]))
    assert filled[0, :, 0, 0].tolist() == [-1.0, -2.0, -3.0]
    assert torch.equal(filled, torch.tensor([-1.0, -2.0, -3.0])[:, None, None].expand(1, 3, 2, 2))


def test_the_images_given_are_left_as_they_were() -> None:
    augment = Augment(jitter=2, flip=True)
    images = pictures(8, 1, 6, 6)
    before = images.clone()
    moved = augment.apply(images, augment.draw(8, generator()))
    moved.zero_()
    assert torch.equal(images, before)


def test_an_example_looks_the_same_in_any_batch() -> None:
    augment = Augment(jitter=2, flip=True)
    images, draws = pictures(20, 1, 6, 6), augment.draw(20, generator())
    together = augment.apply(images, draws)
    order = torch.randperm(20, generator=generator(1))
    assert torch.equal(augment.apply(images[order], draws[order]), together[order])
    assert torch.equal(augment.apply(images[7:8], draws[7:8]), together[7:8])


def test_memory_layout_does_not_matter() -> None:
    augment = Augment(jitter=2, flip=True)
    images, draws = pictures(8, 3, 6, 6), augment.draw(8, generator())
    expected = augment.apply(images, draws)
    assert torch.equal(augment.apply(images.to(memory_format=torch.channels_last), draws), expected)
    assert torch.equal(augment.apply(images.mT.contiguous().mT, draws), expected)


def test_draws_depend_on_the_generator_and_on_nothing_else() -> None:
    augment = Augment(jitter=2, crop=1, flip=True)
    first = augment.draw(100, generator(5))
    torch.manual_seed(123)
    state = torch.get_rng_state()
    assert torch.equal(augment.draw(100, generator(5)), first)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(augment.draw(100, generator(6)), first)


def test_applying_draws_nothing() -> None:
    augment = Augment(jitter=2, flip=True)
    images, draws = pictures(8, 1, 6, 6), augment.draw(8, generator())
    state = torch.get_rng_state()
    assert torch.equal(augment.apply(images, draws), augment.apply(images, draws))
    assert torch.equal(torch.get_rng_state(), state)


def test_switching_the_flip_on_leaves_the_shifts_as_they_were() -> None:
    shifted = Augment(jitter=2).draw(50, generator())
    both = Augment(jitter=2, flip=True).draw(50, generator())
    assert torch.equal(both[:, :2], shifted[:, :2])
    assert shifted[:, 2].unique().tolist() == [0]
    assert both[:, 2].unique().tolist() == [0, 1]


@pytest.mark.parametrize("augment", [Augment(jitter=2), Augment(crop=2)], ids=["jitter", "crop"])
def test_all_offsets_are_equally_likely_and_the_two_directions_independent(augment: Augment) -> None:
    n = 50_000
    draws = augment.draw(n, generator())
    assert draws.shape == (n, 6)
    draws = draws.long()
    assert int(draws[:, :2].min()) == -2
    assert int(draws[:, :2].max()) == 2
    counts = torch.bincount((draws[:, 0] + 2) * 5 + draws[:, 1] + 2, minlength=25).double()
    chi_squared = ((counts - n / 25) ** 2 / (n / 25)).sum().item()
    assert chi_squared < 52  # 24 degrees of freedom: one in a thousand lies above 51.2


def test_half_of_the_examples_are_mirrored() -> None:
    mirrored = Augment(flip=True).draw(50_000, generator())[:, 2]
    assert mirrored.unique().tolist() == [0, 1]
    assert mirrored.double().mean().item() == pytest.approx(0.5, abs=0.009)  # 4 standard deviations


def test_jitter_and_crop_add_up() -> None:
    shifts = Augment(jitter=1, crop=2).draw(5000, generator())[:, :2]
    assert (int(shifts.min()), int(shifts.max())) == (-3, 3)


def test_nothing_enabled_returns_the_very_images_whatever_their_shape() -> None:
    augment = Augment()
    assert not augment.enabled
    rows = torch.ones(4, 10)
    assert augment.apply(rows, augment.draw(4, generator())) is rows
    assert Augment(jitter=1).enabled
    assert Augment(crop=1).enabled
    assert Augment(flip=True).enabled


@pytest.mark.parametrize("augment", [Augment(jitter=2), Augment(crop=1), Augment(flip=True)], ids=str)
def test_rows_of_numbers_cannot_be_moved(augment: Augment) -> None:
    with pytest.raises(ConfigError, match=r"\[4, 784\]") as caught:
        augment.apply(torch.ones(4, 784), augment.draw(4, generator()))
    assert "off" in (caught.value.hint or "")


def test_draws_for_other_examples_are_refused_and_not_broadcast() -> None:
    augment = Augment(jitter=2)
    with pytest.raises(ValueError, match="do not belong to 4 images"):
        augment.apply(torch.ones(4, 1, 5, 5), augment.draw(1, generator()))


@pytest.mark.parametrize("pixels", [-1, 1.5, True, "2"])
@pytest.mark.parametrize("name", ["jitter", "crop"])
def test_only_a_number_of_pixels_is_accepted(name: str, pixels: Any) -> None:
    with pytest.raises(ConfigError, match=f"training.{name} is .*it must be a number of pixels, from 0 to 256"):
        check_fields({name: pixels}, Training, "training")


BENT = Augment(rotate=20, shear=10, scale=0.2)


def test_a_right_angle_turns_the_picture_clockwise() -> None:
    image = pictures(1, 2, 5, 5, dtype=torch.float64)
    quarter = torch.tensor([[0, 0, 0, math.pi / 2, 0, 1]], dtype=torch.float64)
    turned = Augment(rotate=90).apply(image, quarter)
    assert torch.allclose(turned, image.rot90(-1, (2, 3)), atol=1e-9)


def test_twice_the_size_shows_the_middle_half() -> None:
    row = torch.arange(8.0).repeat(8, 1)[None, None]
    enlarged = Augment(scale=0.5).apply(row, torch.tensor([[0, 0, 0, 0, 0, 2.0]]))
    assert enlarged[0, 0, 4].tolist() == pytest.approx([1.75 + i / 2 for i in range(8)])


def test_a_shear_moves_each_row_by_its_height() -> None:
    image = torch.zeros(1, 1, 5, 5, dtype=torch.float64)
    image[..., 2] = 1  # an upright bar
    slanted = Augment(shear=45).apply(image, torch.tensor([[0, 0, 0, 0, math.pi / 4, 1]], dtype=torch.float64))
    assert torch.allclose(slanted[0, 0], torch.eye(5, dtype=torch.float64).flip(1), atol=1e-9)


def test_a_bent_picture_is_filled_with_black_as_the_images_have_it() -> None:
    images = torch.full((50, 2, 9, 9), -1.0)
    images[:, 1] = -2.0
    bent = BENT.apply(images, BENT.draw(50, generator()), fill=torch.tensor([-1.0, -2.0]))
    assert torch.allclose(bent, images)


def test_numbers_that_bend_lie_evenly_within_their_bounds_and_leave_the_moves_as_they_were() -> None:
    augment = Augment(jitter=2, flip=True, rotate=20, shear=10, scale=0.2)
    draws = augment.draw(20_000, generator())
    assert torch.equal(draws[:, :3], Augment(jitter=2, flip=True).draw(20_000, generator())[:, :3])
    for column, middle, reach in ((3, 0, math.radians(20)), (4, 0, math.radians(10)), (5, 1, 0.2)):
        even = (draws[:, column].double() - middle) / reach
        assert -1 <= float(even.min()) < -0.99
        assert 0.99 < float(even.max()) <= 1
        assert float(even.mean()) == pytest.approx(0, abs=0.02)
        assert float(even.square().mean()) == pytest.approx(1 / 3, abs=0.01)


def test_a_bent_example_looks_the_same_in_any_batch_and_layout() -> None:
    images, draws = pictures(20, 3, 6, 6), BENT.draw(20, generator())
    together = BENT.apply(images, draws)
    order = torch.randperm(20, generator=generator(1))
    assert torch.equal(BENT.apply(images[order], draws[order]), together[order])
    assert torch.equal(BENT.apply(images[7:8], draws[7:8]), together[7:8])
    assert torch.equal(BENT.apply(images.to(memory_format=torch.channels_last), draws), together)
    assert not torch.equal(together, images)


@pytest.mark.parametrize("value", [-1, math.nan, math.inf, 400, True, "2"])
@pytest.mark.parametrize("name", ["rotate", "shear", "scale"])
def test_only_angles_and_shares_bend(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"training.{name} is .*it must be an? (angle|share) .*, from 0 to "):
        check_fields({name: value}, Training, "training")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_moves_the_same_pixels() -> None:
    augment = Augment(jitter=2, crop=1, flip=True)
    images, draws = pictures(64, 3, 8, 8), augment.draw(64, generator())
    fill = torch.tensor([-1.0, -2.0, -3.0])
    expected = augment.apply(images, draws, fill=fill)
    assert torch.equal(augment.apply(images.cuda(), draws, fill=fill).cpu(), expected)
