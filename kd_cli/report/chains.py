"""Rows of the tables on chains: the models between teacher and student, and generations of one model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kd_cli.report.compare import MEASURES, Comparison, Setting
from kd_cli.report.words import label, name_of, show
from kd_cli.statistics import Stat, stat


def assistants(comparison: Comparison) -> list[tuple[str, dict[str, Stat]]]:
    """The distinct models between teacher and student of the settings, with the results of each over its seeds."""
    groups: dict[tuple[int, frozenset[str]], tuple[list[Setting], dict[str, Any]]] = {}
    for setting in comparison.settings:
        for k in range(max((len(run.summary.get("chain", ())) for run in setting.runs), default=0)):
            chains = [run.summary.get("chain", ()) for run in setting.runs]
            models = {chain[k]["fingerprint"]: chain[k] for chain in chains if len(chain) > k}
            groups.setdefault((k, frozenset(models)), ([], models))[0].append(setting)
    rows = []
    for (k, _), (settings, models) in sorted(groups.items(), key=lambda item: item[0][0]):
        name = next(iter(models.values()))["name"]
        rivals = sum(place == k for place, _ in groups)
        which = f" ({_common(settings, comparison)})" if rivals > 1 else ""
        rows.append((f"{link_name(settings[0].runs[0].summary, k)} {name}{which}", results(models.values())))
    return rows


def together(comparison: Comparison) -> list[tuple[str, dict[str, Stat]]]:
    """The ensembles of each setting's generations, where it has several."""
    found = []
    for setting in comparison.settings:
        reports = [run.summary["generations"] for run in setting.runs if "generations" in run.summary]
        if reports:
            found.append((f"{setting_prefix(setting, comparison)}generations together", results(reports)))
    return found


def setting_prefix(setting: Setting, comparison: Comparison) -> str:
    """A setting's name before that of one of its models; nothing where there is no other setting."""
    return f"{name_of(setting, comparison)}: " if len(comparison.settings) > 1 else ""


def link_name(summary: Mapping[str, Any], k: int) -> str:
    """What the model `k` of a chain is called: assistant 1, or generation 1."""
    return f"{'generation' if 'generations' in summary else 'assistant'} {k + 1}"


def _common(settings: list[Setting], comparison: Comparison) -> str:
    """The values that the settings have in common, of the keys that distinguish settings."""
    first = settings[0].values
    same = (key for key in comparison.naming_keys if len({show(s.values[key]) for s in settings}) == 1)
    return label({key: first[key] for key in same})


def results(reports: Iterable[Mapping[str, Any]]) -> dict[str, Stat]:
    """The test results of several models of one kind, from their reports in summaries."""
    found = list(reports)
    values = {m: [r["test"][m] for r in found if r["test"].get(m) is not None] for m in MEASURES}
    return {m: known for m, column in values.items() if (known := stat(column)) is not None}
