"""``ckdiff random``."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options


@click.command("random")
@click.option(
    "--like", required=True, metavar="STORE", help="The store whose tensors and counts are used."
)
@click.option(
    "--seed",
    required=True,
    type=int,
    metavar="N",
    help="Any number from 0 to 2**64 - 1: each gives another mask.",
)
@click.option(
    "--within",
    type=options.Choice(["tensor", "model"]),
    default="tensor",
    show_default=True,
    help="Keep the number of changes in each tensor, or only in the whole model.",
)
@options.from_stores
def command(like: str, out: str, as_json: bool, **asked: Any) -> None:
    """Make a random mask with exactly as many changed elements as a store has.

    It is the control for an overlap: a run that agrees no more than this mask agrees by chance. The
    same seed gives the same mask on every machine.
    """
    from ckdiff.cli.made import report
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.masks.random import random_mask

    with Reporter("drawn") as reporter, compilation_noted(reporter):
        store = random_mask(like, out, observer=reporter.observer(), **asked)
    report(store, as_json=as_json)
