"""Where FLOPs mislead: networks of the field in order of their FLOPs and of their latency on this machine."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from kd_cli.cpus import usable
from kd_cli.errors import ConfigError
from kd_cli.export.latency import Call, side_by_side, surroundings, threads
from kd_cli.models.torchvision import torchvision_model
from kd_cli.report.figures import Figure
from kd_cli.report.render import render
from kd_cli.report.svg.lines import Point, Series, line_chart
from kd_cli.runs.models import forward_flops
from kd_cli.storage.files import write_json, write_text

NAME = "flops_against_latency"
CLASSES = 1000  # of ImageNet, which these networks are for


@dataclass(frozen=True)
class Row:
    """A network's cost: FLOPs of an image, latency of one image in milliseconds, its ranks by both from 1."""

    model: str
    flops: int
    parameters: int
    median_ms: float
    p95_ms: float
    flops_rank: int
    latency_rank: int

    @property
    def gflops_per_second(self) -> float:
        return self.flops / self.median_ms / 1e6


def flops_against_latency(
    folder: Path, *, models: Sequence[str], size: int = 224, seconds: float = 2.0, use_threads: int = 1
) -> tuple[str, list[Path]]:
    """Measure torchvision's models with random weights, one image at a time: a table, and the files that it wrote.

    Images are [3, size, size]; each model gets about `seconds`, in turns. Raises ConfigError for values that measure
    nothing and for models that torchvision does not have.
    """
    if len(models) < 2 or len(set(models)) < len(models):
        raise ConfigError("instead.models needs two models or more, each once")
    if size < 1 or seconds <= 0 or not 1 <= use_threads <= usable():
        raise ConfigError(
            f"instead.size is {size}, instead.seconds {seconds:g} and instead.use_threads {use_threads}; they must be "
            f"above 0, and the threads at most the {usable()} cores of this process"
        )
    costs: dict[str, tuple[int, int]] = {}
    calls: dict[str, Call] = {}
    for name in models:
        network = torchvision_model(input_shape=(3, size, size), num_classes=CLASSES, name=name).eval()
        network.requires_grad_(False)
        costs[name] = forward_flops(network, torch.zeros(3, size, size)), sum(p.numel() for p in network.parameters())
        image = torch.rand(1, 3, size, size)
        calls[name] = functools.partial(network, image)
    where = surroundings() | {"threads": use_threads, "size": size, "torch": torch.__version__}
    with threads(use_threads), torch.inference_mode():
        measured = side_by_side(calls, batch=1, seconds=seconds)
    rows = ranked(costs, measured)
    said = sentence(rows)
    load = "" if where["load"] is None else f", load {where['load']:.1f} before"
    facts = f"one image of 3x{size}x{size} at a time, {use_threads} of {where['cores']} cores{load}"
    write_json(folder / f"{NAME}.json", {**where, "rows": [vars(row) for row in rows]})
    write_text(folder / f"{NAME}.csv", as_csv(rows))
    write_text(folder / f"{NAME}.html", page(rows, f"{said} {facts[0].upper()}{facts[1:]}; random weights."))
    return f"{as_text(rows)}\n\n{said}\n{facts}", [folder / f"{NAME}.{ending}" for ending in ("html", "csv", "json")]


def ranked(costs: Mapping[str, tuple[int, int]], measured: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """The rows in order of their latency."""
    by_flops = sorted(costs, key=lambda name: costs[name][0])
    by_latency = sorted(costs, key=lambda name: measured[name]["median_ms"])
    return [
        Row(
            name,
            *costs[name],
            measured[name]["median_ms"],
            measured[name]["p95_ms"],
            by_flops.index(name) + 1,
            place,
        )
        for place, name in enumerate(by_latency, 1)
    ]


def sentence(rows: Sequence[Row]) -> str:
    """How often FLOPs put two networks in the wrong order, the worst pair, and how far both quantities range."""
    wrong = [
        (slow, fast)
        for fast, slow in combinations(rows, 2)  # in order of latency
        if slow.flops < fast.flops
    ]
    low, high = min(rows, key=lambda row: row.flops), max(rows, key=lambda row: row.flops)
    grown = (
        f"From {low.model} to {high.model} FLOPs grow {high.flops / low.flops:.1f} times, latency "
        f"{high.median_ms / low.median_ms:.1f} times."
    )
    pairs = len(rows) * (len(rows) - 1) // 2
    if not wrong:
        return f"By FLOPs and by latency the order is the same in all {pairs} pairs. {grown}"
    slow, fast = max(wrong, key=lambda pair: pair[1].flops / pair[0].flops * pair[0].median_ms / pair[1].median_ms)
    return (
        f"FLOPs and latency order {len(wrong)} of {pairs} pairs differently: {slow.model} has "
        f"{slow.flops / fast.flops:.2f} of the FLOPs of {fast.model} and takes "
        f"{slow.median_ms / fast.median_ms:.2f} times as long. {grown}"
    )


HEADS = ("model", "MFLOPs", "parameters", "ms", "95th percentile", "GFLOPs per second", "by FLOPs", "by latency")


def cells(row: Row) -> list[str]:
    numbers = [f"{row.flops / 1e6:,.0f}", f"{row.parameters:,}", f"{row.median_ms:.2f}", f"{row.p95_ms:.2f}"]
    return [row.model, *numbers, f"{row.gflops_per_second:.1f}", str(row.flops_rank), str(row.latency_rank)]


def as_text(rows: Sequence[Row]) -> str:
    """The rows as a table for the terminal."""
    lines = [list(HEADS), *map(cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADS))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def as_csv(rows: Sequence[Row]) -> str:
    """The rows as CSV, numbers as they were measured."""
    text = io.StringIO()
    names = list(vars(rows[0]))
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([names, *([vars(row)[name] for name in names] for row in rows)])
    return text.getvalue()


def page(rows: Sequence[Row], note: str) -> str:
    """A page with a picture: latency against FLOPs, a mark for each network."""
    series = [
        Series(row.model, [Point(row.flops / 1e6, row.median_ms, None, tip(row))], f"c{i % 8}")
        for i, row in enumerate(rows)
    ]
    chart: Any = line_chart(
        series,
        title="latency against FLOPs",
        x_label="MFLOPs of one image (logarithmic)",
        y_label="milliseconds for one image",
        log_x=True,
    )
    figure = Figure("Latency against FLOPs", chart, note)
    return render("charts", title="FLOPs against latency", figures=[figure])


def tip(row: Row) -> str:
    return (
        f"{row.model}: {row.flops / 1e6:,.0f} MFLOPs, {row.median_ms:.2f} ms; number {row.flops_rank} by FLOPs, "
        f"{row.latency_rank} by latency"
    )
