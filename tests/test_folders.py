"""Pictures in folders: which are read, as what, into which part, and what is said of them."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd_cli.data import decoded
from kd_cli.data.folders import imagefolder
from kd_cli.data.pictures import Reading, decode
from kd_cli.data.prepare import prepare, unlabelled
from kd_cli.data.tree import part_of
from kd_cli.errors import ConfigError, DataError


def picture(path: Path, colour, size=(12, 8), mode="RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)


@pytest.fixture
def zoo(tmp_path):
    """Ten pictures of each of two classes; how red they are tells which is which."""
    for i in range(10):
        picture(tmp_path / "zoo" / "cat" / f"{i}.png", (100 + i, 0, 0))
        picture(tmp_path / "zoo" / "dog" / f"{i}.png", (200 + i, 0, 0))
    return tmp_path / "zoo"


def read(root, data_dir="/nowhere", **keys):
    return imagefolder(data_dir=data_dir, root=str(root), **{"image_size": 6, **keys})


def pixels(image: np.ndarray | Image.Image, size: int) -> torch.Tensor:
    """What a square picture becomes: [3, size, size]."""
    square = (image if isinstance(image, Image.Image) else Image.fromarray(image)).convert("RGB")
    return torch.from_numpy(np.array(square.resize((size, size), Image.Resampling.BILINEAR))).permute(2, 0, 1)


GREY = "1 picture is grey and is read as three equal channels (key channels)"


def only_picture(
    tmp_path: Path, name: str, save: Callable[[Path], None], **keys: object
) -> tuple[torch.Tensor, list[str]]:
    """One picture as it is read, from a folder of its own, and what is noted of it."""
    folder = tmp_path / "only"
    folder.mkdir()
    save(folder / name)
    source = read(folder, **keys)
    assert source.class_names == ()
    return source.train_images[0], source.notes


def test_a_folder_per_class_is_split_class_by_class(zoo):
    source = read(zoo, test_fraction=0.25)
    assert source.class_names == ("cat", "dog")
    assert source.train_images.shape == (15, 3, 6, 6)
    assert source.train_images.dtype == torch.uint8
    red = torch.cat([source.train_images, source.test_images])[:, 0, 0, 0]
    assert sorted(red.tolist()) == [*range(100, 110), *range(200, 210)]
    assert ((red >= 200).long() == torch.cat([source.train_labels, source.test_labels])).all()
    order = np.random.RandomState(20150309).permutation(20).tolist()
    chosen = sorted([i for i in order if i < 10][:3]) + sorted([i for i in order if i >= 10][:2])
    assert source.test_images[:, 0, 0, 0].tolist() == [100 + i % 10 + 100 * (i // 10) for i in chosen]
    assert source.test_names == tuple(f"{'dog' if i >= 10 else 'cat'}/{i % 10}.png" for i in chosen)
    assert "zoo has no test part: 5 of its 20 pictures test, the same share of each class" in source.notes


def test_the_parts_of_a_folder_are_taken_as_they_are(tmp_path):
    for part, n in (("train", 3), ("test", 2), ("val", 9)):
        for name in ("b", "a"):
            for i in range(n):
                picture(tmp_path / part / name / "deeper" / f"{i}.jpeg", 9, mode="L")
    source = read(tmp_path, channels=1)
    assert source.class_names == ("a", "b")
    assert source.train_images.shape == (6, 1, 6, 6)
    assert source.train_labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert source.test_labels.tolist() == [0, 0, 1, 1]
    assert source.val_labels.tolist() == [0] * 9 + [1] * 9
    assert source.val_names[0] == "val/a/deeper/0.jpeg"
    data = prepare(source, val_fraction=0.1)
    assert (len(data.train), len(data.val), len(data.test)) == (6, 18, 4)


@pytest.mark.parametrize(
    ("train", "test", "val"),
    [
        ("train", "test", None),
        ("Training", "Testing", None),
        ("TRAIN", "TEST", "VAL"),
        ("Train", "Test", "Valid"),
        ("seg_train", "seg_test", None),
        ("train_images", "test_images", "val-images"),
        ("train2017", "test2017", "val2017"),
        ("trainset", "testset", "devset"),
        ("training data", "evaluation", "validation"),
    ],
)
def test_parts_are_recognised_by_the_names_that_people_give_them(tmp_path, train, test, val):
    for part, n in ((train, 3), (test, 2), *([(val, 1)] if val else [])):
        for name in ("a", "b"):
            for i in range(n):
                picture(tmp_path / part / name / f"{i}.png", (n, i, 0))
    source = read(tmp_path)
    assert source.class_names == ("a", "b")
    assert (len(source.train_labels), len(source.test_labels)) == (6, 4)
    assert (source.val_labels is None) if val is None else (len(source.val_labels) == 2)
    assert any(f"{train} as train" in note for note in source.notes) == (train != "train")


@pytest.mark.parametrize("name", ["cat", "trainer", "contest", "testudo", "training wheels", "devil", "valley", "data"])
def test_a_class_is_not_taken_for_a_part(name):
    assert part_of(name) is None


def test_parts_that_are_wrapped_in_a_folder_are_found(tmp_path):
    for part in ("seg_train", "seg_test"):
        for name in ("a", "b"):
            picture(tmp_path / "archive" / part / part / name / "0.png", 3)
    source = read(tmp_path)
    assert source.class_names == ("a", "b")
    assert source.test_names == ("archive/seg_test/seg_test/a/0.png", "archive/seg_test/seg_test/b/0.png")
    assert sum("holds one folder only" in note for note in source.notes) == 3


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["train", "val"], "has a folder train and no folder test"),
        (["dev", "train"], "has a folder train and no folder test"),
        (["Training", "unlabelled"], "has a folder Training and no folder test"),
        (["test", "val"], "has no folder train, but test, val"),
        (["train", "Training", "test"], "has several folders for the train part: Training, train"),
        (["train", "test", "eval"], "has several folders for the test part: eval, test"),
    ],
)
def test_parts_that_cannot_be_told_from_each_other_are_asked_about(tmp_path, folders, said):
    for part in folders:
        for name in ("a", "b"):
            picture(tmp_path / part / name / "0.png", 0)
    with pytest.raises(DataError, match=said) as caught:
        read(tmp_path)
    assert caught.value.hint


def test_folders_beside_the_parts_are_left_aside_and_named(tmp_path):
    for part in ("train", "test", "masks"):
        for name in ("a", "b"):
            picture(tmp_path / part / name / "0.png", 0)
    assert any(note.endswith("these are left aside: masks") for note in read(tmp_path).notes)


def test_a_class_may_have_no_test_pictures(tmp_path):
    for path in ("train/a/0.png", "train/b/0.png", "train/c/0.png", "test/a/0.png", "test/b/0.png"):
        picture(tmp_path / path, (len(path), 1, 0))
    (tmp_path / "test" / "c").mkdir()
    for _ in range(2):
        data = prepare(read(tmp_path), val_fraction=0)
        assert data.class_counts() == {"train": [1, 1, 1], "val": [0, 0, 0], "test": [1, 1, 0]}
        assert "no test examples: class c" in data.notes
        shutil.rmtree(tmp_path / "test" / "c", ignore_errors=True)


def test_test_pictures_without_classes_are_refused_with_the_way_on(tmp_path):
    for path in ("train/a/0.png", "train/b/0.png", "test/0.png", "test/1.png"):
        picture(tmp_path / path, 0)
    with pytest.raises(DataError, match="test has 2 pictures and no class folders: without labels") as caught:
        read(tmp_path)
    assert "transfer.data" in caught.value.hint


def test_an_empty_validation_folder_is_not_used(tmp_path):
    for path in ("train/a/0.png", "train/b/0.png", "test/a/0.png"):
        picture(tmp_path / path, 0)
    (tmp_path / "val").mkdir()
    source = read(tmp_path)
    assert source.val_labels is None
    assert any(note.endswith("val has no pictures and is not used") for note in source.notes)


@pytest.mark.parametrize("size", [(30, 10), (10, 30)])
def test_the_shorter_side_is_scaled_and_the_centre_kept(zoo, size):
    wide = Image.fromarray(np.random.RandomState(0).randint(0, 256, (size[1], size[0], 3), np.uint8))
    for i in range(10):
        wide.save(zoo / "cat" / f"{i}.png")
    scaled = wide.resize((size[0] // 2, size[1] // 2), Image.Resampling.BILINEAR)
    left, top = (scaled.width - 5) // 2, (scaled.height - 5) // 2
    expected = torch.from_numpy(np.array(scaled.crop((left, top, left + 5, top + 5)))).permute(2, 0, 1)
    source = read(zoo, image_size=5)
    assert (source.train_images[source.train_labels == 0] == expected).all()


NOISE = np.random.RandomState(1).randint(0, 256, (24, 24, 3), np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tiff", "webp", "jpg"])
def test_a_picture_is_turned_as_its_exif_orientation_says(tmp_path, orientation, ending):
    exif = Image.Exif()
    exif[0x0112] = orientation
    how = {"lossless": True} if ending == "webp" else {"quality": 95} if ending == "jpg" else {}
    image, notes = only_picture(
        tmp_path, f"a.{ending}", lambda file: Image.fromarray(NOISE).save(file, exif=exif, **how), image_size=24
    )
    stored = Image.open(tmp_path / "only" / f"a.{ending}") if ending == "jpg" else Image.fromarray(NOISE)
    methods = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    expected = stored.transpose(methods[orientation]) if orientation > 1 else stored
    assert image.equal(pixels(expected, 24))
    assert any("EXIF orientation" in note for note in notes) == (orientation > 1)


def test_a_damaged_exif_orientation_leaves_a_picture_as_it_lies(tmp_path):
    image, notes = only_picture(
        tmp_path, "a.jpg", lambda file: Image.fromarray(NOISE).save(file, exif=b"Exif\0\0II*\0\xff\xff", quality=95)
    )
    assert image.equal(pixels(Image.open(tmp_path / "only" / "a.jpg"), 6))
    assert notes == []


def ink(colour: int) -> np.ndarray:
    """A square of ink on transparent paper, which is black under its transparency: [8,8,4]."""
    picture = np.zeros((8, 8, 4), np.uint8)
    picture[2:6, 2:6] = (colour, colour, colour, 255)
    return picture


def on_ground(colour: int, ground: int) -> torch.Tensor:
    expected = torch.full((3, 8, 8), ground, dtype=torch.uint8)
    expected[:, 2:6, 2:6] = colour
    return expected


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L with one transparent value", "RGB with one transparent value"])
def test_transparency_shows_the_ground_and_not_the_colour_beneath(tmp_path, mode):
    picture = Image.fromarray(ink(10))
    how = {}
    if mode == "P":
        picture = picture.convert("RGBA").quantize(4)
    elif " " in mode:
        how = {"transparency": 0 if mode[0] == "L" else (0, 0, 0)}
        picture = picture.convert(mode.split()[0])
    else:
        picture = picture.convert(mode)
    image, notes = only_picture(tmp_path, "a.png", lambda file: picture.save(file, **how), image_size=8)
    assert image.equal(on_ground(10, 255))
    said = ["1 picture is transparent and is laid on the colour #ffffff (key background)"]
    assert notes == said + [GREY] * mode.startswith("L")


@pytest.mark.parametrize(("background", "ground"), [("black", 0), ("#404040", 64), ([7, 7, 7], 7)])
def test_the_ground_is_a_key(tmp_path, background, ground):
    image, _ = only_picture(
        tmp_path,
        "a.webp",
        lambda file: Image.fromarray(ink(200)).save(file, lossless=True, exact=True),
        image_size=8,
        background=background,
    )
    assert image.equal(on_ground(200, ground))


def test_half_transparent_ink_is_mixed_with_the_ground(tmp_path):
    picture = ink(0)
    picture[..., 3] //= 2
    image, _ = only_picture(tmp_path, "a.png", Image.fromarray(picture).save, image_size=8)
    assert image.equal(on_ground(128, 255))


def test_white_ink_on_white_ground_is_named_as_blank(tmp_path):
    for name in ("a", "b"):
        for i in range(3):
            picture(tmp_path / "ink" / name / f"{i}.png", (i, 3, 4))
        Image.fromarray(ink(255)).save(tmp_path / "ink" / name / "blank.png")
    notes = prepare(read(tmp_path / "ink"), val_fraction=0).notes
    assert any(note.startswith("8 pictures have the same value in every pixel: ") for note in notes)


def test_an_opaque_alpha_channel_changes_nothing(tmp_path):
    opaque = np.dstack([NOISE, np.full((24, 24), 255, np.uint8)])
    image, notes = only_picture(tmp_path, "a.png", Image.fromarray(opaque).save, image_size=24)
    assert image.equal(pixels(NOISE, 24))
    assert notes == []


@pytest.mark.parametrize("ending", ["png", "tiff", "pgm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path, ending):
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    image, notes = only_picture(tmp_path, f"a.{ending}", Image.fromarray(values).save, image_size=8)
    assert image.equal(torch.from_numpy(np.round(values / 257).astype(np.uint8)).expand(3, 8, 8))
    assert notes == ["1 picture has 16 bits per channel, scaled to 8 (65,535 becomes 255)", GREY]


def test_grey_pictures_are_counted_where_three_channels_are_read(tmp_path):
    values = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    image, notes = only_picture(tmp_path, "a.png", Image.fromarray(values).save, image_size=8)
    assert image.equal(torch.from_numpy(values).expand(3, 8, 8))
    assert notes == [GREY]
    grey = read(tmp_path / "only", image_size=8, channels=1)
    assert grey.train_images[0].equal(torch.from_numpy(values)[None])
    assert grey.notes == []


def test_twelve_bits_in_sixteen_are_said_to_be_dark(tmp_path):
    values = np.linspace(0, 4095, 64).astype(np.uint16).reshape(8, 8)
    _, notes = only_picture(tmp_path, "a.png", Image.fromarray(values).save)
    assert "1 picture of 16 bits uses less than a sixteenth of its range and is nearly black" in notes


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pictures_of_unknown_range_are_refused_by_name(tmp_path, dtype):
    with pytest.raises(DataError, match=r"a\.tiff cannot be used: it has more than 16 bits per channel"):
        only_picture(tmp_path, "a.tiff", Image.fromarray(NOISE[..., 0].astype(dtype)).save)


def test_cmyk_becomes_rgb_and_is_said(tmp_path):
    image, notes = only_picture(tmp_path, "a.tiff", Image.fromarray(NOISE).convert("CMYK").save, image_size=24)
    assert image.equal(pixels(NOISE, 24))
    assert notes == ["1 CMYK picture is converted to RGB without its colour profile"]


def test_grey_and_black_and_white_pictures_become_three_channels(tmp_path):
    for mode in ("L", "1"):
        image, _ = only_picture(tmp_path, "a.png", Image.fromarray(NOISE).convert(mode).save, image_size=24)
        assert image.equal(pixels(Image.fromarray(NOISE).convert(mode), 24))
        shutil.rmtree(tmp_path / "only")


def test_what_is_cut_enlarged_or_left_of_a_picture_is_counted(tmp_path):
    frames = [Image.new("L", (8, 8), value) for value in (10, 200)]
    for name in ("a", "b"):
        picture(tmp_path / name / "wide.png", 3, size=(12, 8))
        picture(tmp_path / name / "small.png", 3, size=(4, 4))
        frames[0].save(tmp_path / name / "film.gif", save_all=True, append_images=frames[1:])
    source = read(tmp_path)
    for said in (
        "2 pictures are not square, and only the square in the centre is used",
        "2 pictures are smaller than 6 pixels and are enlarged",
        "2 pictures have several frames, and only the first is used",
    ):
        assert said in source.notes
    assert 10 in source.train_images[:, 0, 0, 0]
    assert 200 not in source.train_images


def test_a_large_jpeg_is_decoded_at_the_scale_that_is_needed(tmp_path):
    y, x = np.mgrid[:600, :800]
    smooth = np.stack([x // 4, y // 3, (x + y) // 6], -1).clip(0, 255).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "a.jpg", quality=95)
    image, _ = decode(tmp_path / "a.jpg", Reading(16, 3, (255, 255, 255)))
    whole = pixels(Image.open(tmp_path / "a.jpg").crop((100, 0, 700, 600)), 16)
    assert (image.int() - whole.int()).abs().max() <= 3


HIDDEN = (".ipynb_checkpoints", "@eaDir", "__MACOSX", ".git", "#recycle", "$RECYCLE.BIN", "__pycache__")


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_and_system_folders_are_skipped_at_any_depth_and_named(zoo, name):
    for folder in (zoo, zoo / "cat", zoo / "cat" / "deeper", zoo / "dog"):
        picture(folder / name / "0-checkpoint.png", (1, 2, 3))
    source = read(zoo)
    assert source.class_names == ("cat", "dog")
    assert len(source.train_labels) + len(source.test_labels) == 20
    assert f"hidden and system folders are left out: {name}" in source.notes


def test_hidden_and_system_files_are_skipped(zoo):
    for file in ("Thumbs.db", "desktop.ini", ".DS_Store", "._0.png"):
        (zoo / "cat" / file).touch()
    source = read(zoo)
    assert len(source.train_labels) == 16
    assert "1 hidden file with a picture's ending is left out" in source.notes
    assert not any("passed over" in note for note in source.notes)


def test_what_pillow_can_read_is_read_whatever_its_ending(zoo):
    for i, name in enumerate(("0.jfif", "1", "2.img", "3.JPE")):
        Image.fromarray(NOISE).save(zoo / "cat" / name, format="JPEG")
        (zoo / "cat" / f"{i}.png").unlink()
    assert sorted(read(zoo).train_names + read(zoo).test_names)[:4] == ["cat/0.jfif", "cat/1", "cat/2.img", "cat/3.JPE"]


def test_files_that_are_passed_over_are_counted_by_their_ending(zoo):
    for name in ("a.heic", "b.HEIC", "notes.txt", "README", "c.svg"):
        (zoo / "cat" / name).write_bytes(b"no picture that Pillow knows")
    (zoo / "cat" / "gone.png").symlink_to(zoo / "nowhere.png")
    (zoo / "dog" / "elsewhere").symlink_to(zoo / "cat")
    picture(zoo / "loose.png", 3)
    source = read(zoo)
    assert len(source.train_labels) == 16
    for said in (
        "5 files passed over, which Pillow does not read: .heic (2), .txt (1), no ending (1), .svg (1)",
        "1 broken link is passed over",
        "1 link to folders is not followed",
        f"1 picture in {zoo} itself is left out, without a class",
    ):
        assert any(len(note) == len(said) and note.startswith(said[:50]) for note in source.notes), source.notes


def test_a_class_of_files_that_cannot_be_read_is_said(zoo):
    (zoo / "fish").mkdir()
    for i in range(3):
        (zoo / "fish" / f"{i}.heic").write_bytes(b"\0\0\0 ftypheic")
    with pytest.raises(DataError, match="zoo/fish has no pictures") as caught:
        read(zoo)
    assert caught.value.hint == "3 files in it are of a kind that cannot be read; convert them to .png or .jpg"


def test_a_rare_class_keeps_pictures_to_train_on(tmp_path):
    for name, n in (("a_common", 24), ("b_rare", 3), ("c_some", 10)):
        for i in range(n):
            picture(tmp_path / name / f"{i}.png", (i, n, 0))
    data = prepare(read(tmp_path), val_fraction=0.1)
    assert data.class_counts() == {"train": [18, 2, 7], "val": [2, 0, 1], "test": [4, 1, 2]}
    assert "no validation examples: class b_rare" in data.notes


def test_identical_pictures_in_two_parts_are_counted(zoo):
    for file in list(zoo.rglob("*.png")):
        shutil.copy(file, file.with_name(f"{file.stem} (1).png"))
    notes = prepare(read(zoo), val_fraction=0).notes
    assert any(re.fullmatch(r"\d test pictures? of 8 (is|are) identical to a training picture", note) for note in notes)


def test_a_class_folder_whose_name_is_no_utf8_is_called_what_can_be_written(tmp_path):
    for name in (b"caf\xe9", b"thee"):
        for i in range(5):
            picture(Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"latin", name, b"%d.png" % i))), (i, 0, 0))
    source = read(tmp_path / "latin")
    assert source.class_names == ("caf\N{REPLACEMENT CHARACTER}", "thee")
    assert "the name of the class folder b'caf\\xe9' is not UTF-8: it is caf\N{REPLACEMENT CHARACTER}" in source.notes
    for text in (*source.class_names, *source.train_names, *source.notes, source.name):
        text.encode()


def test_two_class_folders_that_read_alike_are_refused(tmp_path):
    for name in (b"caf\xe9", b"caf\xe8"):
        picture(Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name, b"0.png"))), 0)
    with pytest.raises(DataError, match="two class folders that read caf"):
        read(tmp_path)


def test_a_damaged_picture_with_a_name_that_is_no_utf8_is_named(tmp_path):
    for name in (b"a", b"b"):
        picture(Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name, b"0.png"))), 0)
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"a", b"\xe9.png"))).write_bytes(b"")
    with pytest.raises(DataError, match=re.escape("a/\N{REPLACEMENT CHARACTER}.png cannot be used")) as caught:
        read(tmp_path)
    str(caught.value).encode()


# ---------------------------------------------------------------- pictures without labels


def test_a_flat_folder_holds_unlabelled_pictures(tmp_path):
    for i in range(4):
        picture(tmp_path / "flat" / f"{i}.png", (i, 0, 0))
    source = read(tmp_path / "flat")
    images, _, notes = unlabelled(source)
    assert images[:, 0, 0, 0].tolist() == [0, 1, 2, 3]
    assert notes == ["4 pictures are not square, and only the square in the centre is used"]
    with pytest.raises(DataError, match="data set flat has pictures without labels") as caught:
        prepare(source, val_fraction=0.1)
    assert "transfer.data" in caught.value.hint


def test_of_a_labelled_folder_the_training_part_serves_without_labels(zoo):
    images, _, notes = unlabelled(read(zoo))
    assert len(images) == 16
    assert "zoo as transfer.data: its training part is used, 4 held-out examples are not" in notes


# ---------------------------------------------------------------- pictures decoded before


@pytest.fixture
def kept_always(monkeypatch):
    """Decoded pictures are kept however little time they took."""
    monkeypatch.setattr(decoded, "WORTH", 0.0)


def test_pictures_are_decoded_once(zoo, tmp_path, kept_always, caplog):
    caplog.set_level("INFO")
    first = read(zoo, data_dir=tmp_path / "data")
    assert "20 pictures of" in caplog.text
    assert "for later runs" in caplog.text
    before = (tmp_path / "data" / "decoded").iterdir()
    stamps = {file: file.stat().st_mtime_ns for file in before}
    assert len(stamps) == 2
    second = read(zoo, data_dir=tmp_path / "data")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "data" / "decoded").iterdir()} == stamps
    for part in ("train_images", "test_images"):
        assert getattr(first, part).equal(getattr(second, part))
    (pixels,) = (tmp_path / "data" / "decoded").glob("*.npy")
    assert second.notes == [
        *first.notes[:-1],
        f"20 pictures of {zoo} were decoded by an earlier run: {pixels}",
        first.notes[-1],
    ]


@pytest.mark.parametrize("change", ["content", "new", "gone", "renamed", "size", "channels", "background"])
def test_pictures_that_have_changed_are_decoded_anew(zoo, tmp_path, kept_always, caplog, change):
    caplog.set_level("INFO")
    read(zoo, data_dir=tmp_path / "data")
    keys = {"size": {"image_size": 5}, "channels": {"channels": 1}, "background": {"background": "black"}}
    if change == "content":
        times = (zoo / "cat" / "0.png").stat()
        picture(zoo / "cat" / "0.png", (101, 0, 0))
        os.utime(zoo / "cat" / "0.png", ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "new":
        picture(zoo / "cat" / "new.png", 3)
    elif change == "gone":
        (zoo / "cat" / "0.png").unlink()
    elif change == "renamed":
        (zoo / "cat" / "0.png").rename(zoo / "dog" / "new.png")
    fresh = read(zoo, data_dir=tmp_path / "other", **keys.get(change, {}))
    caplog.clear()
    source = read(zoo, data_dir=tmp_path / "data", **keys.get(change, {}))
    assert not any("an earlier run" in note for note in source.notes)
    assert source.train_images.equal(fresh.train_images)
    assert source.train_labels.equal(fresh.train_labels)


@pytest.mark.parametrize("ending", [".npy", ".json"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "gone"])
def test_damaged_pixels_are_decoded_anew(zoo, tmp_path, kept_always, ending, damage):
    fresh = read(zoo, data_dir=tmp_path / "data")
    [file] = (tmp_path / "data" / "decoded").glob(f"*{ending}")
    content = bytearray(file.read_bytes())
    content[-3 if ending == ".npy" else 20] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"cut": bytes(content[:-40]), "flipped": bytes(content), "empty": b""}[damage])
    again = read(zoo, data_dir=tmp_path / "data")
    assert again.train_images.equal(fresh.train_images)
    assert [note for note in again.notes if "an earlier run" not in note] == fresh.notes


def test_a_folder_that_cannot_be_written_only_costs_time(zoo, tmp_path, kept_always, caplog):
    caplog.set_level("INFO")
    (tmp_path / "file").touch()
    assert len(read(zoo, data_dir=tmp_path / "file").train_labels) == 16
    assert "decoded again in every run: cannot write" in caplog.text


def test_a_relative_root_is_found_where_one_stands_and_in_the_data_folder(zoo, monkeypatch, tmp_path):
    assert len(read("zoo", data_dir=zoo.parent).train_labels) == 16
    monkeypatch.chdir(zoo.parent)
    assert len(read("zoo").train_labels) == 16
    with pytest.raises(DataError, match=r"root is pets, and there is no folder .*/pets nor /nowhere/pets"):
        read("pets")


@pytest.mark.parametrize("damage", [b"", b"not a picture", "truncated"])
def test_an_unreadable_picture_is_named(zoo, damage):
    file = zoo / "dog" / "3.png"
    file.write_bytes(file.read_bytes()[:50] if damage == "truncated" else damage)
    with pytest.raises(DataError, match=r"the picture .*zoo/dog/3\.png cannot be used"):
        read(zoo)


@pytest.mark.parametrize("limit", [50, 90])
def test_a_decompression_bomb_is_an_error(zoo, limit, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # PIL warns above it and refuses above twice as much
    with pytest.raises(DataError, match=r"the picture .*0\.png cannot be used: Image size \(96 pixels\) exceeds"):
        read(zoo)


def test_folders_that_are_no_data_set_are_told_why(tmp_path, zoo):
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="nothing has 0 class folders; it must have two or more"):
        read(tmp_path / "nothing")
    (zoo / "fish").mkdir()
    with pytest.raises(DataError, match="zoo/fish has no pictures, and so the class fish has no examples"):
        read(zoo)


def test_train_and_test_must_have_the_same_classes(tmp_path):
    for path in ("train/a/0.png", "train/b/0.png", "test/a/0.png", "test/c/0.png"):
        picture(tmp_path / path, 0)
    with pytest.raises(DataError, match="the same classes; only test has c"):
        read(tmp_path)


def test_a_class_may_be_called_train(zoo):
    picture(zoo / "train" / "0.png", 0)
    assert read(zoo).class_names == ("cat", "dog", "train")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"image_size": 0}, "image_size is 0"),
        ({"image_size": 6.0}, "image_size is 6.0"),
        ({"channels": 4}, "channels is 4"),
        ({"background": "whit"}, "background is 'whit'; it must be a colour"),
        ({"background": [0, 0, 256]}, "background is"),
        ({"background": [1, 2]}, "background is"),
        ({"test_fraction": 0}, "test_fraction is 0"),
        ({"test_fraction": 1.0}, "test_fraction is 1.0"),
    ],
)
def test_keys_outside_their_range_are_refused(zoo, keys, said):
    with pytest.raises(ConfigError, match=said):
        read(zoo, **keys)


def test_a_test_fraction_that_empties_a_part_is_refused(zoo):
    with pytest.raises(DataError, match=r"test_fraction=0.01 makes 0 the test part"):
        read(zoo, test_fraction=0.01)
