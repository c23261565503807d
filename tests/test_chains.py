"""Chains of distillation: assistants between teacher and student, and generations of one architecture."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import TINY
from process import Ran

from kd_cli.data.digits import digits
from kd_cli.export.load import load_student
from kd_cli.storage.store import Store

Run = Callable[..., Ran]

CHAIN = [*TINY, "teacher.chain=[{model: tinymlp, hidden: [10]},{model: tinymlp, hidden: [9]}]"]


def store() -> Store:
    return Store(Path(os.environ["KD_STORE"]))


def student_of(folder: Path) -> bytes:
    return (folder / "student.safetensors").read_bytes()


def test_each_link_is_trained_once_and_found_again_by_other_students(kd_run: Run) -> None:
    ran = kd_run(*CHAIN, "hydra.run.dir=one")
    assert ran.code == 0, ran.err
    chain = ran.summary["chain"]
    assert [link["from_store"] for link in chain] == [False, False]
    assert [link["parameters"] for link in chain] == [64 * 10 + 10 + 110, 64 * 9 + 9 + 100]
    assert "assistant tinymlp, taught by tinymlp: 1 epoch" in ran.err
    assert "assistant 2 by soft_targets (tinymlp)" in ran.out
    assert "assistant 2 by soft_targets (tinymlp)" in (ran.run_dir / "report.html").read_text()
    assert "by way of tinymlp, tinymlp" in ran.out
    roles = [(row["role"], row.get("member")) for row in ran.metrics]
    assert roles == [("teacher", None), ("assistant", 0), ("assistant", 1), ("student_alone", None), ("student", None)]
    again = kd_run(*CHAIN, "seed=1", "hydra.run.dir=two")
    assert [link["from_store"] for link in again.summary["chain"]] == [True, True]
    assert [link["fingerprint"] for link in again.summary["chain"]] == [link["fingerprint"] for link in chain]
    assert "assistant tinymlp, taught by tinymlp: from the store" in again.err
    other = kd_run(*CHAIN, "teacher_training.epochs=2", "hydra.run.dir=three")
    assert {link["fingerprint"] for link in other.summary["chain"]}.isdisjoint(link["fingerprint"] for link in chain)


def test_the_last_link_teaches_the_student_as_its_weights_do_as_a_teacher(kd_run: Run, tmp_path: Path) -> None:
    ran = kd_run(*CHAIN, "hydra.run.dir=chain")
    assert ran.code == 0, ran.err
    torch.save(store().get(ran.summary["chain"][1]["fingerprint"]).weights(), tmp_path / "link.pt")  # type: ignore[union-attr]
    direct = kd_run(*TINY, "teacher.hidden=[9]", "teacher.checkpoint=link.pt", "hydra.run.dir=direct")
    assert direct.code == 0, direct.err
    assert student_of(tmp_path / "chain") == student_of(tmp_path / "direct")
    assert ran.summary["chain"][1]["test"]["errors"] == direct.summary["teacher"]["test"]["errors"]


@pytest.mark.slow
def test_a_checkpoint_may_teach_the_first_link(kd_run: Run, tmp_path: Path) -> None:
    ran = kd_run(*CHAIN, "hydra.run.dir=chain")
    torch.save(store().get(ran.summary["teacher"]["fingerprint"]).weights(), tmp_path / "teacher.pt")  # type: ignore[union-attr]
    loaded = kd_run(*CHAIN, "teacher.checkpoint=teacher.pt", "hydra.run.dir=loaded")
    assert loaded.code == 0, loaded.err
    assert student_of(tmp_path / "chain") == student_of(tmp_path / "loaded")
    assert loaded.summary["chain"][0]["from_store"] is False  # its fingerprint holds that of the file


@pytest.mark.slow
def test_links_meet_a_live_teacher_where_images_are_augmented(kd_run: Run, tmp_path: Path) -> None:
    ran = kd_run(*CHAIN, "training.jitter=1", "hydra.run.dir=chain")
    assert ran.code == 0, ran.err
    torch.save(store().get(ran.summary["chain"][1]["fingerprint"]).weights(), tmp_path / "link.pt")  # type: ignore[union-attr]
    loaded = ["teacher.hidden=[9]", "teacher.checkpoint=link.pt", "training.jitter=1"]
    direct = kd_run(*TINY, *loaded, "hydra.run.dir=direct")
    assert direct.code == 0, direct.err
    assert student_of(tmp_path / "chain") == student_of(tmp_path / "direct")


def test_generations_are_reported_one_by_one_and_together(kd_run: Run, tmp_path: Path) -> None:
    argv = [*TINY, "teacher.hidden=[8]", "teacher.generations=3", "teacher.combine=arithmetic", "training.epochs=2"]
    ran = kd_run(*argv, "hydra.run.dir=out")
    assert ran.code == 0, ran.err
    assert len(ran.summary["chain"]) == 2
    assert "generation 2 of 3 (tinymlp)" in ran.err
    assert "generations 1 to 3 together, arithmetic mean" in ran.out
    outputs = [store().get(link["fingerprint"]).outputs()["test"] for link in ran.summary["chain"]]  # type: ignore[union-attr]
    data = digits(data_dir=tmp_path)
    images, labels = data.test_images, data.test_labels
    members = torch.stack([*outputs, load_student(tmp_path / "out")(images).detach()])
    together = members.softmax(-1).mean(0)
    wrong = int((together.argmax(-1) != labels).sum())
    assert ran.summary["generations"]["test"]["errors"] == wrong
    assert len({link["seed"] for link in ran.summary["chain"]}) == 2


def test_without_labels_generations_learn_from_the_one_before_alone(kd_run: Run) -> None:
    argv = [*TINY, "teacher.generations=2", "teacher.hidden=[8]"]
    hidden = kd_run(*argv, "transfer.labels=false", "hydra.run.dir=hidden")
    assert hidden.code == 0, hidden.err
    soft = kd_run(*argv, "beta=0", "hydra.run.dir=soft")
    chains = [ran.summary["chain"][0]["test"]["errors"] for ran in (hidden, soft)]
    assert chains[0] == chains[1]
    assert hidden.summary["student"]["test"] == soft.summary["student"]["test"]


def test_a_sweep_trains_a_chain_for_each_setting_and_lists_its_links(kd_run: Run) -> None:
    ran = kd_run("-m", *TINY, "teacher.chain=null,[{model: tinymlp, hidden: [10]}]", "T=1,4", "hydra.sweep.dir=out")
    assert ran.code == 0, ran.err
    assert ran.out.count("assistant 1 tinymlp (T=") == 2
    single = kd_run(*TINY, "teacher.chain=[{model: tinymlp, hidden: [10]}]", "T=4", "hydra.run.dir=single")
    assert single.summary["chain"][0]["from_store"]


def test_a_dry_run_names_the_links(kd_run: Run) -> None:
    ran = kd_run(*CHAIN, "dry_run=true")
    assert ran.code == 0, ran.err
    assert ran.out.count("assistant tinymlp, taught by tinymlp: to train") == 2


KILLED = """
import os, signal
from kd_cli.storage.training_state import TrainingState
def killed(self, state, save=TrainingState.save):
    save(self, state)
    if state["epoch"] == 2 and "soft_loss" in state["outcomes"][0]["history"][0]:
        os.kill(os.getpid(), signal.SIGKILL)
TrainingState.save = killed
"""


@pytest.mark.slow
def test_a_chain_killed_in_its_first_link_continues_to_the_same_bytes(kd_run: Run, tmp_path: Path) -> None:
    argv = [*CHAIN, "training.epochs=3", "checkpoint.every=1"]
    assert kd_run(*argv, "hydra.run.dir=whole", "store_dir=other").code == 0
    assert kd_run(*argv, "hydra.run.dir=out", prelude=KILLED).code == -9
    resumed = kd_run("resume=out")
    assert resumed.code == 0, resumed.err
    assert student_of(tmp_path / "out") == student_of(tmp_path / "whole")
    rows = [
        [(row["role"], row.get("member"), row["loss"]) for row in map(json.loads, lines.splitlines())]
        for lines in ((tmp_path / name / "metrics.jsonl").read_text() for name in ("out", "whole"))
    ]
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["teacher.chain=[]"], "it must be a list of one model or more"),
        (["teacher.chain=smallmlp"], "it must be a list of one model or more"),
        (["teacher.chain=[mediumlp]"], "teacher.chain names 'mediumlp', and there is no such model"),
        (["teacher.chain=[mediummlp,mediummlp]"], "teacher.chain loops: its model 2, mediummlp, is model 1 again"),
        (["teacher.chain=[bigmlp]"], "is the teacher again"),
        (["teacher.chain=[smallmlp]"], "is the student again"),
        (["teacher.chain=[mediummlp]", "teacher.generations=2"], "are both given"),
        (["teacher.chain=[mediummlp]", "T=auto"], "train other models before it"),
        (["teacher.generations=0"], "teacher.generations is 0"),
        (["teacher.chain=[mediummlp]", "method=hard"], "method=hard has no teacher"),
        (["teacher.generations=2", "method=mutual", "peers=2"], "method=mutual has no teacher"),
        (["teacher.chain=[mediummlp]", "method=attention", "teacher=cnn", "student=cnn"], "from cnn to mediummlp"),
        (["teacher.chain=[mediummlp]", "method=simkd", "teacher=cnn", "student=cnn"], "another network"),
        (["teacher.chain=[mediummlp]", "method=dkd", "transfer.labels=false"], "the transfer set has none"),
        (["teacher.chain=[{model: mediummlp, hidden: [0]}]"], "hidden"),
        (["teacher.chain=[{model: mediummlp, hiden: [50]}]"], "hiden"),
    ],
)
def test_chains_that_cannot_be_are_refused_before_anything_is_trained(kd_run: Run, argv: list[str], said: str) -> None:
    ran = kd_run(*argv)
    assert ran.code == 1
    assert said in ran.err
    assert "Traceback" not in ran.err
    assert "loss" not in ran.err
    assert not (Path(os.environ["KD_STORE"]) / "partial").exists()
