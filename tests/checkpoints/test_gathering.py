"""Tensors in pieces: any spans of any pieces are the bytes that a naive gather gives."""

from __future__ import annotations

import ctypes
import itertools
from contextlib import closing
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ckdiff
from ckdiff.checkpoints import gathering
from ckdiff.checkpoints.gathering import PieceReader
from ckdiff.checkpoints.pieces import Contents, Piece, borders, packed_strides
from ckdiff.checkpoints.protocol import Checkpoint, IntArray, TensorTable

Array = npt.NDArray[Any]


class Held:
    """A SpanReader over arrays, that notes what it is asked for."""

    def __init__(self, sources: list[Array]) -> None:
        self.sources = sources
        self.asked: list[tuple[int, int, int]] = []

    def acquire(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        found = []
        for source, start, size in zip(
            tensors.tolist(), starts.tolist(), nbytes.tolist(), strict=True
        ):
            assert 0 <= start <= start + size <= self.sources[source].nbytes
            self.asked.append((source, start, size))
            found.append(self.sources[source].ctypes.data + start)
        return np.array(found, np.int64)

    def prefetch(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        pass

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


def contents_of(arrays: list[Array], pieces: dict[int, tuple[Piece, ...]]) -> Contents:
    dtypes = {1: "U8", 2: "BF16", 4: "F32", 8: "I64"}
    table = TensorTable(
        [f"t.{i}" for i in range(len(arrays))],
        [dtypes[array.itemsize] for array in arrays],
        [array.shape for array in arrays],
        np.array([array.nbytes for array in arrays], np.int64),
    )
    nowhere = np.full(len(arrays), -1, np.int64)
    return Contents(table, nowhere.astype(np.int32), nowhere, pieces=pieces)


def split(draw: Any, array: Array, sources: list[Array]) -> tuple[Piece, ...]:
    """Pieces of ``array`` along random cuts of each dimension, each in a source of its own, packed
    or in another order, with something before and after it.
    """
    cuts = []
    for size in array.shape:
        inner = draw(st.sets(st.integers(1, max(size - 1, 1)), max_size=2))
        edges = sorted({0, size, *(at for at in inner if at < size)})
        cuts.append(list(itertools.pairwise(edges)))
    boxes: list[tuple[tuple[int, int], ...]] = [()]
    for dimension in cuts:
        boxes = [(*box, part) for box in boxes for part in dimension]
    pieces = []
    for box in boxes:
        part = array[tuple(slice(low, high) for low, high in box)]
        order = draw(st.permutations(range(array.ndim)))
        stored = np.transpose(part, order).copy(order="C")
        before, after = draw(st.integers(0, 3)), draw(st.integers(0, 3))
        source = np.frombuffer(
            b"\x55" * before * array.itemsize + stored.tobytes() + b"\xaa" * after, np.uint8
        )
        strides = [0] * array.ndim
        for axis, stride in zip(order, packed_strides(stored.shape), strict=True):
            strides[axis] = stride
        pieces.append(
            Piece(
                len(sources),
                before * array.itemsize,
                tuple(low for low, _ in box),
                part.shape,
                tuple(strides),
            )
        )
        sources.append(source)
    return tuple(draw(st.permutations(pieces)))


@settings(deadline=None)  # kernels are compiled
@given(st.data())
def test_any_span_is_what_a_naive_gather_gives(data: st.DataObject) -> None:
    sources: list[Array] = []
    arrays, pieces = [], {}
    for i in range(data.draw(st.integers(1, 3))):
        shape = tuple(data.draw(st.lists(st.integers(1, 7), max_size=4)))
        kind = data.draw(st.sampled_from(["u1", "u2", "u4", "u8"]))
        array = np.random.default_rng(i).integers(0, 255, shape or 1).astype(kind).reshape(shape)
        arrays.append(array)
        pieces[i] = split(data.draw, array, sources)
    contents = contents_of(arrays, pieces)
    spans = []
    for _ in range(data.draw(st.integers(1, 5))):
        tensor = data.draw(st.integers(0, len(arrays) - 1))
        start = data.draw(st.integers(0, arrays[tensor].nbytes))
        spans.append((tensor, start, data.draw(st.integers(0, arrays[tensor].nbytes - start))))
    with closing(PieceReader(Held(sources), contents)) as reader:
        columns = np.array(spans, np.int64).T.copy()
        addresses = reader.acquire(*columns)
        found = [ctypes.string_at(a, s[2]) for a, s in zip(addresses.tolist(), spans, strict=True)]
    assert found == [arrays[t].tobytes()[start : start + size] for t, start, size in spans]


class Counting(Held):
    """Notes how many bytes it is asked for at a time, and that it is released in between."""

    def __init__(self, sources: list[Array]) -> None:
        super().__init__(sources)
        self.most = self.taken = 0

    def acquire(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        assert not self.taken
        self.taken = 1
        self.most = max(self.most, int(nbytes.sum()))
        return super().acquire(tensors, starts, nbytes)

    def release(self) -> None:
        self.taken = 0


@settings(deadline=None)  # kernels are compiled
@given(st.data())
def test_what_lies_far_apart_is_read_a_stretch_at_a_time(data: st.DataObject) -> None:
    """Whatever the order and the steps in which it is stored."""
    sources: list[Array] = []
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    array = np.random.default_rng(1).integers(0, 1 << 16, shape, np.uint16)
    if data.draw(st.booleans()):
        pieces = split(data.draw, array, sources)
    else:  # every so many elements of a larger one
        steps = [data.draw(st.integers(1, 3)) for _ in shape]
        wide = np.zeros([n * step for n, step in zip(shape, steps, strict=True)], np.uint16)
        wide[tuple(slice(None, None, step) for step in steps)] = array
        strides = tuple(n * s for n, s in zip(packed_strides(wide.shape), steps, strict=True))
        pieces = (Piece(0, 0, (0,) * len(shape), shape, strides),)
        sources.append(wide)
    start = data.draw(st.integers(0, array.nbytes))
    size = data.draw(st.integers(0, array.nbytes - start))
    held = Counting(sources)
    with mock.patch.multiple(gathering, BETWEEN=16, STRETCH=32):
        reader = PieceReader(held, contents_of([array], {0: pieces}))
        (address,) = reader.acquire(*np.array([[0], [start], [size]], np.int64)).tolist()
        # a span that begins or ends inside of an element has all of it
        assert held.most <= PieceReader.asked(size + 2)
    assert ctypes.string_at(address, size) == array.tobytes()[start : start + size]


@given(st.integers(1, 6), st.integers(1, 5), st.sets(st.integers(1, 5)))
def test_runs_that_stay_in_one_place_are_not_copied(rows: int, row: int, cuts: set[int]) -> None:
    array = np.arange(rows * row, dtype=np.uint16).reshape(rows, row)
    edges = sorted({0, rows, *(at for at in cuts if at < rows)})
    sources: list[Array] = []
    pieces = []
    for low, high in itertools.pairwise(edges):
        pieces.append(Piece(len(sources), 0, (low, 0), (high - low, row), (row, 1)))
        sources.append(array[low:high].copy())
    assert borders(array.shape, tuple(pieces)).tolist() == [at * row for at in edges[1:-1]]
    held = Held(sources)
    reader = PieceReader(held, contents_of([array], {0: tuple(pieces)}))
    for low, high in itertools.pairwise(edges):
        begin, size = low * row * 2, (high - low) * row * 2
        (address,) = reader.acquire(*np.array([[0], [begin], [size]], np.int64)).tolist()
        assert address in {source.ctypes.data for source in sources}


@pytest.mark.parametrize(
    "pieces",
    [
        [Piece(0, 0, (0, 0), (4, 2), (2, 1)), Piece(1, 0, (0, 2), (4, 2), (2, 1))],  # by columns
        [Piece(0, 0, (0, 0), (4, 4), (1, 4))],  # transposed
    ],
)
def test_what_is_gathered_all_the_same_is_not_cut(pieces: list[Piece]) -> None:
    assert borders((4, 4), tuple(pieces)).tolist() == []


class InPieces(Checkpoint):
    """A checkpoint whose tensors are each in two parts."""

    def __init__(self, arrays: dict[str, Array], dtype: str, at: dict[str, int]) -> None:
        self.label = "parts"
        self.sources: list[Array] = []
        pieces = {}
        for i, (name, array) in enumerate(arrays.items()):
            parts = []
            for low, part in ((0, array[: at[name]]), (at[name], array[at[name] :])):
                box = (low,), part.shape, (1,)
                parts.append(Piece(len(self.sources), 0, *box))
                self.sources.append(np.ascontiguousarray(part))
            pieces[i] = tuple(parts)
        self.contents = contents_of(list(arrays.values()), pieces)
        self.table = self.contents.table
        self.table.names, self.table.dtypes = list(arrays), [dtype] * len(arrays)

    @property
    def borders(self) -> dict[int, IntArray]:
        shapes = self.table.shapes
        return {i: borders(shapes[i], parts) for i, parts in self.contents.pieces.items()}

    def reader(self) -> PieceReader:
        return PieceReader(Held(self.sources), self.contents)

    def reader_memory(self, window: int) -> int:
        return PieceReader.memory(window)

    def fingerprint(self) -> list[Any]:
        return [id(self)]


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_diff_is_the_same_wherever_pieces_end(seed: int, stats: bool) -> None:
    noise = np.random.default_rng(seed)
    base, tuned = {}, {}
    cuts: tuple[dict[str, int], ...] = ({}, {})
    for name, size in (("a", 70_001), ("b", 511), ("c", 300_000), ("d", 1024)):
        base[name] = noise.standard_normal(size).astype(np.float32)
        tuned[name] = base[name].copy()
        tuned[name][noise.integers(0, size, size // 10)] += 1
        for side in cuts:
            side[name] = int(noise.integers(1, size))
    sides = [InPieces(a, "F32", at) for a, at in zip((base, tuned), cuts, strict=True)]
    whole = [InPieces(a, "F32", {n: len(x) for n, x in a.items()}) for a in (base, tuned)]
    for side in whole:
        side.label = "parts"
    found = ckdiff.diff(*sides, stats=stats)
    wanted = ckdiff.diff(*whole, stats=stats)
    for one, other in zip(found.table, wanted.table, strict=True):
        assert one == other
    for name, array in base.items():
        position = found.table.names.index(name)
        changed = int((array.view(np.uint32) != tuned[name].view(np.uint32)).sum())
        assert int(found.table.changed["exact"][position]) == changed


@given(st.data())
def test_of_many_pieces_a_few_are_looked_at(data: st.DataObject) -> None:
    """Runs in any order, with empty ones between them: whatever crosses them is gathered."""
    rows, row = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 3))
    array = np.arange(rows * row, dtype=np.uint16).reshape(rows, row)
    cuts = data.draw(st.lists(st.integers(0, rows), max_size=12))
    edges = sorted([0, rows, *cuts])  # equal ones make empty pieces
    sources = [array[low:high].copy() for low, high in itertools.pairwise(edges)]
    pieces = [
        Piece(i, 0, (low, 0), (high - low, row), (row, 1))
        for i, (low, high) in enumerate(itertools.pairwise(edges))
    ]
    contents = contents_of([array], {0: tuple(data.draw(st.permutations(pieces)))})
    held = Held(sources)
    reader = PieceReader(held, contents)
    for _ in range(5):
        start = data.draw(st.integers(0, array.nbytes))
        size = data.draw(st.integers(0, array.nbytes - start))
        held.asked.clear()
        (address,) = reader.acquire(*np.array([[0], [start], [size]], np.int64)).tolist()
        assert ctypes.string_at(address, size) == array.tobytes()[start : start + size]
        assert sum(n for _, _, n in held.asked) < size + 2 * row * 2 or not size


def test_what_was_asked_for_ahead_is_worked_out_once() -> None:
    array = np.arange(64, dtype=np.uint16).reshape(8, 8)
    piece = Piece(0, 0, (0, 0), (8, 8), (1, 8))
    contents = contents_of([array], {0: (piece,)})
    reader = PieceReader(Held([np.ascontiguousarray(array.T)]), contents)
    windows = [np.array([[0], [start], [16]], np.int64) for start in range(0, 128, 16)]
    with mock.patch.object(PieceReader, "_wanted", autospec=True, side_effect=PieceReader._wanted):
        for window in windows[:6]:  # more than are remembered
            reader.prefetch(*window)
        for window in windows:
            (address,) = reader.acquire(*window).tolist()
            begin = int(window[1, 0])
            assert ctypes.string_at(address, 16) == array.tobytes()[begin : begin + 16]
            reader.release()
        assert PieceReader._wanted.call_count == 6 + len(windows) - 4  # type: ignore[attr-defined]
    assert not reader._coming
