"""Segments of rows that are equally far apart, each from the first of them and the steps."""

from __future__ import annotations

from collections.abc import Callable

from ckdiff.kernels.abi import (
    SEG_BASE,
    SEG_COLUMNS,
    SEG_ELEMENTS,
    SEG_POSITION,
    SEG_ROW,
    SEG_SLOT,
    SEG_TUNED,
    SEG_UNIT,
    STEP_BASE,
    STEP_COLUMNS,
    STEP_POSITION,
    STEP_ROWS,
    STEP_TUNED,
)
from ckdiff.kernels.codegen.words import load_word, store_word
from ckdiff.kernels.hashing import UNIT


def spread_kernel() -> Callable[[int, int, int, int], None]:
    """See the ABI."""

    def spread(heads: int, steps: int, count: int, out: int) -> None:
        for i in range(count):
            head, step = heads + i * (8 * SEG_COLUMNS), steps + i * (8 * STEP_COLUMNS)
            base, tuned = load_word(head + 8 * SEG_BASE), load_word(head + 8 * SEG_TUNED)
            position, unit = load_word(head + 8 * SEG_POSITION), load_word(head + 8 * SEG_UNIT)
            base_step, tuned_step = (
                load_word(step + 8 * STEP_BASE),
                load_word(step + 8 * STEP_TUNED),
            )
            further = load_word(step + 8 * STEP_POSITION)
            for _ in range(load_word(step + 8 * STEP_ROWS)):
                store_word(out + 8 * SEG_BASE, base)
                store_word(out + 8 * SEG_TUNED, tuned)
                store_word(out + 8 * SEG_ELEMENTS, load_word(head + 8 * SEG_ELEMENTS))
                store_word(out + 8 * SEG_POSITION, position)
                store_word(out + 8 * SEG_SLOT, load_word(head + 8 * SEG_SLOT))
                store_word(out + 8 * SEG_UNIT, unit)
                store_word(out + 8 * SEG_ROW, load_word(head + 8 * SEG_ROW))
                base += base_step
                tuned += tuned_step
                position += further
                unit += further // UNIT
                out += 8 * SEG_COLUMNS

    return spread
