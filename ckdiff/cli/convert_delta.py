"""``ckdiff convert-delta``."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options
from ckdiff.cli.output import write_json, write_lines
from ckdiff.deltas.registry import ENCODINGS, VERSIONED


@click.command("convert-delta")
@click.argument("delta")
@options.output("DELTA", "Write the delta to this file, or the version to this stream's directory.")
@click.option("--base", required=True, metavar="CHECKPOINT", help="What the delta was made from.")
@click.option(
    "--encoding",
    type=options.Choice([*ENCODINGS, *VERSIONED]),
    required=True,
    help="The new encoding.",
)
@options.key
@options.as_version
@options.versions
@options.files
def command(delta: str, out: str, as_json: bool, **asked: Any) -> None:
    """Write a delta in another encoding. DELTA is a file, or one version of a stream.

    The checkpoint that it rebuilds is verified; it needs room beside the output meanwhile.
    """
    from ckdiff.budget import format_size
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.deltas.conversion import convert_delta
    from ckdiff.deltas.outcome import DeltaResult
    from ckdiff.errors import printable

    with Reporter("converted") as reporter, compilation_noted(reporter):
        made = convert_delta(delta, out, observer=reporter.observer(), **asked)
    if as_json:
        write_json(made.to_dict())
        return
    if isinstance(made, DeltaResult):
        where, size = made.out, made.size
    else:
        where, size = made.path, made.bytes
    write_lines([printable(f"{where}: {format_size(size)}")])
