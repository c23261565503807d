"""Write the table and the picture of docs/METHODS.md from the sweeps of a comparison of methods.

    python scripts/methods_page.py NAME FOLDER...

Prints a table of each method at its best setting by validation, with its differences in test errors to the student
alone and to tuned soft targets, paired by seed, and writes docs/figures/NAME.svg. The folders are those of the commands
in conf/experiment/NAME.yaml.
"""

from __future__ import annotations

import sys
from pathlib import Path

from findings import alone, said
from kd_cli.report.compare import FIRST, Comparison, baselines, compare
from kd_cli.report.differences import Tuned, from_alone, from_soft_targets, tuned_methods
from kd_cli.report.read import collect
from kd_cli.report.svg.rows import Row, row_chart
from kd_cli.report.words import show
from kd_cli.statistics import Difference

FIGURES = Path(__file__).resolve().parents[1] / "docs" / "figures"
HEADS = (
    "method",
    "at its best",
    "validation",
    "errors",
    "against the student alone",
    "against tuned soft targets",
    "n",
)


def main(name: str, folders: list[Path]) -> None:
    comparison: Comparison = compare(collect(folders)[0])[0]
    tuned = sorted(tuned_methods(comparison), key=lambda one: one.setting.student["errors"].mean)
    print("| " + " | ".join(HEADS) + " |\n|" + "---|" * len(HEADS))
    for one in tuned:
        student = one.setting.student
        cells = [f"`{one.method}`", keys_of(one), said(student["val_accuracy"], ".2%"), said(student["errors"])]
        cells += [verdict(from_alone(one.setting)), verdict(from_soft_targets(one.setting, comparison))]
        print("| " + " | ".join([*cells, str(one.setting.n)]) + " |")
    for role in ("student_alone", "teacher"):
        for _, stats in baselines(comparison, role):
            print(f"| {role.replace('_', ' ')} | | | {said(stats['errors'])} | | | {stats['errors'].n} |")
    rows = [
        Row(one.method, one.setting.student["errors"].mean, one.setting.student["errors"].std, chosen=one.is_best)
        for one in tuned
    ]
    level = tuned[0].setting.student_alone["errors"]
    chart = row_chart(
        rows,
        title="Test errors of each method at its best setting by validation",
        x_label="test errors, mean and standard deviation; the line is the student alone",
        width=1000,
        levels=[Row("student alone", level.mean, level.std, colour="c1")],
    )
    (FIGURES / f"{name}.svg").write_text(alone(chart))


def keys_of(one: Tuned) -> str:
    """The keys of a method's best setting that are swept over, without the method itself and what it has not."""
    values = {key: value for key, value in one.setting.values.items() if key not in FIRST[3:] and value is not None}
    return ", ".join(f"{key}={show(value)}" for key, value in values.items())


def verdict(found: Difference | None) -> str:
    """A difference with its interval, and what it says."""
    if found is None:
        return ""
    word = {-1: "helps", 0: "cannot be told", 1: "harms"}[found.sign]
    return f"{found.mean:+.1f}" + (f" ± {found.half:.1f}" if found.half is not None else "") + f", {word}"


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], [Path(argument) for argument in sys.argv[2:]])
