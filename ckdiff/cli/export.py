"""``ckdiff export``."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options
from ckdiff.cli.output import write_json, write_lines
from ckdiff.masks.exporting.registry import FORMATS

_FORMATS = ", ".join(f"{name} ({line.help})" for name, line in FORMATS.lines.items())


@click.command("export")
@click.argument("store")
@click.option(
    "--to",
    type=options.Choice(list(FORMATS)),
    help=f"The format: {_FORMATS}.",
)
@options.output("PATH", "Write the masks there.")
@click.option("--packed", is_flag=True, help="safetensors only: eight elements in a byte.")
@click.option("--invert", is_flag=True, help="Write ones for elements that did not change.")
@options.one_rule
@click.option(
    "--like",
    metavar="CHECKPOINT",
    help="Use the shards of this checkpoint, or hf://org/name.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace masks exported earlier, once the new ones are complete.",
)
@options.as_json
def command(store: str, out: str, as_json: bool, **asked: Any) -> None:
    """Write the masks of a store in a format that other tools read.

    Each file records what a one means, the rule, the store, and the checkpoints.
    """
    from ckdiff.cli import formats
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.errors import printable
    from ckdiff.masks.exporting.exporting import export_masks

    with Reporter("written") as reporter, compilation_noted(reporter):
        result = export_masks(store, out, observer=reporter.observer(), **asked)
    if as_json:
        write_json(result)
        return
    ones, elements = result["ones"], result["elements"]
    files = len(result["files"])
    write_lines(
        [
            f"{formats.extent(elements, result['tensors'])}, {result['polarity']}: "
            f"{ones:,} ones, {formats.percent(ones, elements)}",
            f"written to {printable(result['out'])}" + (f", {files} files" if files > 1 else ""),
        ]
    )
