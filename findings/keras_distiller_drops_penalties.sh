#!/usr/bin/env bash
# keras 3.15.1: Distiller trains its student without the layers' regularisers, class_weight and sample_weight.
#
# The student's loss is made anew from its labels: what its layers add (kernel_regularizer, activity_regularizer, add_loss)
# and what fit is given as weights is left out. Expected: a student with L2 that learns by Distiller is regularised as by
# its own fit, and examples of weight 0 teach nothing, or an error. Seen: neither has any effect, and fit says nothing: the
# weights are equal to the last bit with L2(10) and without, and with every example's weight 0.
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
from keras.distillation import Distiller, LogitsDistillation

rng = np.random.default_rng(0)
x, y = rng.normal(size=(64, 6)).astype("float32"), rng.integers(0, 3, 64)
labelled = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def network(penalty: keras.regularizers.Regularizer | None = None) -> keras.Model:
    """A small classifier of three classes that answers logits."""
    hidden = keras.layers.Dense(8, "relu", kernel_regularizer=penalty)
    return keras.Sequential([keras.Input((6,)), hidden, keras.layers.Dense(3)])


def trained(distilled: bool, penalty: keras.regularizers.Regularizer | None = None, **keys: object) -> np.ndarray:
    """The hidden layer's weights of a student after ten steps, by Distiller or by its own fit."""
    keras.utils.set_random_seed(0)
    teacher, student = network(), network(penalty)
    loss = LogitsDistillation(temperature=3.0, loss=keras.losses.KLDivergence())
    model = Distiller(teacher, student, loss) if distilled else student
    model.compile(keras.optimizers.SGD(0.02), labelled)
    model.fit(x, y, batch_size=64, epochs=10, verbose=0, **keys)
    return student.layers[0].kernel.numpy()


cases = {
    "kernel_regularizer L2(10)": {"penalty": keras.regularizers.L2(10.0)},
    "class_weight 0, 0 and 9": {"class_weight": {0: 0.0, 1: 0.0, 2: 9.0}},
    "sample_weight 0": {"sample_weight": np.zeros(64)},
}
print(f"keras {version('keras')}, torch {version('torch')}; largest change of a weight of the student")
found = []
for name, keys in cases.items():
    own, by_distiller = (float(np.abs(trained(way, **keys) - trained(way)).max()) for way in (False, True))
    found.append((own, by_distiller))
    print(f"{name}: by the student's own fit {own:.3g}, by Distiller {by_distiller:.3g}")
raise SystemExit(not all(own > 0.01 and by_distiller == 0 for own, by_distiller in found))
PYTHON
