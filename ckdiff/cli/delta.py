"""``ckdiff delta``."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options
from ckdiff.cli.output import write_json, write_lines
from ckdiff.deltas.registry import ENCODINGS


@click.command("delta")
@click.argument("base")
@click.argument("tuned")
@options.output("DELTA", "Write the delta to this file.")
@click.option("--mask", metavar="STORE", help="Take only what this mask marks; the delta is lossy.")
@click.option("--rule", metavar="RULE", help="Which of the mask store's masks.")
@click.option(
    "--encoding",
    type=click.Choice(list(ENCODINGS)),
    default=next(iter(ENCODINGS)),
    show_default=True,
    help="; ".join(f"{name} {line.help}" for name, line in ENCODINGS.lines.items()) + ".",
)
@options.files
def command(base: str, tuned: str, out: str, as_json: bool, **asked: Any) -> None:
    """Write everything that is needed to rebuild TUNED from BASE, bit for bit.

    Both may be on the hub, hf://org/name. `ckdiff apply BASE DELTA -o OUT` rebuilds TUNED. The
    delta is of safetensors files and their index; configs and tokenizers are not part of it.
    """
    from ckdiff.cli import formats
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.deltas.creating import delta
    from ckdiff.errors import printable

    with Reporter("compared") as reporter, compilation_noted(reporter):
        result = delta(base, tuned, out, observer=reporter.observer(), **asked)
    if as_json:
        write_json(result.to_dict())
        return
    from ckdiff.cli.delta_text import changes, lossy_line, odd_lines, sizes

    lines = [changes(result.changed, result.elements, result.paired, result.unpaired)]
    lines += odd_lines(result.resized, result.parts)
    if result.lossy is not None:
        lines.append(lossy_line(result.lossy))
    speed = formats.rate(result.bytes_read, result.seconds)
    took = f"in {formats.duration(result.seconds)}, {speed}"
    lines.append(f"{result.out}: {sizes(result.size, result.rebuilt_size)}, {took}")
    write_lines(map(printable, lines))
