"""Every command in the README is run here, at a size that takes seconds, or by the Makefile that it names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from made_mnist import write_mnist
from PIL import Image
from process import Ran
from safetensors.torch import save_file

from kd_cli.models.mlp import mlp

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = ("training.epochs=1", "teacher_training.epochs=1")


def commands() -> list[str]:
    """The lines of the README's indented blocks and inline code that are commands of ours."""
    blocks = re.findall(r"^    (kd-run.*|kd-report.*)$", README, re.M)
    inline = re.findall(r"`(kd-run [^`]*)`", README)
    return list(dict.fromkeys(" ".join(command.partition("#")[0].split()) for command in blocks + inline))


RUNS = [c for c in commands() if c.startswith("kd-run") and "--help" not in c and "-sc" not in c and "resume=" not in c]


def files_of_the_readme(folder: Path) -> None:
    """The user's own files that the README shows or names."""
    (folder / "conf" / "model").mkdir(parents=True)
    for name, text in re.findall(r"```(?:python|yaml)\n# (\S+\.(?:py|yaml))\n(.*?)```", README, re.S):
        (folder / name).write_text(text)
    for kind in ("a", "b"):
        (folder / "pictures" / kind).mkdir(parents=True)
        for k in range(12):
            Image.new("RGB", (40, 32), (k * 20, 100 if kind == "a" else 0, 0)).save(folder / f"pictures/{kind}/{k}.png")


def test_the_readme_has_the_commands_that_this_file_runs() -> None:
    assert len(RUNS) >= 6
    assert {"kd-report multirun", "kd-run --help"} <= set(commands())


@pytest.mark.parametrize("command", RUNS)
def test_a_command_of_the_readme_runs(
    command: str, kd_run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files_of_the_readme(tmp_path)
    write_mnist(tmp_path / "data")
    monkeypatch.setenv("KD_DATA", str(tmp_path / "data"))
    set_below = {setting.partition("=")[0] for setting in SMALL}
    words = [word for word in shlex.split(command)[1:] if word.partition("=")[0] not in set_below]
    other = any(model in command for model in ("mine", "cnn"))  # which have no hidden layers of that name
    small = [*SMALL, "teacher.hidden=[16]", *([] if other else ["student.hidden=[8]"])]
    ran = kd_run(*words, *small)
    assert ran.code == 0, ran.err
    assert "student alone" in ran.out
    assert "written to" in ran.out


@pytest.mark.parametrize(
    "words",
    re.findall(r"`((?:student|teacher|dataset)=[^`]*|teacher\.checkpoint=[^`]*)`", README),
)
@pytest.mark.slow
def test_a_setting_of_the_readme_is_taken(words: str, kd_run: Callable[..., Ran], tmp_path: Path) -> None:
    if "mnist" in words:
        pytest.skip("tests/test_data.py reads MNIST's format; the data themselves are not at hand everywhere")
    network = mlp(input_shape=(1, 8, 8), num_classes=10, hidden=[16])
    save_file(network.state_dict(), tmp_path / "teacher.safetensors")
    extra = [] if "torchvision" in words else ["student.hidden=[8]"]
    ran = kd_run(*words.split(), *SMALL, "teacher.hidden=[16]", "teacher.dropout=0", "teacher.input_dropout=0", *extra)
    assert ran.code == 0, ran.err


def test_kd_report_and_the_help_of_the_readme(
    kd_run: Callable[..., Ran], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from kd_cli.commands.kd_report import main

    small = ("teacher.hidden=[16]", "student.hidden=[8]")
    ran = kd_run("-m", "T=1,2", *SMALL, *small)
    assert ran.code == 0, ran.err
    main([str(tmp_path / "multirun"), "--out", str(tmp_path)])
    assert "best by validation" in capsys.readouterr().out
    assert "Groups" in kd_run("--help").out


def test_the_readmes_python_predicts_with_a_runs_student(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run(*SMALL, "teacher.hidden=[16]", "student.hidden=[8]")
    (code,) = re.findall(r"```python\n(import kd_cli\n.*?)```", README, re.S)
    code = re.sub(r'load_student\("[^"]*"\)', f"load_student({str(ran.run_dir)!r})", code)
    values = {"images": torch.zeros(3, 1, 8, 8, dtype=torch.uint8)}
    exec(code, values)
    assert values["probabilities"].sum(-1).tolist() == pytest.approx([1, 1, 1])


def test_make_has_the_targets_that_the_readme_names() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`?make ([\w-]+)`?", README):
        assert re.search(rf"^{target}:", makefile, re.M), target
