"""What a run shows of its answers: examples, softened distributions, disagreement, calibration. No files here."""

from __future__ import annotations

import base64
import functools
import io
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kd_cli.data.stored import Images
from kd_cli.metrics import confusion, reliability

TEMPERATURES = (1.0, 2.0, 5.0, 10.0, 20.0)
SIDE = 40  # pixels at most: the pictures travel inside a page
CLASSES = 10  # shown of a distribution
MATRIX = 25  # classes at most for a whole matrix
PAIRS = 12
FILES = 3  # of a pair of classes


def pictures(
    images: Images,
    labels: Tensor,
    teacher_logits: Tensor | None,
    student_logits: Tensor,
    class_names: Sequence[str],
    *,
    T: float,
    alone_logits: Tensor | None = None,
    files: Sequence[str] | None = None,
    temperatures: Sequence[float] = TEMPERATURES,
    count: int = 8,
) -> dict[str, Any]:
    """What `examples.json` holds: plain values, below 100 KB.

    images [N, ...] as published, uint8 or float; labels [N]; logits [N, C] of the same examples. Half of the `count`
    examples are those the teacher is least certain of, half those on which it is surest while the student disagrees.
    Without a teacher: the student's least certain examples and its surest mistakes. `files` are the examples' names on
    disk, where the data set knows them: they let a reader find the pictures.
    """
    labels = labels.detach().cpu()
    student = student_logits.detach().cpu().double()
    teacher = None if teacher_logits is None else teacher_logits.detach().cpu().double()
    alone = None if alone_logits is None else alone_logits.detach().cpu().double()
    warmth = sorted({float(t) for t in temperatures} | {float(T)})
    chosen = choose(labels, teacher, student, count)
    index, at_T = [i for i, _ in chosen], torch.tensor(warmth, dtype=torch.float64)[:, None]

    def softened(logits: Tensor | None) -> list[Tensor | None]:
        """Probabilities of each chosen example, [temperatures, C], to four digits; a sweep makes a thousand pages."""
        if logits is None:
            return [None] * len(chosen)
        return list((torch.softmax(logits[index][:, None] / at_T, -1) * 1e4).round() / 1e4)

    taught, learnt = softened(teacher), softened(student)
    roles = (("teacher", teacher), ("student_alone", alone), ("student", student))
    return {
        "T": float(T),
        "temperatures": warmth,
        "classes": len(class_names),
        "examples": [
            {
                "index": i,
                "why": why,
                "file": None if files is None else str(files[i]),
                "label": str(class_names[int(labels[i])]),
                "image": picture(images[i : i + 1][0]),
                **_likeliest(i, int(labels[i]), teacher, student, class_names, taught[k], learnt[k]),
            }
            for k, (i, why) in enumerate(chosen)
        ],
        "disagreement": None if teacher is None else disagreement(labels, teacher, student, class_names, files),
        "mistakes": mistakes(labels, student, class_names),
        "reliability": {
            role: [_rounded(vars(b)) for b in reliability(logits, labels)]
            for role, logits in roles
            if logits is not None
        },
    }


def choose(labels: Tensor, teacher: Tensor | None, student: Tensor, count: int) -> list[tuple[int, str]]:
    """Positions of the examples to show and why each; equal scores go by position, so that a rerun shows the same."""
    guide, name = (student, "student") if teacher is None else (teacher, "teacher")
    sure, guess = torch.softmax(guide, -1).max(-1)
    differs = (student.argmax(-1) != (labels if teacher is None else guess)).tolist()
    unsure = sure.argsort(stable=True).tolist()
    surest = [i for i in (-sure).argsort(stable=True).tolist() if differs[i]][: count // 2]
    rest = [i for i in unsure[: count + len(surest)] if i not in surest][: count - len(surest)]
    why = "the student is sure and wrong" if teacher is None else "student and teacher disagree"
    return [*((i, f"the {name} is least certain") for i in rest), *((i, why) for i in surest)]


def disagreement(
    labels: Tensor, teacher: Tensor, student: Tensor, class_names: Sequence[str], files: Sequence[str] | None = None
) -> dict[str, Any]:
    """How often two models put an example in different classes, in which, and which of them is right."""
    a, b = teacher.argmax(-1), student.argmax(-1)
    classes = teacher.shape[-1]
    a_right, b_right, same = a == labels, b == labels, a == b
    matrix = confusion(student, a)  # row the teacher's class, column the student's
    rights = [
        torch.bincount(a[~same & right] * classes + b[~same & right], minlength=classes**2)
        for right in (a_right, b_right)
    ]
    pairs = matrix.clone().fill_diagonal_(0).flatten()
    order = (-pairs).argsort(stable=True)[:PAIRS].tolist()
    return {
        "total": len(labels),
        "both_right": int((a_right & b_right).sum()),
        "teacher_right": int((a_right & ~b_right).sum()),
        "student_right": int((~a_right & b_right).sum()),
        "both_wrong_alike": int((~a_right & same).sum()),
        "both_wrong_apart": int((~a_right & ~b_right & ~same).sum()),
        "pairs": [
            {
                "teacher": str(class_names[k // classes]),
                "student": str(class_names[k % classes]),
                "count": int(pairs[k]),
                "teacher_right": int(rights[0][k]),
                "student_right": int(rights[1][k]),
                **({} if files is None else {"files": _files_of(files, (a == k // classes) & (b == k % classes))}),
            }
            for k in order
            if pairs[k]
        ],
        "names": [str(name) for name in class_names] if classes <= MATRIX else None,
        "matrix": matrix.tolist() if classes <= MATRIX else None,
    }


def _files_of(files: Sequence[str], chosen: Tensor) -> list[str]:
    """The names of the first few examples of a mask [N]."""
    return [str(files[i]) for i in chosen.nonzero().flatten()[:FILES].tolist()]


def mistakes(labels: Tensor, student: Tensor, class_names: Sequence[str]) -> list[dict[str, Any]]:
    """The student's most frequent mistakes: true class, predicted class, how many."""
    table = confusion(student, labels).fill_diagonal_(0)
    classes, flat = len(table), table.flatten()
    order = (-flat).argsort(stable=True)[:PAIRS].tolist()
    return [
        {"label": str(class_names[k // classes]), "student": str(class_names[k % classes]), "count": int(flat[k])}
        for k in order
        if flat[k]
    ]


def picture(image: Tensor) -> str | None:
    """One image as a PNG in a data URL; None for what is no image. Floats are stretched from least to most."""
    image = image.detach().cpu()
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3 or min(image.shape) == 0:
        return None
    image = image[: 3 if image.shape[0] >= 3 else 1]
    values = image.double()
    if image.dtype != torch.uint8:
        low, high = values.min(), values.max()
        values = (values - low) / (high - low).clamp_min(1e-12) * 255
    shrink = SIDE / max(values.shape[1:])
    if shrink < 1:
        size = max(round(values.shape[1] * shrink), 1), max(round(values.shape[2] * shrink), 1)
        values = torch.nn.functional.adaptive_avg_pool2d(values[None], size)[0]
    pixels = values.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    return _png_url(pixels.tobytes(), *pixels.shape)


@functools.lru_cache(256)  # the teacher's least certain examples are the same for every student of a sweep
def _png_url(pixels: bytes, height: int, width: int, channels: int) -> str:
    """Bytes in the order [height, width, 1 or 3 channels] as a PNG file in a data URL."""
    file = io.BytesIO()
    Image.frombytes("RGB" if channels == 3 else "L", (width, height), pixels).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _likeliest(
    i: int,
    label: int,
    teacher: Tensor | None,
    student: Tensor,
    class_names: Sequence[str],
    taught: Tensor | None,
    learnt: Tensor | None,
) -> dict[str, Any]:
    """The likeliest classes of one example, the true one among them, and their probabilities at each temperature.

    Logits [N, C] of the two models; their probabilities `taught` and `learnt` of this example [temperatures, C].
    """
    guide = student if teacher is None else teacher
    wanted = [label, int(student[i].argmax()), *(-guide[i]).argsort(stable=True).tolist()]
    kept = list(dict.fromkeys(wanted))[:CLASSES]
    kept = sorted(kept) if len(class_names) <= CLASSES else sorted(kept, key=lambda k: -float(guide[i, k]))

    def rows(softened: Tensor | None) -> list[list[float]] | None:
        return None if softened is None else softened[:, kept].tolist()

    return {
        "classes": [str(class_names[k]) for k in kept],
        "true": kept.index(label),
        "teacher_says": None if teacher is None else str(class_names[int(teacher[i].argmax())]),
        "student_says": str(class_names[int(student[i].argmax())]),
        "teacher": rows(taught),
        "student": rows(learnt),
    }


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {key: round(value, 5) if isinstance(value, float) else value for key, value in values.items()}
