"""``ckdiff report``."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options


@click.command("report")
@click.argument("sources", nargs=-1, required=True, metavar="STORE|TIMELINE...")
@options.output("FILE.html", "Write the report to this file. An earlier report is replaced.")
@options.one_rule
@click.option(
    "--base",
    metavar="CHECKPOINT",
    help="The checkpoint, or hf://org/name, that the runs started from. Adds density by size of "
    "the weight, and the null magnitude.",
)
@options.key
@click.option(
    "--spectrum", metavar="FILE.json", help="Also show the output of ckdiff spectrum --json."
)
@click.option("--figures", metavar="DIR", help="Also write every picture as SVG and PDF into DIR.")
@click.option("--title", metavar="TEXT", help="The heading of the page.")
@options.memory
@options.as_json
def command(sources: tuple[str, ...], out: str, as_json: bool, **asked: Any) -> None:
    """Write one HTML file that shows what changed, where, how far, and what the runs have in
    common.

    The file needs no network and no other files: you can mail it, attach it or print it. --json
    also prints every number of the page. Needs pip install 'ckdiff[report]'.
    """
    from ckdiff.cli.output import write_json, write_lines
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.errors import printable
    from ckdiff.reports.report import report

    with Reporter("read") as reporter, compilation_noted(reporter):
        made = report(sources, out, observer=reporter.observer(), **asked)
    if as_json:
        write_json(made.to_dict())
    else:
        lines = [f"written to {printable(str(made.path))}"]
        if made.figures:
            count = len(made.figures)
            lines.append(f"{count:,} pictures in {printable(str(made.figures[0].parent))}")
        write_lines(lines)
