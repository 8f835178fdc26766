"""``ckdiff structure``."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options


@click.command("structure")
@click.argument("stores", nargs=-1, required=True, metavar="STORE...")
@options.rule
@click.option(
    "--base",
    metavar="CHECKPOINT",
    help="The base that STORE was made from; with --tuned the energy of the update is measured.",
)
@click.option("--tuned", metavar="CHECKPOINT", help="The tuned checkpoint that STORE is of.")
@options.key
@click.option("--include", multiple=True, metavar="GLOB", help="Only matrices with such names.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="No matrices with such names.")
@click.option(
    "-o",
    "profiles",
    metavar="FILE",
    help="Also write the counts of rows and columns to this safetensors file.",
)
@options.overwrite
@options.workers
@options.memory
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    metavar="N",
    help="How many matrices to show: those whose rows or columns are the most unequal.",
)
@options.as_json_or_csv
def command(stores: tuple[str, ...], top: int, as_json: bool, as_csv: bool, **asked: Any) -> None:
    """Say where in its matrices an update is: in which rows, columns and blocks.

    Of several stores also whether their most changed rows and columns are the same ones. A tensor
    of more than two dimensions is a matrix of its first one and all others. docs/structure.md says
    what each number means.
    """
    from ckdiff.cli.output import write_json_rows, write_lines, write_rows
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.runs.structure import structure

    with Reporter("counted") as reporter, compilation_noted(reporter):
        result = structure(list(stores), observer=reporter.observer(), **asked)
    if as_json:
        write_json_rows(result.head(), result.each_row())
        return
    from ckdiff.cli import structure_text

    if as_csv:
        write_rows(structure_text.csv_lines(result))
    else:
        write_lines(structure_text.lines(result, top))
