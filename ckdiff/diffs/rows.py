"""Segments of a window whose tensors are read row by row, where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ckdiff.checkpoints.panels import Late
from ckdiff.checkpoints.protocol import IntArray
from ckdiff.checkpoints.scattered import Rows
from ckdiff.checkpoints.strips import (
    ADDRESS,
    ELEMENTS,
    FIRST,
    PITCH,
    ROWS,
    SPAN,
    STEP,
    rows_of,
)
from ckdiff.kernels import abi
from ckdiff.kernels.hashing import UNIT
from ckdiff.kernels.panels import Panel
from ckdiff.kernels.spread import spread

Grids = Sequence[IntArray]  # of base and tuned: see checkpoints.strips
_COLUMNS = (abi.SEG_BASE, abi.SEG_TUNED)
_PLACES = 32  # bits of an element's number in a window


def row_by_row(
    segments: IntArray, grids: Grids, rows: Sequence[Rows | None], bits: Sequence[IntArray]
) -> IntArray:
    """The segments, which a window's spans have in their order, cut where a row of either side
    begins: those of a span in grids, grid by grid, and those in ``rows`` in order.

    ``bits`` are those of an element, for each segment of both sides.
    """
    if not any(map(len, grids)):
        return cut_in_rows(segments, rows, bits)
    pairs = None if any(rows) else _pairs(segments, grids, bits)
    if pairs is None:
        starts = segments[:, abi.SEG_UNIT] * UNIT
        tables = [
            Rows.joined([each for each in (some, rows_of(grid, starts, width)) if each])
            for some, grid, width in zip(rows, grids, bits, strict=True)
        ]
        return cut_in_rows(segments, tables, bits)
    return spread(*_heads(segments, pairs))


def _heads(segments: IntArray, pairs: Grids) -> tuple[IntArray, IntArray]:
    """Of grids that both sides have alike the segments of their first rows, and the steps to the
    next; and all segments that are in none.
    """
    base = pairs[0]
    spans, count = base[:, SPAN], len(base)
    whole = np.ones(len(segments), np.bool_)
    whole[spans] = False
    others = np.flatnonzero(whole)
    heads = segments.take(np.concatenate([spans, others]), axis=0)
    steps = np.zeros((len(heads), abi.STEP_COLUMNS), np.int64)
    steps[count:, abi.STEP_ROWS] = 1
    first = base[:, FIRST] - heads[:count, abi.SEG_UNIT] * UNIT
    heads[:count, abi.SEG_POSITION] += first
    heads[:count, abi.SEG_UNIT] += first // UNIT
    heads[:count, abi.SEG_ELEMENTS] = base[:, ELEMENTS]
    steps[:count, abi.STEP_ROWS], steps[:count, abi.STEP_POSITION] = base[:, ROWS], base[:, STEP]
    for side, column, step in zip(pairs, _COLUMNS, (abi.STEP_BASE, abi.STEP_TUNED), strict=True):
        heads[:count, column], steps[:count, step] = side[:, ADDRESS], side[:, PITCH]
    return heads, steps


def _pairs(segments: IntArray, grids: Grids, bits: Sequence[IntArray]) -> Grids | None:
    """Grids of both sides that have the same elements; None where rows of the one are not parts of
    rows of the other.
    """
    if np.array_equal(grids[0][:, : ELEMENTS + 1], grids[1][:, : ELEMENTS + 1]):
        return grids
    found = list[Grids]()
    for span in sorted(set(grids[0][:, SPAN].tolist()) | set(grids[1][:, SPAN].tolist())):
        base, tuned = (side[side[:, SPAN] == span] for side in grids)
        width = [int(each[span]) for each in bits]
        if not len(base):
            base = _within(tuned, segments[span], abi.SEG_BASE, width[0])
        elif not len(tuned):
            tuned = _within(base, segments[span], abi.SEG_TUNED, width[1])
        elif base[0, STEP] != tuned[0, STEP]:
            return None
        else:
            base, tuned = _crossed(base, tuned, width)
        found.append((base, tuned))
    return [np.concatenate(sides) for sides in zip(*found, strict=True)]


def _within(grids: IntArray, segment: IntArray, column: int, bits: int) -> IntArray:
    """The same grids of a side that has all of their span at one place."""
    found = grids.copy()
    away = grids[:, FIRST] - segment[abi.SEG_UNIT] * UNIT
    found[:, ADDRESS] = segment[column] + away * bits // 8
    found[:, PITCH] = grids[:, STEP] * bits // 8
    return found


def _crossed(base: IntArray, tuned: IntArray, bits: Sequence[int]) -> Grids:
    """What each grid of a span has in common with each of the other side."""
    sides = [np.divmod(side[:, FIRST], side[:, STEP]) for side in (base, tuned)]
    (top, left), (other_top, other_left) = sides
    high = np.maximum.outer(top, other_top)
    low = np.minimum.outer(top + base[:, ROWS], other_top + tuned[:, ROWS])
    edge = np.maximum.outer(left, other_left)
    end = np.minimum.outer(left + base[:, ELEMENTS], other_left + tuned[:, ELEMENTS])
    both = np.nonzero((low > high) & (end > edge))
    high, edge = high[both], edge[both]
    found = []
    for grids, at, (tops, lefts), width in zip((base, tuned), both, sides, bits, strict=True):
        some = grids.take(at, axis=0)
        some[:, ADDRESS] += (high - tops[at]) * some[:, PITCH] + (edge - lefts[at]) * width // 8
        some[:, FIRST] = high * some[:, STEP] + edge
        some[:, ROWS], some[:, ELEMENTS] = low[both] - high, end[both] - edge
        found.append(some)
    return found


def cut_in_rows(
    segments: IntArray, rows: Sequence[Rows | None], bits: Sequence[IntArray]
) -> IntArray:
    """The segments, cut where a row of either side begins, which are whole units.

    ``rows`` are those of base and tuned, if there are any; ``bits`` of an element, for each segment
    of both.
    """
    tables = [
        None if side is None else (side, _key(side.spans, side.begins * 8 // width[side.spans]))
        for side, width in zip(rows, bits, strict=True)
    ]
    known = [table[1] for table in tables if table is not None]
    if not known:
        return segments
    keys = _keys(len(segments), [side for side in rows if side is not None], known)
    of, at = keys >> _PLACES, keys & ((1 << _PLACES) - 1)
    found: IntArray = segments.take(of, axis=0)
    ends = np.append(at[1:], 0)
    last = np.append(of[1:] != of[:-1], True)
    ends[last] = found[last, abi.SEG_ELEMENTS]
    found[:, abi.SEG_ELEMENTS] = ends - at
    found[:, abi.SEG_POSITION] += at
    found[:, abi.SEG_UNIT] += at // UNIT
    for column, table, width in zip(_COLUMNS, tables, bits, strict=True):
        if table is not None and len(table[1]) == len(keys):
            found[:, column] = table[0].addresses
            continue
        found[:, column] += at * width[of] // 8
        if table is not None:
            side, begins = table
            nth = np.maximum(np.searchsorted(begins, keys, side="right") - 1, 0)
            here = side.spans[nth] == of
            beyond = (keys - begins[nth]) * width[of] // 8
            found[here, column] = (side.addresses[nth] + beyond)[here]
    return found


def in_panels(
    segments: IntArray, late: Sequence[Late], places: IntArray, bits: IntArray
) -> list[Panel]:
    """Panels that have all segments, which are in order: those of ``late`` are compared once they
    are copied, and all others as they are.

    ``places`` are where in the window each span begins, and ``bits`` those of its elements.
    """
    parts = np.array([panel.part for panel in late], np.int64)
    spans, ends = parts[:, 0], parts[:, 1:] * 8
    wanted = places[spans][:, None] + ends // bits[spans][:, None]
    edges = np.searchsorted(segments[:, abi.SEG_POSITION], wanted).tolist()
    found = [Panel(panel.copying, *edge) for panel, edge in zip(late, edges, strict=True)]
    done = 0
    for begin, end in [*sorted((panel.first, panel.stop) for panel in found), (len(segments),) * 2]:
        if begin > done:
            found.append(Panel(None, done, begin))
        done = end
    return found


def _keys(count: int, rows: Sequence[Rows], known: list[IntArray]) -> IntArray:
    """Where the rows of either side begin, and of ``count`` segments those that are in none."""
    whole = np.ones(count, np.bool_)
    for side in rows:
        whole[side.spans] = False
    others = np.flatnonzero(whole)
    parts = [*known, _key(others, np.zeros(len(others), np.int64))] if len(others) else known
    if all(np.array_equal(part, parts[0]) for part in parts[1:]):
        return parts[0]
    return np.unique(np.concatenate(parts))


def _key(spans: IntArray, elements: IntArray) -> IntArray:
    return spans << _PLACES | elements
