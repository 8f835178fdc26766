"""``ckdiff graft``."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options
from ckdiff.cli.output import write_json, write_lines


@click.command("graft")
@click.argument("base")
@click.argument("tuned")
@click.option(
    "--mask",
    required=True,
    metavar="STORE",
    help="The mask store. Where it has ones, elements come from TUNED.",
)
@options.output("PATH", "Write the checkpoint there: a directory, or a file if BASE is one.")
@options.one_rule
@click.option(
    "--no-unfuse",
    "unfuse",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Do not look inside fused tensors for the parts that the mask names.",
)
@options.key
@options.config
@options.files
def command(base: str, tuned: str, mask: str, out: str, as_json: bool, **asked: Any) -> None:
    """Write BASE with the elements of TUNED wherever a mask has ones.

    Use it to test whether the subnetwork alone carries the change. Both checkpoints may be
    hf://org/name. The mask may be any store of the model: of this pair, of another run, combined or
    random. The output has BASE's files, names and headers, and copies of its config and tokenizer
    files. A PATH that ends with a slash is always a directory.
    """
    from ckdiff.checkpoints.pieces import told
    from ckdiff.cli import formats
    from ckdiff.cli.made import wrote_checkpoint
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.grafts.graft import graft

    with Reporter("grafted") as reporter, compilation_noted(reporter):
        result = graft(base, tuned, mask, out, observer=reporter.observer(told), **asked)
    if as_json:
        write_json(result)
        return
    grafted, elements = result["grafted"], result["elements"]
    differing = result["differing"]
    lines = [
        f"{formats.extent(elements, result['tensors'])}: {grafted:,} taken from tuned, "
        f"{formats.percent(grafted, elements)}; {differing:,} of them differ from base"
    ]
    if result["rounded"]:
        tensors = formats.counted(result["rounded"], "tensor")
        lines.append(
            f"rounded to the base's dtype: {result['rounded_elements']:,} elements in {tensors}"
        )
    lines.append(wrote_checkpoint(result["out"], result["files"], result["copied"]))
    write_lines(lines)
