"""Walking masks: how far they agree, what becomes of them together, and where their ones are.

Tables of segments have SEGMENT_COLUMNS, then for each store where in ``memory`` its mask begins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ckdiff.dtypes import DTYPES
from ckdiff.kernels.abi import (
    CELLS_SCRATCH,
    LANES,
    SEG_GROUP,
    SEG_SIZE,
    SEG_TARGET,
    SEGMENT_COLUMNS,
)
from ckdiff.kernels.binades import WAYS, bins
from ckdiff.kernels.compiled import c_function
from ckdiff.kernels.memory import I64, U8, Bytes, Int64, place, room, within

_WORDS = LANES // 8  # bytes of one mask word


def agree(segments: Int64, memory: Bytes, pairs: Int64, votes: Int64) -> None:
    """Add up what masks share: each segment to its row.

    ``pairs`` has the upper triangle of all pairs of stores, diagonal included, in each row;
    ``votes`` the elements that 0 to all stores hold, of which those that none holds are left alone.
    """
    stores, table = segments.shape[1] - SEGMENT_COLUMNS, _placed(segments, memory, len(votes))
    scratch = np.zeros(2 * stores, np.int64)
    c_function("agree", str(stores.bit_length())).ctypes(
        place(table, I64), len(table), stores,
        room(pairs, I64, len(votes) * stores * (stores + 1) // 2),
        room(votes, I64, len(votes) * (stores + 1)), room(scratch, I64),
    )  # fmt: skip


def combine(
    kind: str, segments: Int64, memory: Bytes, threshold: int, target: Bytes, counts: Int64
) -> None:
    """Combine masks into ``target``, where SEG_TARGET says, and add each row's ones to ``counts``.

    ``kind`` is that of the kernel: how votes decide, with the ``threshold`` where they are counted.
    """
    stores, table = segments.shape[1] - SEGMENT_COLUMNS, _placed(segments, memory, len(counts))
    if len(table):
        ends = table[:, SEG_TARGET] + table[:, SEG_SIZE]
        within(int(table[:, SEG_TARGET].min()), int(ends.max()), len(target))
    table[:, SEG_TARGET] += room(target, U8)
    c_function("combine", kind).ctypes(
        place(table, I64), len(table), stores, threshold, room(counts, I64)
    )


def cells(
    dtype: str, base: Bytes, memory: Bytes, places: Sequence[int] | Int64, counts: Int64
) -> None:
    """Count a span of a base's elements by binade, all of them and those that each mask marks.

    The masks lie in ``memory`` at ``places``. ``counts`` is (stores + 1, WAYS, bins), added to.
    """
    form, stores = DTYPES[dtype], len(places)
    elements = len(base) * 8 // form.bits
    masks = np.array(places, np.int64)
    within(int(masks.min()), int(masks.max()) + -(-elements // LANES) * _WORDS, len(memory))
    masks += place(memory, U8)
    scratch = np.zeros(CELLS_SCRATCH, np.uint8)
    c_function("cells", dtype).ctypes(
        place(base, U8), elements, place(masks, I64), stores,
        room(counts, I64, (stores + 1) * WAYS * bins(form)), room(scratch, U8),
    )  # fmt: skip


def margins(mask: Bytes, elements: int, column: int, rows: Int64, columns: Int64) -> None:
    """Count the ones of a piece of a matrix's mask that begins at ``column`` by row and column."""
    if not 0 <= column < len(columns):
        raise ValueError(f"there is no column {column}")
    c_function("margins").ctypes(
        place(mask, U8, -(-elements // LANES) * _WORDS), elements, column, len(columns),
        room(rows, I64, -(-(column + elements) // len(columns))), room(columns, I64),
    )  # fmt: skip


def _placed(segments: Int64, memory: Bytes, rows: int) -> Int64:
    """The table as kernels read it: with addresses."""
    place(segments, I64)
    table = segments.copy()
    masks = table[:, SEGMENT_COLUMNS:]
    if len(table):
        low, high = table.min(axis=0).tolist(), table.max(axis=0).tolist()
        end = max(high[SEGMENT_COLUMNS:]) + high[SEG_SIZE]
        if end > len(memory):  # unless the longest is not the last
            end = int((masks.max(axis=1) + table[:, SEG_SIZE]).max())
        within(min(low[SEG_SIZE], *low[SEGMENT_COLUMNS:]), end, len(memory))
        within(low[SEG_GROUP], high[SEG_GROUP] + 1, rows)
    masks += place(memory, U8)
    return table
