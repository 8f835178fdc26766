"""``ckdiff spectrum``."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options


@click.command("spectrum")
@click.argument("base")
@click.argument("tuned")
@click.option("--tensors", multiple=True, metavar="GLOB", help="Only matrices with such names.")
@click.option("--exclude", multiple=True, metavar="GLOB", help="No matrices with such names.")
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
    help="Where one side has more rows, take the rows that both have.",
)
@click.option(
    "--no-unfuse",
    "unfuse",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Take fused tensors as they are stored.",
)
@click.option("--dequantize", is_flag=True, help="Take quantised tensors by their values.")
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
    help="Look at N matrices of each module and shape; by default at 3 where a model is large.",
)
@click.option("--all", is_flag=True, help="Look at all matrices, however long it takes.")
@click.option(
    "--device",
    type=options.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where singular values are computed; cuda takes torch.",
)
@options.memory
@click.option(
    "--dry-run", is_flag=True, help="Only say what would be looked at, and what it takes."
)
@options.as_json
def command(base: str, tuned: str, dry_run: bool, as_json: bool, **asked: Any) -> None:
    """Say what an update looks like as a matrix: its rank, its norm, how its energy is spread.

    The singular values of TUNED - BASE in float32, one matrix in memory at a time.
    docs/structure.md says what each number means.
    """
    from ckdiff.cli import spectrum_text
    from ckdiff.cli.output import write_json, write_json_rows, write_lines
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
    else:
        write_lines(spectrum_text.lines(result))
