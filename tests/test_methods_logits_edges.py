"""What all methods of the teacher's logits have in common: stacks, gradients, and the cases in which formulas break."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import made
import pytest
import torch
from logits import gradient_of, loss_of, some_labels, some_logits, terms_of, weights_of
from stacks import ADAMW, both_ways
from stacks import teacher as taught
from tape import Tape

from kd_cli.errors import ConfigError
from kd_cli.learn.engine import Outcome
from kd_cli.learn.methods import (
    DIST,
    DKD,
    NKD,
    RLD,
    TTM,
    WSLD,
    Method,
    Ramp,
    Scheduled,
    Setting,
    SoftTargets,
    Sum,
    TeacherFree,
    Weights,
)
from kd_cli.learn.methods.logit_method import standardised
from kd_cli.learn.methods.probe import try_method
from kd_cli.learn.outputs import Outputs

Make = Callable[..., Method]
# Each with the numeric keys that may differ between the students of a stack, in two students.
METHODS: dict[str, tuple[Make, dict[str, float], dict[str, float]]] = {
    "soft_targets": (SoftTargets, {}, {}),
    "dist": (DIST, {"inter": 1.0, "intra": 0.5}, {"inter": 2.0, "intra": 1.0}),
    "dkd": (DKD, {"tckd_weight": 1.0, "nckd_weight": 8.0}, {"tckd_weight": 0.5, "nckd_weight": 2.0}),
    "dkd of predictions": (lambda **keys: DKD(target="teacher", **keys), {}, {"nckd_weight": 2.0}),
    "nkd": (NKD, {"gamma": 1.5}, {"gamma": 3.5}),
    "ttm": (TTM, {}, {}),
    "wttm": (lambda: TTM(weighted=True), {}, {}),
    "rld": (RLD, {"scd_weight": 1.0, "mcd_weight": 8.0}, {"scd_weight": 2.0, "mcd_weight": 1.0}),
    "wsld": (WSLD, {}, {}),
    "teacher_free": (TeacherFree, {"correct": 0.99}, {"correct": 0.7}),
    "sum": (lambda w=1.0: Sum({"b": w}, a=DKD(), b=DIST()), {"w": 0.5}, {"w": 2.0}),
    "scheduled": (lambda a=1.0: Scheduled(NKD(), alpha=Ramp(a, 1.0), T=Ramp(2.0, 1.0)), {"a": 0.0}, {"a": 0.5}),
}
OF_TEACHER = [name for name in METHODS if name != "teacher_free"]
KINDS: dict[str, Make] = {kind.__name__: kind for kind in (SoftTargets, DIST, DKD, NKD, TTM, RLD, WSLD)}
STANDARDISED: dict[str, Make] = {name: lambda kind=kind: kind(standardise=True) for name, kind in KINDS.items()}
ALL: dict[str, Make] = {name: lambda kind=kind: kind() for name, (kind, _, _) in METHODS.items()} | STANDARDISED
B, C = 6, 5


def setting(classes: int = C, smallest_batch: int = B) -> Setting:
    outputs = Outputs(torch.zeros(1, 2, classes))
    return Setting(classes, 100, smallest_batch, outputs, outputs)


@pytest.mark.parametrize("name", ALL)
def test_a_method_passes_the_trial_that_precedes_training(name: str) -> None:
    method = ALL[name]()
    method.setup(setting())
    try_method(method.float(), setting(), size=2)


@pytest.mark.parametrize("name", ALL)
def test_two_students_together_have_the_terms_of_each_alone(name: str) -> None:
    kind, first, second = METHODS.get(name, (ALL[name], {}, {}))
    methods = [kind(**first), kind(**second)]
    student, labels = some_logits(2, B, C), some_labels(2, B, classes=C)
    for teacher in (some_logits(1, B, C, seed=1), some_logits(2, B, C, seed=1)):
        weights = weights_of([1.5, 4.0], alpha=0.7, beta=0.4)
        both = terms_of(type(methods[0]).stack(methods), student, teacher, labels, weights, progress=0.3)
        for s in range(2):
            one = Weights(weights.T[s : s + 1], weights.alpha[s : s + 1], weights.beta[s : s + 1])
            theirs = teacher[min(s, len(teacher) - 1)]
            alone = terms_of(methods[s], student[s], theirs, labels[s], one, progress=0.3)
            assert both.keys() == alone.keys()
            for term in both:
                torch.testing.assert_close(both[term][s : s + 1], alone[term])


@pytest.mark.parametrize("name", METHODS)
def test_a_stack_with_different_keys_trains_as_its_students_do_one_by_one(name: str) -> None:
    kind, first, second = METHODS[name]
    together, alone = both_ways(made.conv, ADAMW, methods=[kind(**first), kind(**second), kind(**first)], epochs=1)
    for ours, theirs in zip(together, alone, strict=True):
        assert made.difference(ours.state, theirs.state) < 1e-9


@pytest.mark.parametrize("name", [name for name in ALL if name != "scheduled"])  # a ramp is evaluated in Python
def test_steps_that_are_recorded_and_replayed_train_the_same_students(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tape, "made", [])

    def trained(recorder: Tape | None) -> Outcome:
        learner = made.solo(optimizer=partial(torch.optim.SGD, lr=0.01))
        plan, method = made.a_plan(epochs=6), ALL[name]()
        return made.train(learner, teacher=taught(live=False), method=method, plan=plan, recorder=recorder)[0]

    plain, recorded = trained(None), trained(Tape())
    assert sum(tape.replays for tape in Tape.made) > 0
    assert made.difference(plain.state, recorded.state) < 1e-6


@pytest.mark.parametrize("name", [name for name in ALL if name.lower() != "wsld"])  # its weights have no gradient
def test_autograd_is_the_slope_of_the_loss(name: str) -> None:
    method = ALL[name]()
    teacher, labels, weights = some_logits(1, 4, C, seed=1), some_labels(1, 4, classes=C), weights_of([2.0], beta=0.5)
    assert torch.autograd.gradcheck(
        lambda x: terms_of(method, x, teacher, labels, weights, progress=0.3)["loss"],
        some_logits(1, 4, C).requires_grad_(),
    )


@pytest.mark.parametrize("margin", [0.0, 17.0, 80.0, 89.0, 95.0, 103.0, 104.0, 300.0, 1e4])
@pytest.mark.parametrize("T", [1.0, 4.0])
@pytest.mark.parametrize("name", ALL)
def test_value_and_gradient_are_finite_at_every_margin_of_either_model(name: str, T: float, margin: float) -> None:
    # log(1 - p) of a summed softmax has a nan gradient in float32 at margins of 89 to 103 times T.
    method, labels = ALL[name]().float(), torch.tensor([0, 1, 2, 0])
    sure, other = torch.zeros(4, C), some_logits(4, C).float()
    sure[:, 0] = margin * T
    for student, teacher in ((sure, other), (other, sure), (sure, sure), (sure, -sure), (-sure, sure)):
        leaf = student.clone().requires_grad_()
        loss = terms_of(method, leaf, teacher, labels, single(T))["loss"]
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), leaf)[0].isfinite().all()


def single(T: float) -> Weights:
    one = torch.ones(1)
    return Weights(T * one, one, one)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ALL)
def test_half_precision_logits_of_ten_thousand_give_no_nan(name: str, dtype: torch.dtype) -> None:
    signs = some_logits(4, C).sign()
    for student, teacher in ((1e4 * signs, -1e4 * signs), (1e4 * signs, 1e4 * signs), (1e4 * signs, signs)):
        leaf = student.to(dtype).requires_grad_()
        loss = terms_of(ALL[name]().float(), leaf, teacher.to(dtype), torch.tensor([0, 1, 2, 0]), single(0.5))["loss"]
        assert loss.isfinite().all()
        assert torch.autograd.grad(loss.sum(), leaf)[0].isfinite().all()


@pytest.mark.parametrize("classes", [10, 1000])
@pytest.mark.parametrize("T", [1.0, 4.0, 20.0])
@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
def test_dists_gradient_on_equal_logits_is_of_the_size_of_soft_targets(scale: float, T: float, classes: int) -> None:
    # A zero-initialised last layer. Pearson's correlation has an infinite gradient there.
    teacher, labels = some_logits(32, classes, seed=1, scale=scale).float(), some_labels(32, classes=classes)
    for level in (0.0, 5.0):
        flat = torch.full((32, classes), level)
        ours, usual = (gradient_of(kind().float(), flat, teacher, labels, T=T) for kind in (DIST, SoftTargets))
        assert 1e-3 < float(ours.norm() / usual.norm()) < 30 * max(1, 1 / scale)


@pytest.mark.parametrize("scale", [0.03, 3.0, 30.0])
@pytest.mark.parametrize("name", STANDARDISED)
def test_a_standardised_methods_gradient_on_equal_logits_is_its_own_over_a_tenth_of_the_teachers_deviation(
    name: str, scale: float
) -> None:
    teacher, labels = some_logits(B, 10, seed=1, scale=scale), some_labels(B, classes=10)
    zeros, flat = torch.zeros_like(teacher), torch.full_like(teacher, 5.0)
    kind, deviation = KINDS[name], 0.1 * teacher.std(-1, keepdim=True).clamp(min=1)
    usual = gradient_of(kind(), zeros, standardised(zeros, teacher)[1], labels, T=2)
    torch.testing.assert_close(gradient_of(kind(standardise=True), flat, teacher, labels, T=2), usual / deviation)


@pytest.mark.parametrize("name", ALL)
def test_a_teacher_whose_logits_are_all_equal_is_harmless(name: str) -> None:
    flat, labels = torch.full((B, C), 3.0), some_labels(B, classes=C)
    for student in (flat, some_logits(B, C).float()):
        leaf = student.clone().requires_grad_()
        loss = terms_of(ALL[name]().float(), leaf, flat, labels, single(2.0))["loss"]
        slope = torch.autograd.grad(loss.sum(), leaf)[0]
        assert loss.isfinite().all()
        assert float(slope.norm()) < 30


@pytest.mark.parametrize("name", ALL)
def test_a_batch_seen_twice_has_the_loss_of_the_batch(name: str) -> None:
    # No weight depends on the size of the batch.
    student, teacher, labels = some_logits(B, C), some_logits(B, C, seed=1), some_labels(B, classes=C)
    once = loss_of(ALL[name](), student, teacher, labels, T=2)
    twice = loss_of(ALL[name](), *(x.repeat(2, 1) for x in (student, teacher)), labels.repeat(2), T=2)
    assert twice == pytest.approx(once, rel=1e-9)


@pytest.mark.parametrize("name", [n for n in OF_TEACHER if n not in ("dist", "sum")])
def test_classes_that_neither_model_considers_change_nothing(name: str) -> None:
    # No weight depends on the number of classes.
    student, teacher, labels = some_logits(B, C), some_logits(B, C, seed=1), some_labels(B, classes=C)
    more = [torch.nn.functional.pad(x, (0, 7), value=-1e4) for x in (student, teacher)]
    method = ALL[name]()
    assert loss_of(method, *more, labels, T=2) == pytest.approx(loss_of(method, student, teacher, labels, T=2))


@pytest.mark.parametrize("name", ALL)
def test_one_class_and_a_batch_of_one_are_errors_or_harmless(name: str) -> None:
    with pytest.raises(ConfigError, match="classes or more"):
        ALL[name]().setup(setting(classes=1))
    method = ALL[name]()
    if method.min_batch == 1:
        method.setup(setting(smallest_batch=1))
        one, other = some_logits(1, C), some_logits(1, C, seed=1)
        assert gradient_of(method, one, other, torch.tensor([2]), T=2).norm() > 0
    else:
        with pytest.raises(ConfigError, match="batches of 2 examples or more"):
            method.setup(setting(smallest_batch=1))


TWO_CLASSES = {"soft_targets", "ttm", "wttm", "wsld", "teacher_free"}


@pytest.mark.parametrize("name", ALL)
def test_two_classes_are_an_error_where_a_term_would_be_nothing(name: str) -> None:
    method = ALL[name]()
    if name not in TWO_CLASSES:
        with pytest.raises(ConfigError, match="3 classes or more"):
            method.setup(setting(classes=2))
        return
    method.setup(setting(classes=2))
    student, teacher, labels = some_logits(B, 2), some_logits(B, 2, seed=1), some_labels(B, classes=2)
    assert gradient_of(method, student, teacher, labels, T=2).abs().min() > 0


def test_dist_within_classes_alone_takes_two_classes_and_a_batch_of_two_is_harmless() -> None:
    method = DIST(inter=0)
    method.setup(setting(classes=2, smallest_batch=2))
    student, teacher, labels = some_logits(B, 2), some_logits(B, 2, seed=1), some_labels(B, classes=2)
    assert gradient_of(method, student, teacher, labels).norm() > 0.01
    assert gradient_of(method, student[:2], teacher[:2], labels[:2]).norm() < 1e-12  # correlations of 1 and -1
    DIST(intra=0).setup(setting(smallest_batch=1))


def test_a_label_that_the_teacher_finds_least_likely_leaves_rld_without_its_second_term() -> None:
    teacher, student = some_logits(B, C, seed=1), some_logits(B, C)
    least = teacher.argmin(-1)
    assert loss_of(RLD(0, 8), student, teacher, least, T=4) == 0
    assert gradient_of(RLD(0, 8), student, teacher, least, T=4).norm() == 0


def test_what_each_needs_labels_for() -> None:
    without = {name for name, method in ALL.items() if not method().needs_labels}
    assert without == {"soft_targets", "dist", "dkd of predictions", "ttm", "wttm", "SoftTargets", "DIST", "TTM"}
    student, teacher, labels = some_logits(B, C), some_logits(B, C, seed=1), some_labels(B, classes=C)
    for name in without:
        assert loss_of(ALL[name](), student, teacher, labels) == loss_of(ALL[name](), student, teacher, 0 * labels)


@pytest.mark.parametrize(
    ("kind", "keys", "said"),
    [
        (DIST, {"inter": 0, "intra": 0}, "both 0"),
        (DIST, {"inter": -1}, "method.inter is -1"),
        (DKD, {"nckd_weight": "8"}, "method.nckd_weight is '8'"),
        (DKD, {"target": "labels"}, "method.target is 'labels'"),
        (NKD, {"gamma": -0.1}, "method.gamma is -0.1"),
        (RLD, {"scd_T": 0}, "method.scd_T is 0"),
        (TeacherFree, {"correct": 1}, "method.correct is 1"),
    ],
)
def test_a_key_that_makes_no_sense_is_refused(kind: Make, keys: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        kind(**keys)


def test_probabilities_that_underflow_still_correlate() -> None:
    # Two classes that nobody predicts: their probabilities are 0 in float32, their correlation is not.
    student, teacher, labels = some_logits(B, C), some_logits(B, C, seed=1), some_labels(B, classes=C)
    drop = torch.tensor([0.0, 0.0, 0.0, -200.0, -200.0], dtype=torch.float64)
    exact = loss_of(DIST(0, 1), student + drop, teacher + drop, labels)
    single_precision = terms_of(
        DIST(0, 1).float(), (student + drop).float(), (teacher + drop).float(), labels, single(1.0)
    )["intra"]
    assert float(single_precision) == pytest.approx(exact, rel=1e-4)
