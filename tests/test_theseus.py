"""Module replacement: the steps of the mixed network, what is shipped, and what is refused."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made
import numpy as np
import pytest
import torch
from PIL import Image
from process import Ran
from safetensors.torch import load_file
from test_blocks import hidden, pair
from torch import Tensor, nn

from kd_cli.data.digits import digits
from kd_cli.errors import ConfigError
from kd_cli.export.load import load_student
from kd_cli.learn.batches import Batch
from kd_cli.learn.blocks import logits_of
from kd_cli.learn.engine import Interrupted
from kd_cli.learn.learner import ModuleLearner
from kd_cli.learn.methods import Ramp, Scheduled, Sum, Theseus
from kd_cli.learn.objective import Objective
from kd_cli.learn.recipe import PLAIN, Recipe
from kd_cli.learn.replacement import Replacement, ReplacingLearner
from kd_cli.learn.teachers import freeze

# ---------------------------------------------------------------- the method


def test_the_probability_follows_the_schedule_and_then_is_one() -> None:
    linear = Theseus(Ramp(0.2, 1.0, 0.0, 0.4), alone=0.5)
    assert [round(linear.probability(p), 6) for p in (0, 0.2, 0.4, 0.45, 0.5, 0.9)] == [0.2, 0.6, 1, 1, 1, 1]
    constant = Theseus(0.3, alone=0.6)
    assert [constant.probability(p) for p in (0, 0.59, 0.6, 1)] == [0.3, 0.3, 1, 1]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Theseus(0.0), "no block is ever the student's"),
        (lambda: Theseus(1.5), "must lie between 0 and 1"),
        (lambda: Theseus("half"), "must be a probability, or a Ramp"),
        (lambda: Theseus(alone=0), "by itself from the first step on"),
        (lambda: Theseus(student_blocks="layer1"), "must be auto, or a list of paths"),
        (lambda: Theseus(student_blocks=["1", 1]), "names a module twice"),
        (lambda: Sum(a=Theseus()), "cannot be a part of another method"),
        (lambda: Scheduled(Theseus()), "cannot be a part of another method"),
    ],
)
def test_options_without_a_meaning_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# ---------------------------------------------------------------- the steps

sgd = torch.optim.SGD


def learner(
    probability: Callable[[float], float], *, seed: int = 0, recipe: Recipe = PLAIN, lr: float = 0.1
) -> tuple[ReplacingLearner, nn.Module]:
    """A student of two layers in a teacher of four, with the frozen teacher."""
    teacher = freeze(made.model(lambda: hidden(8, 8, 8, 8), 9))
    student = made.model(lambda: hidden(8, 8), seed)
    replacement = Replacement(*pair(student, teacher))
    optimizer = sgd(student.parameters(), lr=lr)
    objective = Objective(Theseus(), made.some_weights(beta=(1.0,)))
    own: Any = {"replacement": replacement, "probability": probability, "frozen": replacement.frozen}
    return ReplacingLearner(student, optimizer, seed=seed, objective=objective, recipe=recipe, **own), teacher


def a_batch(n: int = 12) -> Batch:
    index = torch.arange(n)[None]
    images, labels = made.pictures(n)
    return Batch(index, images[None], labels[None])


def one_step(of: ReplacingLearner, batch: Batch) -> dict[str, Tensor]:
    """The changes of the student's weights in one step."""
    before = {name: p.detach().clone() for name, p in of.module.named_parameters()}
    with of.training("student", 1):
        of.step(batch, None, Objective(of.method, made.some_weights(beta=(1.0,))), 1.0)
    return {name: p.detach() - before[name] for name, p in of.module.named_parameters()}


def test_a_step_is_that_of_the_mixed_network_written_out() -> None:
    batch = a_batch()
    for seed in range(4):  # in these, each of the two blocks is drawn in some
        own, teacher = learner(lambda _: 0.5, seed=seed)
        start = made.model(lambda: hidden(8, 8), seed)
        changed = one_step(own, batch)
        assert isinstance(start, nn.Sequential)
        assert isinstance(teacher, nn.Sequential)
        blocks = [start[:3] if own.drawn[0] else teacher[:5], start[3:5] if own.drawn[1] else teacher[5:9]]
        mixed = nn.Sequential(*blocks, teacher[9])
        loss = nn.functional.cross_entropy(mixed(batch.images[0]), batch.labels[0])
        trained = {name: p for name, p in start.named_parameters() if own.drawn[0 if name[0] == "1" else 1]}
        trained = {name: p for name, p in trained.items() if name[0] != "5"}  # the classifier is the teacher's
        gradients = torch.autograd.grad(loss, list(trained.values())) if trained else []
        expected = dict(zip(trained, gradients, strict=True))
        for name, change in changed.items():
            wanted = -0.1 * expected[name] if name in expected else torch.zeros_like(change)
            assert torch.allclose(change, wanted, atol=1e-12), (seed, name)


def test_only_the_students_gradients_count_in_clipping() -> None:
    batch = a_batch()
    plain = one_step(learner(lambda _: 1.0)[0], batch)
    clipped = one_step(learner(lambda _: 1.0, recipe=Recipe(clip=1e-3))[0], batch)
    norm = torch.stack([change.norm() for change in clipped.values()]).norm()
    assert float(norm) == pytest.approx(0.1 * 1e-3, rel=1e-3)  # the whole length is the student's
    ratio = float(norm) / float(torch.stack([change.norm() for change in plain.values()]).norm())
    for name, change in clipped.items():
        assert torch.allclose(change, ratio * plain[name], atol=1e-12)


def test_the_teacher_and_its_classifier_stay_as_they_are_and_the_student_is_evaluated_alone() -> None:
    own, teacher = learner(lambda progress: 0.3 if progress < 0.5 else 1.0)
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    (outcome,) = made.train(own, method=Theseus(), weights=made.some_weights(beta=(1.0,)))
    assert made.difference(before, teacher.state_dict()) == 0
    assert outcome.state["5.weight"].equal(teacher.state_dict()["9.weight"])
    assert not any(module.training for module in teacher.modules())
    alone = hidden(8, 8).double()
    alone.load_state_dict(outcome.state)
    images, labels = made.pictures(30, "val")
    accuracy = float((logits_of(alone, images).argmax(-1) == labels).double().mean())
    assert outcome.history[-1]["val_accuracy"] == pytest.approx(accuracy)


def test_a_step_that_draws_nothing_changes_nothing_even_with_momentum_and_weight_decay() -> None:
    own, _ = learner(lambda _: 0.0)
    own.optimizer.param_groups[0] |= {"momentum": 0.9, "weight_decay": 0.1}
    assert all(not change.any() for change in one_step(own, a_batch()).values())


def test_with_probability_one_it_is_the_student_by_itself_with_the_teachers_classifier() -> None:
    own, teacher = learner(lambda _: 1.0)
    (outcome,) = made.train(own, method=Theseus(), weights=made.some_weights(beta=(1.0,)))
    student = made.model(lambda: hidden(8, 8))
    student.get_submodule("5").load_state_dict(teacher.get_submodule("9").state_dict())
    student.get_submodule("5").requires_grad_(False)
    objective = Objective(Theseus(), made.some_weights(beta=(1.0,)))
    plain = ModuleLearner(student, sgd(student.parameters(), lr=0.1), seed=0, objective=objective)
    (expected,) = made.train(plain, method=Theseus(), weights=made.some_weights(beta=(1.0,)))
    assert made.difference(outcome.state, expected.state) == 0


def test_an_interrupted_training_draws_the_same_modules_again() -> None:
    def halves(progress: float) -> float:
        return 0.5

    keys: Any = {"method": Theseus(), "weights": made.some_weights(beta=(1.0,)), "plan": made.a_plan(epochs=3)}
    (whole,) = made.train(learner(halves)[0], **keys)
    memory = made.InMemory()
    with pytest.raises(Interrupted):
        made.train(learner(halves)[0], **keys, checkpoint=memory, stopping=lambda: True)
    (again,) = made.train(learner(halves)[0], **keys, checkpoint=memory)
    assert made.difference(whole.state, again.state) == 0
    assert made.metrics(whole) == made.metrics(again)


def test_a_block_is_drawn_as_often_as_its_probability_says() -> None:
    own, _ = learner(lambda _: 0.3, lr=0.0)
    batch, objective = a_batch(4), Objective(Theseus(), made.some_weights(beta=(1.0,)))
    counts = torch.zeros(2)
    together = 0
    with own.training("student", 1):
        for _ in range(600):
            own.step(batch, None, objective, 1.0)
            counts += torch.tensor(own.drawn)
            together += all(own.drawn)
    assert torch.allclose(counts / 600, torch.tensor(0.3), atol=0.06)
    assert together / 600 == pytest.approx(0.09, abs=0.04)  # independent draws, one for each block


# ---------------------------------------------------------------- a run

RUN = [
    *("teacher=smallmlp", "teacher.hidden=[16,16,16,16]", "student.hidden=[16,16]", "method=theseus"),
    *("training.epochs=2", "teacher_training.epochs=1", "device=cpu"),
]


def test_a_run_ships_the_students_modules_and_the_teachers_classifier(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run("-m", *RUN, "seed=0,1")
    assert ran.code == 0, ran.err
    why = "run one by one: Theseus draws modules for each student, and they differ in seed"
    assert why in " ".join(ran.err.split())
    directory = ran.run_dirs[0]
    shipped = load_file(directory / "student.safetensors")
    stored = [load_file(path) for path in Path(os.environ["KD_STORE"]).glob("*/weights.safetensors")]
    (teacher,) = (weights for weights in stored if "9.weight" in weights)
    assert shipped["5.weight"].equal(teacher["9.weight"])
    assert {name: tuple(t.shape) for name, t in shipped.items()}["3.weight"] == (16, 16)
    log = (directory / "run.log").read_text()
    assert "rises from 0.3 to 1 in the first 50% of the training: 0 to 4 by 0 to 2, 5 to 8 by 3 to 4" in log
    assert "the student has the teacher's weights in 5, which are not trained" in log
    student, source = load_student(directory), digits(data_dir="")
    errors = int((student(source.test_images).argmax(-1) != source.test_labels).sum())
    assert f'"errors": {errors}' in (directory / "summary.json").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["teacher.members=2"], "teacher.members is 2"),
        (["training.freeze='1'"], "training.freeze is given"),
        (["teacher.normalize=none"], "the two have different inputs"),
        (["transfer.labels=false"], "learns from labels, and the transfer set has none"),
        (["student.hidden=[12]"], "block 1 of 1 ends in 12 numbers in the student (at 2) and in 16 in the teacher"),
        (["dataset.positive=3"], "and the data have independent labels"),
        (["peers=2"], "trains each student by itself"),
        (["T=auto"], "T=auto"),
    ],
)
def test_what_it_cannot_do_is_refused_before_training(
    kd_run: Callable[..., Ran], words: list[str], message: str
) -> None:
    ran = kd_run(*RUN, *words)
    assert ran.code != 0
    assert message in " ".join(ran.err.split())
    assert "epochs in" not in ran.err + ran.out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["theseus_mnist", "theseus_cifar10"])
def test_the_experiments_run_on_small_data(kd_run: Callable[..., Ran], tmp_path: Path, name: str) -> None:
    small = ["training.epochs=1", "teacher_training.epochs=1", "seed=0", "transfer.fraction=1"]
    if name == "theseus_cifar10":
        random = np.random.default_rng(0)
        for part, kind, i in itertools.product(("train", "test"), ("cat", "dog"), range(12)):
            folder = tmp_path / "pictures" / part / kind
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / f"{i}.jpg")
        small += [f"dataset.root={tmp_path / 'pictures'}", "dataset.image_size=8", "training.batch_size=8"]
    else:
        small += ["dataset=digits"]
    ran = kd_run(f"experiment={name}", *small)
    assert ran.code == 0, ran.err
    assert "method=theseus" in ran.out
    assert "method=soft_targets" in ran.out


def test_a_teacher_of_answers_has_no_modules_to_replace(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run("teacher=sklearn", "student=tinymlp", "method=theseus")
    assert ran.code != 0
    assert "puts modules of the teacher into the student, and teacher=sklearn has answers only" in ran.err
