"""The page of one run: what distillation was worth, learning curves, test examples, disagreements, reliability."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kd_cli.errors import StorageError
from kd_cli.report.cost import cost_of, not_measured
from kd_cli.report.curves import COLOURS, run_curves
from kd_cli.report.figures import Figure, is_logarithmic
from kd_cli.report.grids import Grid, plain
from kd_cli.report.read import LOG, Run, read_run
from kd_cli.report.render import render
from kd_cli.report.svg.heat import HeatCell, heat_map
from kd_cli.report.svg.lines import SERIES, Point, Series, line_chart
from kd_cli.report.svg.small import distributions, legend, parts, reliability_diagram
from kd_cli.report.tables import role_rows
from kd_cli.report.words import formatted, next_step, relative, show, trained_together, verdict, worst_class
from kd_cli.roles import ROLE_NAMES, ROLES
from kd_cli.storage.files import read_json
from kd_cli.storage.run_dir import EXAMPLES, METRICS, STUDENT, SUMMARY, WEIGHTS, intact

FILES = (SUMMARY, METRICS, EXAMPLES, WEIGHTS, STUDENT, ".hydra/config.yaml", ".hydra/overrides.yaml")

CLASSES = 30  # whose recall is listed at most


def run_page(run_dir: str | Path, root: Path | None = None) -> str:
    """A run's page, from its run.json, summary.json, metrics.jsonl and examples.json, as far as they exist.

    Links are relative to root, the run directory by default. Raises StorageError when there is no readable run.
    """
    path = Path(run_dir)
    try:
        run = read_run(path)
        examples = read_json(path / EXAMPLES) if (path / EXAMPLES).is_file() and intact(path / EXAMPLES) else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{path} cannot be read as a run: {error}", hint="give a run directory of kd-run") from error
    return render(
        "run",
        title=f"{path.resolve().name}: {run.status}",
        heading=f"kd-run: {path.resolve().name}, {run.status}",
        completed=run.status == "completed",
        **_head(run),
        worst_class=worst_class(run.summary) if run.summary else "",
        notes=run.summary.get("notes", []),
        auto=_auto(run),
        omitted=_omitted(run),
        curves=run_curves(run),
        balance=_balance(run),
        cost=cost_of(run),
        no_latency=not_measured(run),
        classes=_classes(run),
        labels=_labels(run),
        examples=_examples(examples) if examples else None,
        disagreement=_disagreement(examples) if examples and examples["disagreement"] else None,
        mistakes=_mistakes(examples) if examples and not examples["disagreement"] else None,
        reliability=_reliability(examples, run) if examples else None,
        files=_files(run, relative(path, path if root is None else root)),
        command=run.summary.get("command"),
        versions=[f"{name} {version}" for name, version in run.summary.get("versions", {}).items()],
        configuration=[f"{key}: {show(value)}" for key, value in run.config.items()],
    )


def _head(run: Run) -> dict[str, Any]:
    """The headline, the sentence below it, and the table of the roles."""
    if not run.summary:
        why = run.cause or "There is no summary yet: the run goes on, or was stopped."
        return {"headline": "failed" if run.status == "failed" else "not finished", "text": why, "roles": None}
    summary, data = run.summary, run.summary["dataset"]
    first, _, rest = verdict(summary).partition(": ")
    facts = [first] if rest else []
    facts += [f"{data['name']}: {data['train']:,} training, {data['val']:,} validation, {data['test']:,} test examples"]
    facts += [f"{summary['method']}, seed {summary['seed']}, on {summary['device']} in {summary['precision']}"]
    advice = next_step(summary).partition("advice: ")[2]
    if rule := data.get("split"):  # runs of earlier versions did not note it
        facts.append(rule)
    if together := trained_together(summary):
        facts.append(together)
    heads, *rows = role_rows(summary)
    return {
        "headline": rest or first,
        "text": "; ".join(facts) + "." + (f" Advice: {advice}." if advice else ""),
        "roles": plain(heads, rows) if rows else None,
    }


def _auto(run: Run) -> Figure | None:
    """The validation results of the settings that kd-run chose from."""
    facts = run.summary.get("auto")
    if not facts:
        return None
    lines: dict[str, list[Point]] = {}
    chosen = facts["tried"][facts["chosen"]]
    for one in facts["tried"]:
        if one["diverged"] is None and one["val_accuracy"] is not None:
            tip = f"T={one['T']:g}, alpha={one['alpha']:g}: validation accuracy {one['val_accuracy']:.2%}"
            point = Point(float(one["T"]), 100 * (1 - one["val_accuracy"]), None, tip)
            lines.setdefault(f"alpha={one['alpha']:g}", []).append(point)
    series = [Series(name, points, f"c{i % SERIES}") for i, (name, points) in enumerate(lines.items())]
    values = sorted({point.x for points in lines.values() for point in points})
    chart = line_chart(
        series,
        title="validation error of what was tried",
        x_label="temperature T",
        y_label="validation errors, %",
        log_x=is_logarithmic(values),
        x_ticks=values,
    )
    note = f"Chosen: T = {chosen['T']:g}, alpha = {chosen['alpha']:g}; {facts['rule']}. One seed each."
    key = legend([(s.name, s.colour, "line") for s in series])
    return Figure(f"How {' and '.join(facts['keys'])} was chosen", chart, note, key)


def _tested(run: Run) -> dict[str, Any]:
    """The test results of each role that has some: a teacher from a file need not have answered for test data."""
    return {role: run.summary[role]["test"] for role in ROLES if run.summary.get(role) and run.summary[role]["test"]}


def _classes(run: Run) -> Grid | None:
    """Each class's recall by role, the student's worst first; None for many classes and for runs that noted none."""
    names = run.summary.get("dataset", {}).get("class_names", [])
    reports = _tested(run)
    if not 2 <= len(names) <= CLASSES or not all(report.get("recall") for report in reports.values()) or not reports:
        return None
    counts = run.summary["dataset"]["test_by_class"]
    last = list(reports.values())[-1]["recall"]
    order = sorted(range(len(names)), key=lambda c: (last[c] is None, last[c]))

    def shares(report: Mapping[str, Any]) -> list[str]:
        return ["" if report["recall"][c] is None else f"{report['recall'][c]:.1%}" for c in order]

    columns = [[names[c] for c in order], [f"{counts[c]:,}" for c in order], *map(shares, reports.values())]
    balanced = [f"{report['balanced_accuracy']:.1%}" for report in reports.values()]
    rows = [list(row) for row in zip(*columns, strict=True)]
    heads = ["class", "test examples", *(ROLE_NAMES[role] for role in reports)]
    return plain(heads, [*rows, ["mean over the classes", f"{sum(counts):,}", *balanced]])


def _labels(run: Run) -> Grid | None:
    """Each independent label's results on the test part, by role; None for data with classes."""
    reports = _tested(run)
    if not reports or not all(report.get("labels") for report in reports.values()):
        return None
    rows = []
    for i, label in enumerate(reports["student"]["labels"] if "student" in reports else ()):
        for role, report in reports.items():
            own = report["labels"][i]
            shares = ["" if own[key] is None else f"{own[key]:.3f}" for key in ("f1", "average_precision", "ece")]
            rows.append([label["name"], f"{own['positives']:,}", ROLE_NAMES[role], f"{own['errors']:,}", *shares])
    for role, report in reports.items():
        mean = report["mean_average_precision"]
        shares = ["", "" if mean is None else f"{mean:.3f}", f"{report['ece']:.3f}"]
        rows.append(["all labels", "", ROLE_NAMES[role], f"{report['label_errors']:,}", *shares])
    heads = ["label", "test examples with it", "", "wrong", "F1", "average precision", "ECE"]
    return plain(heads, rows) if rows else None


def _balance(run: Run) -> Grid | None:
    """Each term's share of the gradient at the start, the middle and the end; None where none was measured."""
    rows = (run.summary.get("student") or {}).get("loss_balance") or []
    terms = list(dict.fromkeys(term for row in rows for term in row["shares"]))
    shares = [[row["shares"].get(term) for term in terms] for row in rows]
    cells = [["" if share is None else f"{share:.1%}" for share in own] for own in shares]
    heads = ["", "epochs done", *terms]
    lines = [[row["when"], f"{row['epoch']:,}", *own] for row, own in zip(rows, cells, strict=True)]
    return plain(heads, lines) if terms else None


def _omitted(run: Run) -> dict[str, Any] | None:
    """The effect of leaving classes out of the transfer set, before and after the correction of the biases."""
    facts = run.summary.get("omitted")
    if not facts:
        return None
    results = {
        "before": "as trained",
        "corrected": "biases shifted, by training inputs alone",
        "oracle": "oracle: shift tuned on the test set",
    }
    rows = []
    for name, meaning in results.items():
        one = facts[name]
        numbers = (f"{one[key]:,}" for key in ("errors", "omitted_errors", "omitted_total"))
        rows.append([meaning, formatted(one["shift"], "+.2f"), *numbers])
    heads = ["", "shift", "test errors", "of them on these classes", "examples of these classes"]
    return {
        "classes": list(map(str, facts["classes"])),
        "grid": plain(heads, rows, best=[*results].index(facts["result"])),
    }


def _examples(found: Mapping[str, Any]) -> dict[str, Any]:
    """A few test examples: the image, and the teacher's and the student's probabilities at several temperatures."""
    has_teacher = any(example["teacher"] for example in found["examples"])
    key = [("teacher", "teacher", "block")] * has_teacher + [("student", "student", "block")]
    return {
        "heading": "What temperature shows" if has_teacher else "What the student sees",
        "T": found["T"],
        "legend": legend(key),
        "cards": [_example(example, found["temperatures"]) for example in found["examples"]],
    }


def _example(example: Mapping[str, Any], temperatures: list[float]) -> dict[str, Any]:
    panels = []
    for i, T in enumerate(temperatures):
        teacher = example["teacher"][i] if example["teacher"] else [None] * len(example["classes"])
        names = enumerate(zip(example["classes"], teacher, example["student"][i], strict=True))
        rows = [(name, p, q, k == example["true"]) for k, (name, p, q) in names]
        panels.append((T, distributions(rows, title=f"example {example['index']} at T = {T:g}")))
    answers = {"label": "label", "teacher": "teacher_says", "student": "student_says"}
    image = example["image"] or ""
    return {
        "index": example["index"],
        "why": example["why"],
        "file": example.get("file"),  # the picture's own name, where the data set knows it
        "label": example["label"],
        "answers": [(who, example[key]) for who, key in answers.items() if example[key] is not None],
        "image": image if image.startswith("data:image/png") else "",
        "panels": panels,
    }


def _mistakes(found: Mapping[str, Any]) -> Grid | None:
    """The student's most frequent mistakes, in a run without a teacher."""
    rows = [[pair["label"], pair["student"], f"{pair['count']:,}"] for pair in found["mistakes"]]
    return plain(["true class", "student says", "examples"], rows) if rows else None


def _disagreement(found: Mapping[str, Any]) -> dict[str, Any]:
    """How often teacher and student differ, who is right, and between which classes."""
    facts = found["disagreement"]
    shares = (
        ("both right", facts["both_right"], "c2"),
        ("only the teacher right", facts["teacher_right"], "teacher"),
        ("only the student right", facts["student_right"], "student"),
        ("both wrong, the same class", facts["both_wrong_alike"], "alone"),
        ("both wrong, different classes", facts["both_wrong_apart"], "c1"),
    )
    differ = facts["teacher_right"] + facts["student_right"] + facts["both_wrong_apart"]
    return {
        "share": f"{differ:,} of {facts['total']:,} test examples ({differ / facts['total']:.1%})",
        "legend": legend([(f"{name}: {count:,}", colour, "block") for name, count, colour in shares]),
        "bar": parts(shares, title="who is right"),
        "pairs": _pairs(facts["pairs"]),
        "matrix": _matrix(facts) if facts["matrix"] and differ else "",
    }


def _pairs(pairs: list[dict[str, Any]]) -> Grid | None:
    if not pairs:
        return None
    heads = ["teacher says", "student says", "count", "teacher right", "student right"]
    rows = [
        [pair["teacher"], pair["student"], *(f"{pair[k]:,}" for k in ("count", "teacher_right", "student_right"))]
        for pair in pairs
    ]
    if any(pair.get("files") for pair in pairs):
        heads.append("for example")
        rows = [[*row, ", ".join(pair.get("files") or ())] for row, pair in zip(rows, pairs, strict=True)]
    return plain(heads, rows)


def _matrix(facts: Mapping[str, Any]) -> str:
    names = facts["names"]
    cells = {
        (j, i): HeatCell(float(k), f"{k:,}" if k else "", f"teacher {names[i]}, student {names[j]}: {k:,}")
        for i, row in enumerate(facts["matrix"])
        for j, k in enumerate(row)
        if i != j
    }
    title = "disagreements of teacher and student"
    return heat_map(
        cells, columns=names, rows=names, title=title, x_label="student says", y_label="teacher says", width=460
    )


def _reliability(examples: Mapping[str, Any], run: Run) -> Figure:
    found = examples["reliability"]
    roles = [(ROLE_NAMES[role], colour, found[role]) for role, colour in COLOURS.items() if role in found]
    key = []
    for role, colour in COLOURS.items():
        if role in found:
            ece = run.test(role, "ece")
            key.append((ROLE_NAMES[role] + ("" if ece is None else f", ECE {ece:.3f}"), colour, "block"))
    chart = reliability_diagram(roles, title="reliability diagram")
    note = "On the dotted line, what is predicted with confidence p is right a share p of the time. Below it the model "
    return Figure(
        "Reliability", chart, note + "is too sure. A mark's area is its share of the test examples.", legend(key)
    )


def _files(run: Run, link: str) -> list[tuple[str, str]]:
    """The names and links of the run's files."""
    start = "" if link == "." else f"{link}/"
    names = [*(name for name in FILES if (run.path / name).is_file()), LOG]  # a sweep writes its logs after the pages
    return [(name, f"{start}{name}") for name in names]
