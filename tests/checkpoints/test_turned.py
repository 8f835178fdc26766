"""Transposed and woven tensors: gathered in whole rows, with what lies between, which is kept."""

from __future__ import annotations

import ctypes
from itertools import pairwise
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gathering import Counting, contents_of

from ckdiff.checkpoints import turned
from ckdiff.checkpoints.gathering import PieceReader
from ckdiff.checkpoints.pieces import Contents, Piece
from ckdiff.checkpoints.turned import clusters_of

Array = npt.NDArray[Any]


def stack(
    shape: tuple[int, int], experts: int, roles: int, style: str, dtype: str = "u2"
) -> tuple[Array, list[Array], dict[int, tuple[Piece, ...]]]:
    """What holds the parts of some experts in a row, the parts, and where they are in it."""
    rows, columns = shape
    random = np.random.default_rng(rows * columns + experts)
    if style == "rows":  # of all roles in turn
        whole = random.integers(0, 256, (experts, rows, roles, columns), dtype).astype(dtype)
        steps, apart = (roles * columns, 1), columns
        parts = [whole[e, :, r] for e in range(experts) for r in range(roles)]
    elif style == "woven":
        whole = random.integers(0, 256, (experts, columns, rows, roles), dtype).astype(dtype)
        steps, apart = (roles, roles * rows), 1
        parts = [whole[e, :, :, r].T for e in range(experts) for r in range(roles)]
    else:
        whole = random.integers(0, 256, (experts, columns, roles, rows), dtype).astype(dtype)
        steps, apart = (1, roles * rows), rows
        parts = [whole[e, :, r].T for e in range(experts) for r in range(roles)]
    pieces: dict[int, tuple[Piece, ...]] = {}
    for at in range(len(parts)):
        begin = (at // roles * roles * rows * columns + at % roles * apart) * whole.itemsize
        pieces[at] = (Piece(0, begin, (0, 0), shape, steps),)
    return whole, [np.ascontiguousarray(part) for part in parts], pieces


STYLES = st.sampled_from(["rows", "woven", "columns"])


@st.composite
def stacks(draw: st.DrawFn) -> tuple[Array, list[Array], dict[int, tuple[Piece, ...]]]:
    shape = draw(st.tuples(st.integers(1, 70), st.integers(1, 70)))
    dtype = draw(st.sampled_from(["u1", "u2", "u4", "u8"]))
    return stack(shape, draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(STYLES), dtype)


def windows_of(arrays: list[Array], size: int) -> list[list[tuple[int, int, int]]]:
    """All bytes of all tensors in order, in windows of a size."""
    ends = np.cumsum([0, *(array.nbytes for array in arrays)]).tolist()
    found = []
    for low in range(0, ends[-1], size):
        high = min(low + size, ends[-1])
        spans = [
            (tensor, max(low, begin) - begin, min(high, end) - max(low, begin))
            for tensor, (begin, end) in enumerate(pairwise(ends))
            if begin < high and low < end
        ]
        found.append(spans)
    return found


def reader_of(source: Array, contents: Contents) -> tuple[PieceReader, Counting]:
    held = Counting([source])
    return PieceReader(held, contents, clusters_of(contents.table, contents.pieces)), held


def read(reader: PieceReader, arrays: list[Array], spans: list[tuple[int, int, int]]) -> None:
    """Acquire a window and hold it against the tensors."""
    columns = np.ascontiguousarray(np.array(spans, np.int64).T)
    reader.prefetch(*columns)
    for address, (tensor, start, size) in zip(
        reader.acquire(*columns).tolist(), spans, strict=True
    ):
        assert ctypes.string_at(address, size) == arrays[tensor].tobytes()[start : start + size]
    reader.release()


@settings(deadline=None, max_examples=50)  # kernels are compiled
@given(stacks(), st.data())
def test_any_windows_are_what_a_naive_gather_gives(
    made: tuple[Array, list[Array], dict[int, tuple[Piece, ...]]], data: st.DataObject
) -> None:
    """In order, some left out, and in any other order; bounded in what is asked for and kept."""
    source, arrays, pieces = made
    contents = contents_of(arrays, pieces)
    with mock.patch.multiple(turned, _SPARE=512, STRETCH=1 << 9):
        reader, held = reader_of(source, contents)
        size = data.draw(st.integers(max(source.nbytes // 12, 64), source.nbytes + 64))
        windows = windows_of(arrays, size)
        if data.draw(st.booleans()):
            windows = data.draw(st.permutations(windows))
        elif data.draw(st.booleans()):
            windows = windows[:: data.draw(st.integers(1, 3))]
        for spans in windows:
            read(reader, arrays, spans)
            assert held.most <= PieceReader.asked(size)
            if reader._turned is not None:
                here = reader._turned
                taken = sum(map(len, here._kept.values())) + len(here._buffer)
                assert taken <= clusters_of(contents.table, pieces).memory(size)
    reader.close()


@pytest.mark.parametrize("style", ["rows", "woven", "columns"])
def test_what_holds_two_tensors_is_read_once(style: str) -> None:
    source, arrays, pieces = stack((96, 80), 5, 2, style)
    reader, held = reader_of(source, contents_of(arrays, pieces))
    for spans in windows_of(arrays, arrays[0].nbytes // 3 * 2):
        read(reader, arrays, spans)
    assert sum(size for _, _, size in held.asked) <= source.nbytes


def test_a_read_that_failed_left_nothing_behind() -> None:
    source, arrays, pieces = stack((96, 80), 1, 2, "woven")
    reader, held = reader_of(source, contents_of(arrays, pieces))
    whole = [(0, 0, arrays[0].nbytes)]
    with mock.patch.object(held, "acquire", side_effect=KeyError), pytest.raises(KeyError):
        read(reader, arrays, whole)
    read(reader, arrays, [(1, 0, arrays[1].nbytes)])
    read(reader, arrays, whole)


def test_which_tensors_make_a_cluster() -> None:
    def found(style: str, roles: int, shape: tuple[int, int] = (8, 9)) -> dict[int, Any]:
        _, arrays, pieces = stack(shape, 2, roles, style)
        return dict(clusters_of(contents_of(arrays, pieces).table, pieces).of)

    pairs = {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}
    assert found("woven", 2) == found("columns", 2) == found("rows", 2) == pairs
    assert found("columns", 1) == {0: (0,), 1: (1,)}
    assert found("rows", 1) == {}  # rows that follow each other
    assert found("columns", 2, (1, 1 << 17)) == {}  # a row may not be had in part
    assert {*found("columns", 2, (1 << 18, 2)).values()} == {(0,), (1,), (2,), (3,)}  # too far


def test_clusters_that_are_too_large_are_not_kept() -> None:
    source, arrays, pieces = stack((96, 80), 2, 2, "woven")
    reader, _ = reader_of(source, contents_of(arrays, pieces))
    size = arrays[0].nbytes
    for spans in windows_of(arrays, size // 4):
        read(reader, arrays, spans)
    assert reader._turned is not None
    assert not reader._turned._kept
    assert reader._turned._clusters.memory(size // 4) == size // 4 + turned._SPARE
    assert reader._turned._clusters.memory(size // 2) == 4 * size + turned._SPARE
