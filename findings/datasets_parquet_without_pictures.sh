#!/usr/bin/env bash
# datasets 5.2.0: to_parquet writes a picture's path and not its bytes, where save_to_disk writes the bytes.
#
# Both write a data set whose column has the feature Image and was made from paths. Expected: either file can be taken to
# another machine. Seen: in the Parquet file each picture is {"bytes": None, "path": "..."}, so that it is read only where
# the pictures still lie at their paths, while the Arrow files of save_to_disk hold the pictures themselves.
#
# Exit status 0 while that is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet datasets==5.2.0 pyarrow==25.0.0 pillow
cd "$folder"
HF_HOME="$folder/cache" HF_DATASETS_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import logging
from importlib.metadata import version
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, Value, disable_progress_bars
from PIL import Image as Picture

logging.disable(logging.WARNING)
disable_progress_bars()
Picture.new("RGB", (8, 8), "red").save("red.png")
features = Features({"image": Image(), "label": Value("int64")})
made = Dataset.from_dict({"image": ["red.png"], "label": [0]}, features=features)
made.to_parquet("made.parquet")
made.save_to_disk("made")


def shown(value: dict) -> str:
    """Whether a stored picture has its bytes, and its path."""
    bytes_ = value["bytes"]
    return f"bytes {'missing' if bytes_ is None else len(bytes_)}, path {value['path']}"


with pa.memory_map(str(next(Path("made").glob("*.arrow")))) as source:
    on_disk = pa.ipc.open_stream(source).read_all().column("image").to_pylist()[0]
in_parquet = pq.read_table("made.parquet").column("image").to_pylist()[0]
print(f"datasets {version('datasets')}, pyarrow {version('pyarrow')}")
print(f"to_parquet: {shown(in_parquet)}\nsave_to_disk: {shown(on_disk)}")
raise SystemExit(not (in_parquet["bytes"] is None and on_disk["bytes"]))
PYTHON
