"""Aligned columns of text. Plain string work, because a table may have 90,000 rows.

On a terminal a table is never wider than the screen, as far as that is possible: optional columns
go, then names are shortened, and then the table is printed in parts, one below the other. Numbers
stay whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from ckdiff.cli.formats import LONGEST
from ckdiff.cli.shortening import shortened, text_width
from ckdiff.cli.terminal import Terminal

__all__ = ["Column", "narrowest_width", "natural_width", "table", "text_width"]

_GAP = "  "
_NARROWEST = 16  #: columns that a name keeps beside all numbers
_KEPT = 24  #: columns that a name keeps where the table is printed in parts


@dataclass(frozen=True, slots=True)
class Column:
    """How one column looks."""

    title: str  #: may have several lines
    align: Literal["left", "right"] = "right"
    style: str = ""
    flexible: bool = False  #: may be shortened to fit the terminal
    optional: bool = False  #: may be dropped to fit the terminal
    joined: bool = False  #: stays beside the column before it


def table(
    columns: Sequence[Column],
    rows: Iterable[Sequence[str]],
    terminal: Terminal,
    *,
    footer: Sequence[str] | None = None,
    indent: str = "",
) -> list[str]:
    """The lines of a table; cells must hold no control characters.

    Cells of flexible columns are shortened where there is no room; texts that differ still do then.
    """
    cells = [list(row) for row in rows]
    if footer is not None:
        cells.append(list(footer))
    widths = [_width(column, [row[i] for row in cells]) for i, column in enumerate(columns)]
    parts = [list(range(len(columns)))]
    if terminal.width is not None:
        parts = _fitted(columns, widths, terminal.width - len(indent))
    for i, column in enumerate(columns):
        if column.flexible:
            most = min(widths[i], LONGEST) if terminal.width is None else widths[i]
            texts = shortened([row[i] for row in cells], most, terminal.glyphs.ellipsis)
            for row, text in zip(cells, texts, strict=True):
                row[i] = text
            widths[i] = _width(column, texts)
    lines: list[str] = []
    for shown in parts:
        if lines:
            lines.append("")
        lines += _Part(columns, shown, widths, terminal, indent).lines(cells, footer is not None)
    return lines


def natural_width(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> int:
    """Columns of a terminal that a table takes where nothing is shortened."""
    widths = [_width(column, [row[i] for row in rows]) for i, column in enumerate(columns)]
    return _sum(range(len(widths)), widths)


def narrowest_width(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> int:
    """Columns of a terminal that a table takes at least, if it is to be in one part."""
    widths = [_width(column, [row[i] for row in rows]) for i, column in enumerate(columns)]
    shown = [i for i, column in enumerate(columns) if not column.optional]
    least = [min(w, _NARROWEST) if columns[i].flexible else w for i, w in enumerate(widths)]
    return _sum(shown, least)


def _width(column: Column, cells: Iterable[str]) -> int:
    return max(map(text_width, (*column.title.split("\n"), *cells)), default=0)


def _fitted(columns: Sequence[Column], widths: list[int], room: int) -> list[list[int]]:
    """The columns of each part of a table, in which no line is wider than ``room``.

    Drops optional columns, then narrows flexible ones (in ``widths``), then makes parts.
    """
    shown = list(range(len(columns)))

    def excess() -> int:
        return _sum(shown, widths) - room

    for i in reversed(list(shown)):
        if columns[i].optional and excess() > 0:
            shown.remove(i)
    flexible = [i for i in shown if columns[i].flexible]
    natural = {i: widths[i] for i in flexible}
    for least in (_KEPT, _NARROWEST):
        for i in reversed(flexible):  # the first one is what a row is called
            if excess() > 0:
                widths[i] = max(widths[i] - excess(), min(widths[i], least))
    if excess() <= 0:
        return [shown]
    for i in flexible:
        widths[i] = min(natural[i], max(_KEPT, widths[i]))
    return _parts(columns, shown, widths, room)


def _sum(shown: Sequence[int], widths: Sequence[int]) -> int:
    return sum(widths[i] for i in shown) + len(_GAP) * (len(shown) - 1)


def _parts(
    columns: Sequence[Column], shown: Sequence[int], widths: list[int], room: int
) -> list[list[int]]:
    """As many columns as fit below each other, each part with what says which row it is."""
    named = next((at for at, i in enumerate(shown) if columns[i].flexible), 0)
    key, rest = list(shown[: named + 1]), shown[named + 1 :]
    groups: list[list[int]] = []
    for i in rest:
        if columns[i].joined and groups:
            groups[-1].append(i)
        else:
            groups.append([i])
    widest = max((_sum(group, widths) for group in groups), default=0)
    last = key[-1]
    over = _sum(key, widths) + len(_GAP) + widest - room
    if columns[last].flexible and over > 0:
        widths[last] = max(widths[last] - over, min(widths[last], _NARROWEST))
    parts: list[list[int]] = []
    for group in groups:
        if parts and _sum([*parts[-1], *group], widths) <= room:
            parts[-1] += group
        else:
            parts.append([*key, *group])
    return parts or [key]


@dataclass(frozen=True, slots=True)
class _Part:
    """Some columns of a table, and how wide each is."""

    columns: Sequence[Column]
    shown: Sequence[int]
    widths: Sequence[int]
    terminal: Terminal
    indent: str

    def lines(self, cells: Sequence[Sequence[str]], footer: bool) -> list[str]:
        """The head, a line for each row, and before the last one a rule if it is a footer."""
        heads = {i: self.columns[i].title.split("\n") for i in self.shown}
        tall = max(len(head) for head in heads.values())
        padded = {i: [""] * (tall - len(head)) + head for i, head in heads.items()}
        lines = [self._line({i: padded[i][at] for i in self.shown}) for at in range(tall)]
        for position, row in enumerate(cells):
            if footer and position == len(cells) - 1:
                length = _sum(self.shown, self.widths)
                rule = self.terminal.paint(self.terminal.glyphs.rule * length, "dim")
                lines.append(self.indent + rule)
            lines.append(self._line(row))
        return lines

    def _line(self, cells: Sequence[str] | dict[int, str]) -> str:
        parts = []
        for i in self.shown:
            column, text = self.columns[i], cells[i]
            padding = " " * (self.widths[i] - text_width(text))
            style = "bold" if isinstance(cells, dict) else column.style
            painted = self.terminal.paint(text, style) if style and text else text
            parts.append(painted + padding if column.align == "left" else padding + painted)
        return (self.indent + _GAP.join(parts)).rstrip()
