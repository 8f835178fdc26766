"""``ckdiff spectrum``."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options


@click.command("spectrum")
@click.argument("base")
@click.argument("tuned")
@click.option(
    "--tensors", multiple=True, metavar="GLOB", help="Use only matrices whose names match."
)
@click.option(
    "--exclude", multiple=True, metavar="GLOB", help="Leave out matrices whose names match."
)
@click.option(
    "--rename",
    multiple=True,
    metavar="REGEX=REPL",
    help="Rename tensors of TUNED, as in diff. Repeatable.",
)
@options.key
@click.option(
    "--common-rows",
    is_flag=True,
    help="If one side has more rows, use the rows that both have.",
)
@click.option(
    "--no-unfuse",
    "unfuse",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Use fused tensors as they are stored.",
)
@click.option("--dequantize", is_flag=True, help="Use the values of quantised tensors.")
@click.option(
    "--angles",
    type=click.IntRange(min=1),
    metavar="K",
    help="Also decompose both sides: spectral shift, and K principal angles. Takes several times "
    "as long.",
)
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    metavar="N",
    help="Look at N matrices of each module and shape. Default: all, or 3 in a large model.",
)
@click.option("--all", is_flag=True, help="Look at all matrices, however long it takes.")
@click.option(
    "--device",
    type=options.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where to compute singular values. cuda needs torch.",
)
@options.memory
@click.option("--dry-run", is_flag=True, help="Print what a run would look at and need, and stop.")
@options.as_json_or_csv
def command(
    base: str, tuned: str, *, dry_run: bool, as_json: bool, as_csv: bool, **asked: Any
) -> None:
    """Print what an update looks like as a matrix: its rank, its norm, how its energy is spread.

    Computes the singular values of TUNED - BASE in float32, with one matrix in memory at a time.
    docs/structure.md explains each number.
    """
    from ckdiff.cli import spectrum_text
    from ckdiff.cli.output import write_json, write_json_rows, write_lines, write_rows
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.runs.spectra.plan import Options, plan
    from ckdiff.runs.spectrum import run

    with (
        Reporter("decomposed") as reporter,
        compilation_noted(reporter),
        plan(base, tuned, Options(**asked)) as planned,
    ):
        if dry_run:
            estimate = planned.estimate()
            write_json(estimate) if as_json else write_lines(spectrum_text.planned(estimate))
            return
        result = run(planned, reporter.observer())
    if as_json:
        found = result.to_dict()
        write_json_rows(found, found.pop("rows"))
    elif as_csv:
        write_rows(spectrum_text.csv_lines(result))
    else:
        write_lines(spectrum_text.lines(result))
