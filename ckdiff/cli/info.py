"""``ckdiff info``."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options
from ckdiff.cli.output import write_json, write_lines


@click.command("info")
@click.argument("path")
@options.as_json
def command(path: str, as_json: bool) -> None:
    """Say what a file, a directory or hf://org/name is: a delta, a mask store or a checkpoint, and
    what it holds.
    """
    from ckdiff.reports.info import info

    found = info(path)
    if as_json:
        write_json(found)
        return
    from ckdiff.errors import printable

    # whatever a file says of itself, nothing of it acts on the terminal
    write_lines(map(printable, _LINES[found["kind"]](found)))


def _delta(found: dict[str, Any]) -> list[str]:
    from ckdiff.cli.delta_text import changes, lossy_line, sizes
    from ckdiff.cli.formats import counted

    files = counted(len(found["files"]), "file")
    index = f" and {found['index']}" if found["index"] else ""
    lines = [
        f"{found['path']}: a delta, {found['encoding']}, by ckdiff {found['ckdiff']}",
        changes(found["changed"], found["elements"], found["paired"], found["unpaired"]),
        f"{sizes(found['size'], found['rebuilt_size'])}; rebuilds {files}{index}",
        "configs, tokenizers and other files are not part of it",
    ]
    if found["lossy"]:
        lines.append(lossy_line(found["lossy"]))
    return lines


def _store(found: dict[str, Any]) -> list[str]:
    from ckdiff.cli import formats

    lines = [
        f"{found['path']}: a mask store, {formats.extent(found['elements'], found['tensors'])}"
    ]
    for rule, counts in found["rules"].items():
        part = formats.percent(counts["changed"], found["elements"])
        kept = "" if rule in found["masks"] else " (counted only)"
        lines.append(f"{rule}: {counts['changed']:,} changed, {part}{kept}")
    return lines


def _checkpoint(found: dict[str, Any]) -> list[str]:
    from ckdiff.budget import format_size
    from ckdiff.cli import formats

    return [
        f"{formats.at_commit(found['path'], found.get('commit'))}: a checkpoint, "
        f"{formats.counted(len(found['files']), 'file')}, {format_size(found['size'])}",
        f"{formats.extent(found['elements'], found['tensors'])}: "
        + ", ".join(f"{count:,} {dtype}" for dtype, count in found["dtypes"].items()),
    ]


_LINES = {"delta": _delta, "store": _store, "checkpoint": _checkpoint}
