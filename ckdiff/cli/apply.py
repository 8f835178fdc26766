"""``ckdiff apply``."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options
from ckdiff.cli.output import write_json, write_lines


@click.command("apply")
@click.argument("base")
@click.argument("deltas", nargs=-1, required=True, metavar="DELTA...")
@options.output("PATH", "Write the checkpoint there: a directory, or a file if TUNED was one.")
@options.to
@options.base_version
@options.key
@options.config
@options.files
def command(base: str, deltas: tuple[str, ...], out: str, as_json: bool, **asked: Any) -> None:
    """Rebuild a checkpoint from BASE, which may be on the hub, hf://org/name, and a delta, or
    several that follow each other; or a stream of weight versions, or some of its versions.

    The files are the ones that the delta was made of, to the last byte, where these were
    safetensors; of a torch file and others the same tensors come out as one model.safetensors. Both
    what BASE holds and what comes out are verified, and nothing is left where either is wrong. A
    PATH that ends with a slash is a directory in any case. BASE's config and tokenizer files are
    copied into a directory.
    """
    from ckdiff.budget import format_size
    from ckdiff.checkpoints.pieces import told
    from ckdiff.cli import formats
    from ckdiff.cli.made import copied_too
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.deltas.apply import apply
    from ckdiff.deltas.versions.applying import AppliedVersions
    from ckdiff.errors import printable

    with Reporter("rebuilt") as reporter, compilation_noted(reporter):
        result = apply(base, deltas, out, observer=reporter.observer(told), **asked)
    if as_json:
        write_json(result.to_dict())
        return
    took = f"in {formats.duration(result.seconds)}, {formats.rate(result.size, result.seconds)}"
    what = f"{formats.counted(result.tensors, 'tensor')}, {format_size(result.size)}"
    how = "not the tuned checkpoint: a delta is lossy" if result.lossy else "verified"
    if isinstance(result, AppliedVersions):
        how = f"version {result.version}, {how}"
    line = f"{result.out}: {what}, {how}, {took}{copied_too(result.copied)}"
    write_lines([printable(line)])
