"""A folder of pictures or sounds: which of its folders are parts, which are classes, which files are examples."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kd_cli.data.pictures import is_picture, shown
from kd_cli.data.sentences import listed, sentence
from kd_cli.errors import DataError
from kd_cli.nearest import did_you_mean

PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
# What file managers, network drives and notebooks leave behind, beside names that begin with a dot.
SYSTEM = {
    *("__macosx", "@eadir", "@recycle", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "system volume information"),
    *("lost+found", "__pycache__", "thumbs.db", "desktop.ini"),
}
WORDS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validate", "validation", "dev", "devel", "development"),
    "test": ("test", "testing", "tst", "eval", "evaluation", "holdout", "heldout"),
}
FILLING = (
    r"(?:seg|images?|imgs?|data|set|split|pics?|pictures?|photos?|audio|sounds?|clips?|recordings?|wavs?"
    r"|folder|files?|raw|the|my)*"
)
PART = {part: re.compile(f"{FILLING}(?:{'|'.join(words)}){FILLING}") for part, words in WORDS.items()}

Classes = dict[str, list[Path]]  # class name -> its examples' files, both sorted


@dataclass(frozen=True)
class Kind:
    """What the examples are that a folder is searched for."""

    noun: str  # of one of them, as `sentence` knows it
    endings: frozenset[str]
    recognised: Callable[[Path], bool]  # whether a file with another ending is one of them
    reader: str  # what reads them
    sample: str  # the ending in an example of a file's name
    convert: str  # endings to convert others to

    def holds(self, file: Path) -> bool:
        """Whether a file is an example of this kind, by its ending or by its content."""
        return file.suffix.lower() in self.endings or self.recognised(file)


PICTURE = Kind("picture", frozenset(PICTURES), is_picture, "Pillow", "jpg", ".png or .jpg")


@dataclass
class Tree:
    """The examples of a folder: by part if it has parts, else under `all`; without labels under `unlabelled`."""

    parts: dict[str, Classes]
    unlabelled: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_tree(folder: Path, kind: Kind = PICTURE) -> Tree:
    """Find parts, classes and the files of examples in `folder`. Raises DataError if they cannot be distinguished."""
    search = Search(kind)
    folder = search.inner(folder)
    parts = _parts(folder, search)
    if parts is None:
        if len(_folders(folder, search)) < 2 and (loose := sorted(search.files(folder))):
            return Tree({}, loose, search.notes())
        return Tree({"all": _classes(folder, search)}, [], search.notes())
    train = _classes(search.inner(parts["train"]), search)
    found = {"train": train}
    for part in ("val", "test"):
        if part in parts:
            found[part] = _held_out(part, search.inner(parts[part]), train, search)
    if not any(found["test"].values()):
        raise DataError(
            f"{shown(parts['test'])} has no {kind.noun}s in class folders", hint=f"put the test {kind.noun}s there"
        )
    if "val" in found and not any(found["val"].values()):
        search.said.append(f"{shown(parts['val'])} has no {kind.noun}s and is not used")
        del found["val"]
    return Tree(found, [], search.notes())


def part_of(name: str) -> str | None:
    """`train`, `val` or `test` if that is what a folder's name says (Training, seg_test, valid, train_images)."""
    letters = re.sub(r"[\W_]|\d+$", "", name.lower())
    return next((part for part, pattern in PART.items() if pattern.fullmatch(letters)), None)


class Search:
    """A walk through folders, and what it passes over."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.hidden: Counter[str] = Counter()
        self.endings: Counter[str] = Counter()
        self.said: list[str] = []
        self.broken = self.links = self.hidden_files = 0

    def files(self, folder: Path) -> Iterator[Path]:
        """The examples' files in `folder` and below, without hidden and system folders."""

        def unreadable(error: OSError) -> None:
            raise DataError(f"the folder {shown(error.filename)} cannot be read: {error.strerror}")

        for path, folders, files in os.walk(folder, onerror=unreadable):
            for name in [name for name in folders if is_hidden(name)]:
                self.hidden[name] += 1
                folders.remove(name)
            self.links += sum(Path(path, name).is_symlink() for name in folders)  # os.walk does not follow them
            for name in files:
                file = Path(path, name)
                if is_hidden(name):
                    self.hidden_files += file.suffix.lower() in self.kind.endings
                elif file.is_symlink() and not file.exists():
                    self.broken += 1
                elif file.is_file() and self.kind.holds(file):
                    yield file
                else:
                    self.endings[file.suffix.lower() or "no ending"] += 1

    def inner(self, folder: Path) -> Path:
        """The folder itself, or the only one in it that holds several: photos/photos/{cat,dog}, test/test/{cat,dog}."""
        for _ in range(8):
            inside = _folders(folder, self)
            if len(inside) != 1 or len(_folders(inside[0], self)) < 2 or _loose(folder, self.kind):
                return folder
            if part_of(inside[0].name) not in (None, part_of(folder.name)):
                return folder  # a part without the others
            self.said.append(
                f"{shown(folder)} holds one folder only: the {self.kind.noun}s are taken from {shown(inside[0])}"
            )
            folder = inside[0]
        return folder

    def notes(self) -> list[str]:
        """A sentence for each kind of thing that was passed over."""
        notes = list(dict.fromkeys(self.said))
        if self.hidden:
            notes.append(f"hidden and system folders are left out: {listed(sorted(map(shown, self.hidden)))}")
        kinds = listed([f"{shown(name)} ({count})" for name, count in self.endings.most_common()])
        for text, n in (
            (f"{{n}} hidden {{files}} with a {self.kind.noun}'s ending {{is}} left out", self.hidden_files),
            ("{n} {links} to folders {is} not followed", self.links),
            ("{n} broken {links} {is} passed over", self.broken),
            (f"{{n}} {{files}} passed over, which {self.kind.reader} does not read: {{kinds}}", self.endings.total()),
        ):
            if n:
                notes.append(sentence(text, n, kinds=kinds))
        return notes


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or a system's own."""
    return name.startswith(".") or name.lower() in SYSTEM


def _folders(folder: Path, search: Search) -> list[Path]:
    """The visible folders in a folder, sorted: the same on every machine."""
    found = []
    for entry in folder.iterdir():
        if entry.is_dir():
            if is_hidden(entry.name):
                search.hidden[entry.name] = max(1, search.hidden[entry.name])
            else:
                found.append(entry)
    return sorted(found, key=lambda entry: entry.name)


def _holds_classes(folder: Path, search: Search) -> bool:
    return not _loose(folder, search.kind) and len(_folders(folder, search)) > 1


def _loose(folder: Path, kind: Kind) -> list[Path]:
    """The files with an example's ending that lie in a folder itself."""
    return [entry for entry in folder.iterdir() if entry.suffix.lower() in kind.endings and not is_hidden(entry.name)]


def _parts(folder: Path, search: Search) -> dict[str, Path] | None:
    """The folders of the parts, or None if there are only classes. DataError if that cannot be decided."""
    inside = _folders(folder, search)
    named: dict[str, list[Path]] = {}
    for entry in inside:
        if part := part_of(entry.name):
            named.setdefault(part, []).append(entry)
    others = [entry for entry in inside if not part_of(entry.name)]
    if "train" in named and "test" in named:
        for part, several in named.items():
            if len(several) > 1:
                raise DataError(
                    f"{shown(folder)} has several folders for the {part} part: {_names(several)}",
                    hint=f"leave one of them, or move its {search.kind.noun}s into one folder called {part}",
                )
        if others:
            search.said.append(
                f"beside {_names([p[0] for p in named.values()])}, these are left aside: {_names(others)}"
            )
        if guessed := [f"{shown(entry.name)} as {part}" for part, [entry] in named.items() if entry.name != part]:
            search.said.append(f"folders of {shown(folder)} are taken for its parts: {listed(guessed)}")
        return {part: several[0] for part, several in named.items()}
    if "train" in named and (not others or _holds_classes(named["train"][0], search)):
        raise DataError(
            f"{shown(folder)} has a folder {named['train'][0].name} and no folder test, but {_names(inside)}",
            hint=f"call the held-out {search.kind.noun}s' folder test; or give the folder train itself as root, and a "
            "part of it tests",
        )
    if len(inside) > 1 and not others:
        raise DataError(f"{shown(folder)} has no folder train, but {_names(inside)}", hint="call that folder train")
    return None


def _classes(folder: Path, search: Search) -> Classes:
    """The classes in `folder`, sorted, and their examples' files, sorted. DataError if there are fewer than two."""
    folders = _folders(folder, search)
    noun, ending = search.kind.noun, search.kind.sample
    if len(folders) < 2:
        raise DataError(
            f"{shown(folder)} has {len(folders)} class folders; it must have two or more",
            hint=f"put each class's {noun}s into a folder of its own: cat/1.{ending}, dog/1.{ending}",
        )
    if loose := _loose(folder, search.kind):
        search.said.append(_no_class(loose, folder, search.kind))
    classes: Classes = {}
    for entry in folders:
        name = shown(entry.name)
        if name != entry.name:
            search.said.append(f"the name of the class folder {os.fsencode(entry.name)!r} is not UTF-8: it is {name}")
        if name in classes:
            raise DataError(f"{shown(folder)} has two class folders that read {name}", hint="rename one in UTF-8")
        passed = search.endings.total()
        classes[name] = sorted(search.files(entry))
        if not classes[name]:
            others = search.endings.total() - passed
            raise DataError(
                f"{shown(entry)} has no {noun}s, and so the class {name} has no examples",
                hint=f"{others} files in it are of a kind that cannot be read; convert them to {search.kind.convert}"
                if others
                else f"{noun}s end in {listed(sorted(search.kind.endings))}; remove the folder if it is no class",
            )
    return classes


def _held_out(part: str, folder: Path, train: Classes, search: Search) -> Classes:
    """The examples of a held-out part by the classes of the training part, which may have none there."""
    folders, noun = _folders(folder, search), search.kind.noun
    names = {shown(entry.name): entry for entry in folders}
    loose = _loose(folder, search.kind)
    if not folders and loose:
        raise DataError(
            f"{shown(folder)} has {len(loose)} {noun}s and no class folders: without labels they cannot be used to "
            f"{'test' if part == 'test' else 'validate'}",
            hint=f"move that folder away, and a part of the training {noun}s is used; transfer.data takes {noun}s "
            "without labels",
        )
    if loose:
        search.said.append(_no_class(loose, folder, search.kind))
    classes: Classes = {name: [] for name in train}
    unknown = []
    for name, entry in names.items():
        files = sorted(search.files(entry))
        if name in classes:
            classes[name] = files
        elif files:
            unknown.append(name)
    if unknown:
        nearest = did_you_mean(unknown[0], list(train))
        raise DataError(
            f"train and {part} must have the same classes; only {part} has {listed(unknown)}",
            hint=nearest or f"give the training part {noun}s of {listed(unknown)}, or take them out of {part}",
        )
    return classes


def _no_class(loose: Sequence[Path], folder: Path, kind: Kind) -> str:
    return sentence(
        f"{{n}} {{{kind.noun}s}} in {{folder}} itself {{is}} left out, without a class",
        len(loose),
        folder=shown(folder),
    )


def _names(folders: Sequence[Path]) -> str:
    return listed([shown(entry.name) for entry in folders])
