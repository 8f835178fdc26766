"""``ckdiff principal``."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options


@click.command("principal")
@click.argument("checkpoint")
@click.option(
    "--like", required=True, metavar="STORE", help="The store whose layout the mask gets."
)
@click.option(
    "--kind",
    required=True,
    type=options.Choice(["principal", "low"]),
    help="The entries with the largest low-rank reconstruction, or those with the smallest "
    "magnitude.",
)
@click.option(
    "--alpha",
    required=True,
    type=float,
    callback=options.fraction,
    metavar="SHARE",
    help="The share of each matrix to mark, from 0 to 1.",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    metavar="K",
    help="How many singular values to keep. Default: as few as have 90 % of the energy.",
)
@options.key
@options.memory
@options.from_stores
def command(checkpoint: str, out: str, as_json: bool, **asked: Any) -> None:
    """Make a mask of the principal weights of CHECKPOINT, or of its smallest ones.

    Compare its overlap with an update to the overlap of a random mask of the same size: this shows
    where the update lands. Tensors that are not matrices have an empty mask.
    """
    from ckdiff.cli.made import report
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.runs.principal import principal

    with Reporter("made") as reporter, compilation_noted(reporter):
        store = principal(checkpoint, out, observer=reporter.observer(), **asked)
    report(store, as_json=as_json)
