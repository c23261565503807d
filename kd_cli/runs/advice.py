"""What a run advises before it trains."""

from __future__ import annotations

from kd_cli.config.moved import current_name
from kd_cli.config.values import TrainSpec
from kd_cli.data.source import Dataset

MLP = "kd_cli.models.mlp.mlp"
PHOTOGRAPH = 32  # pixels per side from which colour pictures are hard for an MLP


def advice(student: TrainSpec, dataset: Dataset) -> list[str]:
    """A sentence for each choice that is known to serve the data badly."""
    shape, is_mlp = dataset.shape, current_name(str(student.model["_target_"])) == MLP
    if is_mlp and len(shape) == 3 and shape[0] == 3 and min(shape[1:]) >= PHOTOGRAPH:
        return [
            f"the student {student.name} is an MLP, which does not know that pixels have neighbours; for colour "
            f"pictures of {shape[1]}x{shape[2]} pixels try teacher=cnn student=cnn, or teacher=torchvision "
            "student=torchvision"
        ]
    return []
