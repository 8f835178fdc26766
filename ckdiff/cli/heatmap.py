"""A map of densities on the terminal: modules down, layers across."""

from __future__ import annotations

import math

import numpy as np

from ckdiff.cli.formats import brief_share, name, percent
from ckdiff.cli.shortening import shortened, text_width
from ckdiff.cli.terminal import Terminal, visible_width
from ckdiff.errors import printable
from ckdiff.stores.summaries import Stack
from ckdiff.stores.table import IntArray

_MOST_MODULES = 24  #: rows; of more, those with the most elements are drawn
_WIDEST_CELL = 3
_LABEL = 32  #: columns that module names may take
_IGNORED = (
    0.05  #: share of the elements, in the least changed cells, that does not stretch the scale
)
_TRACE = 100.0  #: times less than the lowest density of the scale is next to nothing
_WIDE = 12.0  #: highest / lowest density above which the scale is logarithmic
_APART = "   "  #: between two pieces of the legend
_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  #: layers between two numbers of the axis
#: lightness grows along it, so that it reads the same without colour vision
_SHADES = ("#5e4fa2", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#d8e219", "#fde725")


def heat_map(stack: Stack, terminal: Terminal, rule: str) -> list[str]:
    """The lines of the map of one stack of layers, with axis and legend."""
    width = terminal.width or 100
    chosen = _chosen(stack)
    mark = terminal.glyphs.ellipsis
    longest = min(_LABEL, width // 3)
    labels = shortened([printable(stack.modules[i]) for i in chosen], longest, mark)
    margin = max(map(text_width, labels))
    sums = (grid[chosen].sum(axis=1).tolist() for grid in (stack.changed, stack.elements))
    totals = [percent(changed, elements) for changed, elements in zip(*sums, strict=True)]
    broadest = max(9, *map(len, totals))
    layers = len(stack.layers)
    room = max(width - margin - broadest - 5, 8)
    merged = -(-layers // room)  # adjacent layers that share a column
    columns = -(-layers // merged)
    cell = max(1, min(_WIDEST_CELL, room // columns))
    elements = _merge(stack.elements[chosen], merged)
    changed = _merge(stack.changed[chosen], merged)
    scale = _Scale(elements, changed, terminal)

    title = f"{name(stack.name) or 'layers'}: {rule} density by module and layer"
    if merged > 1:
        title += f", {merged} layers to a column"
    lines = [terminal.paint(title, "bold"), " " * (margin + 2) + _axis(stack, merged, cell)]
    edge = terminal.paint(terminal.glyphs.edge, "dim")
    for row, label in enumerate(labels):
        cells = zip(elements[row].tolist(), changed[row].tolist(), strict=True)
        drawn = "".join(scale.draw(n, k, cell) for n, k in cells)
        blanks = " " * (margin - text_width(label))
        lines.append(f"{label}{blanks} {edge}{drawn}{edge} {totals[row]:>{broadest}}")
    if len(chosen) < len(stack.modules):
        lines.append(f"{mark} and {len(stack.modules) - len(chosen):,} smaller modules")
    return lines + _beside(scale.legend(), margin + 2, width)


def _chosen(stack: Stack) -> list[int]:
    """The modules to draw, in natural order."""
    largest = np.argsort(-stack.elements.sum(axis=1), kind="stable")[:_MOST_MODULES]
    return sorted(largest.tolist())


def _beside(pieces: list[str], indent: int, width: int) -> list[str]:
    """The legend below the cells, or further to the left, or on more lines, as there is room."""
    plain = [visible_width(piece) for piece in pieces]
    whole = sum(plain) + len(_APART) * (len(pieces) - 1)
    indent = max(0, min(indent, width - whole))
    lines, filled = [" " * indent + pieces[0]], indent + plain[0]
    for piece, wide in zip(pieces[1:], plain[1:], strict=True):
        if filled + len(_APART) + wide > width:
            lines.append(" " * indent + piece)
            filled = indent + wide
        else:
            lines[-1] += _APART + piece
            filled += len(_APART) + wide
    return lines


def _merge(grid: IntArray, size: int) -> IntArray:
    """Add up every ``size`` adjacent columns: counts can be added, densities cannot."""
    return np.add.reduceat(grid, np.arange(0, grid.shape[1], size), axis=1)


def _axis(stack: Stack, merged: int, cell: int) -> str:
    """Layer numbers above their columns, as many as there is room for."""
    labels = shortened(stack.layers[::merged], 6, "~")
    longest = max(map(len, labels))
    step = next((n for n in _STEPS if n * cell > longest), len(labels))
    return "".join(label.ljust(step * cell) for label in labels[::step]).rstrip()


class _Scale:
    """Density -> a character and a colour.

    The scale ends at the largest density and begins where the densest 95 % of the elements begin,
    so that a few small tensors (norms, biases) do not hide how the large ones differ. It is linear,
    or logarithmic where it spans more than an order of magnitude. What lies below it has the lowest
    step for itself; or, where it is a hundred times less, a mark of its own: a few elements must
    not look like a third.
    """

    def __init__(self, elements: IntArray, changed: IntArray, terminal: Terminal) -> None:
        some = changed > 0
        n = elements[some]
        densities = changed[some] / n
        self._terminal = terminal
        self.lowest = self.highest = least = 0.0
        if densities.size:
            order = np.argsort(densities, kind="stable")
            reached = np.searchsorted(np.cumsum(n[order]), _IGNORED * float(n.sum()))
            least, self.highest = (float(densities[order[at]]) for at in (0, -1))
            # differences of less than a tenth are not blown up
            self.lowest = min(float(densities[order[reached]]), 0.9 * self.highest)
        self.logarithmic = self.highest > _WIDE * self.lowest
        self.traces = least < self.lowest / _TRACE
        below = (densities < self.lowest) & (densities >= self.lowest / _TRACE)
        #: the step on which the scale begins: there is one below it where something is
        self._first = int(bool(below.any()))
        self._steps = len(terminal.glyphs.levels) - self._first

    def level(self, density: float) -> int:
        """Which character: from 0 to as many as there are."""
        if density < self.lowest:
            return 0
        if density >= self.highest:
            return self._first + self._steps - 1
        if self.logarithmic:
            share = math.log(density / self.lowest) / math.log(self.highest / self.lowest)
        else:
            share = (density - self.lowest) / (self.highest - self.lowest)
        return self._first + min(int(share * self._steps), self._steps - 1)

    def draw(self, elements: int, changed: int, cell: int) -> str:
        """One cell: blank where there is nothing, a dot where nothing changed."""
        if elements == 0:
            return " " * cell
        glyphs = self._terminal.glyphs
        if changed == 0:
            return self._terminal.paint(glyphs.zero * cell, "dim")
        density = changed / elements
        if density < self.lowest / _TRACE:
            return self._block(0, cell, glyphs.trace)
        return self._block(self.level(density), cell)

    def _block(self, level: int, cell: int, mark: str = "") -> str:
        text = (mark or self._terminal.glyphs.levels[level]) * cell
        return self._terminal.paint(text, _SHADES[level]) if self._terminal.shades else text

    def legend(self) -> list[str]:
        """What the characters mean, in pieces."""
        glyphs = self._terminal.glyphs
        pieces = [f"{self._terminal.paint(glyphs.zero, 'dim')} 0 %"]
        if self.highest > 0:
            lowest = brief_share(self.lowest)
            if self.traces:
                below = brief_share(self.lowest / _TRACE)
                pieces.append(f"{self._block(0, 1, glyphs.trace)} < {below}")
            if self._first:
                pieces.append(f"{self._block(0, 1)} < {lowest}")
            last = self._first + self._steps
            blocks = "".join(self._block(level, 1) for level in range(self._first, last))
            text = f"{lowest} {blocks} {brief_share(self.highest)}"
            pieces.append(text + (" (logarithmic)" if self.logarithmic else ""))
        return pieces
