"""`experiment=flops_against_latency`: a measurement in place of a training."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from process import Ran

from kd_cli.errors import ConfigError
from kd_cli.experiments.flops_against_latency import NAME, as_text, flops_against_latency, ranked, sentence

COSTS = {"a": (1_000_000, 10), "b": (4_000_000, 5), "c": (2_000_000, 7)}


def measured(**milliseconds: float) -> dict[str, dict[str, float]]:
    return {name: {"median_ms": ms, "p95_ms": 2 * ms} for name, ms in milliseconds.items()}


def test_networks_are_ranked_by_both_and_the_worst_mistake_is_named() -> None:
    rows = ranked(COSTS, measured(a=6.0, b=2.0, c=3.0))
    assert [(row.model, row.flops_rank, row.latency_rank) for row in rows] == [("b", 3, 1), ("c", 2, 2), ("a", 1, 3)]
    assert rows[0].gflops_per_second == pytest.approx(2.0)
    said = sentence(rows)
    assert said.startswith(
        "FLOPs and latency order 3 of 3 pairs differently: a has 0.25 of the FLOPs of b and takes 3.00"
    )
    assert said.endswith("From a to b FLOPs grow 4.0 times, latency 0.3 times.")
    assert as_text(rows).splitlines()[1].split() == ["b", "4", "5", "2.00", "4.00", "2.0", "3", "1"]


def test_the_same_order_is_called_the_same() -> None:
    assert "the same in all 3 pairs" in sentence(ranked(COSTS, measured(a=1.0, b=3.0, c=2.0)))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"models": ["resnet18"]}, "two models or more"),
        ({"models": ["resnet18", "resnet18"]}, "each once"),
        ({"models": ["resnet18", "vit_b_16"], "use_threads": 4096}, "at most the"),
        ({"models": ["resnet81", "vit_b_16"], "size": 32}, "no classification model of that name"),
    ],
)
def test_values_that_measure_nothing_are_refused(keys: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        flops_against_latency(tmp_path, **keys)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_experiment_measures_and_trains_nothing(kd_run: Callable[..., Ran], tmp_path: Path) -> None:
    words = ["instead.models=[shufflenet_v2_x0_5,mobilenet_v3_small]", "instead.size=32", "instead.seconds=0.01"]
    ran = kd_run(f"experiment={NAME}", *words, "hydra.run.dir=out")
    assert ran.code == 0, ran.err
    assert "by FLOPs" in ran.out
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {f"{NAME}.{e}" for e in ("csv", "json", "html")}
    assert not (tmp_path / "out" / "summary.json").exists()
    rows = list(csv.DictReader((tmp_path / "out" / f"{NAME}.csv").read_text().splitlines()))
    assert {row["model"]: row["parameters"] for row in rows} == {
        "shufflenet_v2_x0_5": "1366792",  # as torchvision documents them
        "mobilenet_v3_small": "2542856",
    }
    assert ran.run_dirs == []  # nothing that kd-report would take for a run


@pytest.mark.slow
def test_a_measurement_is_no_job_of_a_sweep(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run("-m", f"experiment={NAME}", "seed=0,1")
    assert ran.code == 1
    assert "instead runs a function in place of a training, once, and not in a sweep" in ran.err
