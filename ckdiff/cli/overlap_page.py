"""What the parts of ``overlap``'s text have in common: the page, and how its figures look."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from ckdiff.cli.terminal import Terminal
from ckdiff.overlaps.result import Overlap

T = TypeVar("T")
FloatArray = npt.NDArray[np.float64]

_WIDE = 100  #: columns of text where there is no terminal


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """What every part of the output is made from; the tables over the model are made once."""

    result: Overlap
    terminal: Terminal
    labels: list[str]  #: of the runs
    top: int
    counts: npt.NDArray[np.int64]
    jaccard: FloatArray
    nulls: dict[str, dict[str, FloatArray]]

    @property
    def headline(self) -> str:
        """The null whose lift stands for all."""
        return self.result.null_names[0]

    @property
    def lift(self) -> FloatArray:
        """Of each pair over the model, against the first null."""
        return self.nulls[self.headline]["lift"]

    @property
    def width(self) -> int:
        """Columns that there are for sentences and matrices."""
        return self.terminal.width or _WIDE

    def defined(self, null: str, key: str) -> FloatArray:
        """A figure of every pair over the model, without the pairs that have none."""
        square = self.nulls[null][key]
        values = square[np.triu_indices(len(square), 1)]
        return values[~np.isnan(values)]

    def wrapped(self, text: str, indent: int = 0) -> list[str]:
        """A sentence in lines that fit; ``indent`` leaves room before all but the first."""
        return textwrap.wrap(
            text, self.width, subsequent_indent=" " * indent, break_on_hyphens=False
        )


def spread(values: FloatArray) -> tuple[float, float, float]:
    """(least, median, most), NaN where there are none."""
    if not len(values):
        return math.nan, math.nan, math.nan
    return float(values.min()), float(np.median(values)), float(values.max())


def ends(
    page: Page, items: Sequence[T], cells: Callable[[T], list[str]], columns: int
) -> list[list[str]]:
    """Rows of the first items and of the last, and between them how many are not shown."""
    hidden = len(items) - 2 * page.top
    if hidden <= 1:  # a line that says "1 more" would save nothing
        return list(map(cells, items))
    gap = [f"{page.terminal.glyphs.ellipsis} {hidden:,} more", *[""] * (columns - 1)]
    return [*map(cells, items[: page.top]), gap, *map(cells, items[-page.top :])]


def quotient(part: float, whole: float) -> float:
    """``part / whole``, NaN where there is no whole."""
    return part / whole if whole > 0 else math.nan


def ratio(value: float) -> str:
    """A Jaccard index: ``0.657``. Only nothing shared is 0, and only equal masks are 1."""
    if math.isnan(value):
        return "-"
    if value in (0, 1):
        return f"{value:.0f}"
    if value < 0.001:
        return f"{value:.1g}"
    for digits in range(3, 17):
        text = f"{value:.{digits}f}"
        if float(text) < 1:
            break
    return text


def lift(value: float) -> str:
    """``2.21``, ``153``; a pair of which nothing is expected has none."""
    if math.isnan(value):
        return "-"
    if 0 < value < 0.1:
        return f"{value:.1g}"
    return f"{value:.2f}" if value < 100 else f"{value:,.0f}"


def z(value: float) -> str:
    """``-3.2``, ``452``; absent where nothing can vary."""
    if math.isnan(value):
        return "-"
    return f"{value:.1f}" if abs(value) < 100 else f"{value:,.0f}"
