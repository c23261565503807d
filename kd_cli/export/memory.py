"""The memory that a model takes in a process of its own, which runs nothing else.

    python -m kd_cli.export.memory FORM PATH BATCH SHAPE KIND

prints a JSON object, in bytes: `process`, the peak of the whole process, and `model`, what of it came after the
libraries were imported. For ONNX files that process imports no torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

STATUS = Path("/proc/self/status")  # of Linux; elsewhere memory is not measured


def peak_memory(form: str, path: Path, *, batch: int, shape: tuple[int, ...], kind: str) -> dict[str, int] | None:
    """Peak memory in bytes of three batches of one model; None where the system does not say or the process fails.

    `form` is onnx or pt2; `kind` is the type of the input: uint8, float32.
    """
    if not STATUS.is_file():
        return None
    arguments = [form, str(path.resolve()), str(batch), json.dumps(shape), kind]
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    ended = subprocess.run(
        [sys.executable, "-m", "kd_cli.export.memory", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": paths},
    )
    if ended.returncode:
        return None
    found: dict[str, int] = json.loads(ended.stdout.splitlines()[-1])
    return found


def peak() -> int:
    """The highest resident memory of this process so far, in bytes; getrusage would count that of its parent."""
    (line,) = [line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM")]
    return 1024 * int(line.split()[1])


def measured(form: str, path: Path, images: Any) -> dict[str, int]:
    """What `peak_memory` returns, measured in this process."""
    if form == "onnx":
        import onnxruntime

        before = peak()
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        for _ in range(3):
            session.run(None, {session.get_inputs()[0].name: images})
        return {"process": peak(), "model": peak() - before}
    import torch

    import kd_cli.export.student  # noqa: F401  (before the first measurement)

    torch.set_num_threads(1)  # several change the time, which is measured elsewhere
    batch = torch.from_numpy(images)
    before = peak()
    predict = torch.export.load(path).module()
    with torch.no_grad():
        for _ in range(3):
            predict(batch)
    return {"process": peak(), "model": peak() - before}


def main(argv: list[str]) -> None:
    """Print the memory of one model."""
    import numpy as np

    form, path, batch, shape, kind = argv
    images = np.zeros((int(batch), *json.loads(shape)), dtype=kind)
    print(json.dumps(measured(form, Path(path), images)))


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # a user's own models
    main(sys.argv[1:])
