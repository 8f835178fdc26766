"""``ckdiff check``."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options
from ckdiff.cli.output import write_json, write_lines


@click.command("check")
@click.argument("path", metavar="STORE|DELTA|STREAM")
@click.option(
    "--base",
    metavar="CHECKPOINT",
    help="Also apply the delta or the stream to this checkpoint, in memory.",
)
@options.key
@options.to
@options.base_version
@options.workers
@options.memory
@options.as_json
def command(path: str, as_json: bool, **asked: Any) -> None:
    """Verify every byte of a mask store, a delta or a stream of weight versions.

    Of a store each file against its digest and each count against its mask; of a delta each frame
    against its digest; of a stream the chain, indexes, shards and frames, and all digests of
    versions that come after a full one, or with --base of those that begin with it.
    """
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.deltas.checking import check
    from ckdiff.errors import printable

    with Reporter("checked") as reporter, compilation_noted(reporter):
        found = check(path, observer=reporter.observer(), **asked)
    if as_json:
        write_json(found)
    else:
        write_lines([printable(f"{path}: ok, {_said(found)}")])


def _said(found: dict[str, Any]) -> str:
    from ckdiff.budget import format_size
    from ckdiff.cli.formats import counted

    size = format_size(found["bytes"])
    if "store" in found:
        return f"{found['objects']:,} files, {size} verified"
    frames = counted(found["frames"], "frame")
    if "delta" in found:
        how = "applied in memory" if found["applied"] else "verified"
        return f"{found['encoding']}, {frames}, {size} {how}"
    versions = counted(found["versions"], "weight version")
    return f"{versions}, {frames}, {size}; {found['digests']:,} of their digests verified"
