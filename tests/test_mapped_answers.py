"""A teacher's logits that stay in their file: the same answers as from memory."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kd_cli.learn.batches import Batch
from kd_cli.learn.teachers import CachedTeacher, MappedTeacher


@pytest.fixture
def members(tmp_path: Path) -> list[torch.Tensor]:
    """Three members' logits of 50 examples and 7 classes, each mapped from a file."""
    for m in range(3):
        save_file({"train": torch.randn(50, 7) * 5}, tmp_path / f"{m}.safetensors")
    return [load_file(tmp_path / f"{m}.safetensors")["train"] for m in range(3)]


@pytest.mark.parametrize("combine", ["geometric", "arithmetic"])
@pytest.mark.parametrize("n", [1, 3])
def test_a_mapped_teacher_answers_as_one_in_memory(members, combine, n):
    rows = torch.randperm(50)[:30]
    cached = CachedTeacher(torch.stack([member[rows] for member in members[:n]]), combine=combine)
    mapped = MappedTeacher(members[:n], rows, combine=combine)
    assert mapped.depends_on_T == cached.depends_on_T
    assert mapped.needs_images is False
    T = torch.tensor([2.0, 5.0])
    for lead in (1, 2):
        index = torch.randint(30, (lead, 16))
        batch = Batch(index, index[:0], index)
        assert mapped(batch, T).logits.equal(cached(batch, T).logits)


def test_the_stores_file_is_mapped_and_not_read(tmp_path):
    mapped = Path("/proc/self/maps")
    if not mapped.exists():
        pytest.skip("what is mapped is seen in /proc")
    save_file({"train": torch.zeros(1000, 10)}, tmp_path / "outputs.safetensors")
    held = load_file(tmp_path / "outputs.safetensors")
    assert str(tmp_path / "outputs.safetensors") in mapped.read_text()
    assert held["train"].shape == (1000, 10)
