"""Rows and pictures of reports on students that learned from each other."""

from __future__ import annotations

from kd_cli.report.chains import results, setting_prefix
from kd_cli.report.compare import Comparison
from kd_cli.report.read import Run
from kd_cli.report.svg.lines import SERIES, Point, Series
from kd_cli.statistics import Stat


def peers_of(comparison: Comparison) -> list[tuple[str, dict[str, Stat]]]:
    """For each setting with peers: those beside the first, which is the run's student, and the mean of all answers."""
    found = []
    for setting in comparison.settings:
        facts = [run.summary["peers"] for run in setting.runs if "peers" in run.summary]
        where = setting_prefix(setting, comparison)
        for k in range(1, max((len(one["peers"]) for one in facts), default=0)):
            reports = [one["peers"][k] for one in facts if len(one["peers"]) > k]
            found.append((f"{where}peer {k} ({reports[0]['name']})", results(reports)))
        if together := [one["together"] for one in facts if "together" in one]:  # earlier versions have none
            found.append((f"{where}peers together", results(together)))
    return found


def agreement_by_epoch(run: Run) -> list[Series]:
    """For each peer of a run, the share of the validation examples on which it agrees with the others, in percent."""
    members: dict[int, list[Point]] = {}
    for row in run.history.get("student", ()):
        if (share := row.get("val_agreement")) is not None:
            members.setdefault(row["member"], []).append(Point(row["epoch"], 100 * share))
    names = [f"peer {k}, {one['name']}" for k, one in enumerate(run.summary.get("peers", {}).get("peers", ()))]
    return [
        Series(names[k] if k < len(names) else f"peer {k}", points, f"c{k % SERIES}", "bare", marks=False)
        for k, points in sorted(members.items())
    ]
