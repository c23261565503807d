"""Soft targets at high temperature: charts drawn from a sweep's runs when it has ended."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from kd_cli.errors import DataError
from kd_cli.experiments.recorded import completed, configuration, logits_on_test, stored
from kd_cli.export.load import load_student
from kd_cli.losses import logit_matching, soft_cross_entropy
from kd_cli.report.figures import Figure
from kd_cli.report.read import Run
from kd_cli.report.render import render
from kd_cli.report.svg.lines import Point, Series, line_chart
from kd_cli.runs.device_data import load_device_data
from kd_cli.statistics import Stat, stat
from kd_cli.storage.files import write_json, write_text
from kd_cli.storage.store import Store


def high_temperature(folder: Path) -> list[Path]:
    """Compare students by soft targets at growing T with the students by logit matching, seed by seed.

    The folder is that of a sweep over T and over `preset=soft_only,logits_only`. Two quantities are drawn against T,
    mean ± std over seeds: the cosine between the two losses' gradients on the logits, at the student alone, which tends
    to 1 (Hinton 2015, section 2.1); and the distance between the two trained students' centred test logits, relative to
    their size. Writes limit.json and limit.html into the folder. Raises DataError when there are no such runs.
    """
    runs = completed(folder)
    matched = {run.seed: run for run in runs if run.choices.get("method") == "logits"}
    soft = [run for run in runs if run.choices.get("method") == "soft_targets" and run.seed in matched]
    if not soft:
        raise DataError(f"{folder} has no runs by soft targets and by logits with a common seed")
    config = configuration(soft[0])
    data = load_device_data(config)
    store = Store(config.store_dir)
    images = data.dataset.test.images[:]

    def outputs(run: Run, role: str) -> Tensor:
        return logits_on_test(stored(store, run.summary[role]["fingerprint"], run))

    with torch.no_grad():
        targets = {seed: centred(load_student(run.path)(images)) for seed, run in matched.items()}
    cosines: dict[float, list[float]] = {}
    distances: dict[float, list[float]] = {}
    for run in soft:
        T = float(run.config["T"])
        alone, teacher = outputs(run, "student_alone"), outputs(run, "teacher")
        cosines.setdefault(T, []).append(gradient_cosine(alone, teacher, T=T))
        with torch.no_grad():
            logits = centred(load_student(run.path)(images))
        target = targets[run.seed]
        distances.setdefault(T, []).append(float((logits - target).norm() / target.norm()))
    stats = {T: (stat(cosines[T]), stat(distances[T])) for T in sorted(cosines)}
    rows = [
        {"T": T, "n": len(cosines[T]), "gradient_cosine": cosines[T], "distance": distances[T]} for T in sorted(cosines)
    ]
    write_json(folder / "limit.json", rows)
    write_text(folder / "limit.html", _page(stats))
    return [folder / "limit.html", folder / "limit.json"]


def gradient_cosine(student: Tensor, teacher: Tensor, *, T: float) -> float:
    """Mean over examples of the cosine between the gradients of soft targets at T and of logit matching: [N,C]."""

    def gradient(loss: Callable[[Tensor], Tensor]) -> Tensor:
        logits = student.double().clone().requires_grad_()
        return torch.autograd.grad(loss(logits), logits)[0]

    soft = gradient(lambda z: soft_cross_entropy(z, teacher.double(), T=T))
    matching = gradient(lambda z: logit_matching(z, teacher.double()))
    return float(torch.nn.functional.cosine_similarity(soft, matching, dim=-1).mean())


def centred(logits: Tensor) -> Tensor:
    """Logits minus each example's mean, which does not change the softmax."""
    return logits - logits.mean(-1, keepdim=True)


def _page(stats: dict[float, tuple[Stat | None, Stat | None]]) -> str:
    names = ("cosine of the gradients on the logits", "distance between the students' test logits, relative")
    notes = (
        "At the student alone, averaged over test examples; 1 is the same direction.",
        "Of the students by soft targets at T and by logit matching with the same seed; 0 is the same function.",
    )
    n = max(s.n for pair in stats.values() for s in pair if s is not None)
    figures = []
    for k, (name, note) in enumerate(zip(names, notes, strict=True)):
        points = [Point(T, s.mean, s.std, f"T = {T:g}: {s.mean:.4f}") for T, pair in stats.items() if (s := pair[k])]
        chart = line_chart(
            [Series("soft targets against logits", points, "c0")],
            title=f"{name} against T",
            x_label="temperature T (logarithmic)",
            y_label=name.split(",")[0],
            log_x=True,
            x_ticks=sorted(stats),
        )
        figures.append(Figure(name[0].upper() + name[1:], chart, f"{note} Mean ± std over seeds, n = {n}."))
    return render("charts", title="Soft targets at high temperature", figures=figures)
