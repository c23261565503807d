"""Configurations become plain values, `_target_` nodes become objects, and the user's code is in the fingerprint."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import yaml
from omegaconf import ListConfig
from process import Ran
from torch import nn

from kd_cli.config.build import build, locate
from kd_cli.config.check import FORMER_LOSSES, check_config, check_fields
from kd_cli.config.fingerprint import code_version
from kd_cli.config.moved import MOVED, current_name
from kd_cli.config.ranges import interval
from kd_cli.config.schema import OWN_KEYS, Schema, StudentKeys, Training, Transfer
from kd_cli.errors import ConfigError
from kd_cli.learn.methods import Hard
from kd_cli.nearest import did_you_mean
from kd_cli.shipped import USER, raised_by, raised_by_statement

OWN = """
import torch

class Got:
    def __init__(self, *args, **kwargs):
        self.args, self.kwargs = args, kwargs

class Net(torch.nn.Module):
    def __init__(self, input_shape, num_classes, activation=None, widths=()):
        super().__init__()
        self.input_shape, self.activation, self.widths = input_shape, activation, widths

def words(target, where, node=1, config=2):
    return target, where, node, config

def square(x, power=2):
    return x**power

def fails(message="mine"):
    raise ValueError(message)

def reads():
    return open("bc2.csv")
"""
SIZES: dict[str, Any] = {"input_shape": (1, 8, 8), "num_classes": 10}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module of the user's own."""
    name = f"own_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    return name


# ---------------------------------------------------------------- `_target_` nodes


def test_a_target_gets_the_nodes_arguments_as_plain_lists_and_the_callers_untouched(own: str) -> None:
    net = build({"_target_": f"{own}.Net", "widths": [1, {"a": [2]}]}, where="student", **SIZES)
    assert net.widths == [1, {"a": [2]}]
    assert type(net.widths) is list
    assert net.input_shape == (1, 8, 8)
    assert type(net.input_shape) is tuple


def test_nested_nodes_are_built_first_wherever_they_stand(own: str) -> None:
    relu = {"_target_": "torch.nn.ReLU"}
    got = build({"_target_": f"{own}.Got", "one": relu, "many": [relu, {"deep": relu}]})
    assert isinstance(got.kwargs["one"], nn.ReLU)
    assert isinstance(got.kwargs["many"][0], nn.ReLU)
    assert isinstance(got.kwargs["many"][1]["deep"], nn.ReLU)


def test_args_are_positional_arguments_and_may_be_nodes(own: str) -> None:
    got = build({"_target_": f"{own}.Got", "_args_": [1, {"_target_": "torch.nn.ReLU"}], "key": 2})
    assert got.args[0] == 1
    assert isinstance(got.args[1], nn.ReLU)
    assert got.kwargs == {"key": 2}


def test_a_partial_is_called_later_and_completed_where_kd_run_has_the_missing_arguments(own: str) -> None:
    square = build({"_target_": f"{own}.square", "_partial_": True, "power": 3}, where="schedule")
    assert square(2) == 8
    activation = {"_target_": "torch.nn.LeakyReLU", "_partial_": True, "negative_slope": 0.25}
    net = build({"_target_": f"{own}.Net", "_partial_": True, "activation": activation}, where="student", **SIZES)
    assert net.activation()(torch.tensor(-1.0)) == -0.25
    weight = nn.Parameter(torch.zeros(1))
    assert isinstance(build({"_target_": "torch.optim.SGD", "_partial_": True, "lr": 1}, [weight]), torch.optim.SGD)


def test_recursive_false_hands_nodes_over_as_they_are(own: str) -> None:
    node = {"_target_": "nowhere.Net", "x": 1}
    assert build({"_target_": f"{own}.Got", "_recursive_": False, "node": node}).kwargs == {"node": node}


@pytest.mark.parametrize(
    ("convert", "kind"), [("none", ListConfig), ("partial", list), ("object", list), ("all", list)]
)
def test_convert_chooses_the_kind_of_containers(own: str, convert: str, kind: type) -> None:
    got = build({"_target_": f"{own}.Got", "_convert_": convert, "widths": [1, 2]})
    assert type(got.kwargs["widths"]) is kind
    assert list(got.kwargs["widths"]) == [1, 2]


@pytest.mark.parametrize(
    ("keys", "message", "hint"),
    [
        ({"_partial_": "yes"}, "student._partial_ is 'yes'; it must be true or false", None),
        ({"_recursive_": 1}, "student._recursive_ is 1; it must be true or false", None),
        ({"_convert_": "al"}, "student._convert_ is 'al'; it must be one of none, partial, object, all", None),
        ({"_args_": 3}, "student._args_ is 3; it must be a list of positional arguments", None),
        ({"_partal_": True}, "student._partal_: OWN.Net has no such key", "did you mean _partial_?"),
        ({"widhts": [1]}, "student.widhts: OWN.Net has no such key", "did you mean widths?"),
        ({"num_classes": 3}, "student.num_classes is given, and kd-run passes it to OWN.Net itself", "leave it out"),
        (
            {"activation": {"_target_": "torch.nn.LeakyReLU", "negativ_slope": 1}},
            "student.activation.negativ_slope: torch.nn.LeakyReLU has no such key",
            "did you mean negative_slope?",
        ),
        (
            {"widths": [{"_target_": "nowhere.Net"}]},
            "_target_ is nowhere.Net, and no module of that name can be imported",
            "own modules are found in the working directory and on PYTHONPATH",
        ),
    ],
)
def test_a_wrong_key_of_a_node_is_named(own: str, keys: dict[str, Any], message: str, hint: str | None) -> None:
    with pytest.raises(ConfigError) as caught:
        build({"_target_": f"{own}.Net", **keys}, where="student", **SIZES)
    assert caught.value.message == message.replace("OWN", own)
    assert caught.value.hint == hint


def test_positional_arguments_are_not_given_twice(own: str) -> None:
    with pytest.raises(ConfigError, match=r"optimizer\._args_ is \[1\], and kd-run passes the positional arguments"):
        build({"_target_": "torch.optim.SGD", "_args_": [1]}, [nn.Parameter(torch.zeros(1))], where="optimizer")


def test_arguments_may_have_any_name(own: str) -> None:
    node = {"_target_": f"{own}.words", "target": "a", "where": "b", "node": "c", "config": "d"}
    assert build(node, where="dataset") == ("a", "b", "c", "d")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("function", "kind"), [("fails", ValueError), ("reads", FileNotFoundError)])
def test_an_error_of_the_users_code_is_raised_as_it_is(own: str, function: str, kind: type, nested: bool) -> None:
    node: dict[str, Any] = {"_target_": f"{own}.{function}"}
    with pytest.raises(kind) as caught:
        build({"_target_": f"{own}.Got", "inner": [node]} if nested else node, where="dataset")
    assert traceback.extract_tb(caught.value.__traceback__)[-1].name == function
    assert caught.value.__cause__ is caught.value.__context__ is None  # and no other traceback comes before it
    assert raised_by(caught.value) == USER
    assert raised_by_statement(caught.value) == (function == "fails")


def test_a_value_that_a_library_refuses_is_a_mistake_in_the_configuration(own: str) -> None:
    linear = {"_target_": "torch.nn.Linear", "in_features": -1, "out_features": 2}
    with pytest.raises(ConfigError, match=r"student: torch\.nn\.Linear: .*negative dimension"):
        build(linear, where="student")
    with pytest.raises(ConfigError, match=r"student: .*negative dimension"):
        build({"_target_": f"{own}.Got", "layer": linear}, where="student")


def test_a_dangerous_target_is_refused_where_hydra_has_a_list_of_them(own: str) -> None:
    if hydra.__version__ in ("1.3.2", "1.3.3"):
        pytest.skip("this version of Hydra has none")
    for node in ({"_target_": "os.system", "command": "true"}, {"_target_": "builtins.eval", "_args_": ["1"]}):
        for where in (node, {"_target_": f"{own}.Got", "inner": node}):
            with pytest.raises(ConfigError, match=rf"method: Target '{node['_target_']}' is bl(ock|ack)listed"):
                build(where, where="method")


# ---------------------------------------------------------------- former names


def test_former_names_lead_to_what_they_meant() -> None:
    from kd_cli.learn import methods, schedules

    assert isinstance(build({"_target_": "kd_cli.learn.methods.Hard"}), Hard)
    assert locate("kd_cli.zoo.models.mlp").__name__ == "mlp"
    assert locate("kd_cli.zoo.data.imagefolder").__name__ == "imagefolder"
    assert locate("kd_cli.runs.limits.high_temperature").__name__ == "high_temperature"
    assert locate("kd_cli.learn.methods.SoftTargets") is methods.SoftTargets
    assert locate("kd_cli.learn.optim.Cosine") is schedules.Cosine


def test_what_users_code_imports_by_a_former_name_is_found() -> None:
    from kd_cli import data, models, vision
    from kd_cli.zoo.data import Source, digits, imagefolder, normalise, prepare, torchvision_dataset
    from kd_cli.zoo.models import cnn, mlp, torchvision_model
    from kd_cli.zoo.vision import import_torchvision

    assert Source is data.source.Source
    assert prepare is data.prepare.prepare
    assert digits is data.digits.digits
    assert imagefolder is data.folders.imagefolder
    assert normalise is data.normalisation.normalise
    assert torchvision_dataset is data.torchvision.torchvision_dataset
    assert (mlp, cnn, torchvision_model) == (models.mlp.mlp, models.cnn.cnn, models.torchvision.torchvision_model)
    assert import_torchvision is vision.import_torchvision


@pytest.mark.parametrize("former", MOVED)
def test_every_line_of_the_table_leads_to_something_that_exists(former: str) -> None:
    present = current_name(former)
    assert present != former
    assert current_name(present) == present
    locate(present) if "." in present else __import__(present)


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        (
            Schema,
            {"seed": 2**63},
            "seed is 9223372036854775808; it must be at least 0 and at most 9,223,372,036,854,775,807",
        ),
        (Schema, {"T": 10**400}, "it must be a number above 0"),
        (Schema, {"T": 1e-9}, "T is 1e-09; it must be at least 0.001 and at most 10000"),
        (Schema, {"beta": True}, "beta is True; it must be a number, 0 or more"),
        (
            Schema,
            {"precision": "float23"},
            "precision is 'float23'; it must be one of float32, tf32, bfloat16, float64",
        ),
        (Schema, {"diagnostics": 1}, "diagnostics is 1; it must be true or false"),
        (StudentKeys, {"quantise": "int4"}, "quantise is 'int4'; it must be int8 or null"),
        (Schema, {"device": 3}, "device is 3; it must be a text"),
        (Schema, {"training": None}, "training is None; it must be a section of keys"),
        (Schema, {"training": {"epoch": 1}}, "there is no key 'training.epoch'"),
        (Training, {"epochs": 1.5}, "epochs is 1.5; it must be a whole number, at least 1 and at most 1,000,000"),
        (Training, {"epochs": 10**12}, "epochs is 1000000000000; it must be at least 1 and at most 1,000,000"),
        (Training, {"jitter": 10**6}, "jitter is 1000000; it must be a number of pixels, from 0 to 256"),
        (Training, {"keep": "first"}, "keep is 'first'; it must be last or best"),
        (Transfer, {"fraction": 0}, "fraction is 0; it must be above 0 and at most 1"),
        (Transfer, {"omit": [1.5]}, "omit is [1.5]; it must be a list of classes, by number or name"),
    ],
)
def test_a_value_that_is_not_allowed_is_named_with_what_is(section: type, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_fields(values, section, "")
    assert message in caught.value.message


def test_a_record_that_lacks_later_keys_is_completed_with_their_defaults() -> None:
    node = {"_target_": "x.y"}
    nodes = (
        "teacher",
        "student",
        "dataset",
        "method",
        "optimizer",
        "schedule",
        "teacher_optimizer",
        "teacher_schedule",
    )
    values = check_config({**dict.fromkeys(nodes, node), "training": {"epochs": 7}, "T": 3, "loss": None})
    assert (values["T"], values["alpha"], values["diagnostics"]) == (3.0, 1.0, False)
    assert (values["training"]["epochs"], values["training"]["rotate"]) == (7, 0.0)
    assert values["teacher"] == {**node, **OWN_KEYS["teacher"]}
    assert values["dataset"] == {**node, "val_fraction": 0.1, "positive": None}


@pytest.mark.parametrize("loss", ["nope", {"a": 1}, [1], 3])
def test_a_former_loss_that_never_was_is_refused(loss: object) -> None:
    with pytest.raises(ConfigError, match="there is no option loss="):
        check_config({"loss": loss})


@pytest.mark.parametrize("value", [0, -1, "0", "nans", "infs", "-1s", True, None, "x", 1.5, "9" * 5000])
def test_an_interval_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.every is .*it must be a number of epochs or of seconds"):
        interval("checkpoint.every", value)


def test_an_interval_is_a_number_of_epochs_or_of_seconds() -> None:
    assert interval("checkpoint.every", 5) == (5, 0.0)
    assert interval("checkpoint.every", "0.5s") == (0, 0.5)


def test_presets_cannot_be_taken_for_methods() -> None:
    from kd_cli.config.options import conf_dir, groups

    options = groups([conf_dir()])
    assert sorted(options["preset"]) == sorted(FORMER_LOSSES.values())
    assert not options["preset"].keys() & options["method"].keys()
    assert "loss" not in options


@pytest.mark.parametrize(
    ("preset", "words"),
    {
        "soft_and_hard": ["method=soft_targets"],
        "soft_only": ["method=soft_targets", "beta=0"],
        "without_T2": ["method=soft_targets", "method.square_T=false"],
        "logits_only": ["method=logits", "beta=0"],
        "hard_only": ["method=hard", "beta=1"],
        "label_smoothing_only": ["method=label_smoothing", "beta=1"],
    }.items(),
)
def test_a_preset_is_a_method_with_its_weights(kd_run: Callable[..., Ran], preset: str, words: list[str]) -> None:
    composed = [yaml.safe_load(kd_run(*argv, "--cfg", "job").out) for argv in ([f"preset={preset}"], words)]
    assert composed[0] == composed[1]


@pytest.mark.parametrize("word", ["grad_clip", "model", "learning_rate", "cooldown", "num_workers", "wandb", "T1"])
def test_a_word_like_no_key_gets_no_hint(word: str) -> None:
    from kd_cli.config.options import conf_dir, key_names

    assert did_you_mean(word, key_names([conf_dir()])) is None


@pytest.mark.parametrize(
    ("word", "key"),
    [
        ("lr", "optimizer.lr"),
        ("optimizer_lr", "optimizer.lr"),
        ("batchsize", "training.batch_size"),
        ("epohcs", "training.epochs"),
        ("studnet.hidden", "student.hidden"),
        ("teacher.hiden", "teacher.hidden"),
        ("scheduler", "schedule"),
    ],
)
def test_a_typing_error_finds_its_key(word: str, key: str) -> None:
    from kd_cli.config.options import conf_dir, key_names

    assert did_you_mean(word, key_names([conf_dir()])) == f"did you mean {key}?"


# ---------------------------------------------------------------- the fingerprint of the user's code


Write = Callable[[dict[str, str]], dict[str, str]]


@pytest.fixture
def version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write files, and return the code version of `own_fp.net` in a fresh interpreter's eyes."""
    monkeypatch.syspath_prepend(tmp_path)

    def written(files: dict[str, str], node: object = None) -> dict[str, str]:
        from kd_cli.config import fingerprint

        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        for name in [name for name in sys.modules if name.split(".")[0].startswith("own_fp")]:
            del sys.modules[name]
        fingerprint.code_of.cache_clear()
        return code_version(node or {"_target_": "own_fp.net"})

    return written


IMPORTS = {
    "a module": ("import own_fp_part\n", "own_fp_part.py"),
    "a name of a module": ("from own_fp_part import block\n", "own_fp_part.py"),
    "everything of a module": ("from own_fp_part import *\n", "own_fp_part.py"),
    "a module of a package": ("import own_fp_pack.part\n", "own_fp_pack/part.py"),
    "a module from a package": ("from own_fp_pack import part\n", "own_fp_pack/part.py"),
    "a package's __init__": ("from own_fp_pack import part\n", "own_fp_pack/__init__.py"),
    "what an import imports": ("import own_fp_pack.part\n", "own_fp_deep.py"),
    "a relative import's module": ("import own_fp_pack.part\n", "own_fp_pack/near.py"),
    "a relative import from above": ("import own_fp_pack.sub.low\n", "own_fp_pack/near.py"),
    "an import within a function": ("def net():\n    import own_fp_part\n", "own_fp_part.py"),
    "an import that may fail": ("try:\n    import own_fp_part\nexcept ImportError:\n    pass\n", "own_fp_part.py"),
    "an import by its name": ("import importlib\nm = importlib.import_module('own_fp_part')\n", "own_fp_part.py"),
    "a folder without __init__": ("from own_fp_bare import part\n", "own_fp_bare/part.py"),
}
FILES = {
    "own_fp_part.py": "def block(): pass\n",
    "own_fp_pack/__init__.py": "",
    "own_fp_pack/part.py": "from . import near\nimport own_fp_deep\n",
    "own_fp_pack/near.py": "",
    "own_fp_pack/sub/__init__.py": "",
    "own_fp_pack/sub/low.py": "from ..near import *\n",
    "own_fp_deep.py": "import own_fp\n",  # in a circle
    "own_fp_bare/part.py": "",
}


@pytest.mark.parametrize("case", IMPORTS)
def test_an_edit_of_any_file_that_the_code_imports_changes_its_version(version: Write, case: str) -> None:
    statement, file = IMPORTS[case]
    source = f"import os, torch, numpy.linalg\n{statement}\nif not callable(globals().get('net')):\n    net = print\n"
    before = version({**FILES, "own_fp.py": source})
    assert version({"unrelated.py": "", "own_fp_data.csv": "1"}) == before
    after = version({file: FILES[file] + "# edited\n"})
    assert before.keys() == after.keys()
    (changed,) = [name for name in before if before[name] != after[name]]
    assert changed == file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    assert all(name.startswith("own_fp") for name in before)


def test_nested_targets_are_part_of_the_version(version: Write) -> None:
    node = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "own_fp_part.block"}]}
    assert version(FILES, node).keys() == {"own_fp_part"}
    assert version({}, {"_target_": "hydra.utils.get_method", "path": "own_fp_part.block"}).keys() == {"own_fp_part"}
    assert version({}, [{"_target_": "torch.optim.SGD"}, {"_target_": "kd_cli.zoo.models.mlp"}]) == {}
