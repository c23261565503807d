#!/usr/bin/env bash
# onnxruntime 1.32.0: quantize_static rounds what a shortcut adds, although only convolutions are to be quantised.
#
# A residual block adds its input to the output of its last layer. With op_types_to_quantize=["Conv"] and QDQ, expected:
# the convolution reads rounded values and Add the values themselves. Seen: both read the rounded ones. A network that
# was trained with simulated int8 inputs of its layers then computes another sum in the file; in a mobilenetv2 of ten
# such sums that had been trained for two epochs, one in four classes changed.
#
# Exit status 0 while that is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet numpy onnx==1.23.2 onnxruntime==1.32.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import numpy
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import __version__
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

weight = numpy.random.default_rng(0).normal(size=(2, 2, 1, 1)).astype("float32")
values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 2, 4, 4]) for name in ("x", "y")]
nodes = [
    helper.make_node("Relu", ["x"], ["hidden"]),
    helper.make_node("Conv", ["hidden", "weight"], ["found"]),
    helper.make_node("Add", ["found", "hidden"], ["y"], name="shortcut"),
]
graph = helper.make_graph(nodes, "block", values[:1], values[1:], [numpy_helper.from_array(weight, "weight")])
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), "block.onnx")


class Reader(CalibrationDataReader):
    def __init__(self) -> None:
        self.left = [numpy.random.default_rng(1).normal(size=(1, 2, 4, 4)).astype("float32")]

    def get_next(self):
        return {"x": self.left.pop()} if self.left else None


quantize_static(
    "block.onnx",
    "int8.onnx",
    Reader(),
    quant_format=QuantFormat.QDQ,
    op_types_to_quantize=["Conv"],
    activation_type=QuantType.QInt8,
    weight_type=QuantType.QInt8,
    extra_options={"OpTypesToExcludeOutputQuantization": ["Conv"]},
)
made = {name: node.op_type for node in onnx.load("int8.onnx").graph.node for name in node.output}
(add,) = (node for node in onnx.load("int8.onnx").graph.node if node.op_type == "Add")
read = [made[name] for name in add.input]
print(f"onnxruntime {__version__}: Add reads the outputs of {read}")
raise SystemExit("DequantizeLinear" not in read)
PYTHON
