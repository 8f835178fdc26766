"""``python examples/paper run|check-trl|collect|report``: see each one's ``--help``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(prog="paper", description=__doc__)
    commands = out.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="do all runs that are not done yet")
    run.add_argument("--matrix", choices=("full", "small"), default="full")
    run.add_argument("--scale", choices=("tiny", "small", "large"), default="small")
    run.add_argument("--device", default="cpu", help="where to train: cpu, cuda")
    run.add_argument("--only", default="*", help="runs whose names match, and what they need")
    run.add_argument("--processes", type=int, default=2)
    run.add_argument("--list", action="store_true", help="only say which jobs there are")
    run.add_argument("--compare", type=Path, help="then hold the runs against stored results")
    one = commands.add_parser("work", help="do one job (what run starts)")
    one.add_argument("job")
    collect = commands.add_parser("collect", help="copy results and the main runs' masks")
    collect.add_argument("--to", type=Path, default=HERE / "results")
    trl = commands.add_parser("check-trl", help="four main runs again, with TRL's trainers")
    for each in (run, one, collect, trl):
        each.add_argument("--build", type=Path, default=ROOT / "build" / "paper")
    report = commands.add_parser("report", help="write the page from stored results")
    report.add_argument("--results", type=Path, default=HERE / "results")
    report.add_argument("--out", type=Path, default=ROOT / "docs")
    return out


def main() -> int:
    """Do what the command line says; 0 if all went well."""
    sys.path[0] = str(HERE.parent)  # the package's parent, so that imports say where they are from
    options = parser().parse_args()
    from paper import commands

    command = getattr(commands, options.command.replace("-", "_"))
    return int(command(options))


if __name__ == "__main__":
    sys.exit(main())
