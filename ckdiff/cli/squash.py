"""``ckdiff squash``."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options
from ckdiff.cli.output import write_json, write_lines
from ckdiff.deltas.registry import VERSIONED


@click.command("squash")
@click.argument("stream")
@click.argument("first", type=click.IntRange(min=1))
@click.argument("last", type=click.IntRange(min=1))
@options.output("DELTA", "Write the version to this stream's directory, or to its own.")
@click.option(
    "--base",
    metavar="CHECKPOINT",
    help="What FIRST is made from: then they may be of any encoding.",
)
@click.option(
    "--encoding",
    type=options.Choice([*VERSIONED, "packed"]),
    help="The new one; by default what LAST has.",
)
@options.workers
@options.memory
@options.as_json
def command(stream: str, first: int, last: int, out: str, as_json: bool, **asked: Any) -> None:
    """Put versions FIRST to LAST of a stream of weight versions together into one.

    It is version LAST, made from what FIRST is made from. Without --base all of them have to be of
    one encoding, and not packed.
    """
    from ckdiff.budget import format_size
    from ckdiff.cli import formats
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.deltas.squash import squash
    from ckdiff.errors import printable

    with Reporter("merged") as reporter, compilation_noted(reporter):
        made = squash(stream, first, last, out, observer=reporter.observer(), **asked)
    if as_json:
        write_json(made.to_dict())
        return
    what = f"{formats.counted(len(made.versions), 'version')} in one"
    tensors = f"{formats.counted(made.tensors, 'tensor')}, {made.changed_bytes:,} bytes changed"
    took = f"in {formats.duration(made.seconds)}"
    write_lines([printable(f"{made.path}: {what}, {tensors}, {format_size(made.bytes)}, {took}")])
