"""BatchNorm's statistics estimated on training data before a model is evaluated."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from hydra.utils import get_method
from process import Ran
from torch import nn

from kd_cli.config.values import WITHOUT_BATCHNORM, TrainSpec
from kd_cli.learn.batches import Examples
from kd_cli.learn.batchnorm import BATCHES, estimate_statistics, tracked_norms, training_batches

ESTIMATE = "training.batchnorm=estimate"


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.BatchNorm1d(5, momentum=0.01), nn.Dropout(0.5), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.ReLU()]
        return nn.Sequential(*layers).double().eval()


def test_the_statistics_are_those_of_the_batches() -> None:
    images = 3 * torch.randn(60, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 7
    module = network()
    before = {name: p.clone() for name, p in module.named_parameters()}
    batches = images.split(20)
    estimate_statistics([module], iter(batches))
    first, last = module[0], module[3]
    mean, var = (torch.stack([f(batch, 0) for batch in batches]).mean(0) for f in (torch.mean, torch.var))
    assert torch.allclose(first.running_mean, mean)
    assert torch.allclose(first.running_var, var)
    # The second one sees what the first gives in train mode, with dropout switched off.
    inputs = [module[2]((batch - batch.mean(0)) / (batch.var(0, correction=0) + 1e-5).sqrt()) for batch in batches]
    assert torch.allclose(last.running_mean, torch.stack([x.mean(0) for x in inputs]).mean(0))
    assert torch.allclose(last.running_var, torch.stack([x.var(0) for x in inputs]).mean(0))
    assert all(torch.equal(p, before[name]) for name, p in module.named_parameters())
    assert (first.momentum, last.momentum) == (0.01, 0.1)
    assert not any(layer.training for layer in module.modules())


def test_the_batches_are_a_part_of_the_training_data_drawn_anew_in_each_epoch() -> None:
    train = Examples(torch.arange(1000.0)[:, None], torch.zeros(1000, dtype=torch.int64))

    def drawn(batch_size: int, epoch: int = 1) -> list[torch.Tensor]:
        return list(training_batches(train, batch_size, seed=0, role="student", epoch=epoch))

    assert sorted(torch.cat(drawn(128))[:, 0].tolist()) == list(range(1000))
    some = drawn(3)
    assert [len(batch) for batch in some] == [3] * BATCHES
    assert torch.cat(some).unique().numel() == 3 * BATCHES
    assert torch.equal(torch.cat(some), torch.cat(drawn(3)))
    assert not torch.equal(torch.cat(some), torch.cat(drawn(3, epoch=2)))


def test_the_choice_is_in_the_fingerprints_of_models_that_may_have_batchnorm_and_of_no_others() -> None:
    def both(target: str) -> list[dict[str, Any]]:
        spec = TrainSpec("a", {"_target_": target}, 1, 8, {}, {}, {}, 0, "float32", batchnorm="estimate")
        return [one.identity("data") for one in (spec, dataclasses.replace(spec, batchnorm="running"))]

    estimated, running = both("kd_cli.models.cifar.resnet")
    assert estimated != running
    for target in WITHOUT_BATCHNORM:
        widths = {"hidden": [4]} if target.endswith("mlp") else {}
        assert not tracked_norms(get_method(target)(input_shape=(1, 8, 8), num_classes=3, **widths))
        estimated, running = both(target)
        assert estimated == running


# ---------------------------------------------------------------- a run


@pytest.fixture
def own(tmp_path: Path) -> list[str]:
    """Words that choose a student whose running statistics lag far behind."""
    (tmp_path / "own.py").write_text(
        "from torch import nn\n"
        "def net(input_shape, num_classes):\n"
        "    norm = nn.BatchNorm1d(16, momentum=0.003)\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), norm, nn.ReLU(), nn.Linear(16, num_classes))\n"
    )
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "own.yaml").write_text("_target_: own.net\n")
    words = [word for word in TINY if not word.startswith(("student", "training"))]
    return ["--config-dir", str(tmp_path / "conf"), *words, "student=own", "training.epochs=4", "optimizer.lr=0.01"]


@pytest.mark.slow
def test_estimated_statistics_change_the_evaluation_and_not_the_training(
    kd_run: Callable[..., Ran], own: list[str]
) -> None:
    running, estimated = kd_run(*own, "training.batchnorm=running"), kd_run(*own)
    assert (running.code, estimated.code) == (0, 0), running.err + estimated.err
    losses = [[row["loss"] for row in ran.metrics if row["role"] == "student"] for ran in (running, estimated)]
    assert losses[0] == losses[1]
    errors = [ran.summary["student"]["test"]["errors"] for ran in (running, estimated)]
    assert errors[1] < 0.7 * errors[0]
    assert (
        estimated.summary["student_alone"]["fingerprint"]
        == kd_run(*own, ESTIMATE).summary["student_alone"]["fingerprint"]
    )
    assert running.summary["student_alone"]["fingerprint"] != estimated.summary["student_alone"]["fingerprint"]
    assert running.summary["teacher"]["fingerprint"] == estimated.summary["teacher"]["fingerprint"]
    validation = [row["val_accuracy"] for row in estimated.metrics if row["role"] == "student"]
    assert validation[-1] == estimated.summary["student"]["val"]["accuracy"]


KILLED = """
import os, signal
from kd_cli.storage.training_state import TrainingState
def killed(self, state, save=TrainingState.save):
    save(self, state)
    if state["epoch"] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
TrainingState.save = killed
"""


@pytest.mark.parametrize("keep", ["last", "best"])
def test_a_killed_run_with_estimated_statistics_ends_with_the_same_bytes(
    kd_run: Callable[..., Ran], own: list[str], tmp_path: Path, keep: str
) -> None:
    argv = [*own, ESTIMATE, f"training.keep={keep}", "checkpoint.every=1"]
    assert kd_run(*argv, "store_dir=first", "hydra.run.dir=whole").code == 0
    assert kd_run(*argv, "store_dir=second", "hydra.run.dir=out", prelude=KILLED).code < 0
    resumed = kd_run("resume=out")
    assert resumed.code == 0, resumed.err
    for name in ("student.safetensors", "student.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    summaries = [json.loads((tmp_path / folder / "summary.json").read_text()) for folder in ("out", "whole")]
    assert summaries[0]["student"]["test"] == summaries[1]["student"]["test"]
