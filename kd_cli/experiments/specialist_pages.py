"""The page of the specialists experiment: accuracies, gain by cover, clusters against families of classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from kd_cli.report.figures import Figure
from kd_cli.report.render import render
from kd_cli.report.svg.heat import HeatCell, heat_map
from kd_cli.report.svg.rows import Row, row_chart
from kd_cli.report.words import plus_minus
from kd_cli.statistics import Stat, stat

NAMES = {
    "generalist": "the generalist",
    "with_specialists": "with specialists",
    "student_alone": "student alone",
    "student_of_generalist": "student of the generalist",
    "student_of_q": "student of q",
}


def page(table: Mapping[str, Any]) -> str:
    """The page of what `specialists` has found."""
    figures = [accuracies(table), gains(table)]
    if table["families"] is not None:
        figures.append(families_figure(table))
    return render("charts", title=f"Specialists on {table['dataset']}", figures=figures)


def accuracy_of(run: Mapping[str, Any], key: str) -> float | None:
    """A test accuracy of a run, in percent: of the generalist and of q, or of a student."""
    value = run["test"].get(key, run.get(key))
    return None if value is None else 100 * float(value)


def accuracies(table: Mapping[str, Any]) -> Figure:
    """Test accuracies, mean and std over runs."""
    rows = []
    for key, name in NAMES.items():
        found = stat(accuracy_of(run, key) for run in table["runs"])
        if found is not None:
            colour = "teacher" if key in ("generalist", "with_specialists") else "c0"
            said = f"{name}: {plus_minus(found, '.2f')} %, n = {found.n}"
            rows.append(Row(name, found.mean, found.std, said, colour))
    chart = row_chart(rows, title="test accuracy", x_label="test accuracy, %")
    own = f"the {table['size']} classes nearest to a centre" if table["size"] else "a cluster's classes"
    note = (
        f"Mean ± std over {len(table['runs'])} seeds. {table['count']} specialists, each of {own}; q is what "
        "generalist and active specialists say together."
    )
    return Figure("Test accuracy", chart, note)


def cover_rows(table: Mapping[str, Any]) -> list[tuple[int, int, Stat, Stat]]:
    """For each number of specialists that have the right class: it, examples of all runs, gain, relative gain.

    The gain is what specialists add to the number of right answers of a run; the relative one is in percent.
    """
    numbers = sorted({row["specialists"] for run in table["runs"] for row in run["test"]["by_cover"]})
    found = []
    for k in numbers:
        rows = [row for run in table["runs"] for row in run["test"]["by_cover"] if row["specialists"] == k]
        gain = stat(row["with_right"] - row["generalist_right"] for row in rows)
        shares = [100 * (r["with_right"] / r["generalist_right"] - 1) for r in rows if r["generalist_right"]]
        relative = stat(shares or [0.0])
        assert gain is not None
        assert relative is not None
        found.append((k, sum(row["examples"] for row in rows), gain, relative))
    return found


def gains(table: Mapping[str, Any]) -> Figure:
    """The relative change of accuracy by the number of specialists that have the right class (the paper's table 4)."""
    rows = [
        Row(
            f"{k} of the specialists",
            relative.mean,
            relative.std,
            f"{k}: {examples} test examples of all runs, {plus_minus(gain, '.1f')} more right answers a run",
        )
        for k, examples, gain, relative in cover_rows(table)
    ]
    chart = row_chart(rows, title="gain by cover", x_label="relative change of accuracy, %")
    return Figure("Gain by the number of specialists that have the right class", chart, "Mean ± std over seeds.")


def family_names(table: Mapping[str, Any]) -> list[str]:
    """The names of the families of classes, by their numbers."""
    named = zip(table["families"], table["classes"], strict=True)
    return [name for _, name in sorted({(family, name.rpartition("-")[0]) for family, name in named})]


def families_figure(table: Mapping[str, Any], where: str = "") -> Figure:
    """How many classes of each family the first run's clusters have; `where` is added to the heading."""
    run, names = table["runs"][0], family_names(table)
    cells = {}
    for m, own in enumerate(run["groups"]):
        counts = Counter(table["families"][c] for c in own)
        for f, name in enumerate(names):
            title = f"cluster {m + 1}: {counts[f]} of its {len(own)} classes are of {name}"
            cells[f, m] = HeatCell(counts[f] / len(own), str(counts[f]), title)
    chart = heat_map(
        cells,
        columns=names,
        rows=[f"cluster {m + 1}" for m in range(len(run["groups"]))],
        title="classes of the clusters by family",
        x_label="family of the class, by its name",
        y_label="",
    )
    note = (
        f"Of the first seed; the colour is the share of a cluster's classes. Over {len(table['runs'])} seeds: "
        f"{agreement_with_families(table)}."
    )
    return Figure(f"Do the clusters find the families? {where}".strip(), chart, note)


def agreement_with_families(table: Mapping[str, Any]) -> str:
    """How well the clusters of all runs agree with the families, in words."""
    words = {
        "purity": "purity",
        "purity_by_chance": "of random groups",
        "mutual_information": "normalised mutual information",
        "adjusted_rand": "adjusted Rand index",
    }
    found = {key: stat(one.get(key) for one in table["runs"]) for key in words}
    return ", ".join(f"{words[key]} {plus_minus(some, '.2f')}" for key, some in found.items() if some is not None)
