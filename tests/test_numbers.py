"""Numbers at the ends of their range: right to a stated tolerance, or refused with a reason."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable

import pytest
import torch
from conftest import TINY
from process import Ran
from torch import Tensor

from kd_cli.config.check import check_fields
from kd_cli.config.schema import LEAST_T, MOST_T, Schema
from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch, batch_sizes
from kd_cli.learn.methods import Hard, LabelSmoothing, Logits, Method, SoftTargets, Weights
from kd_cli.learn.objective import Objective
from kd_cli.learn.outputs import Outputs
from kd_cli.learn.stacked.closed_forms import closed_form
from kd_cli.losses import hard_cross_entropy, kl_divergence, logit_matching, soft_cross_entropy, uniform_cross_entropy

# Relative errors of a loss and of its gradient, in units of the largest gradient.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 5e-2}
LOSSES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "soft": lambda s, t, T: T**2 * soft_cross_entropy(s, t, T=T),
    "kl": lambda s, t, T: T**2 * kl_divergence(s, t, T=T),
    "logits": lambda s, t, T: logit_matching(s, t),
    "hard": lambda s, t, T: hard_cross_entropy(s, torch.arange(6) % s.shape[-1]),
    "uniform": lambda s, t, T: uniform_cross_entropy(s),
}


def value_and_gradient(loss: str, student: Tensor, teacher: Tensor, T: float) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    value = LOSSES[loss](student, teacher, T)
    value.backward()
    assert student.grad is not None
    return value.detach().double(), student.grad.double()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("T", [LEAST_T, 0.1, 1.0, 20.0, 1e3, MOST_T])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_are_right_wherever_they_are_allowed(loss: str, size: float, T: float, dtype: torch.dtype) -> None:
    own = torch.Generator().manual_seed(1)
    student, teacher = ((torch.randn(6, 10, generator=own) * size).to(dtype) for _ in range(2))
    value, gradient = value_and_gradient(loss, student, teacher, T)
    exact, exact_gradient = value_and_gradient(loss, student.double(), teacher.double(), T)
    assert math.isfinite(value)
    assert gradient.isfinite().all()
    tolerance = TOLERANCE[dtype] + (5e-7 * T / size if loss in ("soft", "kl") else 0)
    if loss != "kl" or T <= 1:  # the divergence itself is the difference of two large numbers at a high T
        assert abs(value - exact) <= tolerance * max(abs(exact), 1e-2)
    assert (gradient - exact_gradient).abs().max() <= tolerance * exact_gradient.abs().max() + 1e-7


METHODS: dict[str, Method] = {
    "soft": SoftTargets(),
    "without_T2": SoftTargets(square_T=False),
    "logits": Logits(),
    "uncentred": Logits(center=False),
    "hard": Hard(),
    "smoothed": LabelSmoothing(0.2),
}


@pytest.mark.parametrize("T", [1.0, 20.0, 1e3])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
@pytest.mark.parametrize("apart", [1.0, 0.01], ids=["far", "near"])
@pytest.mark.parametrize("name", METHODS)
def test_what_a_student_is_taught_by_is_right_wherever_it_is_allowed(
    name: str, apart: float, size: float, T: float
) -> None:
    own = torch.Generator().manual_seed(1)
    teacher = size * torch.randn(2, 6, 10, generator=own)
    student = teacher + apart * size * torch.randn(2, 6, 10, generator=own)
    labels = (torch.arange(6) % 10).expand(2, 6)

    def objective(dtype: torch.dtype) -> Objective:
        weights = Weights(*(torch.tensor(of, dtype=dtype) for of in ([T, 2 * T], [1, 0.5], [0.5, 1])))
        return Objective(METHODS[name], weights)

    def gradient(dtype: torch.dtype) -> Tensor:
        form = closed_form(objective(dtype))
        assert form is not None
        z, v = student.to(dtype), teacher.to(dtype)
        return form.gradient(z, form.target(z, v, labels)).double()

    exact = gradient(torch.float64)
    z = student.double().requires_grad_()
    batch = Batch(labels, labels, labels)
    objective(torch.float64)(Outputs(z), Outputs(teacher.double()), batch)["loss"].sum().backward()
    assert z.grad is not None
    assert (exact - z.grad).abs().max() <= 1e-9 * z.grad.abs().max() + 1e-12
    tolerance = 1e-5 + (1e-6 * T / size / apart if name in ("soft", "without_T2") else 0)
    assert (gradient(torch.float32) - exact).abs().max() <= tolerance * exact.abs().max() + 1e-7


@pytest.mark.parametrize("T", [LEAST_T, 1.0, MOST_T])
def test_a_teacher_certain_of_everything_teaches_labels(T: float) -> None:
    teacher = torch.full((4, 5), -1e4)
    teacher[:, 2] = 1e4
    value, gradient = value_and_gradient("soft", torch.zeros(4, 5), teacher, T)
    assert math.isfinite(value)
    p, q = torch.full((4, 5), 0.2), (teacher.double() / T).softmax(-1)
    assert (gradient - T * (p - q) / 4).abs().max() <= 1e-5 * T


@pytest.mark.parametrize("T", [0, -1, math.nan, math.inf, 1e-4, 1e6, "warm", None, True])
def test_a_temperature_out_of_range_is_refused_with_a_reason(T: object) -> None:
    with pytest.raises(ConfigError, match="T is"):
        check_fields({"T": T}, Schema, "")
    for bound in (LEAST_T, MOST_T):
        assert check_fields({"T": bound}, Schema, "")["T"] == bound


def test_no_batch_is_of_one_example_but_the_only_one() -> None:
    for n, size in itertools.product(range(1, 40), range(1, 12)):
        lengths = batch_sizes(n, size)
        assert sum(lengths) == n
        assert size == 1 or n == 1 or min(lengths) > 1
        assert max(lengths) <= size + (n % size == 1)


@pytest.mark.parametrize("T", ["1e-3", "1e4"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float64"])
def test_a_run_at_the_ends_of_the_range_learns(kd_run: Callable[..., Ran], T: str, precision: str) -> None:
    ran = kd_run(*TINY, f"T={T}", f"precision={precision}", "training.epochs=2", "student.hidden=[16]")
    assert ran.code == 0, ran.err
    losses = [row["loss"] for row in ran.metrics if row["role"] == "student"]
    assert all(math.isfinite(loss) for loss in losses)


def test_float16_is_refused(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run(*TINY, "precision=float16")
    assert ran.code == 1
    assert "precision is 'float16'; it must be one of" in ran.err


def test_a_diverged_student_leaves_its_neighbours_as_they_are(kd_run: Callable[..., Ran]) -> None:
    """In the same place of the same stack, with a harmless weight and with one that makes infinities at once."""
    prelude = """
import kd_cli.runs.stack_size as stack_size
stack_size.seconds_of_step = lambda *args: 1.0  # the largest stack is the fastest
"""
    found = []
    for middle in ("3", "1e38"):
        argv = ("optimizer=sgd", f"alpha=1,{middle},2", "T=4", "training.epochs=2", f"hydra.sweep.dir=alpha{middle}")
        ran = kd_run("-m", *TINY, *argv, prelude=prelude)
        assert ran.code == (0 if middle == "3" else 1), ran.err
        found.append(sorted((ran.folder / f"alpha{middle}").glob("00*")))
    assert json.loads((found[1][1] / "summary.json").read_text())["status"] == "diverged"
    for k in (0, 2):
        for name in ("student.safetensors", "student.json"):
            assert (found[0][k] / name).read_bytes() == (found[1][k] / name).read_bytes()
