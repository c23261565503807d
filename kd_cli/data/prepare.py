"""A data set made ready: checked, its validation part set aside, its statistics measured, its oddities noted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kd_cli.data.columns import Encoding, fit_encoding, notes_on_unseen
from kd_cli.data.duplicates import constant, known, same
from kd_cli.data.normalisation import mean_and_std, mean_and_std_of_counts
from kd_cli.data.sentences import listed, sentence
from kd_cli.data.source import Dataset, Source, Split, check, check_images, check_layout, parts_of
from kd_cli.data.splits import RULE_SEED, set_aside, set_aside_by_class, set_aside_groups
from kd_cli.data.stored import Images, StoredImages, pieces, selected
from kd_cli.data.survey import Survey
from kd_cli.errors import ConfigError, DataError
from kd_cli.nearest import did_you_mean
from kd_cli.numeric import is_number, is_whole

SHORT = {"training": "train", "validation": "val", "test": "test"}


def prepare(source: Source, *, val_fraction: float, positive: str | int | None = None) -> Dataset:
    """Check a source, set its validation part aside, and measure the mean and deviation of the rest.

    With `positive`, the name or number of a class, the examples have one label, whether they are of that class.

    The parts depend on the source and on `val_fraction` alone, never on a run's seed. Raises DataError.
    """
    check(source)
    if not is_number(val_fraction) or not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction is {val_fraction!r}; it must be a number, at least 0 and below 1")
    source = channels_first(source if positive is None else one_label(source, positive))
    parts = parts_of(source)
    train, val, test = parts["train"], parts.get("val"), parts["test"]
    if val is not None:
        val_fraction, positions, rest = 0.0, None, None
        rule = f"the {len(val)} examples of the published validation part validate"
        notes = [
            f"{source.name} has a validation part of its own: its {len(val)} examples validate, and val_fraction "
            "has no effect"
        ]
    else:
        positions, rest, rule = _validation_part(source, val_fraction)
        train, val = _take(train, rest), _take(train, positions)
        notes = []
    survey = Survey(parts, rest, positions) if isinstance(train.images, StoredImages) else None
    fingerprint = _fingerprint(source, val_fraction, positions, survey)
    encoding, (train, val, test), encoded = _encoded(source, (train, val, test))
    notes += encoded
    if isinstance(train.images, StoredImages):
        assert survey is not None
        mean, std = mean_and_std_of_counts(survey.counts)
        notes = [*train.images.notes(), *notes]
    elif encoding is None:
        mean, std = mean_and_std(train.images)
    else:  # a table's numbers are standardised already, before they are rounded to float32
        mean, std = (0.0,) * encoding.features, (1.0,) * encoding.features
    dataset = Dataset(
        name=source.name,
        train=train,
        val=val,
        test=test,
        class_names=tuple(source.class_names),
        mean=mean,
        std=std,
        fingerprint=fingerprint,
        split_rule=rule,
        encoding=encoding,
        published=len(parts["train"]),
        rows=source.rows,
    )
    return replace(dataset, notes=(*source.notes, *notes, *_notes(dataset, survey)))


def _encoded(source: Source, parts: Sequence[Split]) -> tuple[Encoding | None, Sequence[Split], list[str]]:
    """The parts with a table's columns encoded as its training part says, and notes; others as they are."""
    if source.columns is None:
        return None, parts, []
    assert isinstance(parts[0].images, Tensor)
    encoding, notes = fit_encoding(source.columns, parts[0].images)
    splits = []
    for name, split in zip(("training", "validation", "test"), parts, strict=True):
        assert isinstance(split.images, Tensor)
        features, unseen = encoding.encode_read(split.images, source.columns)
        splits.append(replace(split, images=features))
        notes += notes_on_unseen(unseen, name)
    return encoding, splits, notes


def unlabelled(source: Source) -> tuple[Images, str, list[str]]:
    """The training images of a source whose labels are not used, their fingerprint, and notes. Raises DataError."""
    if isinstance(source, Source) and source.columns is not None:
        raise DataError(
            f"transfer.data is the table {source.name}, whose columns are encoded as its own training part says",
            hint="keep the rows in one table, with a column for dataset.split",
        )
    if not isinstance(source, Source) or source.class_names:
        dataset = prepare(source, val_fraction=0.0)
        unused = len(dataset.test) + len(dataset.val)
        note = f"{dataset.name} as transfer.data: its training part is used, {unused} held-out examples are not"
        return dataset.train.images, dataset.fingerprint, [*source.notes, note]
    check_images(f"data set {source.name}: train", source.train_images)
    check_layout(f"data set {source.name}", source.train_images, source.channels_first)
    fingerprint = _fingerprint(source, 0.0, None)
    late = source.train_images.notes() if isinstance(source.train_images, StoredImages) else []
    return channels_first(source).train_images, fingerprint, [*source.notes, *late]


def one_label(source: Source, positive: str | int) -> Source:
    """The source with one label [N,1], whether an example is of the class `positive`. Raises ConfigError."""
    names = list(source.class_names)
    if source.train_labels.dim() == 2:
        raise ConfigError(f"dataset.positive is {positive!r}, and {source.name} has independent labels already")
    if str(positive) in names:
        number = names.index(str(positive))
    elif is_whole(positive) and 0 <= int(positive) < len(names):
        number = int(positive)
    else:
        allowed = did_you_mean(str(positive), names) or f"classes are 0 to {len(names) - 1}, or their names"
        raise ConfigError(
            f"dataset.positive names the class {positive!r}, which {source.name} does not have", hint=allowed
        )

    def label(labels: Tensor) -> Tensor:
        return (labels == number).long()[:, None]

    others = [name for name in names if name != names[number]]
    said = f"one label, {names[number]}: its examples are positive, those of {listed(others, 3)} negative"
    return replace(
        source,
        train_labels=label(source.train_labels),
        test_labels=label(source.test_labels),
        val_labels=None if source.val_labels is None else label(source.val_labels),
        class_names=(names[number],),
        notes=[*source.notes, said],
    )


def channels_first(source: Source) -> Source:
    """The source with images [N,C,H,W], if it says that they are [N,H,W,C]."""
    if source.channels_first is not False or source.train_images.dim() != 4:
        return source

    def turned(images: Images) -> Tensor:
        assert isinstance(images, Tensor)  # stored pictures have their channels first
        return images.permute(0, 3, 1, 2).contiguous()

    return replace(
        source,
        train_images=turned(source.train_images),
        test_images=turned(source.test_images),
        val_images=None if source.val_images is None else turned(source.val_images),
    )


def _take(split: Split, positions: Tensor) -> Split:
    names = tuple(split.names[i] for i in positions.tolist()) if split.names else ()
    rows = None if split.rows is None else split.rows[positions]
    return Split(selected(split.images, positions), split.labels[positions], names, rows)


def _validation_part(source: Source, val_fraction: float) -> tuple[Tensor, Tensor, str]:
    """The positions that validate, those that train, and the rule in words. Raises DataError if a part is empty."""
    total = len(source.train_labels)
    count = round(total * val_fraction)
    order = f"numpy's RandomState({RULE_SEED}).permutation"
    labels = source.train_labels
    labels = labels[:, 0] if labels.dim() == 2 and labels.shape[1] == 1 else labels
    stratified = source.by_class and source.groups is None and labels.dim() == 1
    by_class = set_aside_by_class(labels, count) if stratified else None
    if source.groups is not None:
        val, train = set_aside_groups(source.groups, count)
        groups = len(source.groups.unique())
        rule = (
            f"of the {groups} groups of the {total} training examples, the "
            f"{len(source.groups[val].unique())} that come first in {order}({groups}) validate; the others train"
        )
    elif by_class is not None and len(by_class[0]):
        val, train = by_class
        rule = (
            f"of each class of the {total} training examples, the same share, {len(val)} in all, whose positions come "
            f"first in {order}({total}) validate; the others train"
        )
    else:  # also where no class can spare an example
        val, train = set_aside(total, count)
        rule = (
            f"of the {total} training examples, the {count} whose positions come first in {order}({total}) validate; "
            "the others train"
        )
    left, held = (total - count, count) if count in (0, total) else (len(train), len(val))
    if not left or (not held and val_fraction > 0):
        raise DataError(
            f"val_fraction is {val_fraction}: of the {total} training examples of {source.name} it leaves "
            f"{left} to train on and {held} to validate on",
            hint="val_fraction=0 does without a validation part",
        )
    return val, train, rule


def _notes(dataset: Dataset, survey: Survey | None) -> list[str]:
    """What a reader of the results must know of the data: one sentence each."""
    notes = []
    named = {"training": dataset.train, "validation": dataset.val, "test": dataset.test}
    for part, counts in zip(named, dataset.class_counts().values(), strict=True):
        empty = [name for name, count in zip(dataset.class_names, counts, strict=True) if count == 0]
        if empty and len(named[part]):
            notes.append(f"no {part} examples: {_classes(empty, 'label' if dataset.multilabel else 'class')}")
    noun = "example" if len(dataset.shape) < 2 else "picture"
    for part in ("validation", "test"):
        if count := int(_known(dataset, named[part], SHORT[part], survey).sum()):
            text = f"{{n}} {part} {{{noun}s}} of {len(named[part]):,} {{is}} identical to a training {noun}"
            notes.append(sentence(text, count))
    if len(dataset.shape) > 1:
        blank = [
            split.names[i] if split.names else f"{part} example {i}"
            for part, split in named.items()
            for i in _constant(split, SHORT[part], survey).nonzero()[:, 0].tolist()
        ]
        if blank:
            text = "{n} {pictures} {has} the same value in every pixel: {names}"
            notes.append(sentence(text, len(blank), names=listed(blank, 5)))
    elif flat := _flat(dataset.train.images):
        text = "{n} {features} of {all} {is} constant in the training part: {names} (counted from 0)"
        notes.append(sentence(text, len(flat), all=dataset.shape[0], names=listed([str(i) for i in flat])))
    return notes


def _flat(table: Images) -> list[int]:
    """The features of a table [N,F] that are the same in every row."""
    assert isinstance(table, Tensor)
    return (table == table[:1]).all(0).nonzero()[:, 0].tolist()


def _known(dataset: Dataset, split: Split, part: str, survey: Survey | None) -> Tensor:
    """Which examples of a part occur in the training part too."""
    if survey is None:
        return known(split.images, dataset.train.images)
    return same(split.images, dataset.train.images, survey.hashes(part), survey.hashes("train"))


def _constant(split: Split, part: str, survey: Survey | None) -> Tensor:
    """Which examples of a part show nothing."""
    if survey is not None:
        return survey.constant(part)
    assert isinstance(split.images, Tensor)
    return constant(split.images)


def _classes(names: Sequence[str], noun: str) -> str:
    plural = {"class": "classes", "label": "labels"}[noun]
    return f"{noun if len(names) == 1 else plural} {listed(names)}"


def _fingerprint(source: Source, val_fraction: float, positions: Tensor | None, survey: Survey | None = None) -> str:
    """16 bytes of BLAKE2b over everything that decides what is trained and tested on, in hexadecimal.

    Stored pictures are read once for it, which the survey takes part in.
    """
    digest = hashlib.blake2b(digest_size=16)
    plain = source.groups is None and not source.by_class
    for part in ("train", "test", "val"):
        split = parts_of(source).get(part)
        if split is not None:
            read = pieces(split.images) if survey is None else survey.pieces(part)
            _update(digest, split.images, read)
            _update(digest, split.labels, [split.labels])
    if positions is not None and len(positions) and not plain:
        _update(digest, positions, [positions])
    digest.update(repr((tuple(source.class_names), float(val_fraction))).encode())
    if source.columns is not None:
        digest.update(repr([(column.name, column.categories) for column in source.columns]).encode())
    return digest.hexdigest()


def _update(digest: Any, images: Images, read: Iterable[Tensor]) -> None:
    """Add the type, the shape and the content of images, or of other numbers, to a digest."""
    digest.update(f"{images.dtype}{tuple(images.shape)}".encode())
    for piece in read:
        digest.update(piece.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)
