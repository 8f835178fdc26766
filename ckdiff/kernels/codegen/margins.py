"""Margins of two-dimensional masks: changed elements of each row and of each column."""

from __future__ import annotations

from collections.abc import Callable

from numba.core import types

from ckdiff.kernels.abi import LANES
from ckdiff.kernels.codegen.words import load_word, lowest_one, ones, store_word


def margins_kernel() -> Callable[..., None]:
    """Adds a span of one mask to row and column counts; see the ABI."""

    def margins(mask: int, elements: int, column: int, width: int, rows: int, columns: int) -> None:
        # The span's first element lies in row 0 of `rows`, at `column`. A word that reaches into
        # the next row is looked at once for each row.
        at = 0
        row = 0
        while at < elements:
            stop = at + width - column
            if stop > elements:
                stop = elements
            count = 0
            w = at // LANES
            while w * LANES < stop:
                word = types.uint64(load_word(mask + 8 * w))
                first = w * LANES
                if first < at:
                    word = (word >> types.uint64(at - first)) << types.uint64(at - first)
                if first + LANES > stop:
                    cut = types.uint64(first + LANES - stop)
                    word = (word << cut) >> cut
                count += ones(word)
                start = columns + 8 * (column - at + first)
                while word:
                    slot = start + 8 * lowest_one(word)
                    word &= word - types.uint64(1)
                    store_word(slot, load_word(slot) + 1)
                w += 1
            slot = rows + 8 * row
            store_word(slot, load_word(slot) + count)
            column = 0
            row += 1
            at = stop

    return margins
