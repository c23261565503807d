#!/usr/bin/env bash
# lightgbm 4.7.0: the objective "binary" takes every soft label above 0 for the label 1.
#
# A student of trees is trained on a teacher's probabilities, as xgboost 3.2.0 does with "binary:logistic" and lightgbm with
# "cross_entropy". Expected: "binary" either does so too (its logistic loss is the same formula) or refuses labels that are
# neither 0 nor 1. Seen: no error (at verbosity 1, one line: "Contains only one class"); softmax never gives a plain 0, so
# that the student answers 1 for every example. With teachers' probabilities below 0.05 rounded to 0, the student answers
# whether the teacher's probability was above 0.05, and not the probability.
#
# Exit status 0 while that is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet lightgbm==4.7.0 xgboost-cpu==3.2.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import lightgbm
import numpy as np
import xgboost

x = np.random.default_rng(0).normal(size=(4000, 3))
teacher = 1 / (1 + np.exp(-2 * x[:, 0]))  # its probability of class 1
rounded = np.where(teacher < 0.05, 0.0, teacher)


def of_lightgbm(objective: str, labels: np.ndarray) -> np.ndarray:
    keys = {"objective": objective, "verbosity": -1, "num_threads": 1, "seed": 0}
    return lightgbm.train(keys, lightgbm.Dataset(x, labels), 50).predict(x)


def of_xgboost(labels: np.ndarray) -> np.ndarray:
    data = xgboost.DMatrix(x, labels)
    return xgboost.train({"objective": "binary:logistic", "nthread": 1}, data, 50).predict(data)


print(", ".join(f"{name} {version(name)}" for name in ("lightgbm", "xgboost-cpu")))
found = {}
for name, labels in (("the teacher's probabilities", teacher), ("those below 0.05 rounded to 0", rounded)):
    answers = {f"lightgbm {objective}": of_lightgbm(objective, labels) for objective in ("binary", "cross_entropy")}
    answers["xgboost binary:logistic"] = of_xgboost(labels)
    for library, answer in answers.items():
        agreed = float(((answer > 0.5) == (teacher > 0.5)).mean())
        found[name, library] = agreed
        means = f"mean {answer.mean():.3f} (labels {labels.mean():.3f})"
        print(f"{name}: {library}: {means}, the teacher's class on {agreed:.1%}")
binary = [agreed for (_, library), agreed in found.items() if library == "lightgbm binary"]
others = [agreed for (_, library), agreed in found.items() if library != "lightgbm binary"]
raise SystemExit(not (max(binary) < 0.7 and min(others) > 0.95))
PYTHON
