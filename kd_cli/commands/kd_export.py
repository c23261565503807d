"""The `kd-export` command: the student of a run as files that are shipped."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_cli.commands import cores
from kd_cli.commands.endings import short_endings
from kd_cli.commands.output import allow_any_text

COLUMNS = ("per second", "bytes", "memory", "MFLOPs", "parameters")
EPILOG = """examples:
  kd-export outputs/2026-11-21/10-00-00 --onnx            export/student.onnx in the run's folder
  kd-export outputs/2026-11-21/10-00-00 --onnx --pt2 --to shipped
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `kd-export`. After a user's mistake, prints it without a traceback and exits with 1."""
    allow_any_text()
    options = arguments(argv)
    if "torch" not in sys.modules:  # which reads them when it is imported
        cores.share(os.environ)
    sys.path.append(os.getcwd())  # a user's own models and data sets
    with short_endings():
        from kd_cli.export.ship import ship

        forms = [form for form in ("onnx", "pt2", "int8") if vars(options)[form]]
        to = options.to or options.run / "export"
        record = ship(options.run, to, forms, teacher=options.teacher, trust=options.trust, cost=not options.no_cost)
        print("\n\n".join([table(record), *([cost_table(record["cost"])] if "cost" in record else [])]))
        for note in record.get("notes", []):
            print(f"\n{note}")
        if to.resolve() == (options.run / "export").resolve():
            from kd_cli.report.pages import write_run_page

            write_run_page(options.run)  # with the picture of errors against latency
        print(f"\nwritten to {os.path.relpath(to)}")


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="kd-export",
        description="Export the student of a run; each form is compared with it on the whole test set.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN_DIR", type=Path, help="the directory of a completed run")
    parser.add_argument("--to", metavar="DIR", type=Path, help="where to write; by default export/ in the run's folder")
    parser.add_argument(
        "--onnx", action="store_true", help="student.onnx, for ONNX Runtime (pip install 'kd-cli[export]')"
    )
    parser.add_argument("--int8", action="store_true", help="student.int8.onnx, with weights of 8 bits")
    parser.add_argument("--pt2", action="store_true", help="student.pt2, for torch.export.load")
    parser.add_argument("--teacher", action="store_true", help="export the run's teacher, which the store must hold")
    parser.add_argument("--no-cost", action="store_true", help="measure no latency and no memory")
    parser.add_argument("--trust", action="store_true", help="import and run the run's own models and data sets")
    options = parser.parse_args(argv)
    if not (options.onnx or options.int8 or options.pt2):
        parser.error("choose at least one form: --onnx, --int8, --pt2")
    return options


def table(record: dict[str, Any]) -> str:
    """The student and its exported forms on the test set, a line each."""
    lines = [f"{'':18}{'errors':>12}{'NLL':>9}{'ECE':>9}{'agrees':>9}{'largest diff.':>15}{'bytes':>13}"]
    for name, row in (("PyTorch", record[record["role"]]), *record["forms"].items()):
        size = f"{row['bytes']:,}" if "bytes" in row else ""
        lines.append(
            f"{row.get('file', name):18}{row['errors']:>5} of {row['total']:<4}{row['nll']:>8.4f}{row['ece']:>9.4f}"
            f"{row['agreement']:>9.2%}{row['largest_difference']:>15.2g}{size:>13}"
        )
    return "\n".join(lines)


def cost_table(cost: dict[str, Any]) -> str:
    """What every model costs: a line each, a column for each batch size and number of threads."""
    from kd_cli.report.cost import latencies, sizes

    first = next(iter(cost["rows"].values()))["latency"]
    heads = [f"{one['batch']} on {one['threads']}" for one in first]
    lines = [
        "milliseconds, median (95th percentile), of so many examples at once on so many threads; examples per second "
        f"with {first[-1]['batch']} on {first[-1]['threads']}; peak memory with {cost['memory_batch']}",
        f"{'':9}" + "".join(f"{head:>18}" for head in heads) + "".join(f"{head:>13}" for head in COLUMNS),
    ]
    for name, row in cost["rows"].items():
        times = "".join(f"{span:>18}" for span in latencies(row))
        rate, size, memory, *rest = sizes(row)
        cells = (rate, size, f"{memory} MiB" if memory else "", *rest)
        lines.append(f"{name:9}{times}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
