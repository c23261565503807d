"""Jobs on one data set, device and store: teachers, then students alone, then distilled students."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kd_cli.config.fingerprint import fingerprint
from kd_cli.config.values import Node, RunConfig, TrainSpec
from kd_cli.errors import ConfigError
from kd_cli.learn.augment import Augment
from kd_cli.learn.engine import Outcome
from kd_cli.runs.advice import advice
from kd_cli.runs.answering import check_answering, is_answers
from kd_cli.runs.building import check_recipe
from kd_cli.runs.chains import check_chain, obtain_assistants
from kd_cli.runs.checkpoints import Checkpoints
from kd_cli.runs.device_data import DeviceData
from kd_cli.runs.distil import Distillation, student_tasks, unusual_weights
from kd_cli.runs.extended import extended_spec
from kd_cli.runs.jobs import Job, alive, failing, grouped
from kd_cli.runs.method_check import check_method
from kd_cli.runs.model_notes import quantised_notes
from kd_cli.runs.models import check_shape, forward_flops
from kd_cli.runs.pruned import check_pruned_run, check_pruning, pruned_report
from kd_cli.runs.recipe_check import check_together, check_training
from kd_cli.runs.several import Leader, check_divided
from kd_cli.runs.stacks import Trainer
from kd_cli.runs.summary import Report, ensemble_report, first_summary, results_on_test, validation, with_agreement
from kd_cli.runs.teaching import taught_by, way_of_teaching
from kd_cli.runs.trained_once import Ensemble, Shared, Wanted, wanted_alone, wanted_answers, wanted_teacher
from kd_cli.runs.transfer import TransferSet, transfer_set
from kd_cli.runs.transfer import key_of as transfer_key
from kd_cli.runs.trial_pruning import TrialPruning
from kd_cli.runs.unstacked import log_unstacked
from kd_cli.storage.store import Store


class Session:
    """Jobs on one data set, device and store, and what they share."""

    def __init__(
        self,
        data: DeviceData,
        store: Store,
        checkpoints: Checkpoints,
        leader: Leader | None = None,
        pruning: TrialPruning | None = None,
    ) -> None:
        self.data, self.store, self.leader, self.pruning = data, store, leader, pruning
        self.trainer = Trainer(checkpoints, store.root / "stack-sizes.json", leader)
        self.transfers: dict[str, TransferSet] = {}
        self.user_weights: dict[str, Wanted] = {}
        self.answers: dict[str, Wanted] = {}  # teachers that are no networks
        self.checked: set[tuple[str, str]] = set()  # fingerprints of models that take the data, and of sound recipes
        self.method_notes: dict[str, Sequence[str]] = {}  # of methods that were tried, by their fingerprint
        self.extended: dict[str, Node] = {}  # the models of students that their methods add parts to
        self.ensembles: dict[str, tuple[Ensemble, Report]] = {}
        self.flops: dict[str, int] = {}
        self.latencies: dict[str, Report] = {}  # of the models of a run, by their architectures
        self.shape_notes: dict[tuple[str, str], list[str]] = {}  # of models that take the data
        self.shown: set[str] = set()  # notes that have been on the terminal

    def run(self, jobs: Sequence[Job], report_ended: Callable[[], None]) -> None:
        """Run the jobs, those that need the same together; `report_ended` is called when some may have ended.

        Jobs that an earlier process finished are among them: their students may belong to a stack that is trained.
        """
        opened = [job for job in jobs if job.method is not None]
        for job in alive(opened):
            with failing([job]):
                self.prepare(job)
        report_ended()
        self.teachers([job for job in opened if job.needs_teacher])
        report_ended()
        obtain_assistants(self, [job for job in opened if job.needs_teacher])
        report_ended()
        self.students_alone(opened)
        report_ended()

        def same_examples(job: Job) -> Hashable:
            teacher = taught_by(job.summary)
            way = teacher and way_of_teaching(job)
            return teacher, transfer_key(job.config), job.config.diagnostics, way

        ready = [job for job in opened if job.summary.get("student_alone")]
        log_unstacked(self, ready)
        for group in grouped(ready, same_examples):
            with failing(group):
                if alive(group):
                    Distillation(self, group).run(report_ended)

    def prepare(self, job: Job) -> None:
        """Check what is trained for a job before anything is, and begin its summary."""
        self.check_models(job)
        data, transfer = self.data.dataset, self.transfer(job.config)
        tasks = student_tasks(self, job)
        assert job.method is not None
        for task in tasks:
            job.method.check_temperature(task.T)
        unusual = unusual_weights(job, tasks) if len(tasks) == 1 else ()  # else of the setting that is chosen
        for sentence in (
            *data.notes,
            *transfer.notes,
            *quantised_notes(job.config.student),
            *advice(job.config.student, data),
            *unusual,
        ):
            self.note(job, sentence)
        check_together(job.config, labelled=transfer.labelled)
        if not transfer.labelled:
            self.check_unlabelled(job)
        job.summary = first_summary(job, self.data, transfer)
        if self.leader is not None:
            for sentence in check_divided(job.config, data, self.leader.size, examples=len(transfer.examples)):
                self.note(job, sentence)
            job.summary["processes"] = self.leader.size

    def note(self, job: Job, sentence: str) -> None:
        """Add a note to a job; one that several jobs have is shown on the terminal once."""
        job.note(sentence, shown=sentence not in self.shown)
        self.shown.add(sentence)

    def check_models(self, job: Job) -> None:
        """ConfigError when a model does not take the data or its training cannot be built; each is tried once."""
        config, method = job.config, job.method
        assert method is not None
        check_chain(config, method)
        check_pruned_run(config, method)
        roles = [("student", spec) for spec in config.peers or [config.student]]
        roles += [("assistant", spec) for spec in config.chain]
        if job.needs_teacher and is_answers(config.teacher):
            check_answering(config, method, augmented=Augment(**config.student.augment).enabled)
            wanted_answers(self, config)
        elif job.needs_teacher:
            roles.append(("teacher", config.teacher))
        for role, spec in roles:
            trained = role != "teacher" or config.checkpoint is None
            model = (role, fingerprint([spec.model, spec.normalize, spec.input, spec.prune, trained]))
            recipe = (role, fingerprint([spec.optimizer, spec.schedule, spec.augment]))
            if model not in self.checked:
                notes = check_shape(spec, self.data.dataset, role=role, trained=trained)
                self.shape_notes[model] = [*notes, *check_pruning(spec, self.data.dataset)]
            for sentence in self.shape_notes[model]:
                self.note(job, sentence)
            if recipe not in self.checked:
                check_recipe(spec, role)
            for sentence in check_training(spec, self.data.dataset, role):
                self.note(job, sentence)
            self.checked |= {model, recipe}
        for sentence in self.try_method(job):
            self.note(job, sentence)

    def try_method(self, job: Job) -> list[str]:
        """Try the method on each pair of a teacher and its student; the notes on all of them. Raises ConfigError."""
        notes: list[str] = []
        examples, peers = len(self.transfer(job.config).examples), [spec.model for spec in job.config.peers]
        for link in job.config.links():
            models = [(spec.model, spec.input) for spec in (link.student, link.teacher)]
            weighted = link.student.recipe.get("class_weights")
            pair = fingerprint([link.method, models, link.members, examples, peers, weighted])
            if pair not in self.method_notes:
                spec = link.student if job.config.chain else self.student_spec(job)
                try:
                    self.method_notes[pair] = check_method(link, self.data, spec, examples=examples)
                except ConfigError as error:
                    if not job.config.chain:
                        raise
                    where = f"from {link.teacher.title} to {link.student.title}"
                    raise ConfigError(f"{where}: {error.message}", hint=error.hint) from error
            notes += self.method_notes[pair]
        return notes

    def student_spec(self, job: Job) -> TrainSpec:
        """The student as the run distils and ships it: that of the configuration, or what the method makes of it."""
        config, method = job.config, job.method
        assert method is not None
        if not method.extends_student:
            return config.student
        if config.student.quantised:
            raise ConfigError(
                f"method={config.method_name} adds parts to the student, which student.quantise=int8 does not know",
                hint="student.quantise=null; kd-export --int8 quantises the trained student",
            )
        key = fingerprint([config.method, config.student.model, config.teacher.model, config.teacher.normalize])
        if key not in self.extended:
            self.extended[key] = extended_spec(config, method, self.data).model
        return replace(config.student, name=config.student.title, model=self.extended[key])

    def check_unlabelled(self, job: Job) -> None:
        """Note what missing labels mean; ConfigError for a method that has then nothing to learn from."""
        assert job.method is not None
        if job.method.needs_labels:
            raise ConfigError(
                f"method={job.config.method_name} learns from labels, and the transfer set has none",
                hint="method=soft_targets or method=logits",
            )
        if job.config.beta > 0:
            self.note(job, f"the transfer set has no labels: beta = {job.config.beta:g} has no effect")

    def transfer(self, config: RunConfig) -> TransferSet:
        """The transfer set of a run; runs with the same one share it."""
        key = transfer_key(config)
        if key not in self.transfers:
            self.transfers[key] = transfer_set(config, self.data)
        return self.transfers[key]

    def teachers(self, jobs: Sequence[Job]) -> None:
        """Give each job that has not ended its teacher."""
        for job, entries, from_store in Shared(self, jobs, wanted_teacher, "teacher").obtain():
            teacher = Ensemble(entries, job.config.combine, job.config.teacher)
            if teacher.fingerprint not in self.ensembles:
                report = ensemble_report(teacher, self.data.dataset)
                self.ensembles[teacher.fingerprint] = teacher, report
            job.teacher, report = self.ensembles[teacher.fingerprint]
            job.taught_by = job.teacher
            job.summary["teacher"] = {**report, "from_store": from_store}

    def students_alone(self, jobs: Sequence[Job]) -> None:
        """Give each job that has not ended its student trained without a teacher."""
        for job, entries, from_store in Shared(self, jobs, wanted_alone, "student_alone").obtain():
            entry = job.alone = entries[0]
            job.peers_alone = entries if job.config.peers else ()
            report = {"fingerprint": entry.fingerprint, **entry.report, "from_store": from_store}
            job.summary["student_alone"] = with_agreement(report, entry.outputs()["test"], job.teacher)

    def model_report(self, spec: TrainSpec, module: torch.nn.Module, logits: Tensor, outcome: Outcome | None) -> Report:
        """What a summary says of a trained model; `outcome` is None for weights that the user brought."""
        key = fingerprint([spec.model, spec.prune])
        pruned = None if spec.prune is None else pruned_report(spec, self.data.dataset, module.state_dict())
        if key not in self.flops:
            self.flops[key] = forward_flops(module, self.data.test.first(1)[0])
        return {
            "name": spec.title,
            "parameters": sum(p.numel() for p in module.parameters()),
            "flops": self.flops[key],
            "epochs": len(outcome.history) if outcome else None,
            "seconds": round(outcome.seconds, 3) if outcome else 0.0,
            "val": validation(outcome) if outcome else None,
            "test": results_on_test(logits, self.data.dataset),
            **({} if pruned is None else {"pruned": pruned}),
        }
