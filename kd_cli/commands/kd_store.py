"""The `kd-store` command: what the store of trained models holds, and removing what is no longer used."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from kd_cli.commands.endings import short_endings
from kd_cli.commands.output import allow_any_text
from kd_cli.storage.store import Listed, Store

DAY = 24 * 3600.0
EPILOG = """examples:
  kd-store                        teachers and students alone that runs share, the least recently used first
  kd-store --unused 30            those that no run has used for 30 days
  kd-store --unused 30 --remove   remove them; a run that needs one trains it again
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of `kd-store`. After a user's mistake, prints it without a traceback and exits with 1."""
    allow_any_text()
    with short_endings():
        show(arguments(argv))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="kd-store",
        description="List the models that runs share, or remove those that are no longer used.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "store", nargs="?", type=Path, help="the store's folder; by default $KD_STORE, else ~/.cache/kd-cli"
    )
    parser.add_argument("--unused", metavar="DAYS", type=float, default=0.0, help="only what no run used for so long")
    parser.add_argument("--remove", action="store_true", help="remove what is listed, except what was used just now")
    options = parser.parse_args(argv)
    if not 0 <= options.unused < 1e6:
        parser.error(f"--unused is {options.unused:g}; it must be a number of days")
    if options.remove and "--unused" not in " ".join(sys.argv[1:] if argv is None else argv):
        parser.error("--remove needs --unused DAYS; --unused 0 removes everything")
    return options


def show(options: argparse.Namespace) -> None:
    """List or remove the entries that the options ask for."""
    from kd_cli.config.read import folder

    root = folder(str(options.store) if options.store else None, "KD_STORE", "")
    store = Store(root)
    if options.remove:
        listed = store.prune(unused=options.unused * DAY)
    else:
        listed = [one for one in store.entries() if time.time() - one.used >= options.unused * DAY]
    for one in listed:
        print(row(one))
    size = sum(one.bytes for one in listed)
    print(f"{'removed: ' if options.remove else ''}{len(listed):,} models, {size / 1e6:,.1f} MB in {root}")


def row(one: Listed) -> str:
    """One line of the listing."""
    used = time.strftime("%Y-%m-%d %H:%M", time.localtime(one.used))
    return f"{used}  {one.bytes / 1e6:9,.1f} MB  {one.kind:13}  {one.name:20}  data {one.data:8}  {one.path.name}"


if __name__ == "__main__":
    main()
