#!/usr/bin/env bash
# onnxruntime 1.32.0: quantize_static spoils a fully connected layer that a network uses more than once.
#
# A bias is stored as int32 in units of its layer's input scale times its weight scale. A layer that is applied three times
# (a student with shared weights) has three input scales. Expected: int8 answers as good as those of the same network with
# three copies of the layer. Seen: in a QOperator file one int8 bias serves all three uses, wrong for two of them. A QDQ file
# (the default) has three, but only where the graph's nodes have names, which ONNX does not require: without, one bias serves
# all, and the default optimisation of a session, not a session without, takes its scale for another. Nothing warns.
#
# Exit status 0 while that is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging
from importlib.metadata import version

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

logging.disable(logging.WARNING)
rng = np.random.default_rng(0)
x = rng.normal(size=(256, 16)).astype("float32")
weight, bias = (0.08 * rng.normal(size=shape) for shape in ((16, 16), (16,)))


class Examples(CalibrationDataReader):
    """The 256 examples, as one batch."""

    def __init__(self) -> None:
        self.batches = iter([{"x": x}])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def network(shared: bool, nodes_named: bool = True) -> str:
    """The path of three fully connected layers, each with ReLU: one that is used thrice, or three equal ones."""
    nodes, value = [], "x"
    for use in range(3):
        name = "layer" if shared else f"layer{use}"
        nodes.append(helper.make_node("Gemm", [value, f"{name}.weight", f"{name}.bias"], [f"sum{use}"], transB=1))
        nodes.append(helper.make_node("Relu", [f"sum{use}"], [value := f"relu{use}"]))
        if nodes_named:
            nodes[-2].name, nodes[-1].name = f"gemm{use}", f"activation{use}"
    names = ["layer"] if shared else [f"layer{use}" for use in range(3)]
    held = [(f"{name}.{part}", array) for name in names for part, array in (("weight", weight), ("bias", bias))]
    sides = [[helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 16])] for name in ("x", value)]
    stored = [numpy_helper.from_array(array.astype("float32"), name) for name, array in held]
    graph = helper.make_graph(nodes, "network", *sides, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    path = f"shared_{shared}.onnx"
    onnx.save(model, path)
    return path


def answers(path: str, level: str) -> np.ndarray:
    """The answers of a session that optimises the graph so far; ENABLE_ALL is the default."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
    return onnxruntime.InferenceSession(path, options).run(None, {"x": x})[0]


ALL, NONE = "ENABLE_ALL", "DISABLE_ALL"
print(f"onnxruntime {version('onnxruntime')}, onnx {version('onnx')}; mean error of int8 answers, in percent of their range")
errors, exact = {}, {shared: answers(network(shared), ALL) for shared in (True, False)}
for layout, nodes_named in ((QuantFormat.QOperator, True), (QuantFormat.QDQ, True), (QuantFormat.QDQ, False)):
    for shared in (True, False):
        quantize_static(network(shared, nodes_named), "int8.onnx", Examples(), quant_format=layout)
        layers = "one layer used thrice" if shared else "three equal layers"
        case = f"{layout.name}, nodes {'with' if nodes_named else 'without'} names, {layers}"
        for level in (ALL, NONE):
            error = np.abs(answers("int8.onnx", level) - exact[shared]).mean() / np.ptp(exact[shared])
            errors[case, level] = 100 * float(error)
        print(f"{case}: {', '.join(f'{level} {errors[case, level]:.2f}%' for level in (ALL, NONE))}")
print(f"float answers differ by {np.abs(exact[True] - exact[False]).max():.3g}")
thrice = "names, one layer used thrice"
spoiled = [errors.pop((f"QOperator, nodes with {thrice}", level)) for level in (ALL, NONE)]
spoiled.append(errors.pop((f"QDQ, nodes without {thrice}", ALL)))
raise SystemExit(not (min(spoiled) > 8 * max(errors.values()) and np.array_equal(exact[True], exact[False])))
PYTHON
