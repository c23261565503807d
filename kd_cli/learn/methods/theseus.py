"""The teacher's modules replaced by the student's, with a probability that rises (BERT-of-Theseus)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from kd_cli.errors import ConfigError
from kd_cli.learn.batches import Batch
from kd_cli.learn.blocks import AUTO, Cut, Ends, cut_pair
from kd_cli.learn.methods.base import Method, Terms, Weights
from kd_cli.learn.methods.ramps import Ramp
from kd_cli.learn.outputs import Outputs
from kd_cli.numeric import is_number


class Theseus(Method):
    """`beta * L_hard` of a network of the student's and of the teacher's blocks; Xu et al. 2020, sections 3.1 to 3.4.

    A block is the student's with the probability `replacement`, a number or a Ramp over the training, and always from
    the share `alone` of the training on. `student_blocks` and `teacher_blocks` are the paths of the modules that the
    blocks end at, or "auto"; see `kd_cli.learn.blocks`. There is no distillation loss.
    """

    has_T = False
    has_alpha = False
    replaces_modules = True

    def __init__(
        self,
        replacement: float | Ramp = 0.5,
        alone: float = 0.5,
        student_blocks: Ends = AUTO,
        teacher_blocks: Ends = AUTO,
    ) -> None:
        super().__init__()
        if isinstance(replacement, Ramp):
            ends = (replacement.start, replacement.end)
        elif is_number(replacement):
            ends = (replacement, replacement)
        else:
            raise ConfigError(f"method.replacement is {replacement!r}; it must be a probability, or a Ramp")
        if not all(0 <= end <= 1 for end in ends):
            raise ConfigError(f"method.replacement goes from {ends[0]:g} to {ends[1]:g}; it must lie between 0 and 1")
        if max(ends) == 0:
            raise ConfigError(
                "method.replacement is 0: no block is ever the student's",
                hint="method.replacement=0.5; the paper raises it to 1",
            )
        if not is_number(alone) or not 0 <= alone <= 1:
            raise ConfigError(f"method.alone is {alone!r}; it must be a share of the training, from 0 to 1")
        if alone == 0:
            raise ConfigError(
                "method.alone is 0: the student is trained by itself from the first step on",
                hint="method=hard, or method.alone=0.5",
            )
        self.replacement, self.alone = replacement, float(alone)
        self.student_blocks, self.teacher_blocks = (
            as_ends("student", student_blocks),
            as_ends("teacher", teacher_blocks),
        )

    def probability(self, progress: float) -> float:
        """The probability that a block is the student's after the share `progress` of all steps."""
        if progress >= self.alone:
            return 1.0
        value = self.replacement
        return value(progress) if isinstance(value, Ramp) else float(value)

    def cut(self, student: nn.Module, teacher: nn.Module, images: Tensor) -> tuple[Cut, Cut]:
        pair = cut_pair(student, teacher, images, self.student_blocks, self.teacher_blocks)
        self.notes = self.describe(*pair)
        return pair

    def describe(self, student: Cut, teacher: Cut) -> list[str]:
        """Sentences on the blocks, and on how they are replaced."""
        pairs = [
            f"{theirs[0]} to {theirs[-1]} by {ours[0]} to {ours[-1]}"
            for ours, theirs in zip(student.blocks, teacher.blocks, strict=True)
        ]
        value = self.replacement
        rises = f"rises from {value.start:g} to {value.end:g}" if isinstance(value, Ramp) else f"is {value:g}"
        phases = f"with a probability that {rises} in the first {self.alone:.0%} of the training"
        said = [f"the teacher's modules are replaced by the student's {phases}: {', '.join(pairs)}"]
        if rest := [
            path for path, part in zip(student.rest, student.modules(student.rest), strict=True) if part.state_dict()
        ]:
            said.append(f"the student has the teacher's weights in {', '.join(rest)}, which are not trained")
        return said

    def forward(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        hard = self.hard_loss(student.logits, batch.labels)
        return {"loss": weights.beta * hard, "hard": hard}

    def weighted_terms(self, student: Outputs, teacher: Outputs | None, batch: Batch, weights: Weights) -> Terms:
        return {"hard": self(student, teacher, batch, weights)["loss"]}


def as_ends(role: str, ends: Ends) -> Ends:
    """The paths as strings. Raises ConfigError for anything else than a list of paths and "auto"."""
    if isinstance(ends, str):
        if ends != AUTO:
            raise ConfigError(
                f"method.{role}_blocks is {ends!r}; it must be auto, or a list of paths", hint=f"[{ends}]"
            )
        return ends
    if not isinstance(ends, Sequence) or not ends:
        raise ConfigError(f"method.{role}_blocks is {ends!r}; it must be auto, or a list of paths")
    paths = [str(path) for path in ends]  # YAML reads the path of a layer of an nn.Sequential as a number
    if len(set(paths)) < len(paths):
        raise ConfigError(f"method.{role}_blocks is {paths}; it names a module twice")
    return paths
