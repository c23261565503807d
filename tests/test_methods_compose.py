"""Sums of methods, and methods whose weights and temperature change during training."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace

import made
import pytest
import torch
from conftest import TINY
from logits import some_labels, some_logits, terms_of, weights_of
from process import Ran, Running

from kd_cli import losses
from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.methods import (
    DIST,
    DKD,
    TTM,
    Hard,
    LabelSmoothing,
    Method,
    Ramp,
    Scheduled,
    Setting,
    SoftTargets,
    Sum,
    Terms,
    Weights,
)
from kd_cli.learn.outputs import Outputs
from kd_cli.runs.building import build_method, without_stackable_keys

B, C = 6, 5
OURS, THEIRS, LABELS = some_logits(B, C), some_logits(B, C, seed=1), some_labels(B, classes=C)
WEIGHTS = weights_of([3.0], alpha=0.7, beta=0.4)


def loss_of(method: Method, weights: Weights = WEIGHTS, progress: float = 0.0) -> float:
    return float(terms_of(method, OURS, THEIRS, LABELS, weights, progress=progress)["loss"])


def only_alpha(method: Method) -> float:
    return loss_of(method, weights_of([3.0], alpha=0.7))


# ---------------------------------------------------------------- sums


def test_a_sum_is_each_methods_soft_loss_times_its_weight_and_the_labels_once() -> None:
    hard = float(losses.hard_cross_entropy(OURS, LABELS))
    by_hand = 2 * only_alpha(DKD()) + 0.5 * only_alpha(DIST()) + 0.4 * hard
    assert loss_of(Sum({"a": 2, "b": 0.5}, a=DKD(), b=DIST())) == pytest.approx(by_hand)


def test_a_sum_of_one_method_is_that_method() -> None:
    assert loss_of(Sum(a=TTM())) == pytest.approx(loss_of(TTM()))


def test_a_method_of_labels_only_takes_the_place_of_the_label_term() -> None:
    smoothing = LabelSmoothing(0.2)
    assert loss_of(Sum(a=DKD(), b=smoothing)) == pytest.approx(only_alpha(DKD()) + loss_of(smoothing))
    assert loss_of(Sum({"b": 0.5}, a=DKD(), b=Hard())) == pytest.approx(only_alpha(DKD()) + 0.5 * loss_of(Hard()))


def test_each_methods_terms_are_logged_under_its_name() -> None:
    terms = terms_of(Sum(a=DKD(), b=DKD(1, 2), c=DIST()), OURS, THEIRS, LABELS, WEIGHTS)
    assert set(terms) == {"loss", "hard", *("a_tckd", "a_nckd", "b_tckd", "b_nckd", "c_inter", "c_intra")}


def test_a_sum_needs_what_any_of_its_methods_needs() -> None:
    both = Sum(a=SoftTargets(), b=DIST())
    assert (both.needs_teacher, both.needs_labels, both.has_T, both.min_batch) == (True, False, True, 2)
    assert both.couples_examples
    assert Sum(a=DKD(), b=SoftTargets()).needs_labels
    assert not Sum(a=Hard(), b=LabelSmoothing()).needs_teacher
    outputs = Outputs(torch.zeros(1, 2, 2))
    with pytest.raises(ConfigError, match="DKD needs 3 classes or more"):
        Sum(a=DKD(), b=SoftTargets()).setup(Setting(2, 10, 5, outputs, outputs))


class Gap(Method):
    """Reads one feature of each model, and takes it for granted that there are no others."""

    has_T = False

    def __init__(self, path: str) -> None:
        super().__init__()
        self.student_features, self.teacher_features = [path], [path]

    def setup(self, setting: Setting) -> None:
        super().setup(setting)
        assert setting.teacher is not None
        ((self.path, ours),) = setting.student.features.items()
        self.project = torch.nn.Linear(ours.shape[-1], ours.shape[-1], dtype=ours.dtype)

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        assert teacher is not None
        (ours,), (theirs,) = student.features.values(), teacher.features.values()
        gap = (self.project(ours) - theirs).square().sum(-1).mean(-1)
        return {"loss": weights.alpha * gap, "gap": gap}


def test_methods_in_a_sum_see_their_own_features_and_train_their_own_parameters() -> None:
    both = Sum({"b": 3}, a=Gap("one"), b=Gap("two"), c=SoftTargets())
    assert both.student_features == ["one", "two"]
    features = {"one": some_logits(1, B, 4), "two": some_logits(1, B, 3, seed=5)}
    outputs = Outputs(OURS[None], features)
    both.setup(Setting(C, 100, B, outputs, outputs))
    assert [p.shape[0] for p in both.parameters()] == [4, 4, 3, 3]
    assert [part.path for part in both.methods[:2]] == ["one", "two"]  # type: ignore[attr-defined]
    batch = Batch(LABELS[None], LABELS[None], LABELS[None])
    terms = both(outputs, Outputs(THEIRS[None], features), batch, WEIGHTS)
    by_hand = 0.7 * terms["a_gap"] + 3 * 0.7 * terms["b_gap"] + loss_of(SoftTargets())
    torch.testing.assert_close(terms["loss"], by_hand)


def squares(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return (student - teacher).square().sum(-1).mean()


def test_a_function_of_the_teacher_without_weights_leaves_the_label_term_in_place() -> None:
    function = functools.partial(squares)
    by_hand = 0.5 * float(squares(OURS, THEIRS)) + 0.4 * float(losses.hard_cross_entropy(OURS, LABELS))
    assert loss_of(Sum({"a": 0.5}, a=function)) == pytest.approx(by_hand)


def distil(student: torch.Tensor, teacher: torch.Tensor, T: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    return alpha * T**2 * losses.soft_cross_entropy(student, teacher, T=T)


def test_a_plain_function_can_be_summed() -> None:
    both = Sum(a=functools.partial(distil), b=DIST())
    assert loss_of(both) == pytest.approx(loss_of(Sum(a=SoftTargets(), b=DIST())))
    node = {"_target_": "kd_cli.learn.methods.Sum", "a": {"_target_": f"{__name__}.distil"}}
    assert loss_of(build_method(node)) == pytest.approx(loss_of(SoftTargets()))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Sum(), "no methods to sum"),
        (lambda: Sum({"frist": 1}, first=DKD()), "did you mean first"),
        (lambda: Sum({"a": -1}, a=DKD()), "method.weights.a is -1"),
        (lambda: Sum(a=3), "method.a is 3, which is no method"),
        (lambda: Scheduled(DKD(), T=0), "must stay above 0"),
        (lambda: Scheduled(DKD(), T=Ramp(1.0, 0.0)), "must stay above 0"),
        (lambda: Ramp(until=0), "shares of the training"),
        (lambda: Ramp(begin=0.5, until=0.2), "shares of the training"),
        (lambda: Ramp(start=-1), "start is -1"),
        (lambda: Ramp(shape="square"), "shape is 'square'"),
    ],
)
def test_a_composition_that_makes_no_sense_is_refused(made: Callable[[], object], said: str) -> None:
    with pytest.raises(ConfigError) as found:
        made()
    assert said in str(found.value)


# ---------------------------------------------------------------- schedules


def test_a_ramps_values() -> None:
    linear = Ramp(4.0, 1.0, begin=0.2, until=0.6)
    assert [linear(p) for p in (0.0, 0.2, 0.3, 0.4, 0.6, 1.0)] == pytest.approx([4, 4, 3.25, 2.5, 1, 1])
    cosine = Ramp(shape="cosine")
    assert [cosine(p) for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx([0, 0.5 - 0.5**1.5, 0.5, 1])


@pytest.mark.parametrize("progress", [0.0, 0.05, 0.1, 0.9])
def test_a_warm_up_is_the_method_at_a_part_of_alpha(progress: float) -> None:
    warm = Scheduled(DKD(), alpha=Ramp(until=0.1))
    share = min(1.0, progress / 0.1)
    assert loss_of(warm, progress=progress) == pytest.approx(loss_of(DKD(), weights_of([3.0], 0.7 * share, 0.4)))


def test_a_scheduled_temperature_multiplies_the_runs() -> None:
    cooling = Scheduled(SoftTargets(), T=Ramp(2.0, 1.0), beta=Ramp(0.0, 1.0))
    assert loss_of(cooling, progress=0.5) == pytest.approx(loss_of(SoftTargets(), weights_of([4.5], 0.7, 0.2)))


def test_a_weight_in_a_sum_may_be_a_ramp() -> None:
    both = Sum({"b": Ramp(0.0, 2.0)}, a=DKD(), b=DIST())
    assert loss_of(both, progress=0.25) == pytest.approx(loss_of(Sum({"b": 0.5}, a=DKD(), b=DIST())))


def test_steps_are_recorded_only_where_no_number_changes() -> None:
    assert Sum(a=DKD(), b=DIST()).recordable
    assert not Sum({"b": Ramp()}, a=DKD(), b=DIST()).recordable
    assert not Scheduled(Sum({"b": Ramp()}, a=DKD(), b=DIST())).recordable


class Progress(Method):
    """A term whose gradient is the share of the training done."""

    needs_teacher = False

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        share = batch.progress * student.logits.sum(-1).mean(-1)
        return {"loss": losses.hard_cross_entropy(student.logits, batch.labels), "share": share}


def test_the_size_of_a_scheduled_terms_gradient_is_that_of_the_epochs_last_step() -> None:
    plan = replace(made.a_plan(epochs=2), diagnostics=True)
    outcome = made.train(made.solo(), method=Progress(), plan=plan)[0]
    found = [row["share_gradient_logits"] for row in outcome.history]
    assert found == pytest.approx([4 / 10 * made.CLASSES**0.5, 9 / 10 * made.CLASSES**0.5])


# ---------------------------------------------------------------- from the command line


def test_keys_that_stack_are_found_in_nested_methods() -> None:
    dkd = {"_target_": "kd_cli.learn.methods.DKD", "nckd_weight": 2.0, "target": "label"}
    node = {"_target_": "kd_cli.learn.methods.Sum", "weights": {"a": 1.0}, "a": dkd}
    assert without_stackable_keys(node) == {
        "_target_": "kd_cli.learn.methods.Sum",
        "a": {"_target_": "kd_cli.learn.methods.DKD", "target": "label"},
    }


def test_a_sweep_over_a_sums_keys_stacks_its_students_and_they_equal_the_runs_by_themselves(
    start: Callable[..., Running],
) -> None:
    words = ["method=sum", "method@method.first=dkd", "training.epochs=2"]
    differ = ["method.weights.second=0.5,1", "method.first.nckd_weight=2,8"]
    swept = start("-m", *TINY, *words, *differ).wait()
    assert swept.code == 0, swept.err
    assert "4 × tinymlp:" in swept.err  # the size of the stack is measured
    assert "run one by one" not in swept.err
    one = swept.run_dirs[-1]
    alone = start(*TINY, *words, "method.weights.second=1", "method.first.nckd_weight=8").wait()
    assert alone.code == 0, alone.err
    ours = [json.loads(line) for line in (one / "metrics.jsonl").read_text().splitlines()][-1]
    assert ours["first_tckd_loss"] == pytest.approx(alone.metrics[-1]["first_tckd_loss"], rel=1e-4)
    assert ours["loss"] == pytest.approx(alone.metrics[-1]["loss"], rel=1e-4)


def test_a_method_with_a_warm_up_logs_a_loss_that_grows_into_its_weights(tiny: Callable[..., Ran]) -> None:
    ran = tiny("method=scheduled", "method@method.of=nkd", "method.alpha.until=1", "beta=0", "training.epochs=4")
    rows = [row for row in ran.metrics if row["role"] == "student"]
    shares = [row["loss"] / (row["target_loss"] + 1.5 * 4 * row["others_loss"]) for row in rows]
    assert shares == pytest.approx([3.5 / 32, 11.5 / 32, 19.5 / 32, 27.5 / 32], rel=0.05)


def test_another_temperature_than_the_runs_is_refused_where_teachers_probabilities_are_averaged_at_it(
    kd_run: Callable[..., Ran],
) -> None:
    two = ["teacher.members=2", "teacher.combine=arithmetic"]
    ran = kd_run(*TINY, "method=scheduled", "method.T=2", *two, "dry_run=true")
    assert ran.code == 1
    assert "changes T, and the teachers' mean probabilities are taken at the run's T" in ran.err
    ran = kd_run(*TINY, "method=scheduled", *two, "dry_run=true")
    assert ran.code == 0, ran.err
