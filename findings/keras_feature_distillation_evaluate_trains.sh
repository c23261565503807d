#!/usr/bin/env bash
# keras 3.15.1: with a FeatureDistillation between layers, Distiller.evaluate changes the student.
#
# To read the layer, Distiller runs the student a second time, always with training=True: so do evaluate, and fit's
# validation_data. Expected: evaluate leaves a model as it is, and says the same twice. Seen: BatchNormalization takes the
# validation set's statistics into its moving averages, so that each evaluate changes the student's predictions (fit moves
# the averages twice a step), and distillation_loss is measured with dropout on. With LogitsDistillation neither happens.
#
# Exit status 0 while that is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet keras==3.15.1 torch==2.13.0
cd "$folder"
KERAS_BACKEND=torch KERAS_HOME="$folder" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import keras
import numpy as np
from keras import layers
from keras.distillation import Distiller, FeatureDistillation, LogitsDistillation

keras.utils.set_random_seed(0)
rng = np.random.default_rng(0)
x, y = rng.normal(3, 1, (256, 6)).astype("float32"), rng.integers(0, 3, 256)


def network(dropout: float) -> keras.Model:
    """A classifier of three classes whose hidden layer is named `hidden`."""
    hidden = [layers.Dense(8), layers.BatchNormalization(name="norm"), layers.ReLU(name="hidden")]
    return keras.Sequential([keras.Input((6,)), layers.Dropout(dropout), *hidden, layers.Dense(3)])


def evaluated(loss: keras.distillation.DistillationLoss) -> tuple[float, float]:
    """How far three calls of evaluate move the student's predictions, and the spread of distillation_loss without norm."""
    moved, spread = network(0.0), network(0.5)
    before = moved.predict(x, verbose=0)
    found: dict[keras.Model, list[float]] = {moved: [], spread: []}
    for student, losses in found.items():
        distiller = Distiller(network(0.0), student, [loss])
        distiller.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        student.get_layer("norm").trainable = student is moved  # False: as in inference
        for _ in range(3):
            results = distiller.evaluate(x, y, batch_size=32, verbose=0, return_dict=True)
            losses.append(results["distillation_loss"])
            if student is moved:
                print(f"  {type(loss).__name__}: student_loss {results['student_loss']:.4f}")
    return float(np.abs(moved.predict(x, verbose=0) - before).max()), max(found[spread]) - min(found[spread])


print(f"keras {version('keras')}, torch {version('torch')}; three calls of evaluate, each on the same data")
of_features = evaluated(FeatureDistillation("mse", "hidden", "hidden"))
of_logits = evaluated(LogitsDistillation(loss=keras.losses.KLDivergence()))
for name, (change, spread) in (("FeatureDistillation", of_features), ("LogitsDistillation", of_logits)):
    print(f"{name}: predictions moved by {change:.3g}; distillation_loss of a student with dropout varied by {spread:.3g}")
raise SystemExit(not (min(of_features) > 0.01 and max(of_logits) < 1e-5))
PYTHON
