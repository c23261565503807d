"""What the command says of arguments that cannot be read, of plug-ins, and to terminals without all characters."""

from __future__ import annotations

import io
import logging
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TINY
from hydra.core.override_parser.overrides_parser import OverridesParser
from process import Ran

from kd_cli.commands.help import page
from kd_cli.commands.messages import needs_quotes, several_values
from kd_cli.commands.output import HANDLER, allow_any_text
from kd_cli.config.options import conf_dir
from kd_cli.errors import ConfigError
from kd_cli.runs.progress import SECONDS, Progress, duration

HARD_VALUES = [
    *("größe", "my pics (1)", "epoch=9-step=99.ckpt", "it's", "a#b", "a;b", "a&b", "[2024]pics", "pics{1}", "~/pics"),
    *('say "hi"', "日本", "C:\\a (b)\\", "a=b,c", "!x", "pics[1]", "back\\\"slash'", "f(x)", "{a"),
]


@pytest.mark.parametrize("value", HARD_VALUES)
def test_a_value_that_hydra_cannot_read_is_shown_in_quotes_that_shell_and_hydra_understand(value: str) -> None:
    error = needs_quotes(["T=2", f"dataset.root={value}"])
    assert error is not None
    assert error.message.startswith(f"dataset.root={value} cannot be read: ")
    assert error.hint is not None
    (argument,) = shlex.split(error.hint.partition(": ")[2])
    assert OverridesParser.create().parse_override(argument).value() == value


@pytest.mark.parametrize("value", ["photos", "a/b-c_1.5", "[1,2]", "1e-3", "null", "100%", "a b", "'größe'", "1,2"])
def test_a_value_that_hydra_can_read_needs_no_quotes(value: str) -> None:
    assert needs_quotes([f"dataset.root={value}"]) is None


@pytest.mark.parametrize("argument", ["T", "=3", "", "=", "größe"])
def test_an_argument_without_key_and_value_is_named(argument: str) -> None:
    error = needs_quotes([argument])
    assert error is not None
    assert error.message == f"{argument!r} is no override; it must be key=value or group=option"


def test_several_values_want_a_sweep() -> None:
    assert str(several_values("T=1,2")).endswith(
        "hint: kd-run -m T=1,2 runs each of them; 'T=[1,2]' is a list; 'T=\"1,2\"' is a text with a comma"
    )
    assert str(several_values("seed=range(3)")).endswith("hint: kd-run -m 'seed=range(3)' runs each of them")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["dataset=imagefolder", "dataset.root=größe"], "'dataset.root=\"größe\"'"),
        (["-m", "teacher.checkpoint=epoch=9.ckpt", "T=1,2"], "'teacher.checkpoint=\"epoch=9.ckpt\"'"),
        (["T=1,2"], "T=1,2 gives several values, which a single run cannot have"),
        (["model=cnn"], "there is no key 'model'\n\nhint: teacher= and student= choose a model"),
        (["+model=cnn"], "there is no key 'model'\n\nhint: teacher= and student= choose a model"),
        (["grad_clip=1"], "there is no key 'grad_clip'\n\nhint: kd-run --help lists every key"),
        (["training.grad_clip=1"], "there is no key 'training.grad_clip'\n\nhint: kd-run --help lists every key"),
        (["temperature=3"], "there is no key 'temperature'\n\nhint: T= is the temperature"),
        (["dataset=some/folder"], "hint: dataset=imagefolder dataset.root=some/folder reads a folder of pictures"),
        (["student=mobilenet_v3_small"], "student=torchvision student.name=mobilenet_v3_small"),
        (["dataset=imagefolder", "dataset.image_siz=3"], "hint: did you mean dataset.image_size?"),
    ],
)
def test_mistakes_are_explained_and_leave_nothing(
    kd_run: Callable[..., Ran], tmp_path: Path, arguments: list[str], message: str
) -> None:
    ran = kd_run(*arguments)
    assert ran.code == 1
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_key_that_one_job_of_a_sweep_lacks_is_named_with_the_job(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run("-m", "method=soft_targets,hard", "method.square_T=false")
    assert ran.code == 1
    assert "there is no key 'method.square_T' (in the job method=hard method.square_T=False)" in ran.err


# ---------------------------------------------------------------- directories


@pytest.mark.parametrize("arguments", [["T=0"], ["student.hidden=[0]"], ["dataset=imagefolder", "dataset.root=none"]])
def test_a_refused_run_leaves_no_directory(kd_run: Callable[..., Ran], tmp_path: Path, arguments: list[str]) -> None:
    ran = kd_run(*TINY, *arguments)
    assert ran.code == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("launcher", ["fused", "basic"])
def test_a_sweep_whose_jobs_are_all_refused_leaves_no_directory(
    kd_run: Callable[..., Ran], tmp_path: Path, launcher: str
) -> None:
    ran = kd_run("-m", *TINY, "T=0,-1", f"hydra/launcher={launcher}")
    assert ran.code == 1
    assert "error: 2 of 2 jobs did not complete\n  000_T=0_" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_a_refused_run_removes_nothing_that_was_there(kd_run: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert kd_run(*TINY, "T=0", "hydra.run.dir=mine").code == 1
    assert (tmp_path / "mine" / "notes.txt").read_text() == "keep"


def test_a_run_that_fails_in_training_keeps_its_directory(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run(*TINY, "teacher_optimizer=sgd", "teacher_optimizer.lr=1e30", "teacher_training.epochs=2")
    assert ran.code == 1
    assert ran.summary["status"] == "diverged"
    assert "Error executing job" not in ran.err


@pytest.mark.parametrize("arguments", [[], ["-m"], ["-m", "hydra/launcher=basic"]], ids=" ".join)
def test_relative_paths_start_where_the_command_was_given_also_with_chdir(
    kd_run: Callable[..., Ran], tmp_path: Path, arguments: list[str]
) -> None:
    from PIL import Image

    for name in ("left", "right"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for k in range(10):
            Image.new("RGB", (8, 8), (20 * k, 0, 200)).save(tmp_path / "pictures" / name / f"{k}.png")
    data = ["dataset=imagefolder", "dataset.root=pictures", "dataset.image_size=8"]
    ran = kd_run(*arguments, *TINY, *data, "hydra.job.chdir=true")
    assert ran.code == 0, ran.err
    assert len(ran.run_dirs) == 1
    assert ran.summary["status"] == "completed"


# ---------------------------------------------------------------- output


@pytest.mark.parametrize(
    ("encoding", "text", "written"),
    [
        ("ascii", "3 ± 1 × café", b"3 +- 1 x caf\\xe9"),
        ("latin-1", "3 ± 1 → 日", b"3 \xb1 1 -> \\u65e5"),
        ("utf-8", "caf\udce9", b"caf\\udce9"),
    ],
)
def test_characters_that_cannot_be_shown_are_replaced(
    monkeypatch: pytest.MonkeyPatch, encoding: str, text: str, written: bytes
) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    allow_any_text()
    assert sys.stdout.errors == HANDLER
    print(text, end="", flush=True)
    assert raw.getvalue() == written


@pytest.mark.slow
def test_a_sweep_and_its_report_can_be_printed_in_ascii(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    sweep = [sys.executable, "-m", "kd_cli", "-m", *TINY, "seed=0,1", "hydra.sweep.dir=out"]
    for command in (sweep, [sys.executable, "-m", "kd_cli.commands.kd_report", "out"]):
        ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert "mean +- std" in ran.stdout


def test_a_sweep_of_many_jobs_prints_few_lines(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run("-m", *TINY, "seed=range(20)")
    assert ran.code == 0, ran.err
    lines = ran.err.splitlines()
    assert len(lines) < 16
    assert "digits; teacher tinymlp (1 epoch); student tinymlp (1 epoch); cpu" in lines
    assert sum("teacher tinymlp:" in line for line in lines) <= 2  # trained, and from the store
    assert not re.search(r"[0-9a-f]{32}", ran.err)
    for path in ran.run_dirs:
        assert "student tinymlp by soft_targets: 1 epoch" in (path / "run.log").read_text()


def test_without_a_terminal_a_long_training_logs_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter(range(0, 10_000, 10))
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    progress = Progress("student net", epochs=10, role="student", on_epoch=lambda s, row: None)
    with caplog.at_level(logging.INFO, logger="kd_cli"):
        progress.start(100, 1)
        for epoch in range(5):
            for _ in range(10):
                progress.step()
            progress.epoch([{"loss": 1.5, "train_accuracy": 0.5, "val_accuracy": None, "epoch": epoch}])
        progress.finish()
    assert len(caplog.messages) == 50 * 10 // SECONDS
    assert caplog.messages[0] == "student net: epoch 1/10, 3%, 16 min left"
    assert caplog.messages[5] == "student net: epoch 2/10, 18%, 14 min left, loss 1.5, training 50.00%"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1 min"), (3540, "59 min"), (7500, "2 h 5 min")]
)
def test_a_duration_is_given_in_its_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---------------------------------------------------------------- the environment


BROKEN = "from dataclasses import dataclass\nraise ValueError('mutable default')\n"


def test_a_broken_plug_in_of_hydra_is_named_in_one_line(tmp_path: Path) -> None:
    plug_in = tmp_path / "installed" / "hydra_plugins" / "hydra_own_sweeper"
    plug_in.mkdir(parents=True)
    (plug_in / "__init__.py").write_text("")
    (plug_in / "config.py").write_text(BROKEN)
    paths = [str(tmp_path / "installed"), os.environ.get("PYTHONPATH", "")]
    ran = subprocess.run(
        [sys.executable, "-m", "kd_cli", *TINY],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1
    assert ran.stderr == (
        "error: the Hydra plug-in hydra_own_sweeper cannot be imported: ValueError: mutable default\n\n"
        "hint: pip uninstall hydra-own-sweeper, or install a version for this Python and this Hydra\n"
    )


def test_the_version_is_that_of_kd_cli_and_costs_no_import() -> None:
    program = "import sys; sys.argv = ['kd-run', '--version']; from kd_cli.commands.kd_run import main; main(); "
    program += "print(sorted({'torch', 'hydra', 'numpy'} & set(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert re.fullmatch(r"kd-cli \d\S*, torch \d\S*\n\[\]\n", ran.stdout)


# ---------------------------------------------------------------- help for what is asked for


def test_help_shows_the_keys_of_the_options_that_are_chosen(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run("dataset=imagefolder", "student=torchvision", "--help", "T=4")
    assert ran.code == 0, ran.err
    for key in ("dataset.root=???", "dataset.image_size=64", "student.name=resnet18", "student.pretrained=false"):
        assert f"    {key} " in ran.out
    for key in ("teacher.checkpoint=null", "teacher.members=1", "teacher.combine=geometric"):
        assert f"    {key} " in ran.out
    assert "  T=4 " in ran.out
    assert "student.hidden" not in ran.out
    assert "shown with the values of kd-run dataset=imagefolder student=torchvision T=4" in ran.out


def test_help_shows_what_an_experiment_chooses() -> None:
    text = page([conf_dir()], ["experiment=hinton_mnist_best"])
    assert "  T=4.0 " in text  # its own value, over that of the experiment that it builds on
    assert re.search(r"teacher_training\.epochs=\d+ .*", text)
    assert "of dataset=mnist" in text  # chosen two files further
    assert "of dataset=digits" in page([conf_dir()], ["experiment=hinton_mnist_best", "dataset=digits"])


def test_help_for_an_option_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="there is no option student=smalmlp") as error:
        page([conf_dir()], ["student=smalmlp"])
    assert str(error.value.hint).startswith("did you mean smallmlp?")


def test_characters_that_cannot_be_printed_are_shown_as_python_writes_them(kd_run: Callable[..., Ran]) -> None:
    ran = kd_run("T=\u2028")
    assert ran.code == 1
    assert "\\u2028" in ran.err
    assert "\u2028" not in ran.err
    assert "error: T=a\\n cannot be read" in kd_run("T=a\n").err
