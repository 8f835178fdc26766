"""What stdout can show: its width, its characters, its colours."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TextIO

from ckdiff.cli.shortening import text_width

_WORDS = re.compile(r" *[^ ]+(?: %)?")  # a number and its % are one word
_ESCAPES = re.compile("\x1b\\[[0-9;]*m")


@dataclass(frozen=True, slots=True)
class Glyphs:
    """The characters to draw with."""

    levels: str  #: from little to much
    eighths: str  #: the ends of a bar, from an eighth to a whole
    zero: str  #: nothing
    trace: str  #: next to nothing
    arrow: str
    dash: str  #: between the ends of a range
    ellipsis: str
    rule: str  #: a horizontal line
    edge: str  #: a vertical line
    norm: str  #: the head of the column of relative movement
    max_delta: str


UNICODE = Glyphs("▁▂▃▄▅▆▇█", "▏▎▍▌▋▊▉█", "·", "◦", "→", "–", "…", "─", "│", "‖Δ‖/‖base‖", "max|Δ|")
ASCII = Glyphs(".:-=+*#@", "-#", "0", "'", "->", "-", "...", "-", "|", "|d|/|base|", "max|d|")


def visible_width(text: str) -> int:
    """Columns that a text takes, which may be painted."""
    return text_width(_ESCAPES.sub("", text))


class Terminal:
    """A stream's abilities, after NO_COLOR, FORCE_COLOR, COLUMNS and TERM have had their say."""

    def __init__(self, stream: TextIO | None = None, *, colours: bool = True) -> None:
        from rich.console import Console

        stream = sys.stdout if stream is None else stream
        console = Console(file=stream)
        self.interactive = console.is_terminal and not console.is_dumb_terminal
        #: columns, or None where lines may be as long as they like (a pipe, a file)
        self.width = console.width if self.interactive else None
        encoding = (getattr(stream, "encoding", None) or "utf-8").lower()
        self.glyphs = UNICODE if encoding.startswith("utf") else ASCII
        coloured = colours and self.interactive and not console.no_color
        self._colours = console.color_system if coloured else None
        #: whether shades of a colour can be told apart
        self.shades = self._colours in ("256", "truecolor")

    def paint(self, text: str, style: str) -> str:
        """``text`` in a rich style such as ``bold`` or ``#3b528b``, where there are colours."""
        if self._colours is None:
            return text
        from rich.console import COLOR_SYSTEMS
        from rich.style import Style

        return Style.parse(style).render(text, color_system=COLOR_SYSTEMS[self._colours])

    def wrapped(self, lines: Iterable[str]) -> Iterator[str]:
        """The lines, those that are too wide in several: broken at blanks, but not before a %.

        What is longer than a line by itself, such as a path, is left to the terminal.
        """
        for line in lines:
            if self.width is None or visible_width(line) <= self.width:
                yield line
                continue
            row, filled = "", 0
            for word in _WORDS.findall(line):
                blank = len(word) - len(word.lstrip(" "))
                wide = visible_width(word)
                if row and filled + wide > self.width:
                    yield row.rstrip(" ")
                    row, filled = word[blank:], wide - blank
                else:
                    row, filled = row + word, filled + wide
            yield row

    def bar(self, share: float, width: int) -> str:
        """A bar filling ``share`` of ``width`` columns; anything above 0 shows."""
        eighths = self.glyphs.eighths
        steps = len(eighths)
        filled = round(min(max(share, 0.0), 1.0) * width * steps)
        if share > 0:
            filled = max(filled, 1)
        whole, rest = divmod(filled, steps)
        return eighths[-1] * whole + (eighths[rest - 1] if rest else "")
