"""Do clusters of the classes that a network confuses find known families of classes, as Omniglot's alphabets?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_cli.errors import ConfigError
from kd_cli.experiments.clusters import clusters
from kd_cli.experiments.recorded import completed, configuration, stored
from kd_cli.experiments.specialist_pages import families_figure
from kd_cli.experiments.specialists import families
from kd_cli.learn.specialists import covariance, families_found
from kd_cli.numeric import is_number, is_whole
from kd_cli.report.render import render
from kd_cli.runs.device_data import load_device_data
from kd_cli.storage.files import write_json, write_text
from kd_cli.storage.store import Store

NAME = "class_clusters"


def class_clusters(folder: Path, *, count: int, cluster_T: Sequence[float] | float = 1.0) -> list[Path]:
    """Cluster the classes by the predictions of each run's teacher, and compare the clusters with families of classes.

    Classes are named FAMILY-CLASS. `count` clusters come from K-means on the columns of the covariance of the teacher's
    predictions on the training part, at each of the temperatures `cluster_T` (Hinton 2015, section 5.3). Writes
    class_clusters.json and class_clusters.html into the folder. Raises ConfigError and DataError.
    """
    runs = completed(folder)
    config = configuration(runs[0])
    dataset = load_device_data(config).dataset
    known = families(dataset.class_names)
    if known is None:
        raise ConfigError(f"{dataset.name} has no families of classes: their names are not FAMILY-CLASS")
    if not is_whole(count) or not 1 < count < dataset.classes:
        raise ConfigError(f"after_sweep.count is {count!r}; it must be a whole number from 2 to {dataset.classes - 1}")
    temperatures = list(cluster_T) if isinstance(cluster_T, Sequence) else [cluster_T]
    if not temperatures or not all(is_number(T) and T > 0 for T in temperatures):
        raise ConfigError(f"after_sweep.cluster_T is {cluster_T!r}; it must be numbers above 0")
    store, tables = Store(config.store_dir), []
    for T in temperatures:
        found: list[dict[str, Any]] = []
        for run in runs:
            entry = stored(store, run.summary["teacher"]["fingerprint"], run)
            predictions = (entry.outputs()["train"] / T).softmax(1)
            groups = clusters(covariance(predictions), count, seed=configuration(run).teacher.seed)
            facts = {"seed": run.seed, "accuracy": run.test("teacher", "accuracy")}
            found.append({**facts, "groups": [list(some) for some in groups], **families_found(groups, known)})
        table = {"classes": list(dataset.class_names), "families": known, "cluster_T": T, "runs": found}
        tables.append(table)
    write_json(folder / f"{NAME}.json", tables)
    figures = [families_figure(table, f"at T = {table['cluster_T']:g}") for table in tables]
    write_text(
        folder / f"{NAME}.html", render("charts", title=f"Clusters of classes of {dataset.name}", figures=figures)
    )
    return [folder / f"{NAME}.html", folder / f"{NAME}.json"]
