"""Distilled students: those of jobs that need the same are trained together, then each job gets its results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kd_cli.config.fingerprint import fingerprint
from kd_cli.config.values import TrainSpec
from kd_cli.export.load import record_student
from kd_cli.learn.engine import Outcome
from kd_cli.learn.methods.base import is_temperature
from kd_cli.metrics import matching_shift, oracle_shift
from kd_cli.runs.auto import choice_report, choose
from kd_cli.runs.building import TrainingTask
from kd_cli.runs.chains import generations_report
from kd_cli.runs.group import Beside, Member, Stage
from kd_cli.runs.jobs import Job, alive, failing
from kd_cli.runs.latency import report_latency
from kd_cli.runs.loss_balance import small_terms
from kd_cli.runs.models import load_module, predict_module
from kd_cli.runs.peers import peers_report
from kd_cli.runs.pictures import pictures
from kd_cli.runs.pruned import pruned_note, pruned_spec
from kd_cli.runs.recipe_check import ended_early
from kd_cli.runs.stacks import report_line
from kd_cli.runs.summary import diverged_error, missed_classes, with_agreement
from kd_cli.runs.teaching import taught_by, teacher_of
from kd_cli.statistics import gap_closed
from kd_cli.storage.run_dir import SUMMARY

if TYPE_CHECKING:
    from kd_cli.runs.session import Session


def student_tasks(session: Session, job: Job) -> list[TrainingTask]:
    """The trainings of a job's student: one, or one for each setting to choose from, or one for each peer."""
    config = job.config
    beta = config.beta if session.transfer(config).labelled else 0.0
    if config.peers:
        ((T, alpha),) = config.settings()
        tasks = [TrainingTask(spec, config.method, T, alpha, beta) for spec in config.peers]
        if job.method is not None and job.method.teacher_joins:
            start = job.teacher.members[0].weights if job.teacher else None  # None while it is only checked
            tasks.append(TrainingTask(config.teacher_as_peer(), config.method, T, alpha, beta, start))
        return tasks
    spec = session.student_spec(job)
    return [TrainingTask(spec, config.method, T, alpha, beta) for T, alpha in config.settings()]


def unusual_weights(job: Job, tasks: Sequence[TrainingTask], chosen: int = 0) -> list[str]:
    """The method's sentences on weights far from published ones; of several settings, on the chosen one."""
    assert job.method is not None
    return job.method.unusual_weights(alpha=tasks[chosen].alpha, beta=tasks[chosen].beta)


def learned_temperatures(outcome: Outcome) -> list[str]:
    """A sentence for each temperature that the training learned."""
    first, last = outcome.history[0], outcome.history[-1]
    return [
        f"the temperature {name} was learned: {first[name]:.3g} in the first epoch, {last[name]:.3g} in the last"
        for name in last
        if is_temperature(name)
    ]


def title(job: Job) -> str:
    """A job's student in messages."""
    return f"student {job.config.student.title} by {job.config.method_name}"


def trained_with(beside: Beside) -> dict[str, Any] | None:
    """What a summary says of the models that were trained together with a student; None when there were none."""
    if not beside.stack and not beside.cohort:
        return None
    return {
        "in_one_stack": list(beside.stack),
        "side_by_side": list(beside.cohort),
        # bytes with the same number of threads; workers have one each, while teacher and validation have all
        "equal_to_alone": "rounding" if beside.stack or beside.workers > 1 else "bytes",
        "threads": torch.get_num_threads(),
        "at_once": beside.workers,
    }


class Distillation:
    """Students of jobs with one teacher, which is looked up or runs live for all of them, and one transfer set."""

    def __init__(self, session: Session, jobs: Sequence[Job]) -> None:
        """Jobs that have ended are among them: their students may belong to a stack that is trained."""
        self.session, self.jobs = session, jobs
        self.config = jobs[0].config
        self.transfer = session.transfer(self.config)
        self.tasks = {id(job): student_tasks(session, job) for job in jobs}

    def run(self, report_ended: Callable[[], None]) -> None:
        """Train the students; each job's results are written as soon as all its settings are trained."""
        places = [(job, k) for job in self.jobs for k in range(len(self.tasks[id(job)]))]
        outcomes: dict[int, dict[int, Outcome]] = {}

        def on_epoch(i: int, row: dict[str, Any]) -> None:
            job, k = places[i]
            if job.ended or (len(self.tasks[id(job)]) > 1 and not job.config.peers):
                return  # the chosen one's rows follow the choice
            job.directory.append_metrics([{**row, "member": k} if job.config.peers else row])

        def on_failure(i: int, error: Exception) -> None:
            with failing([places[i][0]]):
                raise error
            report_ended()

        for job in self.jobs:
            if self.session.pruning is not None and job.summary.get("status") == "pruned":
                self.session.pruning.note(job.path.name)
        members = [self.member(*place) for place in places]
        for i, outcome, beside in self.session.trainer.train(self.stage(), members, on_epoch, on_failure):
            job, k = places[i]
            job.summary["trained_with"] = trained_with(beside)
            if outcome.left is not None:
                with failing([job]):
                    self.end_pruned(job, outcome.left)
                report_ended()
                continue
            own = outcomes.setdefault(id(job), {})
            own[k] = outcome
            if len(own) == len(self.tasks[id(job)]) and not job.ended:
                del outcomes[id(job)]  # a finished student's weights are on the disk
                with failing([job]):
                    self.finish(job, [own[k] for k in sorted(own)])
                report_ended()

    def stage(self) -> Stage:
        joins = all(job.method is not None and job.method.teacher_joins for job in self.jobs)
        return Stage(
            replace(self.session.data, train=self.transfer.examples),
            "student",
            teacher=None if joins else teacher_of(self.session, alive(self.jobs)[0]),
            subject=fingerprint([taught_by(self.jobs[0].summary), self.transfer.facts]),
            diagnostics=self.config.diagnostics,
            config=self.config,
            teacher_spec=None if (teacher := alive(self.jobs)[0].taught_by) is None else teacher.spec,
            on_transfer_set=True,
            pruning=self.session.pruning,
        )

    def member(self, job: Job, k: int) -> Member:
        name = job.identity or job.path.name
        result, peers = job.path.absolute() / SUMMARY, name if job.config.peers else ""
        task = self.tasks[id(job)][k]
        return Member(f"{name} {k}", task, title(job), job.path.name, result, lambda: not job.ended, peers)

    def finish(self, job: Job, outcomes: Sequence[Outcome]) -> None:
        """Choose among the settings where there are several, test the student, write the run's files."""
        data, tasks = self.session.data, self.tasks[id(job)]
        chosen = 0 if job.config.peers else choose(outcomes)
        task, outcome = tasks[chosen], outcomes[chosen]
        spec = task.spec
        self.report_choice(job, outcomes, chosen)
        shipped = pruned_spec(spec, data.dataset)
        module = load_module(shipped, outcome.state, data, role="student")
        logits = predict_module(module, data.test)
        shift = torch.zeros(data.dataset.classes)
        if self.transfer.omitted:
            job.summary["omitted"], shift = self.correct_omitted(job, module, logits)
            logits = logits + shift
        report = self.session.model_report(spec, module, logits, outcome)
        report = {"fingerprint": self.fingerprint(job, spec, task), **report, "from_store": False}
        report["loss_balance"] = outcome.balance
        unusual = unusual_weights(job, tasks, chosen)
        early = ended_early(title(job), spec, outcome)
        lost = pruned_note(report, title(job))
        for note in (*lost, *early, *unusual, *small_terms(outcome.balance), *learned_temperatures(outcome)):
            job.note(note)
        job.summary["student"] = with_agreement(report, logits, job.teacher)
        if (sentence := missed_classes(report["test"], data.dataset)) is not None:
            job.note(sentence)
        if job.teacher is not None and job.teacher.test is not None:
            errors = (job.summary[role]["test"]["errors"] for role in ("teacher", "student_alone", "student"))
            job.summary["gap_closed"] = gap_closed(*errors)
        job.directory.write_student(outcome.state, record_student(shipped, data.dataset, shift))
        if job.config.generations > 1:
            job.summary["generations"] = generations_report(self.session, job, logits)
        if job.config.peers:
            job.summary["peers"] = peers_report(self.session, job, outcomes, shift)
        self.write_pictures(job, logits, T=task.T)
        report_latency(self.session, job, shipped, outcome.state)
        job.directory.write_summary(job.summary | {"status": "completed"})
        job.on_completed(job.path)
        job.summary["status"] = "completed"

    def end_pruned(self, job: Job, after: int) -> None:
        """Write the summary of a job whose student left its training after so many epochs: it has no result."""
        assert self.session.pruning is not None
        cause = self.session.pruning.cause(job.path.name)
        job.say(cause)
        job.summary |= {"pruned_after": after, "cause": cause}
        job.directory.write_summary(job.summary | {"status": "pruned"})
        job.summary["status"] = "pruned"

    def report_choice(self, job: Job, outcomes: Sequence[Outcome], chosen: int) -> None:
        """Log and note the setting that was chosen. Raises Diverged when its training did."""
        tasks, said = self.tasks[id(job)], title(job)
        task, outcome = tasks[chosen], outcomes[chosen]
        job.summary |= {"T": task.T, "alpha": task.alpha}
        if job.config.peers:
            said = f"{len(tasks)} peers by {job.config.method_name}, of which the first"
            outcome = next((one for one in outcomes if one.diverged is not None), outcome)
        elif len(tasks) > 1:
            job.summary["auto"] = choice_report(job.config, tasks, outcomes, chosen)
            said = f"{said} at T = {task.T:g}, alpha = {task.alpha:g}, chosen on validation data"
            job.directory.append_metrics(outcome.history)
        if outcome.diverged is not None:
            raise diverged_error("student", outcome, [job])
        job.say(report_line(said, job.config.student, outcome))

    def fingerprint(self, job: Job, spec: TrainSpec, task: TrainingTask) -> str:
        """The fingerprint of a distilled student."""
        facts = {
            "kind": "student",
            **spec.identity(self.session.data.dataset.fingerprint),
            "method": job.config.method,
            "weights": [task.T, task.alpha, task.beta],
            "teacher": job.taught_by and job.taught_by.fingerprint,
            "transfer": self.transfer.facts,
        }
        if job.config.peers:
            facts["peers"] = [peer.identity("") for peer in job.config.peers]
        return fingerprint(facts)

    def write_pictures(self, job: Job, logits: Tensor, *, T: float) -> None:
        dataset = self.session.data.dataset
        if dataset.multilabel:  # these pictures show one class for each example
            job.note("the report shows no single test examples: they have independent labels")
            return
        assert job.alone is not None
        alone = job.alone.outputs()["test"]
        said = {"student": logits, "student_alone": alone}
        job.directory.write_predictions({role: one.argmax(-1).tolist() for role, one in said.items()})
        found = pictures(
            dataset.test.images,
            dataset.test.labels,
            job.teacher.test if job.teacher else None,
            logits,
            dataset.class_names,
            alone_logits=alone,
            files=dataset.test.names or None,
            T=T,
        )
        job.directory.write_pictures(found)

    def correct_omitted(self, job: Job, module: nn.Module, logits: Tensor) -> tuple[dict[str, Any], Tensor]:
        """What leaving classes out did, and the shift of their logits that corrects it without test data."""
        dataset, classes = self.session.data.dataset, list(self.transfer.omitted)
        inside = torch.zeros(dataset.classes)
        inside[classes] = 1.0

        def tested(shift: float) -> dict[str, Any]:
            wrong = (logits + shift * inside).argmax(-1) != dataset.test.labels
            omitted = inside[dataset.test.labels].bool()
            return {
                "shift": shift,
                "errors": int(wrong.sum()),
                "omitted_errors": int(wrong[omitted].sum()),
                "omitted_total": int(omitted.sum()),
            }

        frequency = float(inside[dataset.train.labels].mean())
        on_training = predict_module(module, self.session.data.train)
        shift = matching_shift(on_training, classes, frequency=frequency)
        corrects = job.config.transfer.correct_bias
        report: dict[str, Any] = {
            "classes": [dataset.class_names[c] for c in classes],
            "before": tested(0.0),
            "corrected": tested(shift),
            "oracle": tested(oracle_shift(logits, dataset.test.labels, classes)),
            "result": "corrected" if corrects else "before",
        }
        before, corrected, oracle = (report[key]["errors"] for key in ("before", "corrected", "oracle"))
        job.say(
            f"without {', '.join(report['classes'])}: {before} errors, {corrected} after the bias correction "
            f"({oracle} with a shift tuned on the test data)"
        )
        return report, inside * (shift if corrects else 0.0)
