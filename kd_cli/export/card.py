"""The model card that lies beside exported files: README.md, of what a run and its export recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kd_cli.data.sentences import listed
from kd_cli.export.cost import int8_against_floats
from kd_cli.roles import ROLE_NAMES, ROLES
from kd_cli.storage.files import write_text

MARK = "<!-- written by kd-export, which writes it again -->"  # other files of this name are left alone
NAMES = {"student": "README.md", "teacher": "README.teacher.md"}
FORMS = {"onnx": "ONNX", "int8": "ONNX, int8", "pt2": "torch.export"}
Facts = Mapping[str, Any]


def write_card(to: Path, summary: Facts, record: Facts) -> str | None:
    """Write the card of an export; a sentence that says why not, where the folder has another README.md.

    `summary` is that of the run, `record` the content of export.json. Without an exported form there is no card.
    """
    path = to / NAMES[record["role"]]
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(MARK):
        return f"{path.name} in this folder is not one of kd-export's, so no model card was written"
    if not record["forms"]:
        path.unlink(missing_ok=True)
        return None
    write_text(path, card(summary, record))
    return None


def card(summary: Facts, record: Facts) -> str:
    """The card as Markdown."""
    role = record["role"]
    trained, data = summary[role], summary["dataset"]
    files = [named(row) for row in record["forms"].values()]
    sections = [
        MARK,
        f"# {trained['name']} on {data['name']}",
        f"The {role} of a run of kd-cli {record['versions'].get('kd-cli', '')}: {origin(summary, role)}",
        "## Files",
        f"{listed(files, 9)}; fingerprint of the training `{record['fingerprint']}`. `{record_name(role)}` holds "
        "every number of this page.",
        "## Use",
        *use(record),
        "## Data",
        *data_section(data, record),
        "## Training",
        *bullets(training(summary, role)),
        "## Results",
        results(summary, record),
        f"Errors of {data['test']:,} test examples, which were used for nothing else. {seeds(role)}",
        *(["## Cost", *cost_section(record["cost"])] if "cost" in record else []),
        "## Limits",
        *bullets(limits(summary, record)),
    ]
    return "\n\n".join(sections) + "\n"


def named(row: Facts) -> str:
    """A file's name, and how it came to weights of 8 bits where it has them."""
    how = row.get("quantisation")
    if how is None:
        return str(row["file"])
    return f"{row['file']} (int8, quantised {how if how == 'in training' else f'after training, {how}'})"


def record_name(role: str) -> str:
    return "export.json" if role == "student" else f"export.{role}.json"


def origin(summary: Facts, role: str) -> str:
    """Which models and which method the weights come from."""
    teacher = summary.get("teacher")
    if role == "teacher":
        return f"it taught {summary['student']['name']} by {summary['method']}."
    if teacher is None:
        return f"trained by {summary['method']}, without a teacher."
    chain = [one["name"] for one in summary.get("chain") or []]
    through = f" through {listed(chain, 9)}" if chain else ""
    return f"distilled from {teacher['name']}{through} by {summary['method']}."


# ---------------------------------------------------------------- how to run it


def use(record: Facts) -> list[str]:
    """Five lines of Python that run the first file that they can run, and what they take and print."""
    forms = record["forms"]
    form = next(form for form in ("onnx", "int8", "pt2") if form in forms)
    lines = (with_torch if form == "pt2" else with_onnx_runtime)(record, forms[form]["file"])
    needs = "torch" if form == "pt2" else "numpy and onnxruntime, no torch"
    return [
        f"Needs {needs}. Run it in this folder:",
        "\n".join(["```python", *lines, "```"]),
        f"`{record['input']}` is {shape(record)}, {kind(record)}. Normalisation is inside. `{record['output']}` is "
        f"[batch, {len(record['classes'])}]; " + probabilities(record),
    ]


def with_onnx_runtime(record: Facts, file: str) -> list[str]:
    chosen = "(row > 0).nonzero()[0]" if record.get("multilabel") else "[row.argmax()]"
    return [
        "import json, numpy, onnxruntime",
        f'model = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"])',
        'classes = json.loads(model.get_modelmeta().custom_metadata_map["classes"])',
        f'images = numpy.zeros({tuple(example(record))}, dtype="{record["input_type"]}")  # put your own here',
        f'print([[classes[c] for c in {chosen}] for row in model.run(["{record["output"]}"], '
        f'{{"{record["input"]}": images}})[0]])',
    ]


def with_torch(record: Facts, file: str) -> list[str]:
    chosen = "(row > 0).nonzero()[:, 0]" if record.get("multilabel") else "[row.argmax()]"
    return [
        "import json, pathlib, torch",
        f'model = torch.export.load("{file}").module()',
        f'classes = json.loads(pathlib.Path("{record_name(record["role"])}").read_text("utf-8"))["classes"]',
        f"images = torch.zeros({tuple(example(record))}, dtype=torch.{record['input_type']})  # put your own here",
        f"print([[classes[c] for c in {chosen}] for row in model(images)])",
    ]


def example(record: Facts) -> list[int]:
    return [1, *record["input_shape"][1:]]


def shape(record: Facts) -> str:
    return f"[{', '.join(map(str, record['input_shape']))}]"


def kind(record: Facts) -> str:
    """What the values of the input are."""
    if record["values"] == "bytes":
        return "bytes from 0 to 255 (uint8)"
    span = record["range"]
    values = record["input_type"] + (f", in training from {span[0]:g} to {span[1]:g}" if span else "")
    return values + (f"; `columns` in {record_name(record['role'])} says which" if "columns" in record else "")


def probabilities(record: Facts) -> str:
    return "its sigmoid is each label's probability." if record.get("multilabel") else "its softmax is probabilities."


# ---------------------------------------------------------------- what it is from


def data_section(data: Facts, record: Facts) -> list[str]:
    """The data set's name, size, parts and classes."""
    what = "labels" if data["multilabel"] else "classes"
    lines = [
        f"{data['name']}: {data['train']:,} training, {data['val']:,} validation and {data['test']:,} test examples "
        f"of {'x'.join(map(str, record['input_shape'][1:]))}; {data['classes']} {what}: "
        f"{listed(data['class_names'], 30)}. Fingerprint `{data['fingerprint']}`."
    ]
    if rule := data.get("split"):
        lines.append(f"Parts: {rule}.")
    return lines


def training(summary: Facts, role: str) -> list[str]:
    """Method, T, weights, length and seed."""
    trained = summary[role]
    size = f"{trained['parameters']:,} parameters, {trained['flops'] / 1e6:,.2f} MFLOPs for one example"
    length = f"{trained['epochs']} epochs" if trained.get("epochs") else "weights that were brought"
    if role == "teacher":
        return [f"{trained['name']}: {length}, {summary['precision']} on {summary['device']}; {size}"]
    alone = summary.get("student_alone")
    if alone and alone["parameters"] != trained["parameters"]:
        size += f"; with the parts that {summary['method']} added, without them {alone['parameters']:,} parameters"
    transfer = summary["transfer"]
    labelled = "with their labels" if transfer["labels"] else "without labels"
    return [
        f"method {summary['method']}, T = {summary['T']:g}, alpha = {summary['alpha']:g} (soft term), "
        f"beta = {summary['beta']:g} (hard term)",
        f"{trained['name']}: {length}, seed {summary['seed']}, {summary['precision']} on {summary['device']}; {size}",
        f"transfer set: {transfer['examples']:,} examples, {labelled}",
    ]


def bullets(lines: Sequence[str]) -> list[str]:
    return ["\n".join(f"- {line}" for line in lines)]


# ---------------------------------------------------------------- what it is worth


def results(summary: Facts, record: Facts) -> str:
    """A row for each model of the run, and for each exported form."""
    rows = []
    for role in ROLES if record["role"] == "student" else ("teacher",):
        report = summary.get(role)
        if report and report["test"]:
            agrees = report["test"].get("agreement")
            rows.append((f"{ROLE_NAMES[role]} ({report['name']})", report["test"], agrees, "the teacher"))
    rows += [(row["file"], row, row["agreement"], f"the {record['role']}") for row in record["forms"].values()]
    return table(
        ["", "errors", "NLL", "ECE", "agrees with"],
        [
            [
                name,
                f"{row['errors']:,} of {row['total']:,} ({row['errors'] / row['total']:.2%})",
                f"{row['nll']:.4f}",
                f"{row['ece']:.4f}",
                "" if agrees is None else f"{who}: {agrees:.2%}",
            ]
            for name, row, agrees, who in rows
        ],
    )


def seeds(role: str) -> str:
    if role == "teacher":
        return "n = 1 training."
    return "n = 1 training of each model: a difference of a few errors between them may be chance."


def cost_section(cost: Facts) -> list[str]:
    """The measured latencies, sizes and memory, with how they were measured."""
    first = next(iter(cost["rows"].values()))["latency"]
    heads = [f"{one['batch']} on {one['threads']}" for one in first]
    rows = []
    for name, row in cost["rows"].items():
        times = [f"{one['median_ms']:.3f} ({one['p95_ms']:.3f})" for one in row["latency"]]
        peak = row["peak_memory"]
        memory = f"{peak['model'] / 2**20:,.1f} MiB" if peak else ""
        rows.append([FORMS.get(name, f"{name}, PyTorch"), *times, f"{row['bytes']:,}", memory])
    load = "" if cost["load"] is None else f", load {cost['load']:.1f} before the measurement"
    return [
        table(["", *heads, "bytes", "memory"], rows),
        "Milliseconds, median (95th percentile), of so many examples at once on so many threads; memory is the peak "
        f"with {cost['memory_batch']} examples beyond the libraries. Measured on {cost['machine']} with "
        f"{cost['cores']} cores{load}; {cost['how']}. Another machine has other numbers, and other ratios.",
    ]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


# ---------------------------------------------------------------- what it does not do


def limits(summary: Facts, record: Facts) -> list[str]:
    """What follows from how the model was trained and tested; none of it is a guess about its use."""
    test, data = summary[record["role"]]["test"], summary["dataset"]
    found = [
        f"it knows the {data['classes']} {'labels' if data['multilabel'] else 'classes'} above and always answers "
        "with probabilities of them, also for an input that is none of them",
        f"it was tested on {data['name']} alone; inputs that differ from its training data were not tested",
    ]
    worst = (test or {}).get("worst_class")
    if worst and worst["recall"] is not None:
        found.append(
            f"its worst class is {worst['name']}: {worst['recall']:.1%} of {worst['examples']:,} test examples are "
            "classified correctly"
        )
    omitted = summary.get("omitted")
    if omitted and record["role"] == "student":
        names = listed([str(name) for name in omitted["classes"]], 9)
        found.append(f"the student saw no training examples of {names}")
    for form, row in record["refused"].items():
        found.append(f"{FORMS.get(form, form)} was refused: {row.get('why', 'it differed too much')}")
    if (sentence := int8_against_floats(record.get("cost"))) is not None:
        found.append(sentence)
    notes = len(summary.get("notes", []))
    if notes:
        found.append(f"what kd-run did unasked is in the run's summary.json, notes: {notes}")
    return found
