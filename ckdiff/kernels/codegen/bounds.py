"""What the columns of a table of segments reach from and to, before the driver believes them."""

from __future__ import annotations

from collections.abc import Callable

from ckdiff.kernels.abi import SEG_COLUMNS, SEG_ELEMENTS, SEG_POSITION, SEG_ROW, SEG_SLOT
from ckdiff.kernels.codegen.words import load_word, store_word


def bounds_kernel() -> Callable[[int, int, int], None]:
    """See the ABI."""

    def bounds(segments: int, count: int, out: int) -> None:
        row = most_row = load_word(segments + 8 * SEG_ROW)
        slot = most_slot = load_word(segments + 8 * SEG_SLOT)
        low = high = load_word(segments + 8 * SEG_POSITION)
        for i in range(count):
            at = segments + i * (8 * SEG_COLUMNS)
            one = load_word(at + 8 * SEG_ROW)
            if one < row:
                row = one
            if one > most_row:
                most_row = one
            one = load_word(at + 8 * SEG_SLOT)
            if one < slot:
                slot = one
            if one > most_slot:
                most_slot = one
            one, size = load_word(at + 8 * SEG_POSITION), load_word(at + 8 * SEG_ELEMENTS)
            if one < low:
                low = one
            if size < low:
                low = size
            if one + size > high:
                high = one + size
        store_word(out, row)
        store_word(out + 8, most_row)
        store_word(out + 16, slot)
        store_word(out + 24, most_slot)
        store_word(out + 32, low)
        store_word(out + 40, high)

    return bounds
