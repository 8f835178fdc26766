"""``ckdiff graft``."""

from __future__ import annotations

import click

from ckdiff.cli import options
from ckdiff.cli.made import one_rule
from ckdiff.cli.output import write_json, write_lines


@click.command("graft")
@click.argument("base")
@click.argument("tuned")
@click.option("--mask", required=True, metavar="STORE", help="Where TUNED's elements are taken.")
@click.option("-o", "out", required=True, metavar="PATH", help="Write the checkpoint there.")
@one_rule
@options.overwrite
@options.workers
@options.memory
@options.as_json
def command(
    base: str,
    tuned: str,
    mask: str,
    out: str,
    rule: str | None,
    overwrite: bool,
    workers: int | None,
    memory: str | None,
    as_json: bool,
) -> None:
    """Write BASE with the elements of TUNED wherever a mask has ones.

    Does the subnetwork alone carry the change? Both may be on the hub, hf://org/name. The mask may
    be any store of the model: of this pair, of another run, combined or random. The output has
    BASE's files, names and headers.
    """
    from ckdiff.cli import formats
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.errors import printable
    from ckdiff.grafts.graft import graft

    with Reporter("grafted") as reporter, compilation_noted(reporter):
        made = graft(
            base,
            tuned,
            mask,
            out,
            rule=rule,
            overwrite=overwrite,
            workers=workers,
            memory=memory,
            observer=reporter.observer(),
        )
    if as_json:
        write_json(made)
        return
    grafted, elements, files = made["grafted"], made["elements"], len(made["files"])
    write_lines(
        [
            f"{formats.extent(elements, made['tensors'])}: {grafted:,} taken from tuned, "
            f"{formats.percent(grafted, elements)}; {made['differing']:,} of them differ from base",
            f"written to {printable(made['out'])}" + (f", {files} files" if files > 1 else ""),
        ]
    )
