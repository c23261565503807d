"""Clusters of classes that a network confuses: K-means on the columns of a covariance matrix."""

from __future__ import annotations

import importlib
from types import ModuleType

from torch import Tensor

from kd_cli.errors import ConfigError


def import_cluster() -> ModuleType:
    """scikit-learn's clustering. Raises ConfigError that names the extra where it is missing."""
    try:
        return importlib.import_module("sklearn.cluster")
    except ImportError as error:
        raise ConfigError(
            "clusters of classes need scikit-learn, which is not installed", hint="pip install 'kd-cli[sklearn]'"
        ) from error


def clusters(covariance: Tensor, count: int, *, size: int | None = None, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """`count` sets of classes from the columns of a covariance matrix [C,C], ascending each.

    The clusters of K-means (the best of ten starts), which share no class; with `size`, for each centre the classes of
    the `size` nearest columns: sets of one size, which may overlap and leave classes out.
    """
    columns = covariance.T.double().numpy()
    found = import_cluster().KMeans(count, n_init=10, random_state=seed).fit(columns)
    if size is None:
        return tuple(tuple((found.labels_ == k).nonzero()[0].tolist()) for k in range(count))
    return tuple(
        tuple(sorted(distances.argsort(kind="stable")[:size].tolist())) for distances in found.transform(columns).T
    )
