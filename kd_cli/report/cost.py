"""What kd-export, or else kd-run, measured of a run: errors against latency, as a picture and as a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from kd_cli.report.compare import Comparison, Setting
from kd_cli.report.curves import COLOURS
from kd_cli.report.figures import Figure, is_logarithmic
from kd_cli.report.grids import Grid, plain
from kd_cli.report.read import Run
from kd_cli.report.svg.lines import Point, Series, line_chart
from kd_cli.report.svg.small import legend
from kd_cli.report.words import plus_minus
from kd_cli.roles import ROLE_NAMES
from kd_cli.storage.files import read_json

NAMES = {**ROLE_NAMES, "onnx": "ONNX", "int8": "int8", "pt2": ".pt2"}
FORMS = {"onnx": "c1", "int8": "c2", "pt2": "c3"}


def read_cost(run: Run) -> dict[str, Any] | None:
    """The costs in the run's export folder; None where nothing was measured of this run's student."""
    try:
        record = read_json(run.path / "export" / "export.json")
        if record["fingerprint"] != run.summary["student"]["fingerprint"]:
            return None  # it is another run's
        cost: dict[str, Any] = record["cost"]
        return cost if cost["rows"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_latency(run: Run) -> dict[str, Any] | None:
    """What the run itself measured, in the form of an export's costs; None where it has measured nothing."""
    found = run.summary.get("latency")
    if not found or "rows" not in found:
        return None
    place = {key: found[key] for key in ("batch", "threads")}
    rows = {}
    for role, one in found["rows"].items():
        report = run.summary[role]
        errors = report["test"]["errors"] if report["test"] else None
        facts = {key: report[key] for key in ("flops", "parameters")}
        rows[role] = {"latency": [{**place, **one}], "errors": errors, "bytes": None, "peak_memory": None, **facts}
    return {**found, "memory_batch": None, "rows": rows}


def cost_figure(run: Run, cost: dict[str, Any]) -> Figure:
    """Test errors against the median latency at batch 1 with one thread, which no other work's threads delay."""
    found = {NAMES[name]: (row, COLOURS.get(name) or FORMS[name]) for name, row in cost["rows"].items()}
    alone = run.summary.get("student_alone")
    if alone and "student" in found and "student alone" not in found and same_size(run):
        # the same architecture, so the same latency
        row = {**cost["rows"]["student"], "errors": alone["test"]["errors"]}
        found["student alone"] = row, COLOURS["student_alone"]
    series = []
    for name, (row, colour) in found.items():
        if row["errors"] is None:  # a teacher that has not answered for the test examples
            continue
        one = row["latency"][0]
        tip = f"{name}: {row['errors']:,} errors, {one['median_ms']:g} ms (95th percentile {one['p95_ms']:g} ms)"
        series.append(Series(name, [Point(one["median_ms"], row["errors"], None, tip)], colour))
    note = f"Medians of a measurement on a machine of {cost['cores']} cores: {cost['how']}. One seed."
    return latency_chart(series, "errors against latency", note)


def latency_chart(series: Sequence[Series], title: str, note: str) -> Figure:
    """Test errors against milliseconds; the points of a series are models."""
    log = is_logarithmic(sorted({point.x for one in series for point in one.points}))
    chart = line_chart(
        series,
        title=title,
        x_label="milliseconds for one example, one thread" + (" (logarithmic)" if log else ""),
        y_label="test errors",
        log_x=log,
    )
    return Figure("Errors against latency", chart, note, legend([(s.name, s.colour, "block") for s in series]))


def same_size(run: Run) -> bool:
    """Whether the student trained alone has as many parameters as the distilled one, which a method may extend."""
    alone, student = run.summary["student_alone"], run.summary["student"]
    return bool(alone["parameters"] == student["parameters"])


def cost_grid(cost: dict[str, Any]) -> Grid:
    """A row for each model: latencies by batch size and threads, size, memory, FLOPs, parameters."""
    first = next(iter(cost["rows"].values()))["latency"]
    threads = {one["threads"]: f"{one['threads']} thread" + "s" * (one["threads"] > 1) for one in first}
    heads = ["", *(f"ms, {one['batch']} on {threads[one['threads']]}" for one in first)]
    rows = [[NAMES[name], *latencies(row), *sizes(row)] for name, row in cost["rows"].items()]
    heads += ["examples per second", "bytes", "memory, MiB", "MFLOPs", "parameters"]
    kept = [i for i in range(len(heads)) if i == 0 or any(row[i] for row in rows)]  # kd-run measures no memory
    return plain([heads[i] for i in kept], [[row[i] for i in kept] for row in rows])


def latencies(row: dict[str, Any]) -> list[str]:
    """A model's median latencies with their 95th percentiles, in milliseconds."""
    return [f"{one['median_ms']:.3f} ({one['p95_ms']:.3f})" for one in row["latency"]]


def sizes(row: dict[str, Any]) -> list[str]:
    """A model's examples per second, bytes, memory in MiB, MFLOPs and parameters."""
    peak = row["peak_memory"]
    return [
        f"{row['latency'][-1]['per_second']:,.0f}",
        "" if row["bytes"] is None else f"{row['bytes']:,}",
        f"{peak['model'] / 2**20:,.1f}" if peak else "",
        f"{row['flops'] / 1e6:,.2f}",
        f"{row['parameters']:,}",
    ]


def cost_of(run: Run) -> dict[str, Any] | None:
    """Figure and table for a run's page."""
    cost = read_cost(run) or read_latency(run)
    return cost and {"figure": cost_figure(run, cost), "grid": cost_grid(cost), "batch": cost["memory_batch"]}


def not_measured(run: Run) -> str | None:
    """Why the run has no latencies; None where it or its export has some, and for runs that measured none."""
    found = run.summary.get("latency") or {}
    return None if read_cost(run) else found.get("not_measured")


def latency_figure(comparison: Comparison) -> Figure | None:
    """Mean test errors of each setting's student against its latency; None unless several sizes have one."""
    found = [(setting, one) for setting in comparison.settings if (one := student_latency(setting)) is not None]
    if len({(one["flops"], one["parameters"]) for _, one in found}) < 2:
        return None  # one architecture: its latencies differ by chance alone
    points = []
    for setting, one in sorted(found, key=lambda pair: pair[1]["median_ms"]):
        errors = setting.student["errors"]
        tip = f"{setting.label}: {plus_minus(errors)} errors (n = {errors.n}), {one['median_ms']:g} ms"
        points.append(Point(one["median_ms"], errors.mean, errors.std, tip))
    note = (
        "A point for each setting: the mean errors of its students, ± one standard deviation, and the median of the "
        "latencies that its runs have measured, each beside its own teacher. Small differences say nothing."
    )
    series = [Series("student", points, COLOURS["student"])]
    return latency_chart(series, "errors of each setting's student against its latency", note)


def student_latency(setting: Setting) -> dict[str, Any] | None:
    """The size of a setting's student and the median of its runs' latencies; None where no run has one."""
    costs = [cost for run in setting.runs if (cost := read_cost(run) or read_latency(run)) is not None]
    rows = [cost["rows"]["student"] for cost in costs if "student" in cost["rows"]]
    if not rows or "errors" not in setting.student:
        return None
    median = statistics.median(row["latency"][0]["median_ms"] for row in rows)
    return {"median_ms": median, "flops": rows[0]["flops"], "parameters": rows[0]["parameters"]}
