"""``ckdiff overlap``."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options
from ckdiff.overlaps.nulls.registry import NULLS, USUAL

_MEANINGS = ", ".join(f"{line.help} ({name})" for name, line in NULLS.lines.items())


@click.command("overlap")
@click.argument("stores", nargs=-1, required=True, metavar="STORE STORE...")
@options.rule
@options.by("layer")
@click.option(
    "--null",
    "nulls",
    type=options.Choice(list(NULLS)),
    multiple=True,
    help=f"What chance means: masks spread {_MEANINGS}. Default: {USUAL[0]}. Repeatable; the first "
    "one is the headline.",
)
@click.option(
    "--base",
    metavar="CHECKPOINT",
    help="The checkpoint, or hf://org/name, that all runs started from. Needed for --null "
    "magnitude and --tuned.",
)
@click.option(
    "--tuned",
    multiple=True,
    metavar="CHECKPOINT",
    help="The tuned checkpoint of each store, in the same order. With --base: did the runs move "
    "the shared elements the same way?",
)
@options.key
@click.option(
    "--require-same-base", is_flag=True, help="Refuse stores that were made from different bases."
)
@options.scheduler
@options.workers
@options.memory
@click.option(
    "--top",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    metavar="N",
    help="How many of the strongest and of the weakest groups to show.",
)
@options.as_json_or_csv
def command(
    stores: tuple[str, ...],
    nulls: tuple[str, ...],
    base: str | None,
    *,
    top: int,
    as_json: bool,
    as_csv: bool,
    **asked: Any,
) -> None:
    """Print how much the masks of 2 to 64 stores agree, and how far beyond chance.

    The headline is the lift: shared elements / those that chance would give. For bfloat16 runs use
    --null magnitude with --base. In bfloat16, small weights flip more easily in every run, and this
    null takes that into account.
    """
    from ckdiff.cli.output import write_json_rows, write_lines, write_rows
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.overlaps.overlap import overlap

    with Reporter("compared") as reporter, compilation_noted(reporter):
        result = overlap(stores, nulls=nulls, base=base, observer=reporter.observer(), **asked)
    if as_json:
        write_json_rows(result.head(), result.each_row())
        return
    from ckdiff.cli import overlap_text

    if as_csv:
        write_rows(overlap_text.csv_lines(result))
    else:
        write_lines(overlap_text.lines(result, top))
