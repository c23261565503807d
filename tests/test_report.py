"""Run directories to settings, means, tables and files: known values on made-up summaries, and real runs."""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from made_runs import as_before, made_run, only

from kd_cli.commands.kd_report import main
from kd_cli.errors import DataError
from kd_cli.report.answers import answer
from kd_cli.report.compare import baselines, compare, distinguishing, swept_keys
from kd_cli.report.pages import write_report, write_run_page
from kd_cli.report.read import collect, read_run
from kd_cli.report.run_page import run_page
from kd_cli.report.tables import align, run_table, sweep_table
from kd_cli.report.words import percent, plus_minus, verdict
from kd_cli.statistics import mean_std, stat

OLD_RUN = Path(__file__).with_name(
    "old_run"
)  # of a kd-run that wrote no configuration into run.json; without weights, log and page


@pytest.fixture(scope="session")
def real_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two temperatures and two seeds, by the command itself."""
    folder = tmp_path_factory.mktemp("real")
    words = "student=tinymlp teacher=tinymlp training.epochs=2 teacher_training.epochs=2 device=cpu T=1,4 seed=0,1"
    env = {**os.environ, "KD_STORE": str(folder / "store"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kd_cli", "-m", *words.split(), "hydra.sweep.dir=sweep"]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "sweep"


# ---------------------------------------------------------------- statistics


def test_values_that_are_missing_are_left_out_of_a_mean() -> None:
    found = stat([3.0, None, 5.0, 10.0])
    assert found == mean_std([3.0, 5.0, 10.0])
    assert found.std == pytest.approx(3.605551275)  # sqrt((9 + 1 + 16) / 2)


def test_one_value_has_no_std_and_none_has_no_mean() -> None:
    one = stat([4.0, None])
    assert one is not None
    assert (one.mean, one.std, one.n) == (4.0, None, 1)
    assert plus_minus(one) == "4"
    assert stat([None]) is None


@pytest.mark.parametrize(("value", "word"), [(-0.001, "0%"), (-0.1, "-10%"), (0.0, "0%"), (1.004, "100%")])
def test_a_zero_has_no_sign(value: float, word: str) -> None:
    assert percent(value) == word
    assert plus_minus(stat([value]), ".0%") == word


def test_a_run_that_closed_next_to_nothing_closed_0_percent(tmp_path: Path) -> None:
    summary = json.loads((made_run(tmp_path / "0") / "summary.json").read_text())
    assert verdict(summary | {"gap_closed": -0.002}).endswith(" distilled, 0% of the gap to the teacher closed")


@pytest.mark.parametrize(
    ("student", "auto", "advice"),
    [
        (49, {}, ""),
        (50, {}, ""),
        (51, {}, "advice: distillation made this student worse. Try T=auto, more epochs or a smaller alpha, "),
        (51, {"auto": {"keys": ["T"]}}, "advice: distillation made this student worse. Try more epochs or a smaller "),
    ],
)
def test_a_run_whose_student_got_worse_ends_with_one_line_of_advice(
    student: int, auto: dict[str, Any], advice: str, tmp_path: Path
) -> None:
    summary = json.loads((made_run(tmp_path / "0", alone=50, student=student) / "summary.json").read_text()) | auto
    summary["student_alone"]["val"], summary["student"]["val"] = {"accuracy": 0.9}, {"accuracy": 0.85}
    last = run_table(summary).splitlines()[-1]
    assert last.startswith("advice: ") == bool(advice)
    assert last.startswith(advice)
    if advice:
        assert last.endswith("choose by the validation accuracy: 90.0% alone, 85.0% distilled")


def test_errors_added_to_a_gap_of_one_are_no_share_of_it(tmp_path: Path) -> None:
    summary = json.loads((made_run(tmp_path / "0", teacher=49, alone=50, student=64) / "summary.json").read_text())
    assert verdict(summary).endswith(
        "50 errors alone, 64 distilled: 14 more than alone, where the teacher makes 1 fewer"
    )


def test_a_run_without_a_teacher_gives_no_advice(tmp_path: Path) -> None:
    summary = json.loads((made_run(tmp_path / "0", teacher=None, student=60) / "summary.json").read_text())
    assert "advice" not in run_table(summary)


def test_a_sweep_that_made_students_worse_says_what_to_try(tmp_path: Path) -> None:
    for seed in (0, 1):
        made_run(tmp_path / str(seed), seed=seed, alone=50, student=60)
    assert "; on average no better than alone. Try T=auto, more epochs" in answer(only(tmp_path))[1]


def test_a_setting_averages_over_seeds(tmp_path: Path) -> None:
    for seed, (alone, student) in enumerate([(50, 30), (54, 32), (46, 40)]):
        made_run(tmp_path / str(seed), seed=seed, alone=alone, student=student, val=0.8 + seed / 100)
    comparison = only(tmp_path)
    (setting,) = comparison.settings
    assert setting.n == 3
    assert setting.student["errors"].mean == 34
    assert setting.student["errors"].std == pytest.approx(28**0.5)  # (16 + 4 + 36) / 2
    assert setting.student["val_accuracy"].mean == pytest.approx(0.81)
    assert setting.student_alone["errors"].n == 3
    assert (setting.teacher["errors"].mean, setting.teacher["errors"].n) == (10, 1)  # one teacher taught all three
    assert setting.gap_closed == pytest.approx((50 - 34) / (50 - 10))
    assert setting.saved.mean == 16


def test_the_gap_of_a_setting_is_not_the_mean_of_its_runs_shares(tmp_path: Path) -> None:
    made_run(tmp_path / "0", seed=0, teacher=40, alone=41, student=31)  # a share of 1000 %
    made_run(tmp_path / "1", seed=1, teacher=40, alone=79, student=79)  # of 0 %
    (setting,) = only(tmp_path).settings
    assert setting.gap_closed == pytest.approx((60 - 55) / (60 - 40))
    assert setting.gap_n == 2


def test_the_best_is_chosen_by_validation_and_not_by_the_test_set(tmp_path: Path) -> None:
    made_run(tmp_path / "0", T=1.0, student=20, val=0.80)
    made_run(tmp_path / "1", T=5.0, student=40, val=0.95)
    comparison = only(tmp_path)
    assert comparison.best.values == {"T": 5.0}
    head, text = answer(comparison)
    assert head == "best by validation: T=5"
    assert text.startswith("40 errors on 200 test examples (one seed)")
    assert "One seed cannot tell a difference from chance" in text


def test_of_equal_accuracies_the_better_likelihood_is_chosen(tmp_path: Path) -> None:
    made_run(tmp_path / "0", T=1.0, val=0.9, val_nll=0.4)
    made_run(tmp_path / "1", T=5.0, val=0.9, val_nll=0.3)
    assert only(tmp_path).best.values == {"T": 5.0}


def test_without_validation_nothing_is_chosen(tmp_path: Path) -> None:
    made_run(tmp_path / "0", T=1.0, val=None)
    made_run(tmp_path / "1", T=5.0, val=None)
    comparison = only(tmp_path)
    assert comparison.best is None
    assert answer(comparison)[0] == "no setting is chosen"
    assert "val accuracy" not in sweep_table([comparison])


def test_a_setting_with_a_diverged_run_is_passed_over(tmp_path: Path) -> None:
    made_run(tmp_path / "0", T=1.0, seed=0, val=0.99)
    made_run(tmp_path / "1", T=1.0, seed=1, status="diverged")
    made_run(tmp_path / "2", T=5.0, seed=0, val=0.90)
    comparison = only(tmp_path)
    assert comparison.best.values == {"T": 5.0}
    assert [(s.n, s.diverged) for s in comparison.settings] == [(1, 1), (1, 0)]
    assert "1 (1 diverged)" in sweep_table([comparison])


def test_a_baseline_is_one_though_a_setting_lacks_a_seed(tmp_path: Path) -> None:
    for seed in (0, 1, 2):
        made_run(tmp_path / f"a{seed}", T=1.0, seed=seed, alone=50 + seed)
        made_run(tmp_path / f"b{seed}", T=2.0, seed=seed, alone=50 + seed, status="unfinished" if seed else "completed")
    ((name, stats),) = baselines(only(tmp_path), "student_alone")
    assert (name, stats["errors"].mean, stats["errors"].n) == ("", 51, 3)


def test_baselines_are_named_by_what_can_matter_to_them(tmp_path: Path) -> None:
    for i, (T, epochs) in enumerate((t, e) for t in (1.0, 2.0) for e in (3, 6)):
        made_run(tmp_path / str(i), T=T, epochs=epochs)
    names = [name for name, _ in baselines(only(tmp_path), "student_alone")]
    assert names == ["training.epochs=3", "training.epochs=6"]


def test_settings_within_one_standard_deviation_of_the_best_are_named(tmp_path: Path) -> None:
    for seed in (0, 1):
        made_run(tmp_path / f"a{seed}", T=1.0, seed=seed, val=0.90 + 0.04 * seed)
        made_run(tmp_path / f"b{seed}", T=2.0, seed=seed, val=0.91)
        made_run(tmp_path / f"c{seed}", T=8.0, seed=seed, val=0.50)
    comparison = only(tmp_path)
    assert comparison.best.values == {"T": 1.0}
    assert [s.values["T"] for s in comparison.close_to_best] == [2.0]
    assert "Validation does not tell it from T=2 (" in answer(comparison)[1]


def test_a_key_that_an_earlier_version_did_not_have_is_what_it_meant_then(tmp_path: Path) -> None:
    made_run(tmp_path / "then", seed=0)
    now = {"training.patience": 0, "teacher.chain": None, "student.input": None, "training.batchnorm": "running"}
    made_run(tmp_path / "now", seed=1, **now)
    (setting,) = only(tmp_path).settings
    assert setting.n == 2
    made_run(tmp_path / "other", seed=2, **(now | {"training.patience": 5}))
    assert [setting.n for setting in only(tmp_path).settings] == [2, 1]


def test_a_repeated_run_is_no_new_evidence(tmp_path: Path) -> None:
    for folder in ("monday/0", "tuesday/0"):
        made_run(tmp_path / folder, seed=0)
    made_run(tmp_path / "tuesday/1", seed=1)
    (setting,) = only(tmp_path).settings
    assert (setting.n, setting.repeats) == (2, 1)


def with_changes(run: Path, **roles: dict[str, Any]) -> Path:
    """Change what the summary says of some roles; returns the run directory."""
    summary = json.loads((run / "summary.json").read_text())
    for role, changed in roles.items():
        summary[role] |= changed
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_teachers_that_one_path_held_one_after_the_other_are_settings_of_their_own(tmp_path: Path) -> None:
    for seed, mark in enumerate(["aaaaaaaa11", "aaaaaaaa11", "bbbbbbbb22"]):
        run = made_run(tmp_path / str(seed), seed=seed, **{"teacher.checkpoint": "c.pt"})
        with_changes(run, teacher={"fingerprint": mark})
    comparison = only(tmp_path)
    assert [setting.n for setting in comparison.settings] == [2, 1]
    assert [setting.label for setting in comparison.settings] == [
        "teacher.checkpoint content=aaaaaaaa",
        "teacher.checkpoint content=bbbbbbbb",
    ]
    assert [name for name, _ in baselines(comparison, "teacher")] == [setting.label for setting in comparison.settings]
    assert "teacher.checkpoint content=aaaaaaaa" in sweep_table([comparison])


def test_one_teacher_from_a_file_is_no_swept_key(tmp_path: Path) -> None:
    for seed in range(2):
        run = made_run(tmp_path / str(seed), seed=seed, **{"teacher.checkpoint": "c.pt", "teacher_training.seed": seed})
        with_changes(run, teacher={"fingerprint": "aaaaaaaa11"})
    assert [setting.n for setting in only(tmp_path).settings] == [2]


def test_runs_of_code_that_was_edited_between_them_are_settings_of_their_own(tmp_path: Path) -> None:
    for seed, checksum in enumerate(["11", "11", "22"]):
        run = made_run(tmp_path / str(seed), seed=seed)
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {"code": {"mine": checksum, "parts": "33"}}))
    comparison = only(tmp_path)
    assert sorted(setting.n for setting in comparison.settings) == [1, 2]
    assert all(setting.label.startswith("own code=") for setting in comparison.settings)


def test_code_that_was_not_edited_is_no_swept_key(tmp_path: Path) -> None:
    for seed in range(2):
        run = made_run(tmp_path / str(seed), seed=seed)
        summary = json.loads((run / "summary.json").read_text())
        (run / "summary.json").write_text(json.dumps(summary | {"code": {"mine": "11"}}))
    (setting,) = only(tmp_path).settings
    assert setting.n == 2
    assert "own code" not in setting.label


def test_teachers_trained_under_different_seeds_are_averaged(tmp_path: Path) -> None:
    for seed in range(2):
        made_run(tmp_path / str(seed), seed=seed, **{"teacher_training.seed": seed})
    (setting,) = only(tmp_path).settings
    assert (setting.n, setting.teacher["errors"].n) == (2, 2)


def test_one_seed_whose_model_changed_is_no_second_seed_and_is_named(tmp_path: Path) -> None:
    made_run(tmp_path / "1", student=60)
    with_changes(made_run(tmp_path / "2", student=30), student={"fingerprint": "other code"})
    comparison = only(tmp_path)
    (setting,) = comparison.settings
    assert (setting.n, setting.repeats, setting.student["errors"].mean) == (1, 1, 30)
    said = "1 of these runs has the settings and seeds of a later one and another model"
    assert said in " ".join(sweep_table([comparison]).split())


# ---------------------------------------------------------------- what differs


def test_swept_keys_leave_out_seeds_and_places(tmp_path: Path) -> None:
    made_run(tmp_path / "0", T=1.0, seed=0, device="cpu", **{"teacher_training.seed": 1})
    made_run(tmp_path / "1", T=2.0, seed=1, device="cuda")
    assert swept_keys(collect([tmp_path])[0]) == ["T"]


def test_a_group_is_represented_by_its_option(tmp_path: Path) -> None:
    made_run(tmp_path / "0", choices={"student": "tinymlp"}, **{"student.hidden": [30, 30], "student.dropout": 0.0})
    made_run(tmp_path / "1", choices={"student": "smallmlp"}, **{"student.hidden": [800, 800], "student.dropout": 0.1})
    runs = collect([tmp_path])[0]
    assert swept_keys(runs) == ["student"]
    assert only(tmp_path).settings[0].label == "student=smallmlp"
    made_run(tmp_path / "2", choices={"student": "tinymlp"}, **{"student.hidden": [20], "student.dropout": 0.0})
    assert swept_keys(collect([tmp_path])[0]) == ["student", "student.hidden"]


def test_each_data_set_is_a_comparison_of_its_own(tmp_path: Path) -> None:
    made_run(tmp_path / "0", T=1.0)
    made_run(tmp_path / "1", T=2.0)
    made_run(tmp_path / "2", data="data-2", choices={"dataset": "mnist"}, epochs=4)
    made_run(tmp_path / "3", data="data-3", **{"dataset.val_fraction": 0.5})
    found = {comparison.dataset: comparison.keys for comparison in compare(collect([tmp_path])[0])}
    assert found == {"digits (val_fraction=0.2)": ("T",), "mnist": (), "digits (val_fraction=0.5)": ()}


def test_names_keep_the_keys_that_distinguish_settings() -> None:
    values = [{"T": 1, "teacher": "a", "teacher.hidden": 3}, {"T": 1, "teacher": "b", "teacher.hidden": 4}]
    assert distinguishing(["T", "teacher", "teacher.hidden"], values) == ["teacher"]
    joint = [{"T": 1, "beta": 0.5}, {"T": 2, "beta": 0.7}]
    assert distinguishing(["T", "beta"], joint) == ["T", "beta"]


# ---------------------------------------------------------------- reading


def test_unreadable_runs_are_named_and_the_others_read(tmp_path: Path) -> None:
    made_run(tmp_path / "good")
    (made_run(tmp_path / "torn") / "summary.json").write_text('{"status": "comp')
    (as_before(made_run(tmp_path / "foreign")) / ".hydra/config.yaml").write_text("model: resnet\n")
    with (tmp_path / "good/metrics.jsonl").open("a") as file:
        file.write('not json\n{"role": "stud')
    runs, notes = collect([tmp_path, tmp_path / "good"])
    assert [run.path.name for run in runs] == ["good"]
    assert len(notes) == 3
    assert any("torn is left out: summary.json cannot be read" in note for note in notes)
    assert any("foreign is left out" in note and "config.yaml" in note for note in notes)
    assert any("line 10 cannot be read" in note for note in notes)


def test_a_run_without_a_summary_is_unfinished(tmp_path: Path) -> None:
    made_run(tmp_path / "0", T=1.0)
    made_run(tmp_path / "1", T=2.0, status="unfinished")
    comparison = only(tmp_path, unfinished=True)
    assert [run.status for run in comparison.runs] == ["completed", "unfinished"]
    assert "0 (1 unfinished)" in sweep_table([comparison])


def test_a_log_that_ends_with_an_error_is_why_a_run_failed(tmp_path: Path) -> None:
    path = made_run(tmp_path / "0", status="unfinished")
    stamp = "[2026-11-21 10:00:00,000][kd_cli]"
    log = f"{stamp}[INFO] begins\n{stamp}[ERROR] failed: 0: the disk is full\nTraceback (most recent call last):\n"
    (path / "run.log").write_text(log)
    comparison = only(tmp_path, unfinished=True)
    assert (comparison.runs[0].status, comparison.runs[0].cause) == ("failed", "failed: 0: the disk is full")
    assert "0 (1 failed)" in sweep_table([comparison])
    (path / "run.log").write_text(f"{log}{stamp}[INFO] goes on\n")
    assert only(tmp_path).runs[0].status == "unfinished"


def test_runs_without_a_result_are_counted_in_one_line(tmp_path: Path) -> None:
    for seed in (0, 1):
        made_run(tmp_path / f"good{seed}", T=2.0, seed=seed)
    made_run(tmp_path / "stopped", T=2.0, seed=2, status="unfinished")  # of a setting that has results
    for i in range(44):
        made_run(tmp_path / f"refused{i}", T=float(i + 3), status="unfinished", **{"student.hidden": [i]})
    made_run(tmp_path / "other data", choices={"dataset": "mnist"}, status="unfinished", **{"dataset.root": "x"})
    comparisons = compare(collect([tmp_path])[0])
    table = sweep_table(comparisons)
    assert table.splitlines()[0].startswith("digits: 50 validation, 200 test examples; 47 runs: 2 completed, 45 unfin")
    assert "2 (1 unfinished)" in table
    sentence = "45 runs without a result are not listed (45 unfinished); kd-report --unfinished lists them"
    assert table.endswith(f"\n\n{sentence}")
    assert len(table.splitlines()) < 16
    listed = sweep_table(compare(collect([tmp_path])[0], unfinished=True))
    assert listed.count("0 (1 unfinished)") == 45
    assert sentence not in listed
    written = write_report([tmp_path], tmp_path)
    assert written.html.read_text().count("refused") == 0
    assert written.csv.read_text().count("unfinished") == 46  # the file has every run


def test_a_run_without_a_configuration_in_run_json_opens(tmp_path: Path) -> None:
    run = read_run(OLD_RUN)
    assert "config" not in json.loads((OLD_RUN / "run.json").read_text())
    assert (run.status, run.seed, run.config["training.epochs"]) == ("completed", 0, 2)
    assert run.config["student.hidden"] == [30, 30]
    assert run.choices == {
        "method": "soft_targets",
        "dataset": "digits",
        "student": "tinymlp",
        "teacher": "tinymlp",
        "training": "digits",
        "teacher_training": "digits",
        "optimizer": "adamw",
        "teacher_optimizer": "adamw",
        "schedule": "cosine",
        "teacher_schedule": "cosine",
    }
    assert run.test("student", "errors") == 514
    assert "514 errors on 597 test examples" in write_report([OLD_RUN], tmp_path).table
    assert write_run_page(OLD_RUN, tmp_path).read_text().count("<figure") == 8 * 5


def test_old_and_new_runs_are_compared(tmp_path: Path) -> None:
    as_before(made_run(tmp_path / "0", T=1.0, **{"student.hidden": [3, 4]}))
    made_run(tmp_path / "1", T=4.0, **{"student.hidden": [3, 4]})
    assert only(tmp_path).keys == ("T",)


def test_hydras_files_and_run_json_say_the_same(real_sweep: Path, tmp_path: Path) -> None:
    path = next(real_sweep.glob("*/summary.json")).parent
    now = read_run(path)
    shutil.copytree(path, tmp_path / "run")
    before = read_run(as_before(tmp_path / "run"))
    assert (now.config, now.choices) == (before.config, before.choices)
    assert {"T", "student.hidden", "optimizer.lr"} <= now.config.keys()
    assert now.choices["student"] == "tinymlp"
    shutil.rmtree(tmp_path / "run/.hydra")
    assert read_run(path).config == now.config


@pytest.mark.parametrize(
    "text",
    [
        *("a: 1\n---\nb: 2\n", "a: [1\nb: 2]\nc: }\n", "a: *missing\n", "a: !!python/name:os.system\n"),
        *("[1, 2]\n", "word\n", "a: 1\n", ""),
    ],
)
def test_hydras_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    path = as_before(made_run(tmp_path / "0", status="unfinished"))
    (path / ".hydra/config.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        read_run(path)


def test_a_summary_is_enough(tmp_path: Path) -> None:
    path = made_run(tmp_path / "0")
    for file in (path / ".hydra").iterdir():
        file.unlink()
    (path / ".hydra").rmdir()
    (path / "run.json").unlink()
    assert only(tmp_path).settings[0].n == 1


@pytest.mark.parametrize("make", [lambda path: path / "nowhere", lambda path: path])
def test_nothing_to_report_on_is_an_error_with_a_hint(tmp_path: Path, make: Any) -> None:
    with pytest.raises(DataError) as caught:
        collect([make(tmp_path)])
    assert caught.value.hint is not None


# ---------------------------------------------------------------- tables and files


def test_columns_are_aligned() -> None:
    assert align([["", "n"], ["long", "1"], ["x", "100"]]) == "        n\nlong    1\nx     100"


def test_the_table_of_a_sweep(tmp_path: Path) -> None:
    for i, (T, seed) in enumerate((t, s) for t in (1.0, 4.0) for s in (0, 1)):
        made_run(tmp_path / str(i), T=T, seed=seed, alone=50 + seed, student=30 + int(T) + 2 * seed, val=0.9 + T / 100)
    lines = sweep_table([only(tmp_path)]).splitlines()
    assert lines[0].startswith("digits: 50 validation, 200 test examples; 4 runs: 4 completed")
    assert "T=4 *" in lines[4]
    assert "35.0 ± 1.4" in lines[4]
    assert lines[5].split()[:5] == ["student", "alone", "50.5", "±", "0.7"]
    assert lines[6].split()[:2] == ["teacher", "10"]
    assert max(map(len, lines)) <= 120


def test_the_csv_has_a_row_for_each_run(tmp_path: Path) -> None:
    made_run(tmp_path / "runs/0", T=1.0)
    made_run(tmp_path / "runs/1", T=4.0, status="diverged")
    written = write_report([tmp_path / "runs"], tmp_path / "out")
    rows = list(csv.DictReader(written.csv.read_text().splitlines()))
    assert [(row["run"], row["T"], row["status"], row["student_errors"]) for row in rows] == [
        ("../runs/0", "1", "completed", "30"),
        ("../runs/1", "4", "diverged", ""),
    ]
    assert rows[0]["val_accuracy"] == "0.9"
    assert rows[1]["cause"].startswith("student: the loss")


def test_a_run_ends_with_a_table_even_when_it_diverged(tmp_path: Path) -> None:
    good = json.loads((made_run(tmp_path / "0") / "summary.json").read_text())
    assert "50 errors alone, 30 distilled, 50% of the gap" in run_table(good)
    bad = json.loads((made_run(tmp_path / "1", status="diverged") / "summary.json").read_text())
    assert run_table(bad).endswith("diverged: student: the loss is not a finite number in epoch 1")


def test_a_real_sweep_is_read_whole(real_sweep: Path) -> None:
    comparison = only(real_sweep)
    assert comparison.keys == ("T",)
    assert [(s.values["T"], s.n) for s in comparison.settings] == [(1.0, 2), (4.0, 2)]
    run = comparison.runs[0]
    summary = json.loads((run.path / "summary.json").read_text())
    assert run.test("student", "errors") == summary["student"]["test"]["errors"]
    last = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()][-1]
    assert last["role"] == "student"
    assert run.validation("val_nll") == last["val_nll"]


def test_a_sweep_ends_with_its_answer(real_sweep: Path) -> None:
    written = write_report([real_sweep], real_sweep)
    assert "best by validation: T=" in written.table
    assert (written.csv, written.html) == (real_sweep / "sweep.csv", real_sweep / "sweep.html")
    assert [run.status for run in written.runs] == ["completed"] * 4


def test_a_real_run_has_a_page_with_its_pictures(real_sweep: Path) -> None:
    path = next(real_sweep.glob("*/summary.json")).parent
    text = (path / "report.html").read_text()
    assert text == run_page(path)
    titles = ("What temperature shows", "Where student and teacher disagree", "Reliability", "Learning curves")
    assert all(f"<h2>{title}</h2>" in text for title in titles)
    assert (path / "examples.json").stat().st_size < 100_000


def test_where_the_best_epoch_is_kept_its_validation_counts(tmp_path: Path) -> None:
    path = made_run(tmp_path / "0", **{"training.keep": "best"})
    seen = [(0.7, 0.5), (0.9, 0.4), (0.9, 0.3), (0.8, 0.2)]
    rows = [{"role": "student", "epoch": i + 1, "val_accuracy": a, "val_nll": n} for i, (a, n) in enumerate(seen)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = only(tmp_path).runs[0]
    assert (run.validation("val_accuracy"), run.validation("val_nll")) == (0.9, 0.3)


def test_a_temperature_that_kd_run_chose_is_reported(tmp_path: Path) -> None:
    path = made_run(tmp_path / "0", T="auto")
    summary = json.loads((path / "summary.json").read_text())
    tried = [{"T": T, "alpha": 1.0, "val_accuracy": 0.8 + T / 100, "val_nll": 0.5, "diverged": None} for T in (1, 5)]
    summary |= {"T": 5.0, "auto": {"keys": ["T"], "rule": "highest validation accuracy", "chosen": 1, "tried": tried}}
    (path / "summary.json").write_text(json.dumps(summary))
    assert "T = 5, alpha = 1, beta = 0.5 (T chosen on validation data)" in run_table(summary)
    assert "Chosen: T = 5, alpha = 1" in write_run_page(path).read_text()
    (row,) = csv.DictReader(write_report([path], tmp_path).csv.read_text().splitlines())
    assert (row["T"], row["T_used"]) == ("auto", "5")


def test_a_run_with_left_out_classes_shows_its_result_and_the_oracle(tmp_path: Path) -> None:
    path = made_run(tmp_path / "0")
    summary = json.loads((path / "summary.json").read_text())
    made = {
        k: {"shift": 3.5, "errors": n, "omitted_errors": 1, "omitted_total": 20}
        for k, n in (("before", 90), ("corrected", 40), ("oracle", 35))
    }
    (path / "summary.json").write_text(
        json.dumps(summary | {"omitted": {"classes": ["3"], "result": "corrected", **made}})
    )
    text = write_run_page(path).read_text()
    assert "Without 3 in the transfer set" in text
    assert '<tr class="best"><td>biases shifted, by training inputs alone</td><td>+3.50</td><td>40</td>' in text


# ---------------------------------------------------------------- the command


def test_kd_report_of_a_sweep_writes_beside_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(tmp_path / "sweep/0", T=1.0)
    made_run(tmp_path / "sweep/1", T=2.0)
    main([str(tmp_path / "sweep"), "--runs"])
    assert sorted(p.name for p in (tmp_path / "sweep").iterdir()) == ["0", "1", "sweep.csv", "sweep.html"]
    assert (tmp_path / "sweep/1/report.html").is_file()
    assert "2 runs: 2 completed" in capsys.readouterr().out


def test_kd_report_of_several_paths_writes_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_run(tmp_path / "a/0", T=1.0)
    made_run(tmp_path / "b/0", T=2.0)
    monkeypatch.chdir(tmp_path)
    main(["a", "b"])
    assert (tmp_path / "kd-report.html").is_file()
    assert (tmp_path / "kd-report.csv").read_text().count("\n") == 3


def test_kd_report_of_a_run_leaves_the_run_as_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = made_run(tmp_path / "0")
    before = {p: p.read_bytes() for p in path.rglob("*") if p.is_file()}
    main([str(path)])
    assert {p: p.read_bytes() for p in before} == before
    assert {p.name for p in path.iterdir()} - {p.name for p in before} == {".hydra", "report.html"}
    assert "50% of the gap" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["nowhere"], ["."]])
def test_kd_report_prints_an_error_and_a_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert str(caught.value.code).startswith("error: ")
    assert "\nhint: " in str(caught.value.code)


def test_reports_need_no_torch_and_their_templates_only_when_a_page_is_written(tmp_path: Path) -> None:
    made_run(tmp_path / "0")
    code = (
        "import sys; from kd_cli.commands.kd_report import main; early = 'jinja2' in sys.modules; main(sys.argv[1:]); "
        "sys.exit(early or any(name in sys.modules for name in ('torch', 'hydra', 'omegaconf')))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_kd_report_prints_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"kd-cli {importlib.metadata.version('kd-cli')}\n"


def test_kd_report_lists_unfinished_runs_when_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(tmp_path / "0", T=1.0)
    made_run(tmp_path / "1", T=2.0, status="unfinished")
    main([str(tmp_path)])
    assert "1 run without a result is not listed (1 unfinished)" in capsys.readouterr().out
    main([str(tmp_path), "--unfinished"])
    assert "0 (1 unfinished)" in capsys.readouterr().out


def test_a_damaged_run_json_is_no_loss_while_hydras_files_are_there(tmp_path: Path) -> None:
    path = made_run(tmp_path / "0")
    (path / "run.json").write_text("{")
    assert read_run(path).config["T"] == 2.0
    (path / ".hydra/config.yaml").unlink()
    with pytest.raises(ValueError, match=r"run\.json cannot be read"):
        read_run(path)


def test_a_thousand_runs_take_seconds_and_megabytes(tmp_path: Path) -> None:
    for i in range(1000):
        T, seed, beta = 1.0 + i % 20, (i // 20) % 5, 0.1 * (i // 100)
        made_run(tmp_path / str(i), T=T, seed=seed, beta=beta, student=20 + i % 37, val=0.5 + (i % 41) / 100, epochs=30)
    start = time.process_time()
    written = write_report([tmp_path], tmp_path)
    assert time.process_time() - start < 20  # about 3 seconds on an idle machine
    assert written.html.stat().st_size < 5_000_000
    assert len(written.runs) == 1000


def test_a_page_of_a_run_is_written_where_asked(tmp_path: Path) -> None:
    path = made_run(tmp_path / "run")
    assert write_run_page(path, tmp_path / "elsewhere") == tmp_path / "elsewhere/report.html"
    assert 'href="../run/summary.json"' in (tmp_path / "elsewhere/report.html").read_text()
