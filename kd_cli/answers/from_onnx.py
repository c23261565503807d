"""`teacher=onnx`: a model in a .onnx file, asked through ONNX Runtime on the CPU."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kd_cli.answers.base import Answers, Given, as_logits, check_kind
from kd_cli.data.normalisation import normalise
from kd_cli.data.source import Dataset, Split
from kd_cli.errors import CheckpointError, ConfigError, first_line
from kd_cli.models.renormalised import normalisation_of

BATCH = 128
OURS = "exported_with"  # of the metadata of a file that kd-export wrote


class OnnxAnswers(Answers):
    """The answers of a .onnx file with one input, images [B, *shape], and an output [B, classes]."""

    pending = "to ask"

    def __init__(self, *, checkpoint: str | None = None, output: str | None = None, kind: str = "auto") -> None:
        check_kind(kind)
        if checkpoint is None:
            raise ConfigError("teacher=onnx needs the model's file", hint="teacher.checkpoint=model.onnx")
        self.path, self.kind = Path(checkpoint).expanduser(), kind
        self.title = self.path.name
        self.session = _session(self.path)
        inputs, outputs = self.session.get_inputs(), [one.name for one in self.session.get_outputs()]
        if len(inputs) != 1:
            names = ", ".join(one.name for one in inputs)
            raise ConfigError(
                f"teacher.checkpoint={self.title} takes {len(inputs)} inputs ({names}); it must take images alone"
            )
        self.input, self.output = inputs[0], outputs[0] if output is None else output
        if self.output not in outputs:
            raise ConfigError(f"teacher.output is {output!r}, and {self.title} gives {', '.join(outputs)}")
        self.notes = [f"of the outputs of {self.title} ({', '.join(outputs)}), {self.output} is taken"] * (
            output is None and len(outputs) > 1
        )

    def facts(self) -> dict[str, Any]:
        checksum = hashlib.blake2b(self.path.read_bytes(), digest_size=16).hexdigest()
        return {"file": checksum, "output": self.output, "kind_of_answers": self.kind}

    def check(self, dataset: Dataset) -> None:
        """Ask about two examples."""
        two = Split(dataset.train.images[:2], dataset.train.labels[:2])
        self._ask(two, dataset, "data")

    def answer(self, dataset: Dataset, *, seed: int, normalize: Any) -> Given:
        where = f"teacher.checkpoint={self.title}"
        train, test = (self._ask(split, dataset, normalize) for split in (dataset.train, dataset.test))
        logits, said = as_logits(train, kind=self.kind, multilabel=dataset.multilabel, where=where)
        tested, _ = as_logits(test, kind=self.kind, multilabel=dataset.multilabel, where=where)
        notes = [*self.notes, *said]
        if self._takes_raw():
            notes.append(f"{where} normalises its input itself")
        return Given(logits, tested, tuple(notes))

    def _takes_raw(self) -> bool:
        """Whether the model takes images as the data set has them: bytes, or the floats of a student of kd-export."""
        return self.input.type == "tensor(uint8)" or OURS in self.session.get_modelmeta().custom_metadata_map

    def _ask(self, split: Split, dataset: Dataset, normalize: Any) -> Tensor:
        """What the model gives for a part, [N,C]. Raises CheckpointError if it does not take the images."""
        first = self.input.shape[0] if self.input.shape else None
        size = first if isinstance(first, int) else BATCH
        found = []
        for images in split.images.split(size):
            batch = images if self._takes_raw() else self._normalised(images, dataset, normalize)
            if isinstance(first, int) and len(batch) < first:  # a batch axis that is fixed
                batch = torch.cat([batch, batch[-1:].expand(first - len(batch), *batch.shape[1:])])
            try:
                (answers,) = self.session.run([self.output], {self.input.name: batch.numpy()})
            except Exception as error:  # the runtime's errors have no common class
                raise CheckpointError(
                    f"teacher.checkpoint={self.title} does not take the data of {dataset.name}, {batch.dtype} "
                    f"{list(batch.shape)}: it takes {self.input.type} {self.input.shape}; {first_line(error)}"
                ) from error
            if getattr(answers, "shape", None) != (len(batch), dataset.classes):
                shape = list(getattr(answers, "shape", ())) or f"a {type(answers).__name__}"
                raise CheckpointError(
                    f"teacher.checkpoint={self.title} gives {shape} as {self.output} for {len(batch)} examples of "
                    f"{dataset.classes} classes",
                    hint="teacher.output names another output; skl2onnx needs zipmap=False",
                )
            found.append(torch.from_numpy(answers)[: len(images)])
        return torch.cat(found)

    def _normalised(self, images: Tensor, dataset: Dataset, normalize: Any) -> Tensor:
        try:
            own = normalisation_of(normalize, data_mean=dataset.mean, data_std=dataset.std)
        except ValueError as error:
            raise ConfigError(f"teacher.{error}") from error
        mean, std = own or (dataset.mean, dataset.std)
        kind = torch.float64 if self.input.type == "tensor(double)" else torch.float32
        return normalise(images, mean, std, kind).to(torch.float16 if self.input.type == "tensor(float16)" else kind)


def _session(path: Path) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ConfigError(
            "teacher=onnx needs onnxruntime, which is not installed", hint="pip install 'kd-cli[export]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the runtime's errors have no common class
        raise CheckpointError(f"teacher.checkpoint={path} cannot be read as ONNX: {first_line(error)}") from error
