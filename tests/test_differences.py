"""Differences between settings, paired by seed: values by hand, and where they are shown."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import pytest
from made_runs import made_run, only

from kd_cli.report.answers import answer
from kd_cli.report.differences import from_alone, from_soft_targets, tuned_methods, tuned_soft_targets
from kd_cli.report.pages import write_report
from kd_cli.report.tables import sweep_table
from kd_cli.report.words import difference, effect
from kd_cli.statistics import Difference, paired, t_quantile


@pytest.mark.parametrize(
    ("degrees", "table"),
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (9, 2.262), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_quantiles_are_those_of_the_printed_table(degrees: int, table: float) -> None:
    assert round(t_quantile(degrees), 3) == table


def test_quantiles_of_one_and_two_degrees_have_closed_forms() -> None:
    assert t_quantile(1) == pytest.approx(math.tan(0.475 * math.pi), rel=1e-12)
    p = 0.975
    assert t_quantile(2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-12)
    assert t_quantile(3, 0.99) == pytest.approx(5.840909, rel=1e-6)


def test_an_interval_by_hand() -> None:
    found = paired([-20.0, -18.0, -22.0])  # mean -20, standard deviation 2
    assert found is not None
    assert (found.mean, found.n, found.sign) == (-20.0, 3, -1)
    assert found.half == pytest.approx(4.302653 * 2 / math.sqrt(3))
    assert (difference(found), effect(found)) == ("-20.0 ± 5.0", "helps")


@pytest.mark.parametrize(
    ("values", "text", "shows"),
    [
        ([3.0, 5.0, 4.0], "+4.0 ± 2.5", "harms"),
        ([-1.0, 3.0, -5.0], "-1.0 ± 9.9", "cannot be told with n = 3"),
        ([-1.0, -3.0], "-2.0 ± 12.7", "cannot be told with n = 2"),
        ([-30.0], "-30.0", "cannot be told with n = 1"),
        ([-4.0, -4.0, -4.0], "-4.0", "cannot be told with n = 3"),
        ([0.0, 0.0], "0.0", "cannot be told with n = 2"),
    ],
)
def test_a_difference_helps_or_harms_or_cannot_be_told(values: list[float], text: str, shows: str) -> None:
    found = paired(values)
    assert found is not None
    assert (difference(found), effect(found)) == (text, shows)


def test_there_is_no_difference_without_pairs() -> None:
    assert paired([]) is None
    assert difference(None) == ""


def runs_by_method(folder: Path) -> None:
    """Soft targets at two temperatures, and DKD, by three seeds; T=4 is the better by validation and not by test."""
    by = {("soft_targets", 1.0): (40, 42, 44), ("soft_targets", 4.0): (41, 43, 45), ("dkd", 4.0): (30, 33, 36)}
    for (method, T), errors in by.items():
        for seed, student in enumerate(errors):
            made_run(
                folder / f"{method}-{T}-{seed}",
                choices={"method": method},
                T=T,
                seed=seed,
                alone=50 + 2 * seed,
                student=student,
                val=0.9 + T / 100,
                **{"method._target_": method},
            )


def test_the_reference_is_the_best_of_soft_targets_by_validation(tmp_path: Path) -> None:
    runs_by_method(tmp_path)
    comparison = only(tmp_path)
    by = {(s.runs[0].choices["method"], s.values["T"]): s for s in comparison.settings}
    dkd, tuned = by["dkd", 4.0], by["soft_targets", 4.0]
    assert tuned_soft_targets(dkd, comparison) is tuned
    assert from_soft_targets(tuned, comparison) is None
    # 30 - 41, 33 - 43, 36 - 45: -11, -10, -9
    assert from_soft_targets(dkd, comparison) == Difference(-10.0, pytest.approx(4.302653 / math.sqrt(3)), 3)
    # 30 - 50, 33 - 52, 36 - 54: -20, -19, -18
    assert from_alone(dkd) == Difference(-19.0, pytest.approx(4.302653 / math.sqrt(3)), 3)
    assert from_alone(tuned) == Difference(-9.0, None, 3)  # each seed by nine


def test_soft_targets_alone_are_their_own_reference(tmp_path: Path) -> None:
    for i, T in enumerate((1.0, 4.0)):
        made_run(tmp_path / str(i), T=T)
    comparison = only(tmp_path)
    assert [from_soft_targets(setting, comparison) for setting in comparison.settings] == [None, None]


def test_soft_targets_of_another_student_are_no_reference(tmp_path: Path) -> None:
    for student in ("tinymlp", "cnn"):
        for method in ("soft_targets", "dkd"):
            errors = {"tinymlp": 40, "cnn": 20}[student] - (method == "dkd")
            config = {"method._target_": method, "student._target_": student}
            choices = {"method": method, "student": student}
            made_run(tmp_path / f"{student}-{method}", choices=choices, student=errors, **config)
    comparison = only(tmp_path)
    found = [from_soft_targets(setting, comparison) for setting in comparison.settings]
    assert [value for value in found if value] == [Difference(-1.0, None, 1)] * 2


def test_only_common_seeds_are_paired_and_a_seed_counts_once(tmp_path: Path) -> None:
    for i, (seed, teacher_seed, student) in enumerate([(0, 0, 40), (0, 1, 44), (1, 0, 45), (2, 0, None)]):
        made_run(tmp_path / str(i), alone=50, student=student, seed=seed, **{"teacher_training.seed": teacher_seed})
    (setting,) = only(tmp_path).settings
    assert from_alone(setting) == Difference(-6.5, pytest.approx(12.706205 * 1.5 / 1), 2)  # (-10 - 6) / 2 and -5


def test_the_table_the_sentences_the_page_and_the_csv_have_the_differences(tmp_path: Path) -> None:
    runs_by_method(tmp_path / "runs")
    written = write_report([tmp_path / "runs"], tmp_path)
    assert re.search(r"vs alone +vs soft targets", written.table)
    assert "-19.0 ± 2.5 helps  -10.0 ± 2.5 helps" in written.table
    assert "-9.0 ?" in written.table
    assert "paired by seed, ± its 95 % interval; ? cannot be told with n = 3\n" in written.table
    assert max(map(len, written.table.splitlines())) <= 110
    assert max(len(line) for line in written.table.splitlines() if " ± " in line and "  " in line) <= 100
    assert "-19.0 ± 2.5, helps" in written.html.read_text()
    assert "-9.0, cannot be told with n = 3" in written.html.read_text()
    rows = list(csv.DictReader(written.csv.read_text().splitlines()))
    (row,) = (row for row in rows if (row["method"], row["seed"]) == ("dkd", "1"))
    assert (row["vs_alone"], row["vs_alone_n"], row["vs_alone_shows"]) == ("-19.0", "3", "helps")
    assert float(row["vs_soft_targets_ci95"]) == pytest.approx(4.302653 / math.sqrt(3))
    (row,) = (row for row in rows if (row["method"], row["T"], row["seed"]) == ("soft_targets", "4", "1"))
    assert (row["vs_alone_ci95"], row["vs_soft_targets"], row["vs_soft_targets_shows"]) == ("", "", "")


def test_the_answer_says_what_the_best_setting_is_worth(tmp_path: Path) -> None:
    for seed, student in enumerate((30, 33, 36)):
        made_run(tmp_path / str(seed), seed=seed, alone=50 + 2 * seed, student=student)
    assert "paired by seed: -19.0 ± 2.5 to the student alone (helps)." in answer(only(tmp_path))[1]


# ---------------------------------------------------------------- methods, each at its best setting


def of(method: str) -> dict[str, str]:
    return {"method._target_": method, "student._target_": "mlp"}


def tried(folder: Path) -> None:
    """Two methods at two temperatures, three seeds: dkd is best at T = 4, soft targets at T = 1."""
    number = 0
    found = {
        ("soft_targets", 1.0): (0.92, (30, 31, 32)),
        ("soft_targets", 4.0): (0.90, (10, 10, 10)),  # better on the test data, which must not count
        ("dkd", 1.0): (0.91, (40, 40, 40)),
        ("dkd", 4.0): (0.93, (25, 27, 26)),
    }
    for (method, T), (val, errors) in found.items():
        for seed, student in enumerate(errors):
            number += 1
            made_run(
                folder / f"{number:02}",
                student=student,
                val=val,
                choices={"method": method},
                T=T,
                seed=seed,
                **of(method),
            )


def test_each_method_is_compared_at_its_best_setting_by_validation(tmp_path: Path) -> None:
    tried(tmp_path)
    dkd, soft = tuned_methods(only(tmp_path))
    assert (dkd.method, dkd.setting.values["T"], dkd.tried, dkd.is_best) == ("dkd", 4.0, 2, True)
    assert (soft.method, soft.setting.values["T"], soft.tried, soft.is_best) == ("soft_targets", 1.0, 2, False)
    assert dkd.from_best is None
    assert soft.from_best == paired([5.0, 4.0, 6.0])  # 30 - 25, 31 - 27, 32 - 26
    assert from_soft_targets(dkd.setting, only(tmp_path)) == paired([-5.0, -4.0, -6.0])


def test_methods_at_their_best_stand_in_the_table_and_on_the_page(tmp_path: Path) -> None:
    tried(tmp_path)
    text = sweep_table([only(tmp_path)])
    rows = text[text.index("method at its best") :].splitlines()
    assert re.split(r"\s{2,}", rows[1])[:3] == ["T=4, method=dkd *", "93.00 ± 0.00%", "26.0 ± 1.0"]
    assert "-5.0 ± 2.5 helps" in rows[1]
    assert "+5.0 ± 2.5 harms" in rows[2]
    assert "the highest mean validation accuracy of 2 settings of each method" in text
    page = write_report([tmp_path], tmp_path / "out").html.read_text()
    assert "<h2>Methods</h2>" in page


def test_one_setting_for_each_method_makes_no_table_of_methods(tmp_path: Path) -> None:
    for i, method in enumerate(("soft_targets", "dkd")):
        made_run(tmp_path / str(i), choices={"method": method}, **of(method))
    assert tuned_methods(only(tmp_path)) == []
    assert "method at its best" not in sweep_table([only(tmp_path)])


def test_other_models_are_compared_among_themselves(tmp_path: Path) -> None:
    tried(tmp_path / "one")
    other = {**of("dkd"), "student._target_": "cnn"}
    for i, T in enumerate((1.0, 4.0)):
        choices = {"method": "dkd", "student": "cnn"}
        made_run(tmp_path / "two" / str(i), T=T, choices=choices, student=5, val=0.90 + T / 100, **other)
    found = tuned_methods(only(tmp_path))
    assert {(one.method, one.setting.values["student"], one.setting.values["T"], one.is_best) for one in found} == {
        ("dkd", "tinymlp", 4.0, True),
        ("soft_targets", "tinymlp", 1.0, False),
        ("dkd", "cnn", 4.0, True),
    }
