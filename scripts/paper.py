"""Run the paper's MNIST experiments and write docs/RESULTS.md: the paper's numbers beside ours.

    python scripts/paper.py                          # all of it, or what is missing of it: hours on a CPU
    python scripts/paper.py --only hinton_mnist      # one experiment
    python scripts/paper.py --report                 # only write the page, from the runs that are there

Each experiment is one sweep in its own folder under --out, whose teachers come from the store. What was interrupted
goes on where it stopped; what is done is not run again. Numbers are errors on the test set, mean ± standard deviation
over seeds; what the paper says is Hinton, Vinyals and Dean 2015, section 3.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import seeds

from findings import Finding, Rows, count, figure, said
from kd_cli.config.check import FORMER_LOSSES
from kd_cli.report.compare import Setting, compare, models_of
from kd_cli.report.read import Run, collect
from kd_cli.report.svg.lines import Point, Series
from kd_cli.report.words import show
from kd_cli.statistics import Stat, stat
from kd_cli.sweeps.sweep_folder import resumed_arguments

ROOT = Path(__file__).resolve().parents[1]
SEEDS = "seed=range(3)"


@dataclass(frozen=True)
class Part:
    """An experiment of the paper: its preset, what is said of it, and what makes a table of its runs."""

    name: str
    title: str
    about: str
    finding: Callable[[list[Run]], Finding]
    more: tuple[str, ...] = ()  # further words of the command; presets that sweep by themselves need none

    @property
    def command(self) -> str:
        words = ["kd-run", *(["-m"] if self.more else []), f"experiment={self.name}", *self.more]
        return " ".join(f"'{word}'" if re.search(r"[()\[\]]", word) else word for word in words)


# ---------------------------------------------------------------- numbers


def errors(runs: Iterable[Run], role: str = "student") -> Stat | None:
    """Test errors of a role, each model counted once."""
    return stat(run.test(role, "errors") for run in models_of(runs, role).values())


def seconds(runs: Iterable[Run], role: str = "student") -> str:
    found = stat(run.summary[role]["seconds"] for run in runs if run.summary.get(role))
    return f"{found.mean:,.0f}" if found is not None else "-"


def settings_of(runs: Sequence[Run]) -> Sequence[Setting]:
    return compare(runs)[0].settings if runs else ()


# ---------------------------------------------------------------- experiments


def role_errors(paper: dict[str, str]) -> Callable[[list[Run]], Finding]:
    """The table of teacher, student alone and distilled student."""

    def finding(runs: list[Run]) -> Finding:
        table = [["errors of 10,000", "paper", "ours", "n", "epochs", "seconds each"]]
        names = {"teacher": "teacher", "student_alone": "student alone", "student": "distilled student"}
        for role, name in names.items():
            some = runs[0].summary[role]
            members = some.get("members") or []
            if role == "teacher" and len(members) > 1:
                single = stat(float(one["test"]["errors"]) for one in members)
                mean = f"{sum(one['seconds'] for one in members) / len(members):,.0f}"
                table.append(["a teacher alone", "", said(single), count(single), show(members[0]["epochs"]), mean])
                name = f"the {len(members)} teachers together"
            found = errors(runs, role)
            table.append(
                [name, paper.get(role, ""), said(found), count(found), show(some["epochs"]), seconds(runs, role)]
            )
        return Finding(table)

    return finding


PRESET_NAMES = {
    "soft_and_hard": "soft targets and labels",
    "soft_only": "soft targets alone (beta = 0)",
    "without_T2": "both, without the factor T²",
    "logits_only": "logits (squared error)",
    "label_smoothing_only": "label smoothing 0.1, no teacher",
    "hard_only": "labels alone, no teacher",
}


def losses(runs: list[Run]) -> Finding:
    by_preset: dict[str, list[Run]] = {}
    for run in runs:
        former = FORMER_LOSSES.get(run.choices.get("loss", ""), "")  # of runs made before the group was renamed
        by_preset.setdefault(run.choices.get("preset", former), []).append(run)
    table = [["loss", "errors", "NLL", "n"]]
    for preset, name in PRESET_NAMES.items():
        some = by_preset.get(preset, [])
        table.append(
            [
                name,
                said(errors(some)),
                said(stat(run.test("student", "nll") for run in some), ".4f"),
                count(errors(some)),
            ]
        )
    return Finding(table)


def temperatures(runs: list[Run]) -> Finding:
    groups: dict[tuple[int, float], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.config["student.hidden"][0], float(run.config["T"])), []).append(run)
    widths: dict[int, dict[float, Stat]] = {}
    for (width, T), some in groups.items():
        if (found := errors(some)) is not None:
            widths.setdefault(width, {})[T] = found
    temperatures = sorted({T for found in widths.values() for T in found})
    table = [["units a layer", *(f"T = {T:g}" for T in temperatures), "alone"]]
    series, findings = [], []
    for k, (width, at) in enumerate(sorted(widths.items())):
        alone = errors([run for run in runs if run.config["student.hidden"][0] == width], "student_alone")
        table.append([str(width), *(said(at.get(T), ",.0f") for T in temperatures), said(alone, ",.0f")])
        points = [Point(T, s.mean, s.std) for T, s in sorted(at.items())]
        series.append(Series(f"{width} units", points, f"c{k}"))
        best = min(at, key=lambda T: at[T].mean)
        noise = at[best].std or 0.0
        alike = [f"{T:g}" for T in temperatures if T in at and at[T].mean <= at[best].mean + noise]
        findings.append(
            f"{width} units: best at T = {best:g}; within one standard deviation of it T = {', '.join(alike)}"
        )
    chart = figure(
        series,
        title="test errors against T, by width",
        x_label="temperature T (logarithmic)",
        y_label="errors of 10,000 (logarithmic)",
        log_y=True,
        x_ticks=temperatures,
    )
    length = f"After {show(runs[0].summary['student']['epochs'])} epochs, fewer than the main result's. "
    return Finding(table, length + "; ".join(findings) + ".", (("temperature_by_width", chart),))


def omitted_classes(paper: dict[str, tuple[str, str]]) -> Callable[[list[Run]], Finding]:
    names = {
        "before": "as trained",
        "corrected": "bias corrected without test data: the result",
        "oracle": "oracle: bias tuned on the test set",
    }

    def finding(runs: list[Run]) -> Finding:
        first = runs[0].summary["omitted"]
        table = [
            [
                "",
                "paper: errors",
                "of them in the classes left out",
                "ours: errors",
                "in the classes left out",
                "shift",
                "n",
            ]
        ]
        for key, name in names.items():
            results = [run.summary["omitted"][key] for run in runs]
            all_errors = stat(float(one["errors"]) for one in results)
            of_them = stat(float(one["omitted_errors"]) for one in results)
            shift = stat(float(one["shift"]) for one in results)
            table.append(
                [
                    name,
                    *paper.get(key, ("", "")),
                    said(all_errors),
                    said(of_them),
                    said(shift, ".2f"),
                    count(all_errors),
                ]
            )
        return Finding(
            table, f"{first['before']['omitted_total']:,} of the test examples are of classes that were left out."
        )

    return finding


def regulariser(runs: list[Run]) -> Finding:
    def accuracies(role: str, some: list[Run]) -> list[str]:
        kept = []
        for run in some:
            rows = run.history[role]
            epoch = max(rows, key=lambda row: (row["val_accuracy"], -row["val_nll"])) if best(run) else rows[-1]
            kept.append(100 * epoch["train_accuracy"])
        test = stat(100 * (run.test(role, "accuracy") or 0.0) for run in some)
        return [f"{said(stat(kept), '.1f')} %", f"{said(test, '.1f')} %", count(test)]

    def best(run: Run) -> bool:
        return bool(run.config["training.keep"] == "best")

    last, early = [r for r in runs if not best(r)], [r for r in runs if best(r)]
    teacher = stat(100 * (run.test("teacher", "accuracy") or 0.0) for run in runs[:1])
    return Finding(
        [
            ["3 % of the data", "paper, on speech: train", "test", "ours, on MNIST: train", "test", "n"],
            ["labels, last epoch", "", "", *accuracies("student_alone", last)],
            ["labels, best epoch by validation", "67.3 %", "44.5 %", *accuracies("student_alone", early)],
            ["soft targets, last epoch", "65.4 %", "57.0 %", *accuracies("student", last)],
        ],
        f"The teacher, which had all the data: {said(teacher, '.2f')} % of the test data right. On speech labels for "
        "all data gave 63.4 % on the training data and 58.9 % on the test data.",
    )


def ensemble(runs: list[Run]) -> Finding:
    table = [["", "errors", "n"]]
    members = stat(float(one["test"]["errors"]) for one in runs[0].summary["teacher"]["members"])
    table.append(["one teacher alone", said(members), count(members)])
    for combine in ("geometric", "arithmetic"):
        some = [run for run in runs if run.config["teacher.combine"] == combine]
        if some:
            size = len(some[0].summary["teacher"]["members"])
            table.append(
                [f"{size} teachers, {combine} mean", said(errors(some, "teacher")), count(errors(some, "teacher"))]
            )
            table.append([f"student distilled from them ({combine})", said(errors(some)), count(errors(some))])
    table.append(["student alone", said(errors(runs, "student_alone")), count(errors(runs, "student_alone"))])
    return Finding(table)


def gradient_sizes(runs: list[Run]) -> Finding:
    table = [["T", "soft term, on the logits", "times T²", "hard term, on the logits", "n"]]
    points: dict[str, list[Point]] = {"soft": [], "soft, times T²": [], "hard": []}
    for setting in settings_of(runs):
        T = float(setting.values["T"])
        ends = [run.history["student"][-1] for run in setting.runs]
        soft = stat(row["soft_gradient_logits"] for row in ends)
        scaled = stat(T**2 * row["soft_gradient_logits"] for row in ends)
        hard = stat(row["hard_gradient_logits"] for row in ends)
        table.append([f"{T:g}", said(soft, ".4f"), said(scaled, ".4f"), said(hard, ".4f"), count(soft)])
        for name, value in zip(points, (soft, scaled, hard), strict=True):
            if value is not None:
                points[name].append(Point(T, value.mean, value.std))
    series = [Series(name, found, f"c{k}") for k, (name, found) in enumerate(points.items())]
    chart = figure(
        series,
        title="sizes of the gradients on the logits against T",
        x_label="temperature T (logarithmic)",
        y_label="mean norm (logarithmic)",
        log_y=True,
        x_ticks=[p.x for p in points["hard"]],
    )
    return Finding(
        table, "After the last epoch, on the handwritten digits of scikit-learn.", (("gradient_sizes", chart),)
    )


def high_temperature(runs: list[Run]) -> Finding:
    file = runs[0].path.parent / "limit.json"
    if not file.is_file():  # the sweep has not ended
        return Finding([])
    table = [["T", "cosine of the two gradients", "distance of the two students", "n"]]
    cosines, distances = [], []
    for row in json.loads(file.read_text(encoding="utf-8")):
        cosine, distance = stat(row["gradient_cosine"]), stat(row["distance"])
        assert cosine is not None
        assert distance is not None
        table.append([f"{row['T']:g}", said(cosine, ".4f"), said(distance, ".3f"), count(cosine)])
        cosines.append(Point(row["T"], cosine.mean, cosine.std))
        distances.append(Point(row["T"], distance.mean, distance.std))
    chart = figure(
        [Series("cosine of the gradients", cosines, "c0"), Series("distance of the students", distances, "c1")],
        title="soft targets against logit matching",
        x_label="temperature T (logarithmic)",
        y_label="cosine; relative distance",
        x_ticks=[p.x for p in cosines],
    )
    return Finding(table, "On the handwritten digits of scikit-learn.", (("high_temperature_limit", chart),))


PARTS = (
    Part(
        "hinton_mnist",
        "The main result",
        "A student of 2x800 ReLU units without regularisation, distilled at T = 20 on images without jitter. The "
        "teacher's images are jittered as in the paper, and rotated, sheared and scaled: on the 3,000 validation "
        "images it made 12 errors, the teacher of the next section 20.",
        role_errors({"teacher": "67", "student_alone": "146", "student": "74"}),
        (SEEDS,),
    ),
    Part(
        "hinton_mnist_jitter",
        "The same with the paper's own augmentation",
        "The teacher's images are jittered by up to 2 pixels and nothing else. It is the teacher of all experiments "
        "but the one above and the next.",
        role_errors({"teacher": "67", "student_alone": "146", "student": "74"}),
        (SEEDS,),
    ),
    Part(
        "hinton_mnist_best",
        "Beyond the paper, with the same student",
        "The transfer set's images are distorted as the teacher's own were, and the teacher of the main result is run "
        "on them; T = 4.",
        role_errors({"teacher": "67", "student_alone": "146", "student": "74"}),
        (SEEDS,),
    ),
    Part("hinton_mnist_losses", "One student by each loss", "Shorter trainings, all alike.", losses),
    Part(
        "hinton_mnist_unlabelled",
        "Without labels",
        "The transfer set has no labels: beta has no effect, and the student is that of the soft targets alone, up to "
        "rounding, which a training amplifies.",
        role_errors({}),
        (SEEDS,),
    ),
    Part(
        "hinton_mnist_temperature",
        "Temperature by width",
        "The paper: with 300 or more units a layer every T above 8 gives about the same, with 30 units T from 2.5 to 4 "
        "is clearly best.",
        temperatures,
    ),
    Part(
        "hinton_mnist_omit3",
        "No 3 in the transfer set",
        "The teacher was trained on all digits; the student never sees a 3.",
        omitted_classes({"before": ("206", "133"), "oracle": ("109", "14")}),
        (SEEDS,),
    ),
    Part(
        "hinton_mnist_only78",
        "Only 7s and 8s in the transfer set",
        "Eight of ten digits are left out.",
        omitted_classes({"before": ("4,730", ""), "oracle": ("1,320", "")}),
        (SEEDS,),
    ),
    Part(
        "hinton_mnist_regulariser",
        "Soft targets as a regulariser",
        "The student has 3 % of the training data; its teacher had all of it.",
        regulariser,
    ),
    Part(
        "hinton_mnist_ensemble",
        "An ensemble as the teacher",
        "Ten teachers that differ in their seed alone, all trained briefly, and one student.",
        ensemble,
        (SEEDS, "teacher.combine=geometric,arithmetic"),
    ),
    Part(
        "speech",
        "Speech: ten acoustic models and one distilled from them",
        "Frames of spoken digits. The networks differ in initialisation; T is chosen by validation frames. "
        "docs/SPEECH.md says what stands for the paper's recogniser.",
        seeds.speech,
    ),
    Part(
        "speech_regulariser",
        "Speech: soft targets as a regulariser",
        "The paper's table of 3 % of the data, on frames of spoken digits: networks of 2x128 units without dropout, "
        "soft targets alone at T = 2. docs/SPEECH.md has the split by speaker.",
        seeds.speech_regulariser,
    ),
    Part(
        "specialists",
        "Specialists on the handwritten digits",
        "Three specialists beside a generalist; each class has one. docs/SPECIALISTS.md says how.",
        seeds.specialists,
    ),
    Part(
        "specialists_omniglot",
        "Specialists on Omniglot",
        "242 characters of 8 alphabets, tested on people who drew no training picture. Eight specialists; each class "
        "has one.",
        seeds.specialists,
    ),
    Part(
        "omniglot_clusters",
        "Do clusters of Omniglot's characters find the alphabets?",
        "Generalists of 2x400 units, without specialists: eight clusters of 242 characters by what each predicts on "
        "its training drawings, compared with the eight alphabets. docs/SPECIALISTS.md says more.",
        seeds.class_clusters,
    ),
    Part(
        "privileged_synthetic",
        "Privileged information: four made cases",
        "Lopez-Paz et al. 2016: the teacher sees privileged features, the student regular ones. The last case has to "
        "fail.",
        seeds.privileged_synthetic,
    ),
    Part(
        "privileged_mnist",
        "Privileged information: digits at 28x28 and 7x7 pixels",
        "300 digits to train on, for the teacher at 28x28 pixels, for the student at 7x7.",
        seeds.privileged_mnist,
    ),
    Part(
        "privileged_mnist_500",
        "Privileged information: the same with 500 digits",
        "500 digits to train on, for the teacher at 28x28 pixels, for the student at 7x7.",
        seeds.privileged_mnist,
    ),
    Part(
        "gradient_sizes",
        "Sizes of the gradients",
        "Without the factor T² the soft term fades as T grows. The table has the mean norms of both terms' gradients "
        "with weight 1, to choose alpha and beta by.",
        gradient_sizes,
    ),
    Part(
        "high_temperature_limit",
        "The limit of high temperature",
        "As T grows, soft targets approach logit matching, in the direction of the gradient and in the trained "
        "student.",
        high_temperature,
    ),
)


# ---------------------------------------------------------------- running


def main() -> None:
    args = arguments()
    parts = [part for part in PARTS if not args.only or part.name in args.only]
    todo = [] if args.report else parts
    failed = [part.name for part in todo if not run(part, args.out / part.name, args.set)]
    write_results(args.out, args.results)
    if failed:
        sys.exit(f"{', '.join(failed)}: not all runs completed; the same command goes on where it stopped")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The paper's MNIST experiments, run and reported.")
    add = parser.add_argument
    names = [part.name for part in PARTS]
    add("--out", type=Path, default=Path("paper"), help="folder of the sweeps (%(default)s)")
    add("--results", type=Path, default=ROOT / "docs" / "RESULTS.md", help="the page to write (%(default)s)")
    add("--only", nargs="+", choices=names, metavar="NAME", help="some of the experiments")
    add("--report", action="store_true", help="run nothing, write the page")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for every sweep that is begun")
    return parser.parse_args()


def run(part: Part, folder: Path, more: Sequence[str]) -> bool:
    """Run the experiment's sweep, or what is missing of it; whether all of it completed."""
    words = ["-m", f"experiment={part.name}", *part.more, *more, f"hydra.sweep.dir={folder}"]
    if folder.is_dir() and resumed_arguments(folder) is not None:
        words = [f"resume={folder}"]  # with the words it was begun with
    else:
        note_commit(folder)
    print(f"\n== {part.title}: kd-run {' '.join(words)}", flush=True)
    return subprocess.run([sys.executable, "-m", "kd_cli", *words]).returncode == 0


# ---------------------------------------------------------------- the page


def write_results(out: Path, page: Path) -> None:
    """docs/RESULTS.md and its figures, from the runs under `out`; an experiment without runs keeps its section."""
    figures = page.parent / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    head, *former = re.split(r"^(?=## )", text, flags=re.M)
    sections = {section.partition("\n")[0]: section.rstrip() + "\n" for section in former}
    for part in PARTS:
        folder, title = out / part.name, f"## {part.title}"
        runs = [run for run in collect([folder])[0] if run.status == "completed"] if folder.is_dir() else []
        found = part.finding(runs) if runs else Finding([])
        if not found.table:
            sections.setdefault(title, f"{title}\n\nNot yet run.\n")
            continue
        lines = [title, "", part.about, "", f"    {part.command}", "", markdown(found.table), ""]
        lines += [" ".join(filter(None, [found.sentence, *origin(folder, runs)])), ""]
        for name, chart in found.figures:
            (figures / f"{name}.svg").write_text(chart, encoding="utf-8")
            lines += [f"![{name.replace('_', ' ')}](figures/{name}.svg)", ""]
        sections[title] = "\n".join(lines)
    order = [f"## {part.title}" for part in PARTS]
    order += [title for title in sections if title not in order]  # of other papers, written by hand
    page.write_text("\n".join([head.rstrip() + "\n", *(sections[title] for title in order)]), encoding="utf-8")
    print(f"wrote {page}")


def commit_file(folder: Path) -> Path:
    """The file beside a sweep's folder that names the commit at which the sweep was begun."""
    return folder.with_name(f"{folder.name}.commit")


def note_commit(folder: Path) -> None:
    """Write down the commit that a sweep is about to be made at."""
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(words, capture_output=True, text=True, check=False).stdout.strip()
    if found:
        folder.parent.mkdir(parents=True, exist_ok=True)
        commit_file(folder).write_text(found + "\n", encoding="utf-8")


def origin(folder: Path, runs: Sequence[Run]) -> Iterator[str]:
    """Sentences on the commit, device, precision and version of torch that a section was made with."""
    file = commit_file(folder)
    facts = {f"{s['device']}, {s['precision']}, torch {s['versions']['torch']}" for s in (run.summary for run in runs)}
    at = f" at commit {file.read_text(encoding='utf-8').strip()}" if file.is_file() else ""
    yield f"Made{at}: {'; '.join(sorted(facts))}."


def markdown(table: Rows) -> str:
    head, *rows = table
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    main()
