"""``ckdiff apply``."""

from __future__ import annotations

import click

from ckdiff.cli import options
from ckdiff.cli.output import write_json, write_lines


@click.command("apply")
@click.argument("base")
@click.argument("deltas", nargs=-1, required=True, metavar="DELTA...")
@click.option("-o", "out", required=True, metavar="PATH", help="Write the checkpoint there.")
@options.overwrite
@options.workers
@options.memory
@options.as_json
def command(
    base: str,
    deltas: tuple[str, ...],
    out: str,
    overwrite: bool,
    workers: int | None,
    memory: str | None,
    as_json: bool,
) -> None:
    """Rebuild a checkpoint from BASE, which may be on the hub, hf://org/name, and a delta, or
    several that follow each other.

    The files are the ones that the delta was made of, to the last byte: both what BASE holds and
    what comes out are verified, and nothing is left where either is wrong.
    """
    from ckdiff.budget import format_size
    from ckdiff.cli import formats
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.deltas.applying import apply
    from ckdiff.errors import printable

    with Reporter("rebuilt") as reporter, compilation_noted(reporter):
        made = apply(
            base,
            deltas,
            out,
            overwrite=overwrite,
            workers=workers,
            memory=memory,
            observer=reporter.observer(),
        )
    if as_json:
        write_json(made.to_dict())
        return
    took = f"in {formats.duration(made.seconds)}, {formats.rate(made.size, made.seconds)}"
    what = f"{formats.counted(made.tensors, 'tensor')}, {format_size(made.size)}"
    how = "not the tuned checkpoint: a delta is lossy" if made.lossy else "verified"
    write_lines([printable(f"{made.out}: {what}, {how}, {took}")])
