"""Pages: the answer first, whole without a network, and nothing from outside taken for markup."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from made_runs import made_run, only
from PIL import Image

from kd_cli.errors import StorageError
from kd_cli.metrics import evaluate_logits
from kd_cli.report.compare import compare
from kd_cli.report.curves import mean_curve
from kd_cli.report.figures import axis_of
from kd_cli.report.pages import write_report, write_run_page
from kd_cli.report.read import collect
from kd_cli.report.run_page import run_page
from kd_cli.report.sweep_page import sweep_page
from kd_cli.report.tables import run_table
from kd_cli.runs.pictures import choose, disagreement, mistakes, picture, pictures

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """A page taken apart: it fails on tags that do not match; text, links and what would be loaded are kept."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.words: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        if tag == "a":
            self.links.append(found["href"] or "")
        if tag in ("script", "img", "link", "iframe"):
            self.loaded.append(found.get("src") or found.get("href") or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script", "title"):
            self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def page_of(path: Path) -> Page:
    """The sweep page of the runs under a path."""
    text = write_report([path], path).html.read_text()
    found = Page(text)
    assert all(not source or source.startswith("data:") for source in found.loaded)
    assert "http" not in re.sub(r"\s", "", text).replace("http-equiv", "")
    return found


def sweep(path: Path, values: list[dict[str, Any]], **shared: Any) -> Path:
    for i, own in enumerate(values):
        made_run(path / str(i), **{**shared, **own})
    return path


# ---------------------------------------------------------------- sweeps


def test_the_first_thing_said_is_the_answer(tmp_path: Path) -> None:
    values = [
        {"T": T, "seed": seed, "student": int(30 + T + seed), "val": 0.9 + T / 100}
        for T in (1.0, 4.0)
        for seed in (0, 2)
    ]
    page = page_of(sweep(tmp_path, values))
    start = page.text.split("Error against T")[0].replace("\xa0", " ")
    assert "best by validation: T=4" in start
    assert "35.0 ± 1.4 errors on 200 test examples (mean ± std, n = 2 seeds)" in start
    assert "the student alone 50.0 ± 0.0 (n = 2), the teacher 10 (n = 1)" in start
    assert "38% of the gap to the teacher closed" in start  # (50 - 35) / (50 - 10)
    assert page.headings == ["Error against T", "Learning curves", "Settings", "Runs"]


def test_two_swept_keys_have_a_heat_map(tmp_path: Path) -> None:
    values = [{"T": T, "beta": beta} for T in (1.0, 4.0) for beta in (0.1, 0.5)]
    assert "T and beta" in page_of(sweep(tmp_path, values)).headings


def test_names_without_numbers_are_laid_out_in_rows(tmp_path: Path) -> None:
    values = [{"choices": {"method": name}, "method._target_": name} for name in ("soft_targets", "logits", "hard")]
    assert axis_of(only(sweep(tmp_path, values))) is None
    assert "Test errors" in page_of(tmp_path).headings


def test_another_number_than_T_can_be_the_axis(tmp_path: Path) -> None:
    sweep(tmp_path, [{"optimizer.lr": lr} for lr in (0.1, 0.01, 0.001)])
    assert axis_of(only(tmp_path)) == "optimizer.lr"
    assert "Error against optimizer.lr" in page_of(tmp_path).headings


def test_one_run_says_that_it_is_one(tmp_path: Path) -> None:
    page = page_of(sweep(tmp_path, [{}]))
    assert "soft_targets with T=2, alpha=1, beta=0.5" in page.text
    assert "One seed cannot tell a difference from chance" in page.text
    assert "no error bars" in page.text


def test_each_data_set_has_its_own_answer(tmp_path: Path) -> None:
    mnist = {"data": "data-2", "choices": {"dataset": "mnist"}}
    page = page_of(sweep(tmp_path, [{"T": 1.0}, {"T": 4.0}, {"T": 1.0, **mnist}, {"T": 4.0, "val": 0.95, **mnist}]))
    assert [word for word in page.headings if word in ("digits", "mnist")] == ["digits", "mnist"]
    assert page.text.count("best by validation:") == 2


def test_runs_without_teacher_validation_or_end_are_shown(tmp_path: Path) -> None:
    hard = {"teacher": None, "choices": {"method": "hard"}, "method._target_": "hard"}
    page = page_of(
        sweep(
            tmp_path,
            [
                {"T": 1.0, **hard},
                {"T": 2.0, "val": None},
                {"T": 4.0, "status": "diverged"},
                {"T": 8.0, "status": "unfinished"},
            ],
        )
    )
    assert "1 run diverged and is in no mean" in page.text
    assert "unfinished" in page.text


def test_only_unfinished_runs_are_no_result(tmp_path: Path) -> None:
    page = page_of(sweep(tmp_path, [{"T": 1.0, "status": "unfinished"}, {"T": 2.0, "status": "unfinished"}]))
    assert "nothing to compare yet" in page.text
    assert "2 runs: 2 unfinished" in page.text


def test_what_comes_from_outside_is_no_markup(tmp_path: Path) -> None:
    nasty = "<img src=x onerror=alert(1)>\"'&"
    folder = tmp_path / "<b>sweep & #1"
    sweep(folder, [{"student.note": nasty}, {"student.note": nasty + "2"}], choices={"student": nasty, "method": nasty})
    (folder / "1/summary.json").write_text("{" + nasty)
    text = write_report([folder], folder).html.read_text()
    assert "<img" not in text
    assert "<b>" not in text
    assert "<img" not in run_page(folder / "0")
    outside = write_report([folder], tmp_path / "out").html.read_text()
    assert 'href="../%3Cb%3Esweep%20%26%20%231/0/"' in outside


def test_links_lead_to_the_runs(tmp_path: Path) -> None:
    sweep(tmp_path / "sweep", [{"T": 1.0}, {"T": 4.0}])
    write_run_page(tmp_path / "sweep/1")
    page = Page(write_report([tmp_path / "sweep"], tmp_path / "out").html.read_text())
    assert page.links == ["../sweep/0/", "../sweep/1/", "../sweep/1/report.html", "sweep.csv"]
    assert all((tmp_path / "out" / link).exists() for link in page.links)


def test_curves_are_means_over_runs_and_keep_the_last_epoch(tmp_path: Path) -> None:
    sweep(tmp_path, [{"val": 0.5, "seed": 0}, {"val": 0.7, "seed": 1}], epochs=250)
    curve = mean_curve(collect([tmp_path])[0], "student", "val_accuracy")
    assert len(curve) <= 100
    assert curve[-1] == (250, pytest.approx(0.6), 2)


def test_a_page_is_the_same_every_time(tmp_path: Path) -> None:
    sweep(tmp_path, [{"T": 1.0}, {"T": 4.0}])
    pages = {sweep_page(compare(collect([tmp_path])[0]), tmp_path) for _ in range(2)}
    assert len(pages) == 1


# ---------------------------------------------------------------- one run


def test_the_page_of_a_run_that_did_not_end(tmp_path: Path) -> None:
    assert "not finished" in Page(run_page(made_run(tmp_path / "0", status="unfinished"))).text
    assert "the loss is not a finite number" in Page(run_page(made_run(tmp_path / "1", status="diverged"))).text


def noted(run: Path, *, notes: list[str], recall: list[float | None] | None = None, examples: int = 50) -> Path:
    """Add notes, and the recall of classes a, b, ..., to a made run's summary, as kd-run writes them."""
    summary = json.loads((run / "summary.json").read_text()) | {"notes": notes}
    if recall is not None:
        names = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJ")[: len(recall)]
        summary["dataset"] |= {"class_names": names, "test_by_class": [examples] * len(recall)}
        known = [value for value in recall if value is not None]
        worst = min(range(len(recall)), key=lambda c: 1.0 if recall[c] is None else recall[c])
        for role in ("teacher", "student_alone", "student"):
            summary[role]["test"] |= {
                "recall": recall,
                "balanced_accuracy": sum(known) / len(known),
                "worst_class": {"name": names[worst], "recall": recall[worst], "examples": examples},
            }
    (run / "summary.json").write_text(json.dumps(summary))
    return run


def test_what_kd_run_did_by_itself_stands_on_the_runs_page_and_on_the_sweeps(tmp_path: Path) -> None:
    notes = ["3 pictures are turned", "<b> is left out"]
    first = noted(made_run(tmp_path / "0", seed=0), notes=notes)
    noted(made_run(tmp_path / "1", seed=1), notes=notes[:1])
    found = Page(run_page(first))
    assert "What kd-run did by itself" in found.headings
    assert all(note in found.text for note in notes)
    both = Page(sweep_page([only(tmp_path)], tmp_path))
    assert "What kd-run did by itself" in both.headings
    assert both.text.count("3 pictures are turned") == 1
    assert "<b> is left out (1 of 2 runs)" in both.text


def test_a_run_without_notes_has_no_heading_for_them(tmp_path: Path) -> None:
    assert "What kd-run did by itself" not in Page(run_page(made_run(tmp_path / "0"))).headings


def test_recall_by_class_is_listed_from_the_worst_on(tmp_path: Path) -> None:
    path = noted(made_run(tmp_path / "0", student=30), notes=[], recall=[0.9, 0.1, None, 0.95])
    found = Page(run_page(path))
    assert "Recall by class" in found.headings
    assert "b 50 10.0% 10.0% 10.0% a 50 90.0% 90.0% 90.0% d 50 95.0% 95.0% 95.0%" in found.text
    assert "mean over the classes 200 65.0% 65.0% 65.0%" in found.text
    said = "worst class of tinymlp: b, of whose 50 test examples 10.0% are classified correctly"
    assert said in found.text
    assert said in " ".join(run_table(json.loads((path / "summary.json").read_text())).split())


@pytest.mark.parametrize(
    ("recall", "examples"),
    [([0.85, 0.7], 50), ([0.85, 0.5], 4)],
    ids=["a little below the accuracy", "few examples"],
)
def test_a_class_near_the_accuracy_is_not_named(tmp_path: Path, recall: list[float], examples: int) -> None:
    path = noted(made_run(tmp_path / "0", student=30), notes=[], recall=recall, examples=examples)
    assert "worst class" not in run_table(json.loads((path / "summary.json").read_text()))


def test_more_than_thirty_classes_are_not_listed(tmp_path: Path) -> None:
    path = noted(made_run(tmp_path / "0"), notes=[], recall=[0.9] * 31)
    assert "Recall by class" not in Page(run_page(path)).headings


def test_what_is_no_run_has_no_page(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        run_page(tmp_path)


# Four test examples, three classes. The teacher is right on 0, 1 and 3; the student on 0 and 3.
LABELS = torch.tensor([0, 1, 2, 1])
TEACHER = torch.tensor([[9.0, 0, 0], [0, 3.0, 0], [0.2, 0, 0], [0, 1.0, 0]])
STUDENT = torch.tensor([[5.0, 0, 0], [0, 0, 4.0], [0, 1.0, 0], [0, 2.0, 0]])
IMAGES = torch.arange(4 * 16, dtype=torch.uint8).reshape(4, 1, 4, 4)
NAMES = ["cat", "<dog>", "cow"]


def test_disagreements_by_hand() -> None:
    found = disagreement(LABELS, TEACHER, STUDENT, NAMES)
    counts = ("both_right", "teacher_right", "student_right", "both_wrong_alike", "both_wrong_apart")
    assert [found[key] for key in counts] == [2, 1, 0, 0, 1]
    assert sum(found[key] for key in counts) == found["total"]
    assert found["matrix"] == [[1, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert found["pairs"][1] == {
        "teacher": "<dog>",
        "student": "cow",
        "count": 1,
        "teacher_right": 1,
        "student_right": 0,
    }


def test_disagreements_name_the_files_of_their_pictures(tmp_path: Path) -> None:
    files = [f"photos/{i} & co.png" for i in range(4)]
    found = pictures(IMAGES, LABELS, TEACHER, STUDENT, NAMES, T=2, files=files)
    assert [example["file"] for example in found["examples"]] == [
        files[example["index"]] for example in found["examples"]
    ]
    assert [pair["files"] for pair in found["disagreement"]["pairs"]] == [[files[2]], [files[1]]]
    path = made_run(tmp_path / "0")
    (path / "examples.json").write_text(json.dumps(found))
    page = Page(run_page(path))
    assert "for example" in page.text
    assert all(page.text.count(file) == n for file, n in zip(files, (1, 2, 2, 1), strict=True))


def test_mistakes_by_hand() -> None:
    assert mistakes(LABELS, STUDENT, NAMES) == [
        {"label": "<dog>", "student": "cow", "count": 1},
        {"label": "cow", "student": "<dog>", "count": 1},
    ]


def test_the_examples_are_the_least_certain_and_the_surest_disagreements() -> None:
    assert [i for i, _ in choose(LABELS, TEACHER, STUDENT, 2)] == [2, 1]
    assert [i for i, _ in choose(LABELS, None, STUDENT, 2)] == [2, 1]
    assert sorted(i for i, _ in choose(LABELS, TEACHER, STUDENT, 8)) == [0, 1, 2, 3]


def test_distributions_are_softmaxes_at_each_temperature() -> None:
    found = pictures(IMAGES, LABELS, TEACHER, STUDENT, NAMES, T=3, temperatures=(1, 2))
    assert found["temperatures"] == [1, 2, 3]
    for example in found["examples"]:
        i = example["index"]
        for t, teacher, student in zip(found["temperatures"], example["teacher"], example["student"], strict=True):
            assert teacher == pytest.approx(torch.softmax(TEACHER[i] / t, -1).tolist(), abs=1e-4)
            assert student == pytest.approx(torch.softmax(STUDENT[i] / t, -1).tolist(), abs=1e-4)
        assert example["classes"][example["true"]] == example["label"] == NAMES[int(LABELS[i])]


def test_reliability_bins_agree_with_the_metrics() -> None:
    found = pictures(IMAGES, LABELS, TEACHER, STUDENT, NAMES, T=2, alone_logits=STUDENT)["reliability"]
    assert set(found) == {"teacher", "student", "student_alone"}
    bins = [b for b in found["teacher"] if b["count"]]
    ece = sum(b["count"] / 4 * abs(b["accuracy"] - b["confidence"]) for b in bins)
    assert ece == pytest.approx(evaluate_logits(TEACHER, LABELS).ece, abs=1e-4)


def test_a_picture_is_the_image(tmp_path: Path) -> None:
    url = picture(IMAGES[1])
    assert url is not None
    data = base64.b64decode(url.removeprefix("data:image/png;base64,"))
    with Image.open(io.BytesIO(data)) as file:
        assert (file.format, file.mode, file.size) == ("PNG", "L", (4, 4))
        assert list(file.tobytes()) == IMAGES[1].flatten().tolist()
    assert picture(torch.rand(3)) is None


def test_a_thousand_classes_and_large_pictures_stay_small() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 64, 1000, generator=generator)
    images = torch.randint(0, 256, (64, 3, 96, 128), generator=generator).to(torch.uint8)
    labels = torch.randint(0, 1000, (64,), generator=generator)
    names = [f"class number {i} with a long name" for i in range(1000)]
    text = json.dumps(pictures(images, labels, teacher, student, names, T=4))
    assert len(text) < 100_000
    assert json.loads(text)["disagreement"]["matrix"] is None


@pytest.mark.parametrize("teacher", [TEACHER, None])
def test_the_page_shows_the_examples(tmp_path: Path, teacher: torch.Tensor | None) -> None:
    path = made_run(tmp_path / "0")
    found = pictures(IMAGES, LABELS, teacher, STUDENT, NAMES, T=2, alone_logits=STUDENT)
    (path / "examples.json").write_text(json.dumps(found))
    text = run_page(path)
    page = Page(text)
    assert "<dog>" not in text
    assert sum(source.startswith("data:image/png") for source in page.loaded) == 4
    assert "Reliability" in page.headings
    if teacher is None:
        assert "The student's mistakes" in page.headings
    else:
        assert "What temperature shows" in page.headings
        assert "They put 2 of 4 test examples (50.0%) in different classes." in page.text
