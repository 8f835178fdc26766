"""``ckdiff convert``."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options
from ckdiff.cli.output import write_json, write_lines


@click.command("convert")
@click.argument("checkpoint")
@options.output("DIR", "Write the safetensors files into this directory.")
@click.option(
    "--dtype",
    type=options.Choice(["bf16", "f16", "f32"]),
    help="Round floats to this dtype. Integers and quantised weights stay as they are.",
)
@options.key
@click.option(
    "--shard-size",
    metavar="SIZE",
    default="5GB",
    show_default=True,
    help="Largest size of a file. A larger tensor gets a file of its own.",
)
@options.config
@options.files
def command(checkpoint: str, out: str, as_json: bool, **asked: Any) -> None:
    """Write any CHECKPOINT that ckdiff reads as safetensors files with an index.

    CHECKPOINT may be torch files, a directory of torch.distributed.checkpoint, per-rank files,
    safetensors in other shards, or hf://org/name. The conversion streams in bounded memory. The
    output appears only when it is complete. Config and tokenizer files beside the weights are
    copied.
    """
    from ckdiff.checkpoints.pieces import told
    from ckdiff.cli.made import wrote_checkpoint
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.conversions.convert import convert

    with Reporter("converted") as reporter, compilation_noted(reporter):
        result = convert(checkpoint, out, observer=reporter.observer(told), **asked)
    if as_json:
        write_json(result.to_dict())
        return
    from ckdiff.cli import formats

    lines = [formats.extent(result.elements, result.tensors)]
    if result.dtype is not None:
        rounded = formats.percent(result.rounded, result.elements)
        lines.append(
            f"{formats.counted(result.converted, 'tensor')} converted to {result.dtype}: "
            f"{result.rounded:,} elements rounded, {rounded}"
        )
    took = f"in {formats.duration(result.seconds)}, {formats.rate(result.size, result.seconds)}"
    lines.append(f"{wrote_checkpoint(str(result.out), result.files, result.copied)}, {took}")
    write_lines(lines)
