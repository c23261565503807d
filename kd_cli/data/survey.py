"""What one reading of stored pictures finds: what is measured of tensors by reading them several times."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from kd_cli.data.duplicates import constant, hashes
from kd_cli.data.normalisation import byte_counts
from kd_cli.data.reading_progress import ReadingProgress
from kd_cli.data.source import Split
from kd_cli.data.stored import StoredImages


class Survey:
    """Of a data set's pictures, each one's hash and whether it is constant; of those that train, how often each byte
    occurs."""

    def __init__(self, parts: Mapping[str, Split], train: Tensor | None, val: Tensor | None) -> None:
        """`parts` are as published; of the training part, the positions `train` train and `val` validate.

        Both are None where the validation part was published too.
        """
        self.parts, self.chosen = parts, {"train": train, "val": val}
        published = len(parts["train"])
        self.trains = torch.ones(published, dtype=torch.bool)
        if train is not None:
            self.trains = torch.zeros(published, dtype=torch.bool).index_fill_(0, train, True)
        self._hashes: dict[str, np.ndarray] = {}
        self._constant: dict[str, Tensor] = {}
        self.counts = torch.zeros(0)  # [C,256]

    def hashes(self, part: str) -> np.ndarray:
        """The hashes of the part `train`, `val` or `test` as it is used."""
        positions = self.chosen.get(part)
        return self._hashes[part] if positions is None else self._hashes["train"][positions.numpy()]

    def constant(self, part: str) -> Tensor:
        """Which pictures of a part as it is used are constant, bool."""
        positions = self.chosen.get(part)
        return self._constant[part] if positions is None else self._constant["train"][positions]

    def pieces(self, part: str) -> Iterator[Tensor]:
        """All pictures of a part in their order, a few megabytes at a time; they are measured on the way."""
        images = self.parts[part].images
        assert isinstance(images, StoredImages)
        known, found, same, start = images.hashes(), [], [], 0
        if part == "train":
            self.counts = torch.zeros(images.shape[1], 256, dtype=torch.int64)
        with ReadingProgress("read", f"{part} pictures", len(images)) as progress:
            for piece in images.pieces():
                yield piece
                end = start + len(piece)
                if known is None:
                    found.append(hashes(piece))
                same.append(constant(piece))
                if part == "train":
                    of_training = self.trains[start:end]
                    self.counts += byte_counts(piece if bool(of_training.all()) else piece[of_training])
                start = end
                progress.add(len(piece))
        self._hashes[part] = np.concatenate(found) if known is None else known
        self._constant[part] = torch.cat(same)
