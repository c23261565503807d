"""Show that an exported student runs without torch, by the five lines of its model card.

Trains a short run, exports it, makes a virtual environment with numpy and onnxruntime alone, and executes the lines
there as they stand in README.md. What they print must be what the PyTorch student predicts for the same input. Needs
the extra `export` and pip's access to packages.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from check_wheel import SHORT_RUN, clean_environment, empty, run, say

COMMAND = "import sys; from kd_cli.commands.{0} import main; sys.argv[0] = '{0}'; main()"


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="kd-card-") as folder:
        work = Path(folder)
        student = trained(work)
        python = without_torch(work / "venv")
        for forms in (["--onnx"], ["--int8"]):
            to = work / forms[0].strip("-")
            own_command("kd_export", [str(student), *forms, "--no-cost", "--to", str(to)], work)
            found = re.search(r"```python\n(.*?)\n```", (to / "README.md").read_text(encoding="utf-8"), re.DOTALL)
            assert found is not None
            printed = run([str(python), "-I", "-c", found[1]], cwd=to, env=clean_environment(work)).strip()
            wanted = prediction(student, json.loads((to / "export.json").read_text(encoding="utf-8")))
            if printed != wanted:
                raise SystemExit(f"the card's lines print {printed}, and the PyTorch student predicts {wanted}")
            say(f"{forms[0]}: {len(found[1].splitlines())} lines print {printed}, as the PyTorch student predicts")


def trained(work: Path) -> Path:
    """The directory of a short run."""
    own_command("kd_run", [*SHORT_RUN, "teacher=tinymlp", "student=tinymlp"], empty(work / "run"))
    (summary,) = (work / "run" / "outputs").glob("*/*/summary.json")
    return summary.parent


def own_command(name: str, arguments: list[str], folder: Path) -> None:
    """Run one of the project's commands with this interpreter."""
    root = Path(__file__).resolve().parents[1]
    environment = clean_environment(folder) | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    run([sys.executable, "-c", COMMAND.format(name), *arguments], cwd=folder, env=environment)


def without_torch(environment: Path) -> Path:
    """The interpreter of a new virtual environment with numpy and onnxruntime alone."""
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-compile"]
    subprocess.run([*pip, "numpy", "onnxruntime"], check=True)
    if subprocess.run([str(python), "-I", "-c", "import torch"], capture_output=True).returncode == 0:
        raise SystemExit("the new environment has torch, so nothing would be shown")
    return python


def prediction(run_dir: Path, record: dict[str, list[str]]) -> str:
    """What the PyTorch student predicts for an image of zeros, as the card's lines print it."""
    import torch

    from kd_cli import load_student

    images = torch.zeros(1, *map(int, record["input_shape"][1:]))
    return str([[record["classes"][int(row.argmax())]] for row in load_student(run_dir)(images)])


if __name__ == "__main__":
    main()
