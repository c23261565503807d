"""Export a run's student, each form compared with it on the whole test set before the file has its name."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_cli.export.forms import INPUT, OUTPUT, PACKAGES, check_packages, onnx_bytes, pt2_bytes, run_onnx, run_pt2
from kd_cli.export.int8 import AGREEMENT, MORE_ERRORS, check_int8, int8_bytes
from kd_cli.export.load import load_student
from kd_cli.export.parity import TOLERANCE, check_parity, compare, logits_of
from kd_cli.export.run_data import dataset_of, finished_summary
from kd_cli.export.student import Student
from kd_cli.storage.files import replacing, write_json
from kd_cli.storage.run_dir import read_identity

FILES = {"onnx": "student.onnx", "int8": "student.int8.onnx", "pt2": "student.pt2"}
RECORD = "export.json"


def ship(run_dir: Path, to: Path, forms: Sequence[str], *, trust: bool = False) -> dict[str, Any]:
    """Write the forms and export.json to a folder; return the content of export.json.

    Raises ExportError, and leaves no file under that form's name, when a form cannot be made or
    differs from the student beyond the tolerance.
    """
    if {"onnx", "int8"} & set(forms):
        check_packages()
    summary = finished_summary(run_dir)
    student = load_student(run_dir, trust=trust)
    data = dataset_of(run_dir, summary, trust=trust)
    test = data.test
    reference = logits_of(student, test.images)
    own = compare(reference, reference, test)
    metadata = metadata_of(run_dir, summary, student)
    record: dict[str, Any] = {
        **metadata,
        "tolerance": {"relative": TOLERANCE, "int8_agreement": AGREEMENT, "int8_more_errors": MORE_ERRORS},
        "student": own.record(),
        "forms": {},
    }
    to.mkdir(parents=True, exist_ok=True)
    for form in forms:
        path = to / FILES[form]
        how = {}
        content = pt2_bytes(student) if form == "pt2" else onnx_bytes(student, metadata)
        if form == "int8":
            content, how["quantisation"] = int8_bytes(content, data.train.images)
        path.unlink(missing_ok=True)  # an earlier export, which nobody shall take for a form that is refused now
        with replacing(path) as temporary:
            temporary.write_bytes(content)
            predict = run_pt2(temporary) if form == "pt2" else run_onnx(temporary)
            parity = compare(logits_of(predict, test.images), reference, test)
            if form == "int8":
                check_int8(parity, own, path.name)
            else:
                check_parity(parity, path.name)
        record["forms"][form] = {"file": path.name, "bytes": len(content), **how, **parity.record()}
        write_json(to / RECORD, record)  # after each form: a later one may be refused
    return record


def metadata_of(run_dir: Path, summary: Mapping[str, Any], student: Student) -> dict[str, Any]:
    """What an exported file says of itself: its input and output, its classes, the run that it is from, versions."""
    trained = summary["student"]
    return {
        "name": trained["name"],
        "run": read_identity(run_dir),
        "fingerprint": trained.get("fingerprint", ""),
        "dataset": summary["dataset"]["name"],
        "method": summary["method"],
        "T": summary["T"],
        "input": INPUT,
        "input_shape": ["batch", *student.input_shape],
        "values": student.values,
        "range": student.range and list(student.range),
        "output": OUTPUT,
        "classes": list(student.classes),
        **({} if student.encoding is None else {"columns": student.encoding.record()}),
        "versions": summary["versions"],
        "exported_with": versions(),
    }


def versions() -> dict[str, str]:
    """The versions of what exports; the packages for ONNX where they are installed."""
    found = {}
    for package in ("kd-cli", "torch", *PACKAGES):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
