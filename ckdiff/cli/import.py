"""``ckdiff import``. Named like its command, which is how it is found; nothing else imports it."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options


@click.command("import")
@click.argument("file")
@options.new_store
@click.option(
    "--rule",
    metavar="RULE",
    help="The rule to store the mask under. Default: what the file says, or exact.",
)
@click.option("--invert", is_flag=True, help="A one in the file means frozen, not changed.")
@click.option(
    "--base",
    metavar="CHECKPOINT",
    help="The checkpoint, or hf://org/name, that the masks are for. Its dtypes, shapes and hashes "
    "are stored.",
)
@options.key
@options.overwrite
@options.as_json
def command(file: str, out: str, as_json: bool, **asked: Any) -> None:
    """Make a mask store from masks of other tools: safetensors, npz or torch. FILE may also be one
    version of a stream, STREAM/weight_v000007.

    Masks are bool or uint8 tensors of 0 and 1, or positions of ones called NAME.indices.
    """
    from ckdiff.cli.made import report
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.deltas.importing import import_masks

    with Reporter("imported") as reporter, compilation_noted(reporter):
        store = import_masks(file, out, observer=reporter.observer(), **asked)
    report(store, as_json=as_json)
