"""``ckdiff delta``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ckdiff.cli import options
from ckdiff.cli.output import write_json, write_lines
from ckdiff.deltas.registry import ENCODINGS, VERSIONED

if TYPE_CHECKING:
    from ckdiff.deltas.outcome import DeltaResult
    from ckdiff.deltas.versions.writing import VersionReport

_HELP = {name: line.help for name, line in ENCODINGS.lines.items()} | VERSIONED


@click.command("delta")
@click.argument("base")
@click.argument("tuned")
@options.output("DELTA", "Write the delta to this file, or the version to this stream's directory.")
@click.option(
    "--mask",
    metavar="STORE",
    help="Include only the elements that this mask marks. The delta is lossy.",
)
@click.option("--rule", metavar="RULE", help="Which of the mask store's masks.")
@click.option(
    "--encoding",
    type=options.Choice(list(_HELP)),
    default=next(iter(_HELP)),
    show_default=True,
    help="; ".join(f"{name} {text}" for name, text in _HELP.items()) + ".",
)
@options.as_version
@options.key
@options.versions
@click.option("--full", is_flag=True, help="Publish all of TUNED as a full version.")
@click.option(
    "--full-when-needed",
    is_flag=True,
    help="Publish a full version if a delta cannot express the change.",
)
@options.files
def command(base: str, tuned: str, out: str, as_json: bool, **asked: Any) -> None:
    """Write everything that is needed to rebuild TUNED from BASE, bit for bit.

    Both may be on the hub, hf://org/name. `ckdiff apply BASE DELTA -o OUT` rebuilds TUNED. A delta
    covers safetensors files and their index, not configs and tokenizers.
    """
    from ckdiff.cli.progress import Reporter, compilation_noted
    from ckdiff.deltas.delta import delta
    from ckdiff.deltas.outcome import DeltaResult
    from ckdiff.errors import printable

    with Reporter("compared") as reporter, compilation_noted(reporter):
        result = delta(base, tuned, out, observer=reporter.observer(), **asked)
    if as_json:
        write_json(result.to_dict())
        return
    lines = _file(result) if isinstance(result, DeltaResult) else _version(result)
    write_lines(map(printable, lines))


def _file(result: DeltaResult) -> list[str]:
    from ckdiff.cli import formats
    from ckdiff.cli.delta_text import changes, lossy_line, odd_lines, sizes

    lines = [changes(result.changed, result.elements, result.paired, result.unpaired)]
    lines += odd_lines(result.resized, result.parts)
    if result.lossy is not None:
        lines.append(lossy_line(result.lossy))
    speed = formats.rate(result.bytes_read, result.seconds)
    took = f"in {formats.duration(result.seconds)}, {speed}"
    return [*lines, f"{result.out}: {sizes(result.size, result.rebuilt_size)}, {took}"]


def _version(result: VersionReport) -> list[str]:
    from ckdiff.budget import format_size
    from ckdiff.cli import formats

    what = "a full version" if result.full else f"{result.changed_bytes:,} bytes changed"
    density = "" if result.full else f", {formats.share(result.density)} of the elements"
    took = f"in {formats.duration(result.seconds)}"
    return [
        f"version {result.version}: {formats.counted(result.tensors, 'tensor')}, {what}{density}",
        f"{result.path}: {format_size(result.bytes)}, {took}",
    ]
