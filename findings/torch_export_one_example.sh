#!/usr/bin/env bash
# torch 2.13.0: with an example of one image, torch.export refuses the batch axis that the ONNX exporter leaves free.
#
# torch.onnx.export(..., dynamo=True) is built on torch.export, takes the same dynamic_shapes, and writes a file. Expected:
# the two agree on what one example of a batch allows. Seen: torch.export.export with Dim("batch", min=1) raises "your
# code specialized it to be a constant (1)", while torch.onnx.export gives an axis named "batch", and ONNX Runtime runs
# the file with three images. So that an exporter to ONNX works says nothing of a .pt2 file; with an example of two, both do.
#
# Exit status 0 while that is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import onnxruntime
import torch
from torch import nn

network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
shapes = ({0: torch.export.Dim("batch", min=1)},)
three = torch.rand(3, 3, 8, 8)


def as_program(examples: int) -> str:
    """What torch.export makes of so many examples: the error's second line, or the size of three answers."""
    try:
        program = torch.export.export(network, (torch.zeros(examples, 3, 8, 8),), dynamic_shapes=shapes)
    except torch._dynamo.exc.UserError as error:
        return str(error).splitlines()[1].strip()
    return str(tuple(program.module()(three).shape))


def as_onnx(examples: int) -> str:
    """The size of ONNX Runtime's answers to three images."""
    example = (torch.zeros(examples, 3, 8, 8),)
    exported = torch.onnx.export(network, example, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(exported.model_proto.SerializeToString())
    return str(session.run(None, {session.get_inputs()[0].name: three.numpy()})[0].shape)


print(", ".join(f"{name} {version(name)}" for name in ("torch", "onnx", "onnxscript", "onnxruntime")))
found = {examples: (as_program(examples), as_onnx(examples)) for examples in (1, 2)}
for examples, (program, onnx) in found.items():
    print(f"{examples} in the example: torch.export {program[:90]}; ONNX Runtime {onnx}")
same = found[1][0].startswith("- You marked batch as dynamic but your code specialized it") and found[2][0] == "(3, 5)"
raise SystemExit(not (same and found[1][1] == found[2][1] == "(3, 5)"))
PYTHON
