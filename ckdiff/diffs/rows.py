"""Segments of a window whose tensors are read row by row, where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ckdiff.checkpoints.panels import Late
from ckdiff.checkpoints.protocol import IntArray
from ckdiff.checkpoints.scattered import Rows
from ckdiff.kernels import abi
from ckdiff.kernels.hashing import UNIT
from ckdiff.kernels.panels import Panel

_COLUMNS = (abi.SEG_BASE, abi.SEG_TUNED)
_PLACES = 32  # bits of an element's number in a window


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
