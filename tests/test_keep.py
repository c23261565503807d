"""Pictures in memory, in a file of bytes or decoded in each epoch: the same data, and what goes wrong on the way."""

import collections
import logging
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

from kd_cli.data import decoded, room, streamed
from kd_cli.data.folders import as_reading, imagefolder
from kd_cli.data.keep import choose
from kd_cli.data.normalisation import Normalisation
from kd_cli.data.prepare import prepare, unlabelled
from kd_cli.data.room import available_memory, gigabytes
from kd_cli.data.stored import StoredImages
from kd_cli.errors import ConfigError, DataError
from kd_cli.learn.batches import Examples, gathered
from kd_cli.learn.stored_examples import StoredExamples

WORKERS = "import kd_cli.data.streamed as streamed; streamed.IN_PROCESS = 0.0"
STREAMED = ("dataset=imagefolder", "dataset.image_size=8", "dataset.val_fraction=0.2")


@pytest.fixture
def zoo(tmp_path) -> Path:
    """60 JPEGs in three classes; some occur twice, one shows nothing."""
    random = np.random.default_rng(0)
    for c, name in enumerate(("ape", "bee", "cow")):
        (tmp_path / "zoo" / name).mkdir(parents=True)
        for i in range(20):
            pixels = random.integers(0, 256, (12, 10 + c, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "zoo" / name / f"{i}.jpg", quality=90)
    for one, other in ((7, 3), (8, 0), (9, 1), (11, 10)):  # pictures that occur twice
        (tmp_path / "zoo" / "bee" / f"{one}.jpg").write_bytes((tmp_path / "zoo" / "bee" / f"{other}.jpg").read_bytes())
    Image.new("RGB", (9, 9), (4, 5, 6)).save(tmp_path / "zoo" / "cow" / "1.jpg")
    return tmp_path / "zoo"


@pytest.fixture
def workers(monkeypatch) -> None:
    """Also a few pictures are decoded by worker processes."""
    monkeypatch.setattr(streamed, "IN_PROCESS", 0.0)


def read(zoo: Path, keep: str, **keys):
    return imagefolder(data_dir=zoo.parent / "data", root=str(zoo), image_size=8, keep=keep, **keys)


AT_8 = as_reading(8, 3, "white")


def without_place(notes) -> list[str]:
    return [note for note in notes if "dataset.keep=" not in note and "earlier run" not in note]


@pytest.mark.parametrize("keep", ["disk", "none"])
@pytest.mark.parametrize("published", [False, True])
def test_stored_pictures_make_the_same_data_set(zoo, workers, keep, published):
    if published:
        for part in ("train", "val", "test"):
            for name in ("ape", "bee", "cow"):
                (zoo.parent / "parts" / part / name).mkdir(parents=True)
                for file in sorted((zoo / name).iterdir())[("train", "val", "test").index(part) :: 3]:
                    (zoo.parent / "parts" / part / name / file.name).write_bytes(file.read_bytes())
        zoo = zoo.parent / "parts"
    one = prepare(read(zoo, "memory"), val_fraction=0.2)
    other = prepare(read(zoo, keep), val_fraction=0.2)
    assert any("identical to a training picture" in note for note in one.notes)
    assert any("the same value in every pixel" in note for note in one.notes)
    assert any("not square" in note for note in one.notes)
    assert sorted(without_place(other.notes)) == sorted(one.notes)
    assert (other.fingerprint, other.mean, other.std) == (one.fingerprint, one.mean, one.std)
    for part in ("train", "val", "test"):
        ours, theirs = getattr(other, part), getattr(one, part)
        assert isinstance(ours.images, StoredImages)
        assert ours.names == theirs.names
        assert ours.images[:].equal(theirs.images)
        assert torch.cat(list(ours.images.split(7))).equal(theirs.images)
        assert ours.images[torch.tensor([5, 0, 5])].equal(theirs.images[torch.tensor([5, 0, 5])])


def test_pictures_without_labels_are_the_same_wherever_they_are_kept(zoo):
    flat = zoo / "ape"
    one, two, three = (unlabelled(read(flat, keep)) for keep in ("memory", "disk", "none"))
    assert one[1] == two[1] == three[1]
    assert one[0].equal(two[0][:])
    assert one[0].equal(three[0][:])


@pytest.mark.parametrize("keep", ["disk", "none"])
def test_batches_of_stored_pictures_are_those_of_resident_ones(zoo, workers, keep):
    resident, other = (prepare(read(zoo, k), val_fraction=0.2) for k in ("memory", keep))
    normalise = Normalisation(resident.mean, resident.std, torch.float32)
    one = Examples(resident.train.images, resident.train.labels, normalise=normalise)
    two = StoredExamples(other.train.images, other.train.labels, normalise=normalise)
    order = torch.stack([torch.randperm(len(one)) for _ in range(2)])
    sizes = [16, 16, len(one) - 32]
    random = torch.get_rng_state()
    two.expect(order, sizes)
    for k, index in enumerate(order.split(sizes, 1)):
        if k == 1:
            assert two.images(index[:1, :3]).equal(one.images(index[:1, :3]))  # one that was not announced
        assert two.images(index).equal(one.images(index))
    assert torch.get_rng_state().equal(random)
    assert torch.cat(list(two.in_order(10))).equal(torch.cat(list(one.in_order(10))))
    assert two.first(3).equal(one.first(3))
    some = torch.tensor([4, 1])
    assert two.subset(some).first(2).equal(one.subset(some).first(2))


def test_a_file_without_preadv_is_read_to_the_same_bytes(zoo, monkeypatch):
    images = read(zoo, "disk").train_images
    whole, some = images[:], images[torch.tensor([5, 2, 2])]
    monkeypatch.delattr("os.preadv")
    assert images[:].equal(whole)
    assert images[torch.tensor([5, 2, 2])].equal(some)


def test_a_kept_file_that_becomes_shorter_is_refused(zoo):
    images = read(zoo, "disk").train_images
    os.truncate(images.file.path, 1000)
    with pytest.raises(DataError, match="were changed while this run used them"):
        images[:]


def test_predictions_of_many_batches_are_joined_in_their_order(zoo):
    data = prepare(read(zoo, "disk"), val_fraction=0.2)
    examples = StoredExamples(
        data.train.images, data.train.labels, normalise=Normalisation(data.mean, data.std, torch.float32)
    )
    module = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    with torch.no_grad():
        whole = module(examples.first(len(examples)))
    assert torch.allclose(gathered(map(module, examples.in_order(7)), len(examples)).detach(), whole, atol=1e-6)


@pytest.mark.long
def test_a_student_of_streamed_pictures_is_byte_for_byte_that_of_resident_ones(tiny, zoo, tmp_path):
    words = [*STREAMED, f"dataset.root={zoo}", "training.crop=1", "student.dropout=0.3", "training.batch_size=16"]
    weights = set()
    for keep in ("memory", "none"):
        options = [f"dataset.keep={keep}", f"data_dir={tmp_path / 'data'}", f"store_dir={tmp_path / keep / 'store'}"]
        ran = tiny(*words, *options, folder=tmp_path / keep, prelude=WORKERS)
        weights.add((ran.run_dir / "student.safetensors").read_bytes())
        assert any(f"(dataset.keep={keep})" in note for note in ran.summary["notes"]) == (keep != "memory")
    assert len(weights) == 1


# ---------------------------------------------------------------- which is chosen


@pytest.mark.parametrize(
    ("memory", "disk", "chosen"),
    [(400, 0, "memory"), (399, 200, "disk"), (399, 199, "none"), (None, 0, "memory")],
)
def test_auto_takes_memory_then_disk_then_neither(memory, disk, chosen):
    assert choose(100, memory=memory, disk=disk)[0] == chosen


def test_what_auto_measured_is_said(zoo, caplog):
    caplog.set_level("INFO")
    assert not isinstance(read(zoo, "auto").train_images, StoredImages)
    assert re.search(r"60 pictures of \S+ take 12 kB, less than a quarter of the [\d.]+ [GM]B of avail", caplog.text)


def test_available_memory_is_less_than_the_machine_has():
    assert 0 < available_memory() <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert [gigabytes(n) for n in (2_460_000_000, 49_000_000, 900)] == ["2.5 GB", "49 MB", "1 kB"]


def test_the_memory_of_a_control_group_of_version_1_is_seen(tmp_path):
    own, top = tmp_path / "cgroup", tmp_path / "root" / "memory"
    own.write_text("12:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/\n")  # in a container the path is the host's
    top.mkdir(parents=True)
    (top / "memory.limit_in_bytes").write_text("1000000\n")
    (top / "memory.usage_in_bytes").write_text("400000\n")
    (top / "memory.stat").write_text("cache 90\ntotal_inactive_file 5000\n")
    assert room._of_group(tmp_path / "root", own) == 605_000
    (top / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert room._of_group(tmp_path / "root", own) is None


def test_an_unknown_place_is_refused(zoo):
    with pytest.raises(ConfigError, match="must be one of auto, memory, disk, none") as caught:
        read(zoo, "disc")
    assert "disk" in caught.value.hint


def test_a_picture_that_is_decoded_at_a_part_of_its_size_is_noted(zoo):
    pixels = np.random.default_rng(1).integers(0, 256, (600, 520, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(zoo / "ape" / "0.jpg")
    assert any(
        note.startswith("1 picture is decoded at a half, a quarter or an eighth of its size")
        for note in read(zoo, "memory").notes
    )


# ---------------------------------------------------------------- what goes wrong


def test_too_little_disk_is_refused_before_anything_is_decoded(zoo, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: usage(100_000, 99_000, 1_000))
    with pytest.raises(DataError, match=r"60 decoded pictures take 12 kB, and 1 kB are free on the disk of .*decoded"):
        read(zoo, "disk")


def test_a_file_that_cannot_be_written_is_said(kd_run, zoo, tmp_path):
    ran = kd_run(*TINY, *STREAMED, f"dataset.root={zoo}", "dataset.keep=disk", "dataset.image_size=64", limit=200_000)
    assert ran.code != 0
    said = " ".join(ran.err.split())
    assert "the decoded pictures cannot be written to" in said
    assert "dataset.keep=none needs no disk" in said
    assert "Traceback" not in ran.err
    assert not list((tmp_path / "data").rglob("*.npy"))


@pytest.mark.parametrize("keep", ["disk", "none"])
def test_an_unreadable_picture_in_the_middle_is_named(zoo, workers, keep):
    (zoo / "bee" / "5.jpg").write_bytes(b"\xff\xd8\xff no more")
    with pytest.raises(DataError, match=r"the picture \S+bee/5.jpg cannot be used") as caught:
        prepare(read(zoo, keep), val_fraction=0.2)
    assert "Caught" not in str(caught.value)
    assert not list((zoo.parent / "data").rglob("*.*"))


@pytest.mark.parametrize("change", ["content", "gone"])
def test_a_picture_that_changes_while_a_run_streams_it_is_refused(zoo, workers, change):
    images = read(zoo, "none").train_images
    list(images.split(20))
    file = zoo / "ape" / "4.jpg"
    if change == "gone":
        file.unlink()
    else:
        file.write_bytes((zoo / "ape" / "5.jpg").read_bytes() + b"\0")
    with pytest.raises(DataError, match=r"4.jpg (was changed while this run used it|cannot be used: No such file)"):
        list(images.split(20))


def test_what_a_killed_process_was_decoding_is_removed_and_what_another_decodes_is_not(zoo):
    folder = zoo.parent / "data" / "decoded"
    folder.mkdir(parents=True)
    old, held = folder / f"{decoded.TEMPORARY}1", folder / f"{decoded.TEMPORARY}2"
    for path in (old, held):
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    with open(held, "rb") as file:
        decoded._lock(file)
        read(zoo, "disk")
    assert not old.exists()
    assert held.exists()


@pytest.mark.parametrize("keep", ["disk", "memory"])
def test_of_two_runs_one_decodes_a_folder_and_the_other_waits_for_it(zoo, keep, monkeypatch, caplog):
    monkeypatch.setattr(decoded, "WORTH", 0.0)
    monkeypatch.setattr(decoded, "SOON", 0.0)
    caplog.set_level(logging.INFO)
    first = decoded.Decoded(zoo, streamed.PictureFiles(sorted(zoo.rglob("*.jpg")), AT_8), zoo.parent / "data")
    with ThreadPoolExecutor() as pool:
        with first.alone():
            second = pool.submit(read, zoo, keep)
            until(lambda: "waiting for another process that decodes the pictures of" in caplog.text)
            first.write()
        source = second.result()
    assert any("were decoded by an earlier run" in note for note in source.notes)
    assert [path.suffix for path in sorted((zoo.parent / "data" / "decoded").iterdir())] == [".json", ".npy"]


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="processes are found in /proc")
def test_a_killed_streaming_run_leaves_no_workers_and_ends_with_the_same_bytes(kd_run, start, zoo, tmp_path):
    words = [*TINY, *STREAMED, f"dataset.root={zoo}", "dataset.keep=none", "training.epochs=4", "checkpoint.every=1"]
    words += ["training.crop=1", "student.dropout=0.3", "training.batch_size=8", f"hydra.run.dir={tmp_path / 'run'}"]
    whole = kd_run(*words[:-1], f"hydra.run.dir={tmp_path / 'whole'}", f"store_dir={tmp_path / 's'}", prelude=WORKERS)
    assert whole.code == 0, whole.err
    running, rows = start(*words, prelude=WORKERS), tmp_path / "run" / "metrics.jsonl"
    until(lambda: rows.exists() and len(rows.read_text().splitlines()) > 2)
    main = running.process.pid
    until(lambda: children(main))
    found = children(main)
    os.kill(main, signal.SIGKILL)
    running.wait()
    until(lambda: not any(map(runs, found)))
    again = kd_run("resume=run", prelude=WORKERS)
    assert again.code == 0, again.err
    assert (tmp_path / "run" / "student.safetensors").read_bytes() == (
        tmp_path / "whole" / "student.safetensors"
    ).read_bytes()


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def until(reached) -> None:
    end = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < end, reached
        time.sleep(0.01)
