"""What teacher, student and each exported form cost: latency, throughput, file size, peak memory."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_cli.cpus import usable
from kd_cli.data.stored import Images
from kd_cli.errors import ExportError
from kd_cli.export.forms import INPUT, OUTPUT, onnx_session, pt2_bytes, run_pt2
from kd_cli.export.latency import Call, side_by_side, surroundings, threads
from kd_cli.export.memory import peak_memory
from kd_cli.export.student import Student

BATCHES = (1, 128)


def measured_cost(models: Mapping[str, Student], files: Mapping[str, Path], images: Images) -> dict[str, Any]:
    """Latencies and memory of PyTorch models and of exported files, by name, on examples of the test set.

    `files` are by form: onnx, int8, pt2. Each model is measured with batches of BATCHES and with one thread and all.
    """
    where = surroundings()
    rows: dict[str, dict[str, Any]] = {name: {"latency": []} for name in (*models, *files)}
    for count in sorted({1, usable()}):
        with threads(count), torch.inference_mode():
            for size in BATCHES:
                batch = images[torch.arange(size) % len(images)].contiguous()
                calls = {name: in_torch(model, batch) for name, model in models.items()}
                calls |= {name: in_file(name, path, batch) for name, path in files.items()}
                for name, found in side_by_side(calls, batch=size).items():
                    rows[name]["latency"].append({"batch": size, "threads": count, **found})
    for name, model in models.items():
        with tempfile.TemporaryDirectory() as folder:
            rows[name]["peak_memory"] = memory_of_module(model, Path(folder) / "model.pt2", images)
    for name, path in files.items():
        rows[name]["peak_memory"] = memory("pt2" if name == "pt2" else "onnx", path, images)
    return {**where, "memory_batch": BATCHES[-1], "rows": rows}


def in_torch(model: Student, batch: Tensor) -> Call:
    """One batch through a PyTorch model, without the checks of its values."""
    return lambda: model.unchecked(batch)


def in_file(form: str, path: Path, batch: Tensor) -> Call:
    """One batch through an exported file."""
    if form == "pt2":
        predict = run_pt2(path)
        return lambda: predict(batch)
    session, array = onnx_session(path), batch.numpy()
    return lambda: session.run([OUTPUT], {INPUT: array})


def memory(form: str, path: Path, images: Images) -> dict[str, int] | None:
    kind = str(images.dtype).removeprefix("torch.")
    return peak_memory(form, path, batch=BATCHES[-1], shape=tuple(images.shape[1:]), kind=kind)


def memory_of_module(model: Student, path: Path, images: Images) -> dict[str, int] | None:
    """Peak memory of a PyTorch model as a program of torch.export; None where it cannot be one."""
    try:
        path.write_bytes(pt2_bytes(model))
    except ExportError:
        return None
    return memory("pt2", path, images)


def size_of(model: Student) -> int:
    """The bytes of a model's weights and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in model.network.state_dict().values())


def int8_against_floats(cost: Mapping[str, Any] | None) -> str | None:
    """Whether int8 took less time for one example than the ONNX file of floats; None where not both were measured."""
    if cost is None or not {"onnx", "int8"} <= cost["rows"].keys():
        return None
    floats, int8 = (cost["rows"][form]["latency"][0]["median_ms"] for form in ("onnx", "int8"))
    took = (
        f"int8 took {int8 / floats:.2f} of the time of ONNX with floats for one example on one thread of this machine"
    )
    return took if int8 < floats else f"int8 is smaller and not faster: {took}"
