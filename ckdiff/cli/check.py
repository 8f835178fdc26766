"""``ckdiff check``."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options
from ckdiff.cli.output import write_json, write_lines, write_rows


@click.command("check")
@click.argument("path", metavar="STORE|TIMELINE|DELTA|STREAM")
@click.option(
    "--base",
    metavar="CHECKPOINT",
    help="Also apply the delta or the stream to this checkpoint, in memory.",
)
@options.key
@options.to
@options.base_version
@options.signed
@click.option(
    "--manifest",
    metavar="FILE",
    help="Write what a signature covers, of a delta or one weight version, to FILE (- for stdout).",
)
@options.workers
@options.memory
@options.as_json
def command(path: str, manifest: str | None, as_json: bool, **asked: Any) -> None:
    """Verify every byte of a mask store, a timeline, a delta or a stream of weight versions.

    A store: each file against its digest, and each count against its mask. A timeline: the store of
    each step, and the first moves against the masks. A delta: each frame against its digest. A
    stream: the chain, indexes, shards and frames, and the digests of the versions after a full one.
    With --base, all digests.

    `--manifest FILE` writes the SHA-256 of every file, for signing with `ssh-keygen -Y sign -n
    ckdiff -f KEY FILE` or another tool. Each version of a stream is signed separately.
    """
    if manifest == "-" and as_json:
        raise click.UsageError("--manifest - and --json both print to stdout: name a file")
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.deltas.checking import check
    from ckdiff.deltas.signing.manifest import covered
    from ckdiff.deltas.signing.verifying import write_manifest
    from ckdiff.errors import printable
    from ckdiff.runs.timelines.file import is_timeline

    if is_timeline(path):
        _check_timeline(path, {"manifest": manifest, **asked}, as_json=as_json)
        return
    if manifest is not None:
        covered(path)
    with Reporter("checked") as reporter, compilation_noted(reporter):
        to_file = None if manifest == "-" else manifest
        found = check(path, manifest=to_file, observer=reporter.observer(), **asked)
    if manifest == "-":
        write_rows(write_manifest(path, None).decode().splitlines())
    elif as_json:
        write_json(found)
    else:
        write_lines([printable(f"{path}: ok, {_said(found)}{_signed(found)}")])


def _check_timeline(path: str, asked: dict[str, Any], *, as_json: bool) -> None:
    """Verify a timeline, which is of nothing else and takes no options."""
    import time

    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.errors import UsageError, printable
    from ckdiff.options import Progress
    from ckdiff.runs.timelines.check import check_timeline

    given = [name for name, value in asked.items() if value is not None]
    if given := [name for name in given if name not in ("workers", "memory")]:
        option = "to" if given[0] == "target" else given[0].replace("_", "-")
        raise UsageError(f"--{option} does not go with a timeline")
    began = time.perf_counter()
    with Reporter("checked") as reporter, compilation_noted(reporter):
        observer = reporter.observer()

        def progress(done: int, total: int) -> None:
            observer.progress(Progress(done, total, time.perf_counter() - began, 0))

        found = check_timeline(path, progress)
    if as_json:
        write_json(found)
    else:
        write_lines([printable(f"{path}: ok, {_said(found)}")])


def _said(found: dict[str, Any]) -> str:
    from ckdiff.budget import format_size
    from ckdiff.cli.formats import counted

    size = format_size(found["bytes"])
    if "store" in found or "timeline" in found:
        return f"{found['objects']:,} files, {size} verified"
    frames = counted(found["frames"], "frame")
    if "delta" in found:
        how = "applied in memory" if found["applied"] else "verified"
        return f"{found['encoding']}, {frames}, {size} {how}"
    versions = counted(found["versions"], "weight version")
    return f"{versions}, {frames}, {size}; {found['digests']:,} of their digests verified"


def _signed(found: dict[str, Any]) -> str:
    if "signed_by" not in found:
        return ""
    return f"; signed by {', '.join(dict.fromkeys(found['signed_by'].values()))}"
