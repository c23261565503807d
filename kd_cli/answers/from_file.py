"""`teacher=file`: answers that any system has written to a file, matched with the examples by key or by order."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from kd_cli.answers.answer_files import AnswerFile, in_order_of, read_answers
from kd_cli.answers.base import Answers, Given, as_logits, check_kind
from kd_cli.data.sentences import listed, sentence
from kd_cli.data.source import Dataset, Split
from kd_cli.errors import DataError

WHERE, TEST_WHERE = "teacher.answers", "teacher.test_answers"
SHOWN = 3  # examples that the log shows with their answers


class FileAnswers(Answers):
    """Probabilities or logits in a file.

    A table with a column `key` is matched by the examples' names: the paths of pictures, the values of `dataset.key`,
    else numbers of rows from 0. Other files have a row for each published training example, in order, or for each row
    of the table that the data are.
    """

    pending = "to read from the file"

    def __init__(self, *, answers: str, test_answers: str | None = None, kind: str = "auto", key: str = "key") -> None:
        check_kind(kind)
        self.kind, self.key = kind, key
        self.file = read_answers(answers, key=key, where=WHERE)
        self.test_file = None if test_answers is None else read_answers(test_answers, key=key, where=TEST_WHERE)
        self.title = self.file.name

    def facts(self) -> dict[str, Any]:
        test = None if self.test_file is None else self.test_file.checksum
        return {"file": self.file.checksum, "test_file": test, "kind_of_answers": self.kind, "key": self.key}

    def check(self, dataset: Dataset) -> None:
        self.answer(dataset)

    def answer(self, dataset: Dataset, *, seed: int = 0, normalize: Any = "data") -> Given:
        values = in_order_of(self.file, dataset.class_names, WHERE)
        how: dict[str, Any] = {"kind": self.kind, "multilabel": dataset.multilabel}
        rows = self._rows(self.file, dataset, "train")
        train, notes = as_logits(values["train"][rows], where=WHERE, **how)
        unused = len(values["train"]) - len(rows)
        found = self._test(values, dataset)
        if found is None:
            test = None
            notes.append(
                f"{WHERE} has no answers to the test examples: the teacher's errors, its agreement with the student "
                f"and the share of the gap closed are not known; {TEST_WHERE} gives them"
            )
        else:
            test, _ = as_logits(found, where=TEST_WHERE if self.test_file else WHERE, **how)
            unused -= len(test) if self.test_file is None and "test" not in values else 0
        if unused:
            text = "{where}: {n} {rows} of {name} {is} of no training or test example and not used"
            notes.append(sentence(text, unused, where=WHERE, name=self.file.name))
        return Given(train, test, (*notes, *_alignment(train, rows, self.file, dataset)))

    def _test(self, values: dict[str, Tensor], dataset: Dataset) -> Tensor | None:
        """Answers to the test examples [M,C]: of a file of their own, else where the one file covers them all."""
        if self.test_file is not None:
            own = in_order_of(self.test_file, dataset.class_names, TEST_WHERE)
            return own["train"][self._rows(self.test_file, dataset, "test")]
        if "test" in values:
            if len(values["test"]) != len(dataset.test):
                raise DataError(
                    f"{WHERE}: {self.file.name} has {len(values['test'])} answers called test, and {dataset.name} has "
                    f"{len(dataset.test)} test examples"
                )
            return values["test"]
        if self.file.keys is not None:
            if not dataset.test.names and dataset.rows is None:
                return None  # keys are then numbers of training examples
            known = set(self.file.keys)
            if not all(name in known for name in keys_of(dataset.test)):
                return None
        elif dataset.rows is None:
            return None
        return values["train"][self._rows(self.file, dataset, "test")]

    def _rows(self, file: AnswerFile, dataset: Dataset, part: str) -> Tensor:
        """The row of the file for each example of a part [N]. Raises DataError if one has none."""
        where = TEST_WHERE if file is self.test_file else WHERE
        split = dataset.train if part == "train" else dataset.test
        if file.keys is not None:
            return _by_key(file, split, part, where)
        given, own_file = len(file.values["train"]), file is self.test_file
        assert split.rows is not None
        published = len(dataset.test) if part == "test" else dataset.published
        if dataset.rows is not None and given == dataset.rows:  # one answer for each row of the table
            return split.rows
        if given == published and (dataset.rows is None or own_file):
            return split.rows if dataset.rows is None else torch.arange(given)
        wanted = (
            f"{dataset.name} has {dataset.rows:,} rows"
            if dataset.rows is not None
            else f"{dataset.name} has {published:,} {'test' if part == 'test' else 'training'} examples"
            + (f", of which {len(dataset.val):,} validate" if part == "train" and published > len(split) else "")
        )
        raise DataError(
            f"{where}: {file.name} has {given:,} rows, and {wanted}",
            hint=f"a row for each, in their order; or a CSV file with a column {self.key}, such as "
            f"{keys_of(split)[0]!r} for the first",
        )


def keys_of(split: Split) -> tuple[str, ...]:
    """The keys of the examples: their names, else their numbers in the published part, from 0."""
    assert split.rows is not None
    return split.names or tuple(map(str, split.rows.tolist()))


def _by_key(file: AnswerFile, split: Split, part: str, where: str) -> Tensor:
    assert file.keys is not None
    if twice := [key for key, n in Counter(file.keys).items() if n > 1]:
        raise DataError(f"{where}: {file.name} has the key {twice[0]!r} more than once")
    place = {key: i for i, key in enumerate(file.keys)}
    wanted = keys_of(split)
    if lacking := [key for key in wanted if key not in place]:
        raise DataError(
            f"{where}: {file.name} has no answers to {len(lacking):,} of {len(wanted):,} {part}ing examples: "
            f"{listed(map(repr, lacking), 3)}".replace("testing", "test"),
            hint=f"its keys are {listed(map(repr, file.keys), 3)}",
        )
    return torch.tensor([place[key] for key in wanted])


def _alignment(logits: Tensor, rows: Tensor, file: AnswerFile, dataset: Dataset) -> list[str]:
    """Sentences that show whether answers and examples belong together: agreement with the labels, and examples."""
    if dataset.multilabel:
        return []
    labels, names = dataset.train.labels, dataset.class_names
    p, best = logits.double().softmax(1).max(1)
    right, total = int((best == labels).sum()), len(labels)
    most = int(torch.bincount(labels).max())
    shown = []
    for i in torch.linspace(0, total - 1, min(SHOWN, total)).long().tolist():
        key = keys_of(dataset.train)[i]
        shown.append(
            f"example {key}, labelled {names[labels[i]]}: {names[best[i]]} with {p[i]:.2f} (row {int(rows[i])})"
        )
    notes = [
        f"{WHERE} agree with the labels of {right:,} of {total:,} training examples, matched "
        f"{'by order' if file.keys is None else 'by key'}; {'; '.join(shown)}"
    ]
    if total - right > 0.85 * (total - most):
        notes.append(
            f"{WHERE} are near chance: always answering the most frequent class agrees with {most:,}; look at the "
            "order of the rows and of the classes"
        )
    return notes
