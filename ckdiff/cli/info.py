"""``ckdiff info``."""

from __future__ import annotations

from typing import Any

import click

from ckdiff.cli import options
from ckdiff.cli.output import remark, write_json, write_lines

_UNPAIRED = 20  #: unpaired tensors that are named


@click.command("info")
@click.argument("path")
@options.key
@options.as_json
def command(path: str, key: str | None, as_json: bool) -> None:
    """Print what a file, a directory or hf://org/name is (a delta, a stream of weight versions, a
    mask store, a timeline or a checkpoint), and what it holds.
    """
    from ckdiff.reports.info import info

    about = info(path, key=key)
    if as_json:
        write_json(about)
        return
    from ckdiff.checkpoints.pieces import told
    from ckdiff.errors import printable

    for note in about.get("notes", ()):
        remark(told(note))
    # whatever a file says of itself, nothing of it acts on the terminal
    write_lines(map(printable, _LINES[about["kind"]](about)))


def _delta(about: dict[str, Any]) -> list[str]:
    from ckdiff.cli.delta_text import changes, lossy_line, odd_lines, sizes
    from ckdiff.cli.formats import counted

    files = counted(len(about["files"]), "file")
    index = f" and {about['index']}" if about["index"] else ""
    lines = [
        f"{about['path']}: a delta, {about['encoding']}, by ckdiff {about['ckdiff']}",
        changes(about["changed"], about["elements"], about["paired"], about["unpaired"]),
        f"{sizes(about['size'], about['rebuilt_size'])}; rebuilds {files}{index}",
        "configs, tokenizers and other files are not part of it",
    ]
    lines[2:2] = odd_lines(about["resized"], about["parts"])
    if about["lossy"]:
        lines.append(lossy_line(about["lossy"]))
    return lines


def _store(about: dict[str, Any]) -> list[str]:
    from ckdiff.cli import formats
    from ckdiff.cli.terminal import Terminal
    from ckdiff.cli.unpaired_text import unlike_lines

    lines = [
        f"{about['path']}: a mask store, {formats.extent(about['elements'], about['tensors'])}"
    ]
    lines.append(_origin(about))
    for rule, counts in about["rules"].items():
        part = formats.percent(counts["changed"], about["elements"])
        kept = "" if rule in about["masks"] else " (counted only)"
        lines.append(f"{rule}: {counts['changed']:,} changed, {part}{kept}")
    lines += unlike_lines(about["retyped"], about["resized"], (), Terminal())
    details = about.get("unpaired_details", ())
    for detail in details[:_UNPAIRED]:
        sides = filter(None, (formats.side(detail, side) for side in ("base", "tuned")))
        what = f"{detail['reason']} {formats.name(detail['name'])}"
        lines.append(f"not compared: {what}, {' -> '.join(sides)}")
    if len(details) > _UNPAIRED:
        lines.append(f"and {len(details) - _UNPAIRED:,} more ({len(details):,} in all)")
    return lines


def _origin(about: dict[str, Any]) -> str:
    """What the masks are of."""
    from ckdiff.cli import formats, made

    if "made_by" in about:
        return made.title(about["made_by"])
    commits = about.get("commits", {})
    base, tuned = (formats.at_commit(about[s], commits.get(s)) for s in ("base", "tuned"))
    return f"base {base}, tuned {tuned}"


def _checkpoint(about: dict[str, Any]) -> list[str]:
    from ckdiff.budget import format_size
    from ckdiff.cli import formats

    what = "an adapter" if about.get("adapter") else "a checkpoint"
    return [
        f"{formats.at_commit(about['path'], about.get('commit'))}: {what}, "
        f"{formats.counted(len(about['files']), 'file')}, {format_size(about['size'])}",
        f"{formats.extent(about['elements'], about['tensors'])}: "
        + ", ".join(f"{count:,} {dtype}" for dtype, count in about["dtypes"].items()),
    ]


def _stream(about: dict[str, Any]) -> list[str]:
    from ckdiff.cli import formats
    from ckdiff.cli.stream_text import table

    count = formats.counted(len(about["versions"]), "weight version")
    return [f"{about['path']}: {count}", "", *table(about["versions"])]


def _timeline(about: dict[str, Any]) -> list[str]:
    from ckdiff.cli import formats
    from ckdiff.cli.tables import Column, table
    from ckdiff.cli.terminal import Terminal
    from ckdiff.errors import printable

    elements = about["elements"]
    lines = [
        f"{about['path']}: a timeline of {formats.counted(len(about['steps']), 'step')}, "
        f"{about['rule']}, {formats.extent(elements, about['tensors'])}",
        f"from {about['checkpoints'][0]}",
    ]
    rows = [
        [
            str(number),
            printable(step["checkpoint"]),
            formats.percent(step["changed_since_first"], elements),
        ]
        for number, step in enumerate(about["steps"], 1)
    ]
    heads = [Column("step"), Column("checkpoint", "left", flexible=True), Column("since first")]
    lines += ["", *table(heads, rows, Terminal(colours=False)), ""]
    never, returned, final = (
        formats.percent(about[key], elements) for key in ("never", "returned", "final")
    )
    lines.append(f"{never} never moved, {returned} moved and returned, {final} changed in the end")
    return lines


_LINES = {
    "delta": _delta,
    "stream": _stream,
    "store": _store,
    "timeline": _timeline,
    "checkpoint": _checkpoint,
}
