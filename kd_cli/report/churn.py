"""How often two trainings that differ in their seed alone answer differently: prediction churn.

Anil et al. 2018 report it for two retrainings of one model; here it is the mean over all pairs of runs of a setting.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kd_cli.report.compare import Setting, models_of
from kd_cli.report.read import Run
from kd_cli.storage.files import read_json
from kd_cli.storage.run_dir import PREDICTIONS, intact


def churn(setting: Setting, role: str) -> float | None:
    """The share of the test examples that two distinct models of a role put in different classes, over all pairs.

    `role` is student or student_alone. None for fewer than two models, and where runs did not note their answers.
    """
    answers = [said for run in models_of(setting.runs, role).values() if (said := predictions(run, role))]
    if len(answers) < 2 or len(set(map(len, answers))) > 1:
        return None
    return mean_disagreement(answers)


def mean_disagreement(answers: Sequence[Sequence[int]]) -> float:
    """The share of the examples on which two of several models differ, over all pairs; each has a class per example."""
    n, alike = len(answers), 0
    for said in zip(*answers, strict=True):
        alike += n * (n - 1) if len(set(said)) == 1 else sum(k * (k - 1) for k in Counter(said).values())
    return 1 - alike / (n * (n - 1) * len(answers[0]))


def predictions(run: Run, role: str) -> list[int]:
    """The class of each test example by a model of a run; empty where the run did not note them."""
    file = run.path / PREDICTIONS
    if not file.is_file() or not intact(file):
        return []
    found = read_json(file).get(role, [])
    return [int(said) for said in found]
