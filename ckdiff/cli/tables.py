"""Aligned columns of text. Plain string work, because a table may have 90,000 rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ckdiff.cli.formats import shorten
from ckdiff.cli.terminal import Terminal

_GAP = "  "
_NARROWEST = 16


@dataclass(frozen=True, slots=True)
class Column:
    """How one column looks."""

    title: str  #: may have several lines
    align: Literal["left", "right"] = "right"
    style: str = ""
    flexible: bool = False  #: may be shortened to fit the terminal
    optional: bool = False  #: may be dropped to fit the terminal


def table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[str]],
    terminal: Terminal,
    *,
    footer: Sequence[str] | None = None,
    indent: str = "",
) -> list[str]:
    """The lines of a table; cells must hold no control characters."""
    cells = [list(row) for row in rows]
    if footer is not None:
        cells.append(list(footer))
    heads = [column.title.split("\n") for column in columns]
    widths = [
        max([*map(text_width, head), *(text_width(row[i]) for row in cells)], default=0)
        for i, head in enumerate(heads)
    ]
    shown = list(range(len(columns)))
    if terminal.width is not None:
        _fit(columns, shown, widths, terminal.width - len(indent))
    tall = max(len(heads[i]) for i in shown)
    lines = [
        _line(
            columns,
            [([""] * (tall - len(head)) + head)[at] for head in heads],
            shown,
            widths,
            terminal,
            indent,
            head=True,
        )
        for at in range(tall)
    ]
    for position, row in enumerate(cells):
        if footer is not None and position == len(cells) - 1:
            length = sum(widths[i] for i in shown) + len(_GAP) * (len(shown) - 1)
            lines.append(indent + terminal.paint(terminal.glyphs.rule * length, "dim"))
        lines.append(_line(columns, row, shown, widths, terminal, indent))
    return lines


def _fit(columns: Sequence[Column], shown: list[int], widths: list[int], available: int) -> None:
    """Drop optional columns, then shorten flexible ones, until a line fits."""

    def excess() -> int:
        return sum(widths[i] for i in shown) + len(_GAP) * (len(shown) - 1) - available

    for i in reversed(list(shown)):
        if columns[i].optional and excess() > 0:
            shown.remove(i)
    for i in shown:
        if columns[i].flexible and excess() > 0:
            widths[i] = max(widths[i] - excess(), min(widths[i], _NARROWEST))


def _line(
    columns: Sequence[Column],
    cells: Sequence[str],
    shown: Sequence[int],
    widths: Sequence[int],
    terminal: Terminal,
    indent: str,
    *,
    head: bool = False,
) -> str:
    parts = []
    for i in shown:
        column, text = columns[i], cells[i]
        if text_width(text) > widths[i]:
            text = _shortened(text, widths[i], terminal.glyphs.ellipsis)
        padding = " " * (widths[i] - text_width(text))
        style = "bold" if head else column.style
        painted = terminal.paint(text, style) if style and text else text
        parts.append(painted + padding if column.align == "left" else padding + painted)
    return (indent + _GAP.join(parts)).rstrip()


def _shortened(text: str, width: int, mark: str) -> str:
    room = width
    while text_width(short := shorten(text, room, mark)) > width and room > 1:
        room -= 1  # wide characters take two columns
    return short


def text_width(text: str) -> int:
    """Columns that a text takes on a terminal."""
    if text.isascii():
        return len(text)
    from rich.cells import cell_len

    return cell_len(text)
