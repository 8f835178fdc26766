"""A map of densities on the terminal: modules down, layers across."""

from __future__ import annotations

import math

import numpy as np

from ckdiff.cli.formats import name, percent, shorten
from ckdiff.cli.tables import text_width
from ckdiff.cli.terminal import Terminal
from ckdiff.stores.summaries import Stack
from ckdiff.stores.table import IntArray

_MOST_MODULES = 24  #: rows; of more, those with the most elements are drawn
_WIDEST_CELL = 3
_LABEL = 32  #: columns that module names may take
_IGNORED = (
    0.05  #: share of the elements, in the least changed cells, that does not stretch the scale
)
_WIDE = 12.0  #: highest / lowest density above which the scale is logarithmic
_STEPS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  #: layers between two numbers of the axis
#: lightness grows along it, so that it reads the same without colour vision
_SHADES = ("#5e4fa2", "#365c8d", "#277f8e", "#1fa187", "#4ac16d", "#a0da39", "#d8e219", "#fde725")


def heat_map(stack: Stack, terminal: Terminal, rule: str) -> list[str]:
    """The lines of the map of one stack of layers, with axis and legend."""
    width = terminal.width or 100
    chosen = _chosen(stack)
    mark = terminal.glyphs.ellipsis
    longest = min(_LABEL, width // 3)
    labels = [shorten(name(stack.modules[i]), longest, mark) for i in chosen]
    margin = max(map(text_width, labels))
    layers = len(stack.layers)
    room = max(width - margin - 14, 8)
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
        total = percent(int(changed[row].sum()), int(elements[row].sum()))
        lines.append(f"{label}{' ' * (margin - text_width(label))} {edge}{drawn}{edge} {total:>9}")
    if len(chosen) < len(stack.modules):
        lines.append(f"{mark} and {len(stack.modules) - len(chosen):,} smaller modules")
    lines.append(" " * (margin + 2) + scale.legend())
    return lines


def _chosen(stack: Stack) -> list[int]:
    """The modules to draw, in natural order."""
    largest = np.argsort(-stack.elements.sum(axis=1), kind="stable")[:_MOST_MODULES]
    return sorted(largest.tolist())


def _merge(grid: IntArray, size: int) -> IntArray:
    """Add up every ``size`` adjacent columns: counts can be added, densities cannot."""
    return np.add.reduceat(grid, np.arange(0, grid.shape[1], size), axis=1)


def _axis(stack: Stack, merged: int, cell: int) -> str:
    """Layer numbers above their columns, as many as there is room for."""
    labels = [shorten(layer, 6, "~") for layer in stack.layers[::merged]]
    longest = max(map(len, labels))
    step = next((n for n in _STEPS if n * cell > longest), len(labels))
    return "".join(label.ljust(step * cell) for label in labels[::step]).rstrip()


class _Scale:
    """Density -> a character and a colour.

    The scale ends at the largest density and begins where the densest 95 % of the elements begin,
    so that a few small tensors (norms, biases) do not hide how the large ones differ. It is linear,
    or logarithmic where it spans more than an order of magnitude.
    """

    def __init__(self, elements: IntArray, changed: IntArray, terminal: Terminal) -> None:
        some = changed > 0
        n = elements[some]
        densities = changed[some] / n
        self._terminal = terminal
        self._levels = len(terminal.glyphs.levels)
        self.lowest = self.highest = 0.0
        if densities.size:
            order = np.argsort(densities, kind="stable")
            reached = np.searchsorted(np.cumsum(n[order]), _IGNORED * float(n.sum()))
            self.highest = float(densities[order[-1]])
            # differences of less than a tenth are not blown up
            self.lowest = min(float(densities[order[reached]]), 0.9 * self.highest)
        self.logarithmic = self.highest > _WIDE * self.lowest

    def level(self, density: float) -> int:
        """0 to levels - 1."""
        if density >= self.highest or density <= self.lowest:
            return self._levels - 1 if density >= self.highest else 0
        if self.logarithmic:
            share = math.log(density / self.lowest) / math.log(self.highest / self.lowest)
        else:
            share = (density - self.lowest) / (self.highest - self.lowest)
        return min(int(share * self._levels), self._levels - 1)

    def draw(self, elements: int, changed: int, cell: int) -> str:
        """One cell: blank where there is nothing, a dot where nothing changed."""
        if elements == 0:
            return " " * cell
        if changed == 0:
            return self._terminal.paint(self._terminal.glyphs.zero * cell, "dim")
        return self._block(self.level(changed / elements), cell)

    def _block(self, level: int, cell: int) -> str:
        text = self._terminal.glyphs.levels[level] * cell
        return self._terminal.paint(text, _SHADES[level]) if self._terminal.shades else text

    def legend(self) -> str:
        """What the characters mean."""
        text = f"{self._terminal.paint(self._terminal.glyphs.zero, 'dim')} 0 %"
        if self.highest > 0:
            blocks = "".join(self._block(level, 1) for level in range(self._levels))
            at_most = self._terminal.glyphs.at_most
            text += f"   {at_most} {_percent(self.lowest)} {blocks} {_percent(self.highest)}"
            text += " (logarithmic)" if self.logarithmic else ""
        return text


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
