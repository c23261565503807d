"""Latencies that kd-run measures by itself: quick or not at all, in the summary and on the page, in no fingerprint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from process import Ran

from kd_cli.export.latency import ROUNDS, within
from kd_cli.report.compare import Comparison, Setting
from kd_cli.report.cost import cost_of, latency_figure, not_measured
from kd_cli.report.read import Run
from kd_cli.runs.latency import LIMIT
from kd_cli.statistics import mean_std

ONE = {"median_ms": 2.0, "p95_ms": 3.0, "per_second": 500.0, "calls": 9}
WHERE = {"cores": 2, "how": "all models took turns", "batch": 1, "threads": 1}


def test_a_measurement_that_takes_too_long_is_given_up_after_the_first_calls() -> None:
    calls: list[str] = []
    assert within({"a": lambda: calls.append("a")}, batch=1, limit=-1.0) is None
    assert calls == ["a"]


def test_what_is_quick_is_measured_in_turns() -> None:
    calls: list[str] = []
    both = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    found = within(both, batch=2, limit=30.0)
    assert found is not None
    assert {name: one["calls"] + 4 for name, one in found.items()} == {name: calls.count(name) for name in "ab"}
    assert all(one["calls"] >= ROUNDS for one in found.values())


@pytest.mark.slow
def test_a_run_measures_teacher_and_student_and_its_fingerprints_do_not_change(tiny: Callable[..., Ran]) -> None:
    ran = tiny()
    found = ran.summary["latency"]
    assert (found["batch"], found["threads"], list(found["rows"])) == (1, 1, ["teacher", "student"])
    assert all(0 < one["median_ms"] <= one["p95_ms"] < 1000 * LIMIT for one in found["rows"].values())
    assert "Errors against latency" in (ran.run_dir / "report.html").read_text()
    without = tiny("latency=false", "hydra.run.dir=without")
    assert without.summary["latency"] is None
    assert "Errors against latency" not in (without.run_dir / "report.html").read_text()
    for role in ("teacher", "student_alone", "student"):
        assert without.summary[role]["fingerprint"] == ran.summary[role]["fingerprint"]
    assert without.summary["teacher"]["from_store"]


def run_of(latency: dict[str, Any] | None, alone_parameters: int = 10) -> Run:
    def report(errors: int, parameters: int) -> dict[str, Any]:
        test = {"errors": errors, "total": 100}
        return {"test": test, "flops": 2000, "parameters": parameters, "fingerprint": "f"}

    models = {"teacher": report(5, 50), "student_alone": report(9, alone_parameters), "student": report(7, 10)}
    return Run(Path("none"), "completed", {}, {}, {**models, "latency": latency}, {})


def test_the_picture_has_every_role_at_its_latency() -> None:
    latency = {**WHERE, "rows": {"teacher": {**ONE, "median_ms": 8.0}, "student": ONE}}
    found = cost_of(run_of(latency))
    assert found is not None
    for tip in ("teacher: 5 errors, 8 ms", "student alone: 9 errors, 2 ms", "student: 7 errors, 2 ms"):
        assert tip in found["figure"].chart
    assert "memory, MiB" not in str(found["grid"])


def test_a_student_alone_of_another_size_has_its_own_latency_or_none() -> None:
    latency = {**WHERE, "rows": {"student": ONE}}
    found = cost_of(run_of(latency, alone_parameters=4))
    assert found is not None
    assert "student alone" not in found["figure"].chart
    latency["rows"] = {"student_alone": {**ONE, "median_ms": 1.5}, "student": ONE}
    found = cost_of(run_of(latency, alone_parameters=4))
    assert found is not None
    assert "student alone: 9 errors, 1.5 ms" in found["figure"].chart


@pytest.mark.parametrize("latency", [None, {"not_measured": "that would take more than 0.5 s"}])
def test_without_a_measurement_there_is_no_picture(latency: dict[str, Any] | None) -> None:
    assert cost_of(run_of(latency)) is None
    assert not_measured(run_of(latency)) == (latency or {}).get("not_measured")


@pytest.mark.parametrize("sizes", [(10, 40), (10, 10)], ids=["two sizes", "one size"])
def test_a_sweeps_picture_has_each_setting_of_several_sizes(sizes: tuple[int, int]) -> None:
    runs = []
    for seed, (parameters, ms) in enumerate([(sizes[0], 2.0), (sizes[0], 4.0), (sizes[0], 3.0), (sizes[1], 9.0)]):
        run = run_of({**WHERE, "rows": {"student": {**ONE, "median_ms": ms}}})
        run.summary["student"]["parameters"] = parameters
        run.summary["student"]["test"]["errors"] = 7 if seed < 3 else 5
        runs.append(run)
    groups = (runs[:3], runs[3:])
    stats = [{"errors": mean_std([run.summary["student"]["test"]["errors"] for run in own])} for own in groups]
    rest = {"student_alone": {}, "teacher": {}, "saved": None, "gap_closed": None, "gap_n": 0}
    rest |= dict.fromkeys(("diverged", "failed", "unfinished", "repeats", "changed"), 0)
    rest["pruned"] = ()
    settings = [
        Setting({"student.hidden": hidden}, tuple(own), student, **rest)
        for hidden, own, student in zip(([8], [32]), groups, stats, strict=True)
    ]
    figure = latency_figure(Comparison("made", tuple(runs), ("student.hidden",), tuple(settings), None))
    if len(set(sizes)) == 1:
        assert figure is None
        return
    assert figure is not None
    for tip in ("7.0 ± 0.0 errors (n = 3), 3 ms", "5 errors (n = 1), 9 ms"):
        assert tip in figure.chart
