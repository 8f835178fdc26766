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
@options.output(
    "DELTA", "Write the version into this stream's directory, or to a directory of its own."
)
@click.option(
    "--base",
    metavar="CHECKPOINT",
    help="The checkpoint that FIRST is made from. With it, the versions may have any encoding.",
)
@click.option(
    "--encoding",
    type=options.Choice([*VERSIONED, "packed"]),
    help="The new encoding. Default: that of LAST.",
)
@options.workers
@options.memory
@options.as_json
def command(stream: str, first: int, last: int, out: str, as_json: bool, **asked: Any) -> None:
    """Merge versions FIRST to LAST of a stream of weight versions into one.

    The result is version LAST, made from what FIRST is made from. Without --base, all of them must
    have the same encoding, xor or overwrite.
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
