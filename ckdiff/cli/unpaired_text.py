"""What is said of tensors that were not compared, or that are not the same on both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckdiff.cli import formats
from ckdiff.cli.tables import Column, narrowest_width, table
from ckdiff.cli.terminal import Terminal
from ckdiff.errors import printable

_UNPAIRED = 20  #: unpaired tensors that are named
_UNLIKE = 5


def unpaired_lines(details: Sequence[Mapping[str, Any]], terminal: Terminal) -> list[str]:
    """A table of tensors that were not compared, with the reasons; nothing where all were."""
    if not details:
        return []
    arrow = f" {terminal.glyphs.arrow} "
    rows = []
    for detail in details[:_UNPAIRED]:
        sides = [formats.side(detail, which) or "" for which in ("base", "tuned")]
        rows.append([detail["reason"], printable(detail["name"]), *sides])
    called = [
        Column("not compared", "left", "yellow"),
        Column("tensor", "left", "cyan", flexible=True),
    ]
    together = [[*row[:2], arrow.join(filter(None, row[2:]))] for row in rows]
    heads = [*called, Column(f"base{arrow}tuned", "left")]
    if terminal.width is None or narrowest_width(heads, together) <= terminal.width:
        out = table(heads, together, terminal)
    else:  # a column for each side may go below the other
        out = table([*called, Column("base", "left"), Column("tuned", "left")], rows, terminal)
    if len(details) > _UNPAIRED:
        out.append(f"and {len(details) - _UNPAIRED:,} more ({len(details):,} in all)")
    return out


def unlike_lines(
    retyped: Sequence[Mapping[str, Any]],
    resized: Sequence[Mapping[str, Any]],
    tied: Sequence[Mapping[str, Any]],
    terminal: Terminal,
) -> list[str]:
    """A line each for tensors of two dtypes, of other numbers of rows, and tied ones."""
    arrow = terminal.glyphs.arrow
    out = list[str]()
    for items, one, several in (
        (
            retyped,
            "has two dtypes and was compared by value",
            "have two dtypes and were compared by value",
        ),
        (
            resized,
            "has another number of rows: those that both sides have were compared",
            "have another number of rows: those that both sides have were compared",
        ),
    ):
        if items:
            pairs = [f"{_shown(item['base'])} {arrow} {_shown(item['tuned'])}" for item in items]
            out.append(_listed(items, one if len(items) == 1 else several, pairs))
    if tied:
        said = [f"as {formats.name(item['same_as'])} in {item['side']}" for item in tied]
        what = "is tied to another" if len(tied) == 1 else "are tied to others"
        out.append(_listed(tied, what, said))
    return out


def _listed(items: Sequence[Mapping[str, Any]], what: str, each: Sequence[str]) -> str:
    shown = ", ".join(
        f"{formats.name(item['name'])} ({said})"
        for item, said in zip(items[:_UNLIKE], each, strict=False)
    )
    more = f" and {len(items) - _UNLIKE:,} more" if len(items) > _UNLIKE else ""
    return f"{formats.counted(len(items), 'tensor')} {what}: {shown}{more}"


def _shown(value: Any) -> str:
    return formats.shape(value) if isinstance(value, (list, tuple)) else str(value)
