"""Made data with privileged features: what a teacher may see in training, and a student never does."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from kd_cli.data.source import Source
from kd_cli.errors import ConfigError
from kd_cli.numeric import is_whole

CASES = ("clean_labels", "clean_inputs", "relevant_features", "features_of_example")
RELEVANT = 3  # features that decide, in the last two cases


def privileged(
    *, data_dir: str | Path, case: str, train: int = 200, test: int = 10_000, features: int = 50, seed: int = 0
) -> Source:
    """Tables [N, features + P] of two classes: regular features first, then P privileged ones.

    The four synthetic experiments of Lopez-Paz et al. 2016, section 6, with a random hyperplane a ~ N(0, I):

    - `clean_labels`: x ~ N(0, I), privileged a'x, y = [a'x + N(0, 1) > 0];
    - `clean_inputs`: privileged u ~ N(0, I), x = u + N(0, I), y = [a'u > 0];
    - `relevant_features`: x ~ N(0, I), privileged the same 3 features of each x, y = [their part of a'x > 0];
    - `features_of_example`: other 3 features for each example, with one set of 3 weights for all examples; with the
      weights of the features themselves, as the paper's formula can be read, no linear teacher reaches its 96 %.

    Raises ConfigError.
    """
    if case not in CASES:
        raise ConfigError(f"case is {case!r}; it must be one of {', '.join(CASES)}")
    for key, value, least in (("train", train, 2), ("test", test, 2), ("features", features, RELEVANT)):
        if not is_whole(value) or value < least:
            raise ConfigError(f"{key} is {value!r}; it must be a whole number, {least} or more")
    random = torch.Generator().manual_seed(seed)
    direction = torch.randn(features, generator=random)
    inputs, labels = made(case, train + test, direction, random)
    return Source(
        name=f"privileged_{case}",
        train_images=inputs[:train],
        train_labels=labels[:train],
        test_images=inputs[train:],
        test_labels=labels[train:],
        class_names=("below", "above"),
        by_class=False,
        notes=[f"made data: {features} regular features, then {inputs.shape[1] - features} privileged ones"],
    )


def made(case: str, total: int, direction: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Regular and privileged features side by side, and the labels, of `total` examples."""
    features = len(direction)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    x = normal(total, features)
    if case == "clean_labels":
        extra = (x @ direction)[:, None]
        score = extra[:, 0] + normal(total)
    elif case == "clean_inputs":
        extra, x = x, x + normal(total, features)
        score = extra @ direction
    else:
        if case == "relevant_features":
            index = torch.randperm(features, generator=random)[:RELEVANT].expand(total, -1)
        else:
            index = torch.rand(total, features, generator=random).topk(RELEVANT, 1).indices
        extra = x.gather(1, index)
        weights = direction[index] if case == "relevant_features" else direction[:RELEVANT]
        score = (extra * weights).sum(1)
    return torch.cat([x, extra], 1), (score > 0).long()
