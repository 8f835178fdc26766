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
    help="The base of STORE. With --tuned, also measure the energy of the update.",
)
@click.option("--tuned", metavar="CHECKPOINT", help="The tuned checkpoint of STORE.")
@options.key
@click.option(
    "--include", multiple=True, metavar="GLOB", help="Use only matrices whose names match."
)
@click.option(
    "--exclude", multiple=True, metavar="GLOB", help="Leave out matrices whose names match."
)
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
    help="How many matrices to show, the most unequal first.",
)
@options.as_json_or_csv
def command(stores: tuple[str, ...], top: int, as_json: bool, as_csv: bool, **asked: Any) -> None:
    """Print in which rows, columns and blocks of its matrices an update is.

    With several stores, also print whether their most changed rows and columns are the same. A
    tensor of more than two dimensions counts as a matrix: its first dimension by all others.
    docs/structure.md explains each number.
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
