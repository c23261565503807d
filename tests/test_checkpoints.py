"""Weights from anywhere: found in their files, fitted to the model, read without running code, or refused by name."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from process import Ran
from safetensors.torch import save_file
from torch import Tensor, nn

from kd_cli.errors import CheckpointError
from kd_cli.models.mlp import mlp
from kd_cli.models.weights import absurd, fit_weights, wrong_head, wrong_input
from kd_cli.storage.files import checksum
from kd_cli.storage.weight_files import read_weight_file

State = dict[str, Tensor]


class Small(nn.Module):
    """Convolution, BatchNorm and a classifier."""

    def __init__(self, classes: int = 4, channels: int = 3) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, 5, 3), nn.BatchNorm2d(5)
        self.fc = nn.Linear(5, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


@pytest.fixture
def state() -> State:
    torch.manual_seed(0)
    module = Small()
    module(torch.rand(8, 3, 6, 6))  # statistics of its own
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def prefixed(state: State, prefix: str) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def doubled(state: State) -> State:
    return {name: 2 * tensor for name, tensor in state.items()}


def fitted(path: Path, content: Any, module: nn.Module | None = None, key: str | None = None) -> Any:
    torch.save(content, path)
    file = read_weight_file(path)
    return fit_weights(module or Small(), file.tensors, homes=file.homes, key=key)


def equal(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(tensor.equal(other[name]) for name, tensor in one.items())


# ---------------------------------------------------------------- where weights are in a file


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "model.", "net.", "backbone.", "module._orig_mod.", "encoder.model.", "0.", "student."],
)
def test_a_prefix_of_a_wrapper_is_taken_off_and_said(tmp_path: Path, state: State, prefix: str) -> None:
    fit = fitted(tmp_path / "w.pt", prefixed(state, prefix))
    assert not fit.problems
    assert equal(fit.state, state)
    said = " ".join(fit.notes)
    assert all(part in said for part in prefix.strip(".").split("."))


@pytest.mark.parametrize("part", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_a_wrapper_inside_a_model_is_taken_off(tmp_path: Path, state: State, part: str) -> None:
    inside = {name.replace("norm.", f"norm.{part}."): tensor for name, tensor in state.items()}
    fit = fitted(tmp_path / "w.pt", inside)
    assert equal(fit.state, state)
    assert f"{part}. was taken off the names" in fit.notes


@pytest.mark.parametrize(
    "keys",
    [
        ("state_dict",),
        ("model",),
        ("model_state_dict",),
        ("net",),
        ("weights",),
        ("ema",),
        ("teacher",),
        ("module",),
        ("checkpoint", "model"),
    ],
    ids=".".join,
)
def test_weights_under_a_key_of_the_file_are_taken_and_said(tmp_path: Path, state: State, keys: tuple[str]) -> None:
    content: Any = prefixed(state, "module.")
    optimizer = torch.optim.Adam(Small().parameters())
    for key in reversed(keys):
        content = {key: content, "epoch": 9, "optimizer": optimizer.state_dict(), "best": torch.tensor(0.5)}
    fit = fitted(tmp_path / "w.pt", content)
    assert not fit.problems
    assert equal(fit.state, state)
    assert any(f"'{'.'.join(keys)}.module.'" in note for note in fit.notes)


def test_a_checkpoint_of_lightning_is_taken(tmp_path: Path, state: State) -> None:
    content = {
        "epoch": 3,
        "pytorch-lightning_version": "2.5.0",
        "state_dict": prefixed(state, "model.") | {"criterion.weight": torch.ones(4)},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "hyper_parameters": argparse.Namespace(lr=0.1),
    }
    fit = fitted(tmp_path / "last.ckpt", content)
    assert equal(fit.state, state)
    assert "1 other tensor in it is left out" in fit.notes


@pytest.mark.parametrize("key", ["ema", "model_ema", "state_dict_ema", "ema_model", "ema_state_dict", "swa_model"])
def test_averaged_weights_come_first_and_the_choice_is_said(tmp_path: Path, state: State, key: str) -> None:
    content = {"state_dict": state, key: {"n_averaged": torch.tensor(7)} | prefixed(doubled(state), "module.")}
    fit = fitted(tmp_path / "w.pt", content)
    assert equal(fit.state, doubled(state))
    assert fit.notes[0] == (
        f"the weights under '{key}.module.', averaged (EMA) weights are taken; state_dict would fit, too"
    )
    assert equal(fitted(tmp_path / "w.pt", content, key="state_dict").state, state)


def test_of_a_teacher_and_a_student_the_teacher_is_taken(tmp_path: Path, state: State) -> None:
    content = {"student": state, "teacher": doubled(state), "ema": state}
    fit = fitted(tmp_path / "w.pt", content)
    assert equal(fit.state, doubled(state))
    assert "ema, student would fit, too" in fit.notes[0]


def test_a_key_that_names_nothing_is_answered_with_the_places_there_are(tmp_path: Path, state: State) -> None:
    fit = fitted(tmp_path / "w.pt", {"model": state, "ema": doubled(state)}, key="best")
    assert fit.problems == ["nothing under 'best' fits; the model's names are under model, ema"]


def test_weights_of_the_inner_network_fit_a_wrapper_around_it(state: State) -> None:
    wrapped = nn.Sequential(collections.OrderedDict(network=nn.Sequential(collections.OrderedDict(network=Small()))))
    for prefix in ("", "network.", "network.network.", "module.network."):
        fit = fit_weights(wrapped, prefixed(state, prefix))
        assert not fit.problems
        assert equal(fit.state, prefixed(state, "network.network."))


def test_old_batchnorm_and_counters_of_other_programs_are_no_obstacle(state: State) -> None:
    old = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    fit = fit_weights(Small(), old | {"total_ops": torch.zeros(1), "conv.total_params": torch.zeros(1)})
    assert not fit.problems
    assert int(fit.state.pop("norm.num_batches_tracked")) == 0
    assert equal(fit.state, old)
    assert "1 counter of BatchNorm that old files lack is 0" in fit.notes


def test_auxiliary_heads_are_left_out_and_said(state: State) -> None:
    fit = fit_weights(Small(), state | {"AuxLogits.fc.weight": torch.ones(2, 2), "aux1.fc.bias": torch.ones(2)})
    assert equal(fit.state, state)
    assert "2 tensors of auxiliary heads are left out" in fit.notes


def test_a_name_that_safetensors_left_out_for_a_shared_weight_is_filled_in(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 3))
    module[2].weight = module[0].weight
    state = {name: tensor for name, tensor in module.state_dict().items() if name != "2.weight"}
    assert fit_weights(module, state).state["2.weight"].equal(module[0].weight)


def test_a_part_of_a_deeper_network_does_not_pass_for_the_whole() -> None:
    wide, narrow = (mlp(input_shape=(8,), num_classes=4, hidden=hidden) for hidden in ([8, 8], [8]))
    fit = fit_weights(narrow, wide.state_dict())
    assert fit.problems
    assert fit_weights(nn.Sequential(nn.Linear(8, 8)), {"a.0.weight": torch.ones(8, 8)}).problems


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_taken_and_said(state: State, dtype: torch.dtype) -> None:
    low = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    fit = fit_weights(Small(), low)
    assert not fit.problems
    assert f"they are {str(dtype).removeprefix('torch.')}" in fit.notes


def test_a_classifier_of_other_classes_and_an_input_of_other_channels_are_recognised() -> None:
    assert wrong_head(Small(), Small(classes=7).state_dict(), 4) == ("fc", 7)
    assert wrong_head(Small(), Small(channels=1).state_dict(), 4) is None
    assert wrong_input(Small(), Small(channels=1).state_dict()) == (
        "its first layer conv takes 1 channel, the model's 3"
    )
    small, large = (mlp(input_shape=(1, n, n), num_classes=4, hidden=[8]).state_dict() for n in (8, 28))
    assert wrong_input(mlp(input_shape=(1, 8, 8), num_classes=4, hidden=[8]), large) == (
        "its first layer 1 takes 784 input values, the model's 64"
    )
    assert wrong_input(mlp(input_shape=(1, 8, 8), num_classes=4, hidden=[8]), small) is None


@pytest.mark.parametrize(
    ("value", "said"),
    [(float("nan"), "infinite or not numbers"), (float("-inf"), "infinite or not numbers"), (-3e30, "the value 3e+30")],
)
def test_weights_that_no_training_gives_are_named(state: State, value: float, said: str) -> None:
    assert absurd(state) is None
    state["fc.bias"][1] = value
    found = absurd(state)
    assert found is not None
    assert found.startswith("fc.bias holds")
    assert said in found


# ---------------------------------------------------------------- files


@dataclasses.dataclass
class Settings:
    lr: float = 0.1


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before 1.6"])
def test_tensors_are_read_beside_objects_whose_code_is_not_run(tmp_path: Path, state: State, zipped: bool) -> None:
    trap = tmp_path / "sprung"
    content = {
        "state_dict": state,
        "args": argparse.Namespace(lr=0.1),
        "settings": Settings(),
        "path": Path("x"),
        "counts": collections.defaultdict(list, a=[1]),
        "trap": Trap(trap),
    }
    path = tmp_path / "w.pth.tar"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    file = read_weight_file(path)
    assert equal(fit_weights(Small(), file.tensors, homes=file.homes).state, state)
    assert {"argparse.Namespace", f"{__name__}.Settings"} <= set(file.not_read)
    assert not trap.exists()


def test_a_whole_pickled_model_gives_its_weights_without_its_code(tmp_path: Path) -> None:
    module = Small()
    torch.save({"model": module, "epoch": 1}, tmp_path / "whole.pt")
    file = read_weight_file(tmp_path / "whole.pt")
    assert equal(fit_weights(Small(), file.tensors, homes=file.homes).state, dict(module.state_dict()))
    assert f"{__name__}.Small" in file.not_read


@pytest.mark.parametrize("name", ["w.SAFETENSORS", "model.bin", "weights", "w.pt"])
def test_safetensors_are_recognised_by_content(tmp_path: Path, state: State, name: str) -> None:
    save_file(state, tmp_path / name)
    file = read_weight_file(tmp_path / name)
    assert equal(file.tensors, state)
    assert file.checksum == checksum(tmp_path / name)


def test_torchs_own_files_are_recognised_under_the_name_of_safetensors(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "w.safetensors")
    assert equal(read_weight_file(tmp_path / "w.safetensors").tensors, state)


def test_a_flipped_bit_in_a_weight_is_noticed(tmp_path: Path, state: State) -> None:
    path = tmp_path / "w.pt"
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    content[content.find(state["conv.weight"].numpy().tobytes()) + 3] ^= 0x40
    path.write_bytes(content)
    assert not torch.load(path)["conv.weight"].equal(state["conv.weight"])  # torch takes it
    with pytest.raises(CheckpointError, match=r"it is damaged: .*data/0 in it does not have its checksum"):
        read_weight_file(path)


def test_a_file_that_was_written_without_checksums_is_read(tmp_path: Path, state: State) -> None:
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(state, tmp_path / "w.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert equal(read_weight_file(tmp_path / "w.pt").tensors, state)


def archive(**files: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, text in files.items():
            file.writestr(name, text)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"\0" * 100, "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "a web page"),
        (b'{"a": 1}', "JSON"),
        (b"\x89HDF\r\n", "HDF5"),
        (b"\x1f\x8b\x08\x00", "compressed by gzip"),
        (b"\x93NUMPY\x01", "a NumPy array"),
        (b"random bytes of no format", "damaged, or no file of torch.save"),
        (archive(**{"a.npy": "x"}), "zip archive of NumPy arrays"),
        (archive(**{"readme.txt": "x"}), "zip archive of readme.txt"),
        (archive(**{"m/code/a.py": "", "m/data.pkl": ""}), "a TorchScript program"),
        ((60).to_bytes(8, "little") + b'{"a": 1', "a damaged safetensors file"),
    ],
)
def test_other_files_are_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=said) as caught:
        read_weight_file(tmp_path / "w.pt")
    assert caught.value.hint


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "safetensors", "before 1.6"])
def test_a_file_that_is_cut_off_is_damaged(tmp_path: Path, state: State, share: float, kind: str) -> None:
    path = tmp_path / "w.pt"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CheckpointError, match="damaged"):
        read_weight_file(path)


def test_a_pickle_of_another_protocol_is_refused_in_our_own_words(tmp_path: Path, state: State) -> None:
    torch.save(state, tmp_path / "w.pt", pickle_protocol=4)
    with pytest.raises(CheckpointError, match="a pickle of a protocol") as caught:
        read_weight_file(tmp_path / "w.pt")
    assert "weights_only" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


# ---------------------------------------------------------------- the command


@pytest.fixture
def weights() -> State:
    """Of the teacher of TINY."""
    torch.manual_seed(0)
    return dict(mlp(input_shape=(1, 8, 8), num_classes=10, hidden=[12]).state_dict())


def notes(ran: Ran) -> str:
    return "\n".join(ran.summary["notes"])


@pytest.mark.slow
def test_a_run_says_what_it_made_of_a_checkpoint(tiny: Callable[..., Ran], tmp_path: Path, weights: State) -> None:
    content = {"state_dict": prefixed(weights, "module."), "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "w.pth.tar")
    ran = tiny("teacher.checkpoint=w.pth.tar")
    for said in ("'state_dict.module.' are taken", "argparse.Namespace in it are not created", "is near chance"):
        assert said in notes(ran)
        assert said in ran.out + ran.err
    again = tiny("teacher.checkpoint=w.pth.tar", "seed=1")  # from the store, and said all the same
    assert again.summary["teacher"]["from_store"]
    assert notes(again) == notes(ran)


def test_a_key_chooses_among_the_weights_of_a_file_and_is_part_of_the_fingerprint(
    tiny: Callable[..., Ran], tmp_path: Path, weights: State
) -> None:
    torch.save({"model": weights, "ema": doubled(weights)}, tmp_path / "w.pt")
    ran = [tiny("teacher.checkpoint=w.pt", *more) for more in ((), ("teacher.checkpoint_key=model",))]
    assert "'ema.', averaged (EMA) weights are taken; model would fit, too" in notes(ran[0])
    assert ran[0].summary["teacher"]["fingerprint"] != ran[1].summary["teacher"]["fingerprint"]
    assert ran[0].summary["teacher"]["test"]["nll"] != ran[1].summary["teacher"]["test"]["nll"]


def test_the_bytes_that_are_hashed_are_the_bytes_that_are_used(
    tiny: Callable[..., Ran], tmp_path: Path, weights: State
) -> None:
    save_file(weights, tmp_path / "w.safetensors")
    save_file(doubled(weights), tmp_path / "other")
    true = tiny("teacher.checkpoint=w.safetensors", "store_dir=one")
    # Another file is copied over the first, in place, as soon as it has been read once.
    swap = """
import kd_cli.storage.weight_files as files, pathlib
read = files.read_weight_file
def swapped(path):
    found = read(path)
    pathlib.Path(path).write_bytes(pathlib.Path("other").read_bytes())
    return found
import kd_cli.runs.models as models
models.read_weight_file = swapped
"""
    raced = tiny("teacher.checkpoint=w.safetensors", "store_dir=two", prelude=swap)
    for key in ("fingerprint", "test"):
        assert raced.summary["teacher"][key] == true.summary["teacher"][key]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda w: {"a": {"conv.weight": torch.ones(2)}, "epoch": 1}, "its keys are a, epoch; its tensors are a.conv"),
        (lambda w: {"layer.0.1.weight": torch.ones(12), "layer.0.1.bias": torch.ones(12)}, "2 of the model's 4 names"),
        (lambda w: {"epoch": 1, "lr": 0.1}, "holds no tensors; its keys are epoch, lr"),
        (
            lambda w: w | {"3.weight": torch.ones(7, 12), "3.bias": torch.ones(7)},
            "its last layer 3, which has 7 classes",
        ),
        (lambda w: w | {"1.weight": torch.ones(12, 784)}, "its first layer 1 takes 784 input values, the model's 64"),
        (lambda w: w | {"1.bias": torch.full((12,), 3e33)}, "1.bias holds the value 3e+33"),
        (lambda w: w | {"5.weight": torch.ones(3)}, "5.weight is not in the model"),
    ],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_trained(
    kd_run: Callable[..., Ran], tmp_path: Path, weights: State, content: Any, said: str
) -> None:
    torch.save(content(weights), tmp_path / "w.pt")
    ran = kd_run(*TINY, "teacher.checkpoint=w.pt")
    assert ran.code == 1
    assert said in ran.err
    assert "hint: " in ran.err
    assert "Traceback" not in ran.err
    assert not list(tmp_path.rglob("metrics.jsonl"))


def test_half_precision_gives_what_its_numbers_give_in_full(
    tiny: Callable[..., Ran], tmp_path: Path, weights: State
) -> None:
    half = {name: tensor.half() for name, tensor in weights.items()}
    torch.save(half, tmp_path / "half.pt")
    torch.save({name: tensor.float() for name, tensor in half.items()}, tmp_path / "full.pt")
    ran = [tiny(f"teacher.checkpoint={name}.pt") for name in ("half", "full")]
    assert ran[0].summary["teacher"]["test"] == ran[1].summary["teacher"]["test"]
    assert "they are float16" in notes(ran[0])


# ---------------------------------------------------------------- the teacher's normalisation


@pytest.fixture(scope="module")
def raw() -> State:
    """A teacher of the digits that was trained on pixels from 0 to 255."""
    from kd_cli.data.digits import digits
    from kd_cli.data.prepare import prepare

    data = prepare(digits(data_dir="unused"), val_fraction=0.1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = mlp(input_shape=(1, 8, 8), num_classes=10, hidden=[12])
        optimizer = torch.optim.Adam(network.parameters(), 2e-3)
        images, labels = data.train.images * 255, data.train.labels
        for _ in range(30):
            for index in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(network(images[index]), labels[index]).backward()
                optimizer.step()
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


def test_a_teacher_under_a_wrong_normalisation_is_noticed_and_can_be_put_right(
    tiny: Callable[..., Ran], tmp_path: Path, raw: State
) -> None:
    from kd_cli.data.digits import digits

    torch.save(raw, tmp_path / "raw.pt")
    source = digits(data_dir="unused")
    network = mlp(input_shape=(1, 8, 8), num_classes=10, hidden=[12])
    network.load_state_dict(raw)
    own = int((network(source.test_images * 255).argmax(1) != source.test_labels).sum())

    wrong = tiny("teacher.checkpoint=raw.pt")
    right = tiny("teacher.checkpoint=raw.pt", "teacher.normalize={mean: 0, std: 0.0039215686}")
    assert "with 'teacher.normalize={mean: 0, std: 0.00392157}'" in notes(wrong)
    assert wrong.summary["teacher"]["test"]["errors"] > 1.5 * own
    assert right.summary["teacher"]["test"]["errors"] == own
    assert not right.summary["notes"]
    assert right.summary["teacher"]["fingerprint"] != wrong.summary["teacher"]["fingerprint"]


@pytest.mark.parametrize(
    ("value", "said"),
    [("nope", "teacher.normalize is 'nope'"), ("{mean: 0}", "it must be data"), ("{mean: 0, std: 0}", "std is 0"),
     ("{mean: [0, 0, 0], std: 1}", "normalize.mean has 3 numbers, and the data has 1 channels"),
     ("{mean: x, std: 1}", "mean is 'x'")],
)  # fmt: skip
def test_a_normalisation_that_cannot_be_is_refused(kd_run: Callable[..., Ran], value: str, said: str) -> None:
    ran = kd_run(*TINY, f"teacher.normalize={value}")
    assert ran.code == 1
    assert said in ran.err
    assert "Traceback" not in ran.err


def test_a_trained_teacher_can_have_a_normalisation_of_its_own(tiny: Callable[..., Ran]) -> None:
    ran = tiny("teacher.normalize=none", "teacher.max_norm=1", "teacher.dropout=0.2", "training.jitter=1")
    assert ran.summary["teacher"]["val"]["nll"] > 0
    assert json.loads((ran.run_dir / "student.json").read_text())["normalize"] == "data"


@pytest.mark.parametrize(("byte", "bit"), [(38, 0x10), (10, 0x08), (42, 0x01), (16, 0x01), (24, 0x10)])
def test_a_flipped_bit_in_the_list_of_an_archives_files_is_noticed(tmp_path: Path, byte: int, bit: int) -> None:
    """Among them: a tensor's file that is marked as a folder, of which torch.load gives uninitialised memory."""
    torch.save({"weight": torch.randn(4, 4)}, tmp_path / "w.pt")
    content = bytearray((tmp_path / "w.pt").read_bytes())
    entry = content.index(b"w/data/0", content.index(b"PK\x01\x02")) - 46  # of the tensor, in the central directory
    assert content[entry : entry + 4] == b"PK\x01\x02"
    content[entry + byte] ^= bit
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="it is damaged"):
        read_weight_file(tmp_path / "w.pt")


def test_a_dry_run_and_the_first_line_say_that_a_teacher_is_loaded(kd_run: Callable[..., Ran], tmp_path: Path) -> None:
    torch.save(mlp(input_shape=(1, 8, 8), num_classes=10, hidden=[12]).state_dict(), tmp_path / "t.pt")
    words = [*TINY, "teacher.dropout=0", "teacher.input_dropout=0", "teacher.checkpoint=t.pt"]
    assert "teacher tinymlp: to test, with the weights of teacher.checkpoint" in kd_run(*words, "dry_run=true").out
    assert "teacher tinymlp (loaded); student tinymlp (1 epoch)" in kd_run(*words).err
