"""Export a run's student, each form compared with it on the whole test set before the file has its name."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_cli.data.source import Dataset
from kd_cli.data.stored import Images
from kd_cli.errors import ExportError
from kd_cli.export.card import write_card
from kd_cli.export.cost import int8_against_floats, measured_cost, size_of
from kd_cli.export.forms import (
    INPUT,
    OUTPUT,
    PACKAGES,
    check_packages,
    example_of,
    onnx_bytes,
    pt2_bytes,
    run_onnx,
    run_pt2,
)
from kd_cli.export.int8 import AGREEMENT, INSTEAD, MORE_ERRORS, check_int8, int8_bytes
from kd_cli.export.load import load_student
from kd_cli.export.parity import TOLERANCE, Parity, check_parity, compare, logits_of
from kd_cli.export.run_data import background_of, dataset_of, finished_summary, sound_of
from kd_cli.export.student import Student
from kd_cli.export.teacher import load_teacher
from kd_cli.models.quantised import in_floats, int8_layers, ranges_in_order
from kd_cli.storage.files import read_json, replacing, write_json
from kd_cli.storage.run_dir import finite, read_identity

ENDINGS = {"onnx": ".onnx", "int8": ".int8.onnx", "pt2": ".pt2"}
RECORD = "export.json"
TEACHER_RECORD = "export.teacher.json"


def ship(
    run_dir: Path, to: Path, forms: Sequence[str], *, teacher: bool = False, trust: bool = False, cost: bool = True
) -> dict[str, Any]:
    """Write the forms, export.json and a model card to a folder; return the content of export.json.

    `teacher` exports the run's teacher in the student's place. Raises ExportError, and leaves no file under that form's
    name, when a form cannot be made or differs from the model beyond the tolerance.
    """
    if {"onnx", "int8"} & set(forms):
        check_packages()
    summary = finished_summary(run_dir)
    student = None if teacher else load_student(run_dir, trust=trust)
    data = dataset_of(run_dir, summary, trust=trust)
    model = student or load_teacher(run_dir, summary, data, trust=trust)
    shipment = Shipment(
        "teacher" if teacher else "student", model, data, to, metadata_of(run_dir, summary, model, teacher)
    )
    try:
        for form in forms:
            shipment.add(form)
        if cost:
            shipment.measure(run_dir, summary, trust=trust)
    finally:
        shipment.describe(summary)  # of the forms that are there, also when one was refused
    return shipment.record


class Shipment:
    """One model of a run, its exported files in a folder, and the record of them."""

    def __init__(self, role: str, model: Student, data: Dataset, to: Path, metadata: dict[str, Any]) -> None:
        self.role, self.model, self.data, self.to, self.metadata = role, model, data, to, metadata
        self.reference = logits_of(model, data.test.images)
        self.own = compare(self.reference, self.reference, data.test)
        self.path = to / (TEACHER_RECORD if role == "teacher" else RECORD)
        to.mkdir(parents=True, exist_ok=True)
        self.record: dict[str, Any] = {
            **metadata,
            "tolerance": {"relative": TOLERANCE, "int8_agreement": AGREEMENT, "int8_more_errors": MORE_ERRORS},
            role: self.own.record(),
            "forms": {},
            "refused": {},
        }
        self.keep_earlier()

    def file(self, form: str) -> Path:
        return self.to / f"{self.role}{ENDINGS[form]}"

    def keep_earlier(self) -> None:
        """Take over what an earlier export of the same weights recorded of files that are still as it wrote them."""
        try:
            earlier = read_json(self.path)
            same = earlier["fingerprint"] == self.metadata["fingerprint"] != ""
            forms, refused = dict(earlier["forms"]), dict(earlier.get("refused", {}))
            written = {form: self.to / row["file"] for form, row in forms.items()}
            sizes = {form: path.stat().st_size for form, path in written.items() if path.is_file()}
            kept = {form: row for form, row in forms.items() if sizes.get(form) == row["bytes"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return  # no record, or one that is not ours
        if same:
            self.record["forms"] |= kept
            self.record["refused"] |= refused
        elif kept:
            names = ", ".join(written[form].name for form in kept)
            self.note(f"{names} in this folder: from an earlier export of other weights, and not listed")

    def add(self, form: str) -> None:
        """Write one form. ExportError when it cannot be made, or is refused; the record then holds its numbers."""
        path, how = self.file(form), {}
        if form == "onnx" and int8_layers(self.model.network):
            raise ExportError(
                f"the {self.role} was trained in simulated int8, which ONNX with floats would only imitate",
                hint="--int8 ships it as it was trained; --pt2 has the simulation",
            )
        self.record["forms"].pop(form, None)
        self.record["refused"].pop(form, None)
        if form == "int8":
            content, how["quantisation"] = int8_form(self.model, self.metadata, self.data.train.images)
        else:
            content = pt2_bytes(self.model) if form == "pt2" else onnx_bytes(self.model, self.metadata)
        path.unlink(missing_ok=True)  # an earlier export, which nobody shall take for a form that is refused now
        with replacing(path) as temporary:
            temporary.write_bytes(content)
            predict = run_pt2(temporary) if form == "pt2" else run_onnx(temporary)
            parity = compare(logits_of(predict, self.data.test.images), self.reference, self.data.test)
            row = {"file": path.name, "bytes": len(content), **how, **parity.record()}
            try:
                self.check(form, parity, path.name)
            except ExportError as error:
                self.record["refused"][form] = finite({**row, "why": error.message})
                self.write()
                raise
        self.record["forms"][form] = row
        self.write()  # after each form: a later one may be refused

    def check(self, form: str, parity: Parity, name: str) -> None:
        """ExportError beyond the tolerance of a form."""
        if form == "int8":
            check_int8(parity, self.own, name, self.role, hint=self.instead_of_int8(parity))
        else:
            check_parity(parity, name, self.role)

    def instead_of_int8(self, parity: Parity) -> str:
        """What to do when the int8 form is refused; of a student of simulated int8, how much hangs on its rounding."""
        if not int8_layers(self.model.network) or parity.agreement >= AGREEMENT:
            return INSTEAD
        with in_floats(self.model.network):
            floats = logits_of(self.model, self.data.test.images)
        agree = compare(floats, self.reference, self.data.test).agreement
        return (
            f"in PyTorch, the same weights without rounding agree with it on {agree:.2%}: where that is little, its "
            "classes hang on single roundings, and ONNX Runtime rounds biases too; train it for longer, or "
            "student.quantise=null"
        )

    def measure(self, run_dir: Path, summary: Mapping[str, Any], *, trust: bool) -> None:
        """Measure what the model, every form in the folder and, of a student, the teacher cost."""
        models = {self.role: self.model}
        if self.role == "student" and summary.get("teacher") is not None:
            try:
                models = {"teacher": load_teacher(run_dir, summary, self.data, trust=trust), **models}
            except ExportError as error:
                self.note(f"the teacher was not measured: {error.message}")
        files = {form: self.to / row["file"] for form, row in self.record["forms"].items()}
        cost = measured_cost(models, files, self.data.test.images)
        for name, row in cost["rows"].items():
            report = summary[name if name in models else self.role]
            row |= {"parameters": report["parameters"], "flops": report["flops"]}
            if name in models:
                row |= {"bytes": size_of(models[name]), "errors": report["test"]["errors"]}
            else:
                row |= {key: self.record["forms"][name][key] for key in ("bytes", "errors")}
        self.record["cost"] = cost
        sentence = int8_against_floats(cost)
        if sentence is not None:
            self.note(sentence)
        self.write()

    def describe(self, summary: Mapping[str, Any]) -> None:
        """Write the model card beside the files."""
        if (sentence := write_card(self.to, summary, self.record)) is not None:
            self.note(sentence)
            self.write()

    def note(self, sentence: str) -> None:
        self.record["notes"] = [*self.record.get("notes", []), sentence]

    def write(self) -> None:
        write_json(self.path, self.record)


def int8_form(model: Student, metadata: Mapping[str, Any], train: Images) -> tuple[bytes, str]:
    """The content of an int8 file, and how it was quantised: as the model was trained, else after training."""
    if not int8_layers(model.network):
        return int8_bytes(onnx_bytes(model, metadata), train)
    ranges = ranges_in_order(model.network, model.unchecked, example_of(model, 1))
    with in_floats(model.network):
        content = onnx_bytes(model, metadata)
    return int8_bytes(content, train, ranges)


def metadata_of(run_dir: Path, summary: Mapping[str, Any], model: Student, teacher: bool = False) -> dict[str, Any]:
    """What an exported file says of itself: its input and output, its classes, the run that it is from, versions."""
    trained = summary["teacher" if teacher else "student"]
    return {
        "name": trained["name"],
        "role": "teacher" if teacher else "student",
        "run": read_identity(run_dir),
        "fingerprint": trained.get("fingerprint", ""),
        "dataset": summary["dataset"]["name"],
        **({} if teacher else {"method": summary["method"], "T": summary["T"]}),
        "input": INPUT,
        "input_shape": ["batch", *model.input_shape],
        "input_type": str(example_of(model, 1).dtype).removeprefix("torch."),
        "values": model.values,
        "range": model.range and list(model.range),
        "output": OUTPUT,
        "classes": list(model.classes),
        **({"multilabel": True} if model.multilabel else {}),
        **({} if model.encoding is None else {"columns": model.encoding.record()}),
        **({"background": background} if (background := background_of(run_dir)) is not None else {}),
        **({"sound": sound} if (sound := sound_of(run_dir)) is not None else {}),
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
