"""A student with 8-bit integer weights for ONNX Runtime, made from its ONNX file."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_cli.data.stored import Images
from kd_cli.errors import ExportError, first_line
from kd_cli.export.forms import INPUT
from kd_cli.export.parity import Parity

Ranges = Sequence[tuple[float, float]]
CALIBRATION = 512  # training examples, evenly spaced over the training part
BATCH = 32
AGREEMENT = 0.98  # with the PyTorch student, at least
MORE_ERRORS = 0.01  # of the test examples, at most
INSTEAD = "ship --onnx instead"
LAYERS = ["Conv", "Gemm", "MatMul"]  # the preparation of the input stays in floating point


def int8_bytes(content: bytes, train: Images, ranges: Ranges | None = None) -> tuple[bytes, str]:
    """The content of a .onnx file with int8 weights, and how it was quantised, from that of one with floats.

    Convolutional networks: static, per channel, QDQ, activations calibrated on training images [N, ...]. Networks
    without convolutions: dynamic, per channel. A student that was trained in simulated int8 has its own `ranges` of the
    layers' inputs, in the order in which they compute: static, and no outputs are rounded that its training did not
    round. ExportError when ONNX Runtime cannot quantise the file.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_dynamic, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    convolves = any(node.op_type == "Conv" for node in onnx.load_from_string(content).graph.node)
    with tempfile.TemporaryDirectory() as folder:
        given, prepared, written = (Path(folder) / name for name in ("float.onnx", "prepared.onnx", "int8.onnx"))
        given.write_bytes(content)
        try:
            quant_pre_process(given, prepared, skip_symbolic_shape=True)
            shared: dict[str, Any] = {
                "op_types_to_quantize": LAYERS,
                "per_channel": True,
                "weight_type": QuantType.QInt8,
            }
            if convolves or ranges is not None:
                options = {} if ranges is None else own_ranges(onnx.load(prepared), ranges)
                quantize_static(
                    prepared,
                    written,
                    reader(train),
                    quant_format=QuantFormat.QDQ,
                    activation_type=QuantType.QInt8,
                    extra_options=options,
                    **shared,
                )
            else:
                quantize_dynamic(prepared, written, **shared)
        except ExportError:
            raise
        except Exception as error:  # its errors have no common class
            raise ExportError(
                f"ONNX Runtime does not quantise the student: {first_line(error)}", hint="--onnx"
            ) from error
        how = "in training" if ranges is not None else "static" if convolves else "dynamic"
        quantised = onnx.load(written)
        if ranges is not None:
            leave_others_whole(quantised.graph)
        return with_metadata(quantised, content), how


def own_ranges(model: Any, ranges: Ranges) -> dict[str, Any]:
    """Options with which ONNX Runtime takes the ranges of layers' inputs as they are. ExportError where they misfit."""
    import numpy
    from onnxruntime.quantization import QuantType

    constant = {tensor.name for tensor in model.graph.initializer}
    layers = [node for node in model.graph.node if node.op_type in LAYERS and node.input[1] in constant]
    if len(layers) != len(ranges):
        raise ExportError(
            f"the student computes {len(ranges)} layers in int8, and its ONNX file has {len(layers)} with weights",
            hint="student.quantise=null; kd-export --int8 then quantises the trained student",
        )
    found: dict[str, Any] = {}
    for node, span in zip(layers, ranges, strict=True):
        low, high = (numpy.array(end, dtype=numpy.float32) for end in span)
        found[node.input[0]] = [{"quant_type": QuantType.QInt8, "rmin": low, "rmax": high}]
    return {"TensorQuantOverrides": found, "OpTypesToExcludeOutputQuantization": LAYERS, "QuantizeBias": False}


def leave_others_whole(graph: Any) -> None:
    """Let all nodes but LAYERS read values as they were before they were rounded for these.

    ONNX Runtime rounds a tensor for every node that reads it: of the input of a residual block, the shortcut would add
    the rounded values, and the student was trained with the others.
    """
    rounding = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
    rounded = {node.output[0]: rounding.get(node.input[0]) for node in graph.node if node.op_type == "DequantizeLinear"}
    for node in graph.node:
        if node.op_type not in LAYERS:
            for k, name in enumerate(node.input):
                node.input[k] = rounded.get(name) or name


def calibration_images(train: Images) -> Tensor:
    """CALIBRATION images evenly spaced over the training part, in whose order classes may follow one another."""
    count = min(CALIBRATION, len(train))
    return train[torch.linspace(0, len(train) - 1, count).long()]


def reader(train: Images) -> Any:
    """What ONNX Runtime reads its calibration data from."""
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(calibration_images(train).split(BATCH))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {INPUT: batch.numpy()}

    return Reader()


def with_metadata(model: Any, source: bytes) -> bytes:
    """The content of a model's .onnx file with the metadata of another file."""
    import onnx

    other = onnx.load_from_string(source)
    del model.metadata_props[:]
    model.metadata_props.extend(other.metadata_props)
    serialised: bytes = model.SerializeToString()
    return serialised


def check_int8(found: Parity, student: Parity, name: str, role: str = "student", *, hint: str = INSTEAD) -> None:
    """ExportError when an int8 form disagrees with the student, or errs, more often than is allowed."""
    more = (found.errors - student.errors) / found.total
    if found.agreement >= AGREEMENT and more <= MORE_ERRORS:
        return
    raise ExportError(
        f"{name} agrees with the PyTorch {role} on {found.agreement:.2%} of the test examples and makes "
        f"{found.errors} errors, the {role} {student.errors}; at least {AGREEMENT:.0%} must agree, and at most "
        f"{MORE_ERRORS:.0%} of the examples may be further errors; the file was not written",
        hint=hint,
    )
