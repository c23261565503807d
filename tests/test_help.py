"""The help page and the suggestions for mistyped words."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from kd_cli.commands.help import WIDTH, page
from kd_cli.config.options import conf_dir, data_node, groups, own_keys
from kd_cli.config.schema import OWN_KEYS
from kd_cli.config.yaml_comments import defaults_list, description, keys
from kd_cli.nearest import did_you_mean, nearest

SHIPPED = conf_dir()

CONFIG = """\
defaults:
  - kd_schema
  - _self_
  - teacher: big  # who teaches
  - student: small
  - dataset: digits
  - optimizer: sgd
  - teacher_optimizer: sgd
  - optional training: ${dataset}
  - experiment: null
  - override hydra/launcher: basic

T: 2.0  # temperature; raise it when the teacher
        # is too sure of itself
name: "a # b"  # a label
training:  # the student's budget
  epochs: 20  # passes over the data
  stop:  # when to stop early
    patience: null  # epochs without gain
  drops:  # where the rate falls
    - 0.5
    - 0.75
hydra:
  job: {name: run}
"""


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    files = {
        "config.yaml": CONFIG,
        "model/big.yaml": "# two wide layers\n_target_: x.Net\nhidden: [1200, 1200]  # widths\n",
        "model/small.yaml": "# one narrow layer\ndefaults:\n  - big\n  - _self_\nhidden: [30]  # widths\n",
        "teacher/ensemble.yaml": "# several at once\nmembers: 3  # how many\n",
        "dataset/digits.yaml": "# handwritten digits\nval_fraction: 0.1  # share for validation\n",
        "optimizer/sgd.yaml": "# plain descent\nlr: 0.1  # learning rate\n",
        "training/digits.yaml": "# the budget for digits\nepochs: 30  # a small set\n",
        "experiment/paper.yaml": "# @package _global_\n# what the paper did\nT: 20\n",
        "hydra/job_logging/kd.yaml": "# logging\nversion: 1\n",
    }
    return write(tmp_path / "conf", files)


def lines(*conf_dirs: Path) -> list[str]:
    """Return the page's lines, each with its runs of spaces made one."""
    return [" ".join(line.split()) for line in page(conf_dirs).splitlines()]


def test_a_shared_model_is_an_option_of_both_roles_and_each_marks_its_default(conf: Path) -> None:
    text = lines(conf)
    teacher = text[text.index("teacher= who teaches") :]
    assert teacher[1:4] == ["big (default) two wide layers", "small one narrow layer", "ensemble several at once"]
    student = text[text.index("student=") :]
    assert student[1:3] == ["big two wide layers", "small (default) one narrow layer"]


def test_groups_come_in_the_order_of_the_defaults_list_and_hydras_own_are_left_out(conf: Path) -> None:
    heads = re.findall(r"^  ([+\w/]+)=(?: |$)", page([conf]).partition("\nKeys")[0], re.MULTILINE)
    assert heads == ["teacher", "student", "dataset", "optimizer", "teacher_optimizer", "training", "experiment"]


def test_a_group_with_the_options_of_another_points_there(conf: Path) -> None:
    assert "teacher_optimizer= the options of optimizer=; default sgd" in lines(conf)


def test_an_option_that_follows_another_group_is_marked(conf: Path) -> None:
    text = lines(conf)
    at = text.index("training= follows dataset= where an option has its name")
    assert text[at + 1] == "digits (default) the budget for digits"


def test_the_examples_end_with_an_experiment_where_there_is_one(conf: Path) -> None:
    assert "kd-run experiment=paper" in lines(conf)
    (conf / "experiment/paper.yaml").unlink()
    assert "experiment=" not in page([conf])


def test_the_package_directive_is_not_taken_for_the_description(conf: Path) -> None:
    assert "paper what the paper did" in lines(conf)


def test_keys_show_defaults_and_comments(conf: Path) -> None:
    text = lines(conf)
    assert "T=2.0 temperature; raise it when the teacher is too sure of itself" in text
    assert 'name="a # b" a label' in text
    assert "training. the student's budget; of training=digits" in text
    assert "training.stop.patience=null epochs without gain" in text
    assert "training.drops=[0.5, 0.75] where the rate falls" in text


def test_hydras_settings_and_targets_are_no_keys_of_the_page(conf: Path) -> None:
    assert "hydra.job" not in page([conf])
    assert "_target_" not in page([conf])


def test_an_options_value_wins_over_config_yaml_only_after_self(conf: Path) -> None:
    assert "training.epochs=30 passes over the data" in lines(conf)
    write(conf, {"config.yaml": CONFIG.replace("  - _self_\n", "")})  # then config.yaml has the last word
    assert "training.epochs=20 passes over the data" in lines(conf)


def test_keys_of_default_options_and_of_what_they_inherit_are_listed(conf: Path) -> None:
    write(conf, {"model/big.yaml": "# wide\nhidden: [1200]  # widths\ndropout: 0.5  # share of units dropped\n"})
    text = lines(conf)
    assert "dataset.val_fraction=0.1 share for validation" in text
    assert "student.hidden=[30] widths" in text
    assert "student.dropout=0.5 share of units dropped" in text


def test_a_section_equal_to_another_points_there(conf: Path) -> None:
    assert "teacher_optimizer. of teacher_optimizer=sgd; the keys and defaults of optimizer" in lines(conf)


def test_a_users_folder_adds_options_and_groups_but_replaces_none(conf: Path, tmp_path: Path) -> None:
    mine = {
        "model/mine.yaml": "# my own net\n_target_: my.Net\n",
        "model/big.yaml": "# another of that name\n",
        "extra/one.yaml": "# a group of mine\n",
    }
    text = lines(conf, write(tmp_path / "mine", mine))
    assert text.count("mine my own net") == 2
    assert "big (default) two wide layers" in text
    assert "+extra=" in text


def test_every_line_fits(conf: Path) -> None:
    write(conf, {"config.yaml": CONFIG + f"a_key_with_a_rather_long_name: 12345  # {'words and ' * 40}\n"})
    assert max(len(line) for line in page([conf]).splitlines()) <= WIDTH


def test_program_is_named_as_it_was_called(conf: Path) -> None:
    assert "kd-run" not in page([conf], program="python -m kd_cli")


@pytest.mark.parametrize(
    ("text", "value", "comment"),
    [
        ("a: 1 # one", "1", "one"),
        ("a: 1", "1", ""),
        ("a:  # nothing", "null", "nothing"),
        ("a: 'it''s # no comment'  # yes", "'it''s # no comment'", "yes"),
        ("a: ${b}  # follows b", "${b}", "follows b"),
        ("a: {b: 1, c: 2}  # a map", "{b: 1, c: 2}", "a map"),
        ("a: [1,  # first\n  2]  # all", "[1, 2]", "all"),
        ("a: 1  # one\n# not of a", "1", "one"),
    ],
)
def test_a_value_is_shown_as_written_and_its_comment_found(text: str, value: str, comment: str) -> None:
    assert keys(text) == [("a", value, comment)]


def test_help_imports_neither_torch_nor_hydra() -> None:
    code = "import sys, kd_cli.commands.help, kd_cli.nearest\n"
    code += "print(sorted({'torch', 'hydra', 'omegaconf'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


# What ships


@pytest.mark.parametrize("file", sorted(SHIPPED.rglob("*.yaml")), ids=lambda file: str(file.relative_to(SHIPPED)))
def test_shipped_yaml_explains_itself(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    group = file.parent.relative_to(SHIPPED).as_posix()
    if group != ".":
        assert description(file), "the first line should be a comment that describes the option"
    if group.partition("/")[0] in {"hydra", "experiment"}:
        return  # Hydra explains its own keys; an experiment sets keys that are explained elsewhere
    silent = [
        key.name
        for key in keys(text)
        if not key.comment and not key.name.endswith("_target_") and key.name.partition(".")[0] != "hydra"
    ]
    assert not silent, "these keys lack an end-of-line comment"


def test_examples_of_the_page_name_options_and_keys_that_exist() -> None:
    available = groups([SHIPPED])
    names = {key.name for key in keys((SHIPPED / "config.yaml").read_text(encoding="utf-8"))}
    for line in re.findall(r"^  kd-run (.*)$", page([SHIPPED]), re.MULTILINE):
        for name, value in re.findall(r"([\w.]+)=([\w(),]+)", line):
            assert value in available.get(name, ()) or name in names, line


def test_every_default_of_the_shipped_configuration_exists() -> None:
    available = groups([SHIPPED])
    for entry in defaults_list((SHIPPED / "config.yaml").read_text(encoding="utf-8")):
        if entry.override:  # Hydra's own groups
            continue
        for option in entry.options:
            if entry.group and option != "null" and "$" not in option:
                assert option in available[entry.group]


def test_the_keys_that_every_option_of_a_role_has_are_explained() -> None:
    own = [key for group in OWN_KEYS for key in own_keys(group)]
    assert len(own) >= 3
    assert not [key.name for key in own if not key.comment]


def test_a_transfer_set_has_the_image_size_of_the_runs_data() -> None:
    run = {"_target_": "x", "root": "a", "image_size": 32, "channels": 1, "test_fraction": 0.5}
    node = data_node({"name": "imagefolder", "root": "b"}, [SHIPPED], run)
    assert (node["root"], node["image_size"], node["channels"], node["test_fraction"]) == ("b", 32, 1, 0.2)
    assert data_node({"name": "imagefolder", "root": "b", "image_size": 8}, [SHIPPED], run)["image_size"] == 8
    assert "image_size" not in data_node("kmnist", [SHIPPED], run)


# Suggestions


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("t", "T"),
        ("Alpha", "alpha"),
        ("traning.epochs", "training.epochs"),
        ("epoch", "training.epochs"),
        ("student.hiden", "student.hidden"),
        ("teacher_training.epoch", "teacher_training.epochs"),
        ("training.hidden", "student.hidden"),
    ],
)
def test_a_typo_finds_the_key_that_was_meant(word: str, meant: str) -> None:
    candidates = ["T", "alpha", "beta", "training.epochs", "teacher_training.epochs", "student.hidden"]
    assert did_you_mean(word, candidates) == f"did you mean {meant}?"


def test_a_word_like_none_gets_no_suggestion() -> None:
    assert did_you_mean("gamma", ["T", "alpha", "beta"]) is None
    assert did_you_mean("x", []) is None


def test_nearest_returns_the_most_alike_first_and_at_most_n() -> None:
    assert nearest("bigmpl", ["smallmlp", "bigmlp", "bigmlp2", "resnet18"], n=2) == ["bigmlp", "bigmlp2"]


def test_a_reader_of_the_page_may_leave_early() -> None:
    command = f"{sys.executable} -m kd_cli --help | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.stdout.startswith("kd-run trains a teacher")
    assert done.stderr == ""
