"""``ckdiff check``."""

from __future__ import annotations

import click

from ckdiff.cli import options
from ckdiff.cli.output import write_json, write_lines


@click.command("check")
@click.argument("store")
@options.as_json
def command(store: str, as_json: bool) -> None:
    """Verify every byte of STORE: each file against its digest, each count against its mask."""
    from ckdiff.budget import format_size
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.errors import printable
    from ckdiff.stores.maskstore import check_store

    with Reporter("checked") as reporter, compilation_noted(reporter):
        counts = check_store(store, reporter.update)
    if as_json:
        write_json(counts)
    else:
        size = format_size(counts["bytes"])
        write_lines([f"{printable(store)}: ok, {counts['objects']:,} files, {size} verified"])
