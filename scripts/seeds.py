"""Sections of docs/RESULTS.md on the paper's experiments beyond MNIST, from what the presets' analyses have written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from findings import Finding, alone, count, figure, said
from kd_cli.experiments.specialist_pages import agreement_with_families, cover_rows, families_figure
from kd_cli.report.read import Run
from kd_cli.report.svg.lines import Point, Series
from kd_cli.statistics import stat


def written(runs: list[Run], name: str) -> Any:
    """What an analysis has written into the folder of its sweep; None before the sweep has ended."""
    file: Path = runs[0].path.parent / name
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


# ---------------------------------------------------------------- speech


def speech(runs: list[Run]) -> Finding:
    found = written(runs, "speech.json")
    if found is None:
        return Finding([])
    networks, chosen = found["networks"], found["chosen_T"]
    table = [["", "paper: frames, words wrong", "ours: frames right, %", "recordings wrong, %", "n"]]
    rows = {
        f"one network (the {len(networks['members'])} that teach)": ("58.9 %, 10.9 %", networks["members"]),
        "the student alone": ("", networks["alone"]),
        "all of them together": ("61.1 %, 10.7 %", networks["ensemble"]),
    }
    for row in found["distilled"]:
        mark = ", chosen" if row["T"] == chosen else ""
        rows[f"distilled, T = {row['T']:g}{mark}"] = ("60.8 %, 10.7 %" if mark else "", row["results"])
    for name, (paper, results) in rows.items():
        frames, wrong = (stat(one[key] for one in results) for key in ("frame_accuracy", "recording_errors"))
        table.append([name, paper, said(frames, ".2f"), said(wrong, ".2f"), count(frames)])
    kept = found["gain_kept"]
    share = kept["frame_accuracy"]
    sentence = (
        f"{found['frames']:,} frames of {found['recordings']} recordings test. Of the gain over one network the "
        f"paper's distilled model keeps more than 80 %; ours at T = {chosen:g}: "
        f"{'there was no gain' if share is None else f'{100 * share:.0f} % of the gain in frames'}. Recordings are "
        "hardly ever wrong, and tell nothing apart."
    )
    points = []
    for row in found["distilled"]:
        frames = stat(one["frame_accuracy"] for one in row["results"])
        assert frames is not None
        points.append(Point(row["T"], frames.mean, frames.std))
    series = [Series("distilled", points, "c0")]
    for key, name, colour in (("members", "one network", "alone"), ("ensemble", "the ensemble", "teacher")):
        level = stat(one["frame_accuracy"] for one in networks[key])
        assert level is not None
        series.append(Series(name, [Point(p.x, level.mean, level.std) for p in points], colour, "level"))
    chart = figure(
        series,
        title="frame accuracy against T",
        x_label="temperature T (logarithmic)",
        y_label="frames right, %",
        x_ticks=[p.x for p in points],
    )
    return Finding(table, sentence, (("speech", chart),))


def speech_regulariser(runs: list[Run]) -> Finding:
    found = written(runs, "speech_regulariser.json")
    if found is None:
        return Finding([])
    paper = {
        "baseline, all frames": "63.4 / 58.9",
        "labels, best epoch by validation": "67.3 / 44.5",
        "soft targets, last epoch": "65.4 / 57.0",
    }
    table = [["frames right, %", "paper: train / test", "ours: train", "test", "recordings wrong, %", "n"]]
    for row in found["rows"]:
        each = {key: stat(one[key] for one in row["results"]) for key in ("train", "test", "recording_errors")}
        numbers = [said(value, ".2f") for value in each.values()]
        table.append([row["name"], paper.get(row["name"], ""), *numbers, count(each["test"])])
    return Finding(
        table,
        f"The baseline had {found['frames']:,} frames, the others {found['trained']:,} of them. Accuracy on training "
        "frames is that while the epoch's steps were taken.",
    )


# ---------------------------------------------------------------- specialists


def percent(values: list[float | None]) -> str:
    return said(stat(None if value is None else 100 * value for value in values), ".2f")


def specialists(runs: list[Run]) -> Finding:
    found = written(runs, "specialists.json")
    if found is None:
        return Finding([])
    each = found["runs"]
    n = str(len(each))

    def test(key: str) -> str:
        return percent([run["test"][key] for run in each])

    table = [["test accuracy, %", "paper, on JFT", "ours", "n"]]
    table += [
        ["the generalist", "25.0", test("generalist"), n],
        ["with specialists", "26.1", test("with_specialists"), n],
        ["the generalist, within a specialist's classes", "43.1", test("conditional_generalist"), n],
        ["with specialists, within a specialist's classes", "45.9", test("conditional_with_specialists"), n],
        ["student alone", "", percent([run["student_alone"] for run in each]), n],
        ["student of the generalist", "", percent([run["student_of_generalist"] for run in each]), n],
        ["student of q", "", percent([run.get("student_of_q") for run in each]), n],
    ]
    gain = stat(run["test"]["with_specialists"] / run["test"]["generalist"] - 1 for run in each)
    assert gain is not None
    sentences = [
        f"Specialists change the accuracy by {100 * gain.mean:+.1f} % of itself (the paper: +4.4 %).",
        "By the number of specialists that have the right class: "
        + "; ".join(
            f"{k}: {more.mean:+.1f} right answers of {examples // len(each):,} ({relative.mean:+.1f} %)"
            for k, examples, more, relative in cover_rows(found)
        )
        + ".",
    ]
    if found["families"] is not None:
        sentences.append(f"Clusters and families of classes: {agreement_with_families(found)}.")
        chart = alone(families_figure(found).chart)
        return Finding(table, " ".join(sentences), ((f"specialists_{found['dataset']}", chart),))
    return Finding(table, " ".join(sentences))


def class_clusters(runs: list[Run]) -> Finding:
    found = written(runs, "class_clusters.json")
    if found is None:
        return Finding([])
    keys = ("purity", "purity_by_chance", "mutual_information", "adjusted_rand")
    table = [
        ["predictions clustered at", "purity", "purity by chance", "mutual information", "adjusted Rand index", "n"]
    ]
    for one in found:
        each = [stat(run[key] for run in one["runs"]) for key in keys]
        table.append([f"T = {one['cluster_T']:g}", *(said(value, ".2f") for value in each), count(each[0])])
    chart = alone(families_figure(found[-1]).chart)
    return Finding(table, "The picture is of the first seed at the highest T.", (("omniglot_clusters", chart),))


# ---------------------------------------------------------------- privileged information

CASES = {  # the paper's accuracies of the teacher, the student alone and the distilled student, in percent
    "clean_labels": ("clean labels", "96 / 88 / 95"),
    "clean_inputs": ("clean inputs", "90 / 68 / 70"),
    "relevant_features": ("relevant features", "98 / 89 / 97"),
    "features_of_example": ("features of each example", "96 / 55 / 56"),
}
ROLES = ("teacher", "student_alone", "student")


def privileged_synthetic(runs: list[Run]) -> Finding:
    table = [["% right", "paper: privileged / regular / distilled", "privileged", "regular", "distilled", "n"]]
    for case, (name, paper) in CASES.items():
        some = [run for run in runs if run.config["dataset.case"] == case]
        if some:
            found = [percent([run.test(role, "accuracy") for run in some]) for role in ROLES]
            table.append([name, paper, *found, str(len(some))])
    return Finding(table, "10,000 made examples test. Each seed has data of its own.")


def privileged_mnist(runs: list[Run]) -> Finding:
    settings: dict[tuple[float, float], list[Run]] = {}
    for run in runs:
        settings.setdefault((float(run.config["T"]), float(run.config["method.imitation"])), []).append(run)

    def validated(some: list[Run]) -> float:
        return sum(run.validation("val_accuracy") or 0.0 for run in some) / len(some)

    chosen = max(settings, key=lambda key: validated(settings[key]))
    alone = {run.seed: run for run in runs}.values()
    table = [["% right", "ours", "n"]]
    table.append(["teacher, 28x28 pixels", percent([runs[0].test("teacher", "accuracy")]), "1"])
    table.append(
        ["student alone, 7x7", percent([run.test("student_alone", "accuracy") for run in alone]), str(len(alone))]
    )
    for key in dict.fromkeys([chosen, *sorted(settings)]):
        T, share = key
        mark = ", chosen" if key == chosen else ""
        if mark or share == chosen[1] or chosen[0] == T:
            some = settings[key]
            name = f"distilled, T = {T:g}, imitation {share:g}{mark}"
            table.append([name, percent([run.test("student", "accuracy") for run in some]), str(len(some))])
    return Finding(
        table,
        f"{len(settings)} settings were trained, of which 1,000 validation images choose; the table has those that "
        "share T or the imitation with the chosen one. The paper has a figure without numbers.",
        ((f"privileged_mnist_{runs[0].summary['dataset']['train']}", imitation_chart(settings, alone)),),
    )


def imitation_chart(settings: Mapping[tuple[float, float], list[Run]], alone: Iterable[Run]) -> str:
    """Accuracy on the test images against the imitation, a line for each T, between student alone and teacher."""

    def point(x: float, role: str, some: Iterable[Run]) -> Point:
        value = stat(100 * (run.test(role, "accuracy") or 0.0) for run in some)
        assert value is not None
        return Point(x, value.mean, value.std)

    shares = sorted({share for _, share in settings})
    series = [
        Series(f"T = {T:g}", [point(share, "student", settings[T, share]) for share in shares], f"c{k}")
        for k, T in enumerate(sorted({T for T, _ in settings}))
    ]
    own = list(alone)
    for role, name, colour in (("teacher", "teacher, 28x28", "teacher"), ("student_alone", "student alone", "alone")):
        series.append(Series(name, [point(share, role, own) for share in shares], colour, "level"))
    return figure(
        series,
        title="accuracy against imitation",
        x_label="imitation",
        y_label="test digits right, %",
        x_ticks=shares,
        log_x=False,
    )
