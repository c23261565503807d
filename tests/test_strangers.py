"""Weights, runs and archives from strangers: nothing in them is run, and nothing in them is believed unseen."""

from __future__ import annotations

import ast
import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TINY
from PIL import Image
from process import Ran, Running
from safetensors.torch import load_file, save_file

import kd_cli
from kd_cli.config.build import build
from kd_cli.config.options import conf_dir
from kd_cli.data.folders import imagefolder
from kd_cli.data.torchvision import torchvision_dataset
from kd_cli.errors import CheckpointError, DataError
from kd_cli.export.load import OWN_MODELS, load_student
from kd_cli.storage.files import checksum

PACKAGE = Path(kd_cli.__file__).parent
# What may unpickle, and why it is safe.
ALLOWED = {
    *(
        (f"sweeps/hydra_internals/{file}.py", f"pickle.{function}")  # configurations copied within one process
        for file in ("compositions", "records")
        for function in ("dumps", "loads")
    ),
    ("models/torchvision.py", "pickle.UnpicklingError"),
}
UNPICKLES = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def test_no_path_in_the_package_unpickles_code() -> None:
    found = set()
    for file in PACKAGE.rglob("*.py"):
        name = file.relative_to(PACKAGE).as_posix()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in UNPICKLES, name
            if isinstance(node, ast.Attribute) and dotted(node).split(".")[0] in UNPICKLES:
                found.add((name, dotted(node)))
            if isinstance(node, ast.Call):
                called = dotted(node.func)
                keys = {k.arg: k.value for k in node.keywords}
                assert called not in ("eval", "exec", "yaml.unsafe_load", "yaml.full_load"), (name, called)
                if called in ("torch.load", "torch.hub.load_state_dict_from_url") or called.endswith(".get_state_dict"):
                    only = keys.get("weights_only")
                    assert isinstance(only, ast.Constant), (name, called)
                    assert only.value is True, (name, called)
                if called in ("np.load", "numpy.load"):
                    assert "allow_pickle" not in keys, (name, called)
                if called == "yaml.load":
                    assert "Loader" in keys, name
    assert found == ALLOWED  # a file that moved is no longer allowed


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("finished")
    ran = Running((*TINY, f"store_dir={folder / 'store'}"), folder).wait()
    assert ran.code == 0, ran.err
    return ran


@pytest.fixture
def student(finished: Ran, tmp_path: Path) -> Path:
    """A copy of a finished run."""
    return Path(shutil.copytree(finished.run_dir, tmp_path / "run"))


def change(run: Path, **values: object) -> None:
    """Change student.json as a stranger would who knows about the checksums."""
    path = run / "student.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    (run / ".checksums.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "model",
    [
        {"_target_": "os.system", "command": "touch executed"},
        {"_target_": "kd_cli.models.mlp.torch.hub.load", "repo": "x"},
        {"_target_": "kd_cli.config.build.locate", "target": "antigravity"},
        {"_target_": "kd_cli.models.mlp.mlp", "hidden": [{"_target_": "pathlib.Path.touch", "self": "executed"}]},
    ],
)
def test_a_student_names_no_code_to_import(student: Path, model: dict[str, object]) -> None:
    change(student, model=model)
    with pytest.raises(CheckpointError, match=r"code that kd_cli does not ship[^$]*hint: .*trust=True"):
        load_student(student)
    assert not Path("executed").exists()


def test_a_student_of_every_shipped_model_is_loaded_without_trust() -> None:
    shipped = {yaml.safe_load(file.read_text())["_target_"] for file in (conf_dir() / "model").glob("*.yaml")}
    models = "kd_cli.models."
    made = {
        models + name for name in ("extended.extended_student", "quantised.quantised", "pruned.pruned")
    }  # from them
    assert shipped | made == OWN_MODELS


@pytest.mark.parametrize("name", ["resnet8x4", "shufflenetv1"])
def test_a_cifar_networks_student_is_rebuilt(student: Path, name: str) -> None:
    node = yaml.safe_load((conf_dir() / "model" / f"{name}.yaml").read_text())
    change(student, model=node)
    state = build(node, input_shape=(1, 8, 8), num_classes=10).state_dict()
    save_file(state, student / "student.safetensors")
    change(student, checksum=checksum(student / "student.safetensors"))
    loaded = load_student(student)
    assert all(torch.equal(value, state[key]) for key, value in loaded.network.state_dict().items())


def test_a_users_own_model_is_loaded_when_trusted(
    student: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "own_model_of_a_test.py").write_text("from kd_cli.models.mlp import mlp as mine\n")
    monkeypatch.syspath_prepend(tmp_path)
    model = json.loads((student / "student.json").read_text())["model"]
    change(student, model=model | {"_target_": "own_model_of_a_test.mine"}, code=None)
    with pytest.raises(CheckpointError, match="own_model_of_a_test"):
        load_student(student)
    assert load_student(student, trust=True)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_a_student_of_an_older_version_names_its_model_as_it_was_called(student: Path) -> None:
    model = json.loads((student / "student.json").read_text())["model"]
    change(student, model=model | {"_target_": "kd_cli.zoo.models.mlp"})
    assert load_student(student)(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


def test_an_error_of_the_users_model_is_raised_as_it_is(
    student: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "own_model_that_reads.py").write_text("def net(**sizes):\n    return open('widths.csv')\n")
    monkeypatch.syspath_prepend(tmp_path)
    change(student, model={"_target_": "own_model_that_reads.net"}, code=None)
    with pytest.raises(FileNotFoundError, match=r"widths\.csv"):
        load_student(student, trust=True)


@pytest.mark.parametrize(
    "values",
    [
        {"model": None},
        {"model": {"_target_": "kd_cli.models.mlp.mlp", "hidden": [-1]}},
        {"model": {"_target_": "kd_cli.models.mlp.mlp", "hidden": "no"}},
        {"model": {"_target_": "kd_cli.models.mlp.mlp", "hidden": [9]}},
        {"input_shape": None},
        {"input_shape": [1, 9, 9]},
        {"input_shape": [1, 2.5]},
        {"classes": ["one", "two"]},
        {"classes": 3},
        {"precision": "float64", "mean": None},
        {"std": None},
        {"shift": ["x"]},
    ],
)
def test_a_student_whose_description_is_wrong_is_refused(student: Path, values: dict[str, object]) -> None:
    change(student, **values)
    with pytest.raises(CheckpointError):
        load_student(student)


def test_a_changed_description_is_noticed(student: Path) -> None:
    path = student / "student.json"
    path.write_text(path.read_text().replace('"mean": [\n    0.', '"mean": [\n    1.'))
    with pytest.raises(CheckpointError, match=r"student\.json was changed since the run wrote it"):
        load_student(student)


WRONG: dict[str, Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "whole numbers": lambda s: s | {"1.weight": s["1.weight"].long()},
    "complex numbers": lambda s: s | {"1.weight": s["1.weight"].to(torch.complex64)},
    "another shape": lambda s: s | {"1.weight": s["1.weight"][:-1]},
    "a name too many": lambda s: s | {"more": s["1.weight"].clone()},
    "a name too few": lambda s: {name: t for name, t in s.items() if name != "1.weight"},
    "not a number": lambda s: s | {"1.weight": s["1.weight"] * torch.nan},
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("form", ["safetensors", "pt"])
def test_a_checkpoint_that_does_not_fit_is_named(
    finished: Ran, kd_run: Callable[..., Ran], tmp_path: Path, wrong: str, form: str
) -> None:
    state = WRONG[wrong](load_file(finished.run_dir / "student.safetensors"))
    path = tmp_path / f"weights.{form}"
    save_file({k: t.contiguous() for k, t in state.items()}, path) if form == "safetensors" else torch.save(state, path)
    ran = kd_run(*TINY, "teacher.hidden=[8]", f"teacher.checkpoint={path}")
    assert ran.code == 1
    assert "error: teacher.checkpoint=" in ran.err
    assert "hint: " in ran.err
    assert "Traceback" not in ran.err


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"PK\x03\x04", b"\xff" * 64, b'{"a": 1}'])
@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_file_that_is_no_checkpoint_is_named(
    kd_run: Callable[..., Ran], tmp_path: Path, content: bytes, name: str
) -> None:
    (tmp_path / name).write_bytes(content)
    ran = kd_run(*TINY, f"teacher.checkpoint={name}")
    assert ran.code == 1
    assert "cannot be read as weights" in ran.err or "no state dict" in ran.err
    assert "Traceback" not in ran.err


# ---------------------------------------------------------------- archives and pictures


def test_an_archive_that_is_not_the_published_one_is_never_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # nobody there
    data = tmp_path / "data"
    data.mkdir()
    with tarfile.open(data / "cifar-10-python.tar.gz", "w:gz") as archive:
        for name in ("../../outside", "/tmp/kd-outside", "cifar-10-batches-py/data_batch_1"):
            member = tarfile.TarInfo(name)
            member.size = 1
            archive.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(DataError, match="could not be downloaded"):
        torchvision_dataset(data_dir=data, name="CIFAR10")
    assert [path.name for path in data.rglob("[!.]*")] == ["cifar-10-python.tar.gz"]
    assert not (tmp_path / "outside").exists()
    assert not Path("/tmp/kd-outside").exists()


def pictures(folder: Path) -> Path:
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / name / f"{i}.png")
    return folder


def test_a_decompression_bomb_is_refused(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures")
    Image.new("1", (10_000, 10_000)).save(folder / "cat" / "bomb.png")
    with pytest.raises(DataError, match=r"bomb\.png"):
        imagefolder(data_dir=tmp_path, root=str(folder), image_size=8)


def test_a_picture_that_is_a_program_is_refused(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures")
    (folder / "cat" / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n(executed) (w) file closefile\nshowpage\n"
    )
    with pytest.raises(DataError, match=r"x\.png"):
        imagefolder(data_dir=tmp_path, root=str(folder), image_size=8)
