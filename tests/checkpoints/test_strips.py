"""Tensors that are cut across their rows: grids have each element once, and say where it is."""

from __future__ import annotations

import itertools
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckdiff.checkpoints import strips
from ckdiff.checkpoints.pieces import Piece, packed_strides
from ckdiff.checkpoints.strips import ADDRESS, ELEMENTS, FIRST, PITCH, ROWS, STEP, Strips, rows_of

WIDTH, UNIT = 2, 4
Array = npt.NDArray[Any]


def pieces_of(data: st.DataObject, array: Array, sources: list[Array]) -> list[Piece]:
    """Boxes of a tensor, whose columns end at units as a rule, each in a source of its own: packed,
    or with something between its rows, or with its outer dimensions in another order.
    """
    cuts = []
    for axis, size in enumerate(array.shape):
        step = UNIT if axis == array.ndim - 1 and data.draw(st.integers(0, 9)) else 1
        inner = data.draw(st.sets(st.integers(1, max((size - 1) // step, 1)), max_size=2))
        cuts.append(list(itertools.pairwise(sorted({0, size, *(step * n for n in inner)}))))
    found = []
    for box in itertools.product(*cuts):
        part = array[tuple(slice(low, high) for low, high in box)]
        outer = data.draw(st.permutations(range(array.ndim - 1)))
        order = [*outer, array.ndim - 1]
        padded = (*(part.shape[i] for i in outer), part.shape[-1] + data.draw(st.integers(0, 2)))
        stored: Array = np.full(padded, 7, array.dtype)
        stored[..., : part.shape[-1]] = np.transpose(part, order)
        strides = [0] * array.ndim
        for axis, stride in zip(order, packed_strides(stored.shape), strict=True):
            strides[axis] = stride
        at = tuple(low for low, _ in box)
        found.append(Piece(len(sources), WIDTH, at, part.shape, tuple(strides)))
        sources.append(np.append(np.zeros(1, array.dtype), stored.reshape(-1)))
    return found


@settings(deadline=None)
@given(st.data())
def test_grids_have_each_element_of_a_span_once(data: st.DataObject) -> None:
    outer = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    shape = (*outer, data.draw(st.integers(1, 20)))
    array = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape)
    sources: list[Array] = []
    pieces = pieces_of(data, array, sources)
    with mock.patch.object(strips, "UNIT", UNIT):
        found = Strips.of(shape, pieces, WIDTH)
    if found is None:
        return
    first = data.draw(st.integers(0, array.size - 1))
    stop = data.draw(st.integers(first + 1, array.size))
    grids, requests, idle = found.between(first, stop)
    seen = np.full(array.size, -1)
    for grid, (source, begin, size) in zip(grids.tolist(), requests, strict=True):
        data_at = sources[source].view(np.uint8)[begin : begin + size]
        assert len(data_at) == size
        for row in range(grid[ROWS]):
            at = grid[FIRST] + row * grid[STEP]
            assert at % UNIT == 0 or at == first
            some = data_at[row * grid[PITCH] :][: grid[ELEMENTS] * WIDTH].view(np.uint16)
            assert (seen[at : at + len(some)] == -1).all()
            seen[at : at + len(some)] = some
    assert np.array_equal(seen[first:stop], np.arange(first, stop))
    assert (seen[:first] == -1).all()
    assert (seen[stop:] == -1).all()
    assert idle == sum(size for *_, size in requests) - (stop - first) * WIDTH


@pytest.mark.parametrize("columns", [[8, 16], [4, 20], [8, 8, 8]])
def test_what_is_cut_at_units_is_taken(columns: list[int]) -> None:
    """Each part packed, as ranks write them, in one grid."""
    edges = [0, *itertools.accumulate(columns)]
    shape = (5, 3, edges[-1])
    pieces = [
        Piece(i, 0, (0, 0, low), (5, 3, high - low), packed_strides((5, 3, high - low)))
        for i, (low, high) in enumerate(itertools.pairwise(edges))
    ]
    with mock.patch.object(strips, "UNIT", UNIT):
        found = Strips.of(shape, pieces, WIDTH)
        assert Strips.of(shape, [Piece(0, 0, (0, 0, 0), shape, packed_strides(shape))], 2) is None
    assert found is not None
    grids, requests, idle = found.between(0, 15 * edges[-1])
    assert grids[:, ROWS].tolist() == [15] * len(columns)
    assert [size for *_, size in requests] == [15 * WIDTH * wide for wide in columns]
    assert idle == 0


@pytest.mark.parametrize("edge", [6, 5])
def test_rows_that_begin_inside_units_are_gathered(edge: int) -> None:
    pieces = [
        Piece(0, 0, (0, 0), (3, edge), (edge, 1)),
        Piece(1, 0, (0, edge), (3, 16 - edge), (16 - edge, 1)),
    ]
    with mock.patch.object(strips, "UNIT", UNIT):
        assert Strips.of((3, 16), pieces, WIDTH) is None


def test_grids_row_by_row_are_in_order() -> None:
    """Two grids of one span and one of another, whose rows alternate."""
    grids = np.zeros((3, strips.NO_GRIDS.shape[1]), np.int64)
    grids[:, strips.SPAN] = 1, 0, 1
    grids[:, FIRST], grids[:, STEP], grids[:, ROWS] = (24, 0, 20), (8, 8, 8), (2, 1, 2)
    grids[:, ELEMENTS], grids[:, ADDRESS], grids[:, PITCH] = 4, (100, 50, 200), 16
    rows = rows_of(grids, np.array([0, 20]), np.array([8, 16]))
    assert rows.spans.tolist() == [0, 1, 1, 1, 1]
    assert rows.begins.tolist() == [0, 0, 8, 16, 24]
    assert rows.addresses.tolist() == [50, 200, 100, 216, 116]
