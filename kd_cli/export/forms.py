"""The forms in which a student is shipped: ONNX and torch.export's .pt2."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_cli.errors import ExportError, first_line
from kd_cli.export.parity import Predict
from kd_cli.export.student import Student
from kd_cli.shipped import USER, raised_by

INPUT, OUTPUT = "images", "logits"
ONE_FILE = 2**31 - 1  # bytes that protobuf can hold
PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def check_packages() -> None:
    """ExportError that names the extra when a package for ONNX is missing."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ExportError(
                f"ONNX needs {name}, which is not installed", hint="pip install 'kd-cli[export]'"
            ) from error


def example_of(student: Student, count: int) -> Tensor:
    """`count` images of zeros in the type that the exported form takes: bytes or floats, as the data set has them."""
    kind = torch.uint8 if student.values == "bytes" else student.dtype
    return torch.zeros(count, *student.input_shape, dtype=kind)


def program_of(student: Student, examples: int = 2) -> torch.export.ExportedProgram:
    """The student as torch.export has it, in eval mode, with a free batch axis. ExportError says what prevents it."""
    batch = torch.export.Dim("batch", min=1)
    try:
        with narrow_warnings():
            return torch.export.export(
                student.eval(), (example_of(student, examples),), dynamic_shapes={"images": {0: batch}}
            )
    except Exception as error:
        raise not_exported(error) from error


def not_exported(error: Exception) -> ExportError:
    """Why torch.export does not follow a model, and what to do."""
    whose = "the model's own code" if raised_by(error) == USER else "the model"
    return ExportError(
        f"{whose} cannot be exported: {type(error).__name__}: {first_line(error)}",
        hint="the forward pass must not branch on values of its input or on the number of images; "
        "load_student(RUN_DIR) runs every model in PyTorch",
    )


def pt2_bytes(student: Student, examples: int = 2) -> bytes:
    """The content of a .pt2 file."""
    buffer = io.BytesIO()
    with narrow_warnings():
        torch.export.save(program_of(student, examples), buffer)
    return buffer.getvalue()


def run_pt2(path: Path) -> Predict:
    """Predict with a .pt2 file."""
    with path.open("rb") as file:
        module = torch.export.load(io.BytesIO(file.read())).module()
    return lambda images: module(images)


def onnx_bytes(student: Student, metadata: Mapping[str, Any], examples: int = 2) -> bytes:
    """The content of a .onnx file, with metadata; the names are those of INPUT and OUTPUT."""
    batch = torch.export.Dim("batch", min=1)
    try:
        with quiet_exporter(), narrow_warnings():
            exported = torch.onnx.export(
                student.eval(),
                (example_of(student, examples),),
                dynamo=True,
                dynamic_shapes={"images": {0: batch}},
                input_names=[INPUT],
                output_names=[OUTPUT],
                verbose=False,
            )
    except Exception as error:
        raise not_exported(error) from error
    assert exported is not None
    proto = exported.model_proto
    clean(proto.graph)
    for function in proto.functions:
        for node in function.node:
            clean_node(node)
    for key, value in metadata.items():
        proto.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    if proto.ByteSize() > ONE_FILE:
        raise ExportError("the model is larger than 2 GB, which one ONNX file cannot hold", hint="--pt2")
    content: bytes = proto.SerializeToString()
    return content


def clean(graph: Any) -> None:
    """Remove source paths, and the shapes of initialisers, which ONNX Runtime's quantisers refuse."""
    constant = {tensor.name for tensor in graph.initializer}
    kept = [info for info in graph.value_info if info.name not in constant]
    del graph.value_info[:]
    graph.value_info.extend(kept)
    for part in (graph, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
    for node in graph.node:
        clean_node(node)


def clean_node(node: Any) -> None:
    """Remove the metadata of a node and of the graphs inside it."""
    del node.metadata_props[:]
    node.doc_string = ""
    for attribute in node.attribute:
        for graph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
            clean(graph)


def run_onnx(path: Path) -> Predict:
    """Predict with a .onnx file through ONNX Runtime on the CPU."""
    session = onnx_session(path)
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


def onnx_session(path: Path) -> Any:
    """A .onnx file in ONNX Runtime on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common class
        raise ExportError(f"ONNX Runtime does not run the exported file: {first_line(error)}") from error


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Let the exporter's packages log errors only."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


class narrow_warnings(warnings.catch_warnings):
    """Ignore what the exporters say of their own inner workings."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        warnings.filterwarnings("ignore", message=r".*isinstance\(treespec, LeafSpec\)", category=FutureWarning)
        warnings.filterwarnings("ignore", message=r".*Guards may run slower", category=RuntimeWarning)
        return entered
