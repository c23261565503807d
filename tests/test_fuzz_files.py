"""Odd folders, files, checkpoints, models and methods: each is used, or refused in words; a user's bug stays theirs.

KD_FUZZ_FILES says how many of each kind are tried.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from kd_cli.commands.kd_run import main
from kd_cli.data.folders import imagefolder
from kd_cli.data.prepare import prepare, unlabelled
from kd_cli.errors import CheckpointError, KdError
from kd_cli.models.mlp import mlp
from kd_cli.models.weights import fit_weights
from kd_cli.storage.weight_files import read_weight_file

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("KD_FUZZ_FILES", "60"))
SEED = int(os.environ.get("KD_FUZZ_SEED", "20150309"))
quick = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


# ---------------------------------------------------------------- folders of pictures


def picture(kind: str) -> bytes:
    """A small file: a picture of a kind, or what is none."""
    if kind in ("empty", "text"):
        return b"" if kind == "empty" else b"no picture"
    file = io.BytesIO()
    mode, form = {"rgba": ("RGBA", "PNG"), "grey": ("L", "PNG"), "deep": ("I;16", "PNG")}.get(kind, ("RGB", "PNG"))
    made = Image.new(mode, (5, 7)) if kind == "deep" else Image.new(mode, (5, 7), len(kind))
    made.save(file, "JPEG" if kind == "jpeg" else form)
    content = file.getvalue()
    return content[: len(content) // 2] if kind == "cut" else content


PARTS = ["", "", "train", "test", "val", "Training", "Testing", "valid", "seg_test", "dev", "images"]
CLASSES = ["cat", "dog", "Cat", "größe", "a b", ".hidden", "@eaDir", "1", "train", "test", b"caf\xe9"]
NAMES = ["0.png", "1.jpg", "2.PNG", "3.jfif", "noending", ".4.png", "notes.txt", "Thumbs.db", "0.png.bak", b"\xff.png"]
KINDS = ["rgb", "rgb", "jpeg", "rgba", "grey", "deep", "empty", "text", "cut", "broken link", "folder"]
files = st.tuples(*(st.sampled_from(some) for some in (PARTS, CLASSES, NAMES, KINDS)))


def lay(root: Path, chosen: list[tuple[Any, ...]]) -> None:
    for part, name, file, kind in chosen:
        place = os.path.join(os.fsencode(root), *(os.fsencode(one) for one in (part, name) if one), os.fsencode(file))
        with contextlib.suppress(FileExistsError, NotADirectoryError, IsADirectoryError):
            os.makedirs(os.path.dirname(place), exist_ok=True)
            if kind == "broken link":
                os.symlink(b"gone", place)
            elif kind == "folder":
                os.mkdir(place)
            else:
                with open(place, "wb") as out:
                    out.write(picture(kind))


@seed(SEED)
@settings(max_examples=4 * EXAMPLES, **quick)
@given(chosen=st.lists(files, max_size=14), many=st.booleans())
def test_any_tree_of_folders_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, chosen: list[tuple[Any, ...]], many: bool
) -> None:
    root = tmp_path_factory.mktemp("tree")
    if many:  # a sound data set, to which the others are added
        lay(root, [("", name, f"{i}.png", "rgb") for name in ("cat", "dog") for i in range(4)])
    lay(root, chosen)
    try:
        source = imagefolder(data_dir=root / "data", root=str(root), image_size=4)
        notes = unlabelled(source)[2] if not source.class_names else prepare(source, val_fraction=0.2).notes
    except KdError as error:
        refused = error.message
    else:
        refused = ""
    if refused:
        assert len(refused) > 12
        assert refused.isprintable()
        return
    names = [*source.train_names, *source.val_names, *source.test_names]
    assert len(names) == len(set(names)) <= len(chosen) + 8 * many
    assert not any(part.startswith((".", "@")) for name in names for part in Path(name).parts)
    assert all(note.isprintable() for note in notes)


# ---------------------------------------------------------------- checkpoints

WRAPS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "epoch": 3, "loss": 0.5},
    "model and ema": lambda state: {"model": {k: v + 1 for k, v in state.items()}, "ema": state},
    "optimizer first": lambda state: {"optimizer": {"state": {0: {"step": torch.ones(())}}}, "model": state},
    "namespace": lambda state: {"net": state, "args": argparse.Namespace(lr=0.1)},
    "deep": lambda state: {"a": {"b": {"model_state_dict": state}}},
    "ordered": lambda state: collections.OrderedDict(state),
}
PREFIXES = ["", "module.", "_orig_mod.", "model.", "net.module.", "backbone.encoder."]
DAMAGES = ["none", "none", "none", "none", "cut", "flip", "empty", "missing", "other shape", "nan", "no tensors"]


@seed(SEED)
@settings(max_examples=3 * EXAMPLES, **quick)
@given(
    wrap=st.sampled_from(sorted(WRAPS)),
    prefix=st.sampled_from(PREFIXES),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]),
    form=st.sampled_from(["pt", "safetensors"]),
    damage=st.sampled_from(DAMAGES),
    where=st.floats(0, 0.999),
)
def test_any_checkpoint_gives_its_weights_or_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
    wrap: str,
    prefix: str,
    dtype: torch.dtype,
    form: str,
    damage: str,
    where: float,
) -> None:
    network = mlp(input_shape=(1, 3, 3), num_classes=4, hidden=[5])
    own = {name: torch.randn(value.shape).to(dtype) for name, value in network.state_dict().items()}
    state = {prefix + name: value for name, value in own.items()}
    first = next(iter(state))
    if damage == "missing":
        del state[first]
    elif damage == "other shape":
        state[first] = state[first][1:]
    elif damage == "nan":
        state[first] = state[first] * torch.nan
    path = tmp_path_factory.mktemp("weights") / "w.bin"
    if damage == "no tensors":
        torch.save({"epoch": 3}, path)
    elif form == "safetensors":
        save_file(state, path)
    else:
        torch.save(WRAPS[wrap](state), path)
    if damage in ("cut", "flip", "empty"):
        content = bytearray(path.read_bytes())
        at = int(where * len(content))
        content[at] ^= 0x10
        path.write_bytes({"cut": content[:at], "flip": content, "empty": b""}[damage])
    try:
        found = read_weight_file(path)
        fit = fit_weights(network, found.tensors, homes=found.homes)
    except CheckpointError as error:
        refused = error.message
    else:
        refused = ""
    if refused:
        assert damage in ("cut", "flip", "empty", "no tensors")
        assert "\x1b" not in refused
    elif damage in ("missing", "other shape", "no tensors", "empty"):
        assert fit.problems
    elif damage == "none":
        assert not fit.problems
        assert all(fit.state[name].equal(value) for name, value in own.items())
    elif damage == "flip" and not fit.problems and form == "pt":  # safetensors has no checksums
        assert all(fit.state[name].equal(value) for name, value in own.items())


# ---------------------------------------------------------------- models and methods

HEAD = """
import torch
from torch import nn
class Mine(Exception): ...
"""
MODELS = {  # the body of a builder or of a forward; whether it can be used
    "build": [
        ("return nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))", True),
        ("return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))", False),
        ("return nn.Sequential(nn.Flatten(), nn.Linear(3, num_classes))", False),
        ("return nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))", True),
        ("return nn.Linear(8, 10)", False),
        ("return None", False),
        ("return nn.Linear", False),
        ("return lambda x: x", False),
        ("return Net(lambda y, x: (y, x))", True),
        ("return Net(lambda y, x: {'logits': y})", True),
        ("return Net(lambda y, x: [])", False),
        ("return Net(lambda y, x: y.argmax(-1))", False),
        ("return Net(lambda y, x: y.sum())", False),
        ("return Net(lambda y, x: 3.0)", False),
        ("return Net(lambda y, x: None)", False),
        ("return Net(lambda y, x: y.detach())", False),
        ("return Net(lambda y, x: y * float('nan'))", False),
        ("return Net(lambda y, x: y.double())", True),
        ("raise Mine('in the builder')", None),
        ("return Net(lambda y, x: 1 / 0)", None),
        ("return Net(lambda y, x: y.nope)", None),
        ("open('/nope/weights.csv')", None),
        ("import no_such_module_of_mine", None),
    ],
    "loss": [
        ("return (student - teacher).square().mean()", True),
        ("return {'loss': (student - teacher).square().mean(), 'soft': student.sum()}", True),
        ("return {'soft': student.mean()}", False),
        ("return (student - teacher).square()", False),
        ("return 0.0", False),
        ("return None", False),
        ("return teacher.mean()", False),
        ("return student.mean().detach()", False),
        ("return student.sum() * float('inf')", False),
        ("return 'loss'", False),
        ("raise Mine('in the loss')", None),
        ("return student.nope", None),
        ("return [][0]", None),
        ("return student @ teacher", None),
    ],
}
NET = """
class Net(nn.Module):
    def __init__(self, ends):
        super().__init__()
        self.body, self.ends = nn.Linear(64, 10), ends
    def forward(self, x):
        return self.ends(self.body(x.flatten(1)), x)
"""


def command(*argv: str) -> tuple[int, str, BaseException | None]:
    """Run the command in this process: its exit status, what it printed, and an error that it did not explain."""
    said, before, path, environ = io.StringIO(), sys.argv, sys.path[:], dict(os.environ)
    sys.argv = ["kd-run", *argv]
    status: Any = 0
    raised: BaseException | None = None
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main()
    except SystemExit as end:
        status = end.code or 0
    except Exception as error:
        status, raised = 1, error
    finally:
        sys.argv, sys.path[:] = before, path
        os.environ.clear()
        os.environ.update(environ)
    if isinstance(status, str):
        said.write(status)
        status = 1
    return status, said.getvalue(), raised


CASES = [(kind, body, good) for kind, bodies in MODELS.items() for body, good in bodies]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "body", "good"), CASES, ids=[f"{kind}: {body}" for kind, body, _ in CASES])
def test_any_own_code_runs_is_refused_or_raises_its_own_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, body: str, good: bool | None
) -> None:
    name = "kd_code_of_fuzz"
    signature = "build(*, input_shape, num_classes)" if kind == "build" else "loss(student, teacher)"
    (tmp_path / f"{name}.py").write_text(f"{HEAD}{NET}def {signature}:\n    {body}\n")
    group = "student" if kind == "build" else "method"
    (tmp_path / "conf" / group).mkdir(parents=True)
    (tmp_path / "conf" / group / "own.yaml").write_text(f"_target_: {name}.{kind}\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop(name, None)
    words = [word for word in TINY if not word.startswith(f"{group}")]
    status, said, raised = command("--config-dir", "conf", *words, f"{group}=own", "hydra.run.dir=out")
    if good is None:  # the user's own error, with their line as the last but for those of libraries
        assert raised is not None, said
        frames = [frame.filename for frame in traceback.extract_tb(raised.__traceback__)]
        last = next(file for file in reversed(frames) if "site-packages" not in file)
        assert Path(last).name == f"{name}.py" or isinstance(raised, ModuleNotFoundError)
    else:
        assert raised is None, repr(raised)
        assert (status == 0) == good, said
        if not good:
            assert "error: " in said
            assert not list((tmp_path / "out").glob("**/student.safetensors"))
