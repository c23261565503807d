"""An ensemble of acoustic models and one model distilled from it (Hinton 2015, section 4), on spoken digits.

The paper decodes with a recogniser and counts words that are wrong. Here a recording is one word of ten, and the word's
states follow each other in order: the best path through each word's states (Viterbi) says which word it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kd_cli.data.source import Dataset
from kd_cli.errors import DataError
from kd_cli.experiments.recorded import completed, configuration, logits_on_test, stored
from kd_cli.export.load import load_student
from kd_cli.learn.teachers import combine_logits
from kd_cli.report.figures import Figure
from kd_cli.report.read import Run
from kd_cli.report.render import render
from kd_cli.report.svg.lines import Point, Series, line_chart
from kd_cli.report.svg.small import legend
from kd_cli.runs.device_data import load_device_data
from kd_cli.statistics import Stat, stat
from kd_cli.storage.files import write_json, write_text
from kd_cli.storage.store import Entry, Store

Results = dict[str, float]  # frame_accuracy, and recording_errors where recordings are known, both in percent
WORDS = 10  # of the spoken digits


@dataclass(frozen=True)
class Recordings:
    """The test frames of whole recordings: which recording each frame is of, and which word each recording is."""

    number: Tensor  # [M], ascending
    words: Tensor  # [R]
    log_prior: Tensor  # of the states in the training part: [C]

    @classmethod
    def of(cls, dataset: Dataset) -> Recordings:
        """Raises DataError for data that are no frames of recordings of ten words."""
        names = dataset.test.names
        if not names or dataset.classes % WORDS:
            raise DataError(
                f"{dataset.name} has no frames of recordings of {WORDS} words", hint="dataset=spoken_digits"
            )
        starts = [k for k, name in enumerate(names) if k == 0 or name != names[k - 1]]
        sizes = torch.tensor([b - a for a, b in zip(starts, [*starts[1:], len(names)], strict=True)])
        number = torch.arange(len(starts)).repeat_interleave(sizes)
        words = dataset.test.labels[torch.tensor(starts)] // (dataset.classes // WORDS)
        counts = torch.bincount(dataset.train.labels, minlength=dataset.classes)
        return cls(number, words, (counts.double() / counts.sum()).log())

    def errors(self, logits: Tensor) -> float:
        """The share, in percent, of recordings whose best word is another, from logits [M,C] of their frames."""
        scores = logits.double().log_softmax(1) - self.log_prior  # likelihoods up to a factor of each frame's own
        best = best_words(scores.unflatten(1, (WORDS, -1)), self.number)
        return 100 * float((best != self.words).double().mean())


def best_words(scores: Tensor, number: Tensor) -> Tensor:
    """The word of each recording whose states have the best path through its frames: [R].

    `scores` are the log likelihoods [M,W,K] of the K states of W words, `number` [M] the recording of each frame,
    ascending. A path begins in a word's first state, ends in its last one, and stays or moves one state on from frame
    to frame; a recording of fewer frames than states ends where it can.
    """
    states = scores.shape[2]
    found = []
    for frames in scores.split(torch.bincount(number).tolist()):
        best = torch.full(frames.shape[1:], -torch.inf, dtype=scores.dtype)
        best[:, 0] = frames[0, :, 0]
        for frame in frames[1:]:
            moved = torch.cat([torch.full_like(best[:, :1], -torch.inf), best[:, :-1]], 1)
            best = torch.maximum(best, moved) + frame
        found.append(best[:, min(states, len(frames)) - 1].argmax())
    return torch.stack(found)


def speech(folder: Path) -> list[Path]:
    """Compare one network, ten networks that differ in initialisation, and the network distilled from their mean.

    The folder is that of a sweep over T and seeds with an ensemble as the teacher. Frame accuracy and the error of the
    whole recording, in percent, mean and std over networks; the share of the ensemble's gain that the student keeps.
    T is chosen by validation frame accuracy. Writes speech.json and speech.html into the folder. Raises DataError.
    """
    runs = completed(folder)
    config = configuration(runs[0])
    dataset = load_device_data(config).dataset
    recordings, labels = Recordings.of(dataset), dataset.test.labels
    store = Store(config.store_dir)

    def results(logits: Tensor) -> Results:
        accuracy = 100 * float((logits.argmax(1) == labels).double().mean())
        return {"frame_accuracy": accuracy, "recording_errors": recordings.errors(logits)}

    def of_entries(fingerprints: Iterable[str]) -> list[Results]:
        entries = [stored(store, key, runs[0]) for key in dict.fromkeys(fingerprints)]
        return [results(logits_on_test(entry)) for entry in entries]

    teacher = runs[0].summary["teacher"]
    members = [stored(store, one["fingerprint"], runs[0]) for one in teacher.get("members") or [teacher]]
    found = {
        "alone": of_entries(run.summary["student_alone"]["fingerprint"] for run in runs),
        "members": [results(logits_on_test(entry)) for entry in members],
        "ensemble": [results(ensemble_logits(members, config.combine))],
    }
    students = {T: [run for run in runs if float(run.config["T"]) == T] for T in temperatures(runs)}
    with torch.no_grad():
        by_T = {
            T: [results(load_student(run.path)(dataset.test.images[:])) for run in some] for T, some in students.items()
        }
    chosen = max(students, key=lambda T: mean_of(run.validation("val_accuracy") or 0.0 for run in students[T]))
    table = {
        "recordings": len(recordings.words),
        "frames": len(labels),
        "networks": found,
        "distilled": [{"T": T, "results": rows} for T, rows in by_T.items()],
        "chosen_T": chosen,
        "gain_kept": gain_kept(found["members"], found["ensemble"], by_T[chosen]),
    }
    write_json(folder / "speech.json", table)
    write_text(folder / "speech.html", _page(found, by_T, chosen))
    return [folder / "speech.html", folder / "speech.json"]


def ensemble_logits(members: list[Entry], combine: str) -> Tensor:
    """The logits at T = 1 of the members' mean on the test data: [M,C]."""
    return combine_logits(torch.stack([logits_on_test(entry) for entry in members]), combine=combine, T=torch.ones(()))


def temperatures(runs: Iterable[Run]) -> list[float]:
    """The temperatures of some runs, ascending."""
    return sorted({float(run.config["T"]) for run in runs})


def mean_of(values: Iterable[float]) -> float:
    some = list(values)
    return sum(some) / len(some)


def gain_kept(one: list[Results], ensemble: list[Results], distilled: list[Results]) -> dict[str, float | None]:
    """The share of the ensemble's gain over one network that the distilled one keeps, by measure; None without gain."""
    kept: dict[str, float | None] = {}
    for measure, sign in (("frame_accuracy", 1), ("recording_errors", -1)):
        base, best, mine = (mean_of(row[measure] for row in rows) for rows in (one, ensemble, distilled))
        gain = sign * (best - base)
        kept[measure] = sign * (mine - base) / gain if gain > 0 else None
    return kept


def _page(found: Mapping[str, list[Results]], by_T: Mapping[float, list[Results]], chosen: float) -> str:
    names = {"frame_accuracy": "frame accuracy, %", "recording_errors": "recordings recognised wrongly, %"}
    return render(
        "charts",
        title="An ensemble of acoustic models, and one distilled from it",
        figures=[_figure(measure, name, found, by_T, chosen) for measure, name in names.items()],
    )


def _figure(
    measure: str, name: str, found: Mapping[str, list[Results]], by_T: Mapping[float, list[Results]], chosen: float
) -> Figure:
    def level(rows: list[Results]) -> Stat:
        value = stat(row[measure] for row in rows)
        assert value is not None
        return value

    series = [Series("distilled", [Point(T, level(rows).mean, level(rows).std) for T, rows in by_T.items()], "c0")]
    words = {"members": ("one network", "alone"), "ensemble": ("the ensemble", "teacher")}
    for key, (title, colour) in words.items():
        one = level(found[key])
        series.append(Series(title, [Point(T, one.mean, one.std) for T in by_T], colour, "level"))
    chart = line_chart(
        series,
        title=f"{name} against T",
        x_label="temperature T (logarithmic)",
        y_label=name,
        log_x=True,
        x_ticks=list(by_T),
    )
    n = max(len(rows) for rows in by_T.values())
    note = (
        f"Mean ± std: of {n} distilled networks at each T, of the {len(found['members'])} networks that teach; the "
        f"ensemble is one. Validation frames choose T = {chosen:g}."
    )
    return Figure(name[0].upper() + name[1:], chart, note, legend([(s.name, s.colour, s.style) for s in series]))
