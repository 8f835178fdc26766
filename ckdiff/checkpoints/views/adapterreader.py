"""Reading a base with an adapter merged into it, span by span."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ckdiff.checkpoints.protocol import IntArray, SpanReader
from ckdiff.checkpoints.views.adaptermath import (
    Floats,
    merged,
    product,
    rounded,
    widened,
)
from ckdiff.checkpoints.views.adapterplan import Factor, LowRank, MergePlan
from ckdiff.dtypes import DTYPES
from ckdiff.kernels.memory import Bytes, bytes_at

_BLOCK = 1 << 15  # elements whose product is computed at a time
_FACTOR = 1 << 16  # elements of a matrix that are held at a time
#: bytes of what is computed with: two pieces of matrices, stored and widened, and a block's sums
SCRATCH = 4 << 20

#: rows and columns of a tensor: first and last of each
Box = tuple[int, int, int, int]


class AdapterReader:
    """A SpanReader; one for each worker. Takes two readers of the adapter: one whose addresses are
    handed out, and one for the matrices, of which nothing is held.
    """

    def __init__(self, plan: MergePlan, dtypes: list[str], readers: list[SpanReader]) -> None:
        self._plan = plan
        self._base, self._adapter, matrices = readers
        self._matrices = _Matrices(matrices, dtypes)
        self._buffer = np.empty(0, np.uint8)
        #: of each span of a window the address of what the matrices are added to: the base's bytes,
        #: or the adapter's where it brings the tensor whole; of a merged one the elements that its
        #: first and last bytes are in are whole
        self.unmerged: IntArray = np.empty(0, np.int64)
        #: how many elements of each span the adapter asks to change: by however little
        self.asked: IntArray = np.empty(0, np.int64)

    def acquire(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> IntArray:
        """See SpanReader. What is merged is in a buffer of this reader."""
        plan = self._plan
        sizes = [DTYPES[plan.table.dtypes[t]].bits // 8 for t in tensors.tolist()]
        computed = np.array([plan.computed(t) for t in tensors.tolist()], bool)
        width = np.where(computed, np.maximum(np.array(sizes, np.int64), 1), 1)
        begins = starts // width * width
        lengths = np.where(nbytes > 0, -(-(starts + nbytes) // width) * width - begins, 0)
        addresses = self._sources(tensors, begins, lengths)
        self.unmerged = addresses + (starts - begins)
        self.asked = np.zeros(len(tensors), np.int64)
        if computed.any():
            self._compute(tensors, begins, lengths, computed, addresses)
        return addresses + (starts - begins)

    def prefetch(self, tensors: IntArray, starts: IntArray, nbytes: IntArray) -> None:
        """See SpanReader. Of the matrices nothing is: they are small, and soon in memory."""
        for reader, at in self._sides():
            here = at[tensors] >= 0
            if at is self._plan.adapter_at:
                here &= np.array([t not in self._plan.cast for t in tensors.tolist()], bool)
            reader.prefetch(at[tensors[here]], starts[here], nbytes[here])

    def release(self) -> None:
        """See SpanReader."""
        self._base.release()
        self._adapter.release()

    def close(self) -> None:
        """See SpanReader."""
        for reader in (self._base, self._adapter, self._matrices.reader):
            reader.close()
        self._buffer = np.empty(0, np.uint8)

    def _sides(self) -> tuple[tuple[SpanReader, IntArray], ...]:
        return (self._base, self._plan.base_at), (self._adapter, self._plan.adapter_at)

    def _sources(self, tensors: IntArray, begins: IntArray, lengths: IntArray) -> IntArray:
        """Where the bytes are that the spans are, or are made of."""
        plan = self._plan
        addresses = np.zeros(len(tensors), np.int64)
        starts, sizes = begins.copy(), lengths.copy()
        for i, tensor in enumerate(tensors.tolist()):
            if tensor in plan.cast:  # elements of another width
                ours = DTYPES[plan.table.dtypes[tensor]].bits
                theirs = DTYPES[plan.cast[tensor]].bits
                starts[i], sizes[i] = starts[i] * theirs // ours, sizes[i] * theirs // ours
        for reader, at in self._sides():
            here = at[tensors] >= 0
            addresses[here] = reader.acquire(at[tensors[here]], starts[here], sizes[here])
        return addresses

    def _compute(
        self,
        tensors: IntArray,
        begins: IntArray,
        lengths: IntArray,
        computed: np.ndarray[tuple[int], np.dtype[np.bool_]],
        addresses: IntArray,
    ) -> None:
        """Compute spans into the buffer, and put the addresses there in place of the sources'."""
        needed = int((lengths[computed] + 7 & -8).sum())
        if len(self._buffer) < needed:
            self._buffer = np.empty(0, np.uint8)  # not both at once
            self._buffer = np.empty(needed, np.uint8)
        at = 0
        for i in np.flatnonzero(computed).tolist():
            tensor, begin, length = int(tensors[i]), int(begins[i]), int(lengths[i])
            out = self._buffer[at : at + length]
            self.asked[i] = self._span(tensor, begin, int(addresses[i]), out)
            addresses[i] = out.ctypes.data
            at += length + 7 & -8

    def _span(self, tensor: int, begin: int, source: int, out: Bytes) -> int:
        """Compute whole elements of a tensor from byte ``begin`` on; gives how many may change."""
        plan = self._plan
        dtype = plan.table.dtypes[tensor]
        width = DTYPES[dtype].bits // 8
        if tensor in plan.cast:
            _cast(source, plan.cast[tensor], out, dtype)
            weight = out
        else:
            weight = bytes_at(source, len(out))
        change = plan.changes.get(tensor)
        if change is None:
            return 0
        asked = 0
        first, last = begin // width, (begin + len(out)) // width
        for box in _boxes(first, last, change.columns):
            top, bottom, left, right = box
            at = (top * change.columns + left - first) * width
            size = (bottom - top) * (right - left) * width
            here, to = (data[at : at + size].reshape(bottom - top, -1) for data in (weight, out))
            asked += self._box(change, dtype, box, here, to)
        return asked

    def _box(self, change: LowRank, dtype: str, box: Box, weight: Bytes, out: Bytes) -> int:
        """Merge rows and columns of a tensor; both arrays are bytes, a row for each row."""
        width = DTYPES[dtype].bits // 8
        wide = dtype == "F64"
        top, bottom, first, last = box
        asked = 0
        for some, rows in _pieces(top, bottom, max(1, _FACTOR // change.rank)):
            left = self._matrices.read(change.left, (some, rows), change.rank, False, wide)
            for begin, end in _pieces(first, last, _strip(change.rank)):
                right = self._matrices.read(change.right, (begin, end), change.rank, True, wide)
                for low, high in _pieces(some, rows, max(1, _BLOCK // (end - begin))):
                    delta = product(left[low - some : high - some], right, change.scaling)
                    asked += int(np.count_nonzero(delta))
                    where = (
                        slice(low - top, high - top),
                        slice((begin - first) * width, (end - first) * width),
                    )
                    held = np.ascontiguousarray(weight[where]).reshape(-1)
                    made = merged(held, dtype, delta, round_first=change.round_first)
                    out[where] = made.reshape(high - low, -1)
        return asked


class _Matrices:
    """Reads pieces of the matrices of an adapter; nothing of them is held on."""

    def __init__(self, reader: SpanReader, dtypes: list[str]) -> None:
        self.reader = reader
        self._dtypes = dtypes

    def read(
        self, factor: Factor, some: tuple[int, int], rank: int, columns: bool, wide: bool
    ) -> Floats:
        """Some rows of a left matrix, all their ``rank`` columns; or some columns of a right one.

        As float32, or as float64 if ``wide``.
        """
        begin, end = some
        if factor.tensor < 0:
            return np.ones((1, 1), np.float64 if wide else np.float32)
        # the rank's rows are apart in a right one that lies as it is, and in a left one across
        if columns != factor.across:
            spans = [(k * factor.width + begin, end - begin) for k in range(rank)]
        else:
            spans = [(begin * factor.width, (end - begin) * factor.width)]
        dtype = self._dtypes[factor.tensor]
        width = DTYPES[dtype].bits // 8
        numbers = np.array(spans, np.int64) * width
        tensors = np.full(len(spans), factor.tensor, np.int64)
        held = self.reader.acquire(tensors, numbers[:, 0].copy(), numbers[:, 1].copy())
        made = np.empty(sum(size for _, size in spans), np.float64 if wide else np.float32)
        at = 0
        for address, (_, size) in zip(held.tolist(), spans, strict=True):
            with np.errstate(all="ignore"):
                made[at : at + size] = widened(bytes_at(address, size * width), dtype)
            at += size
        self.reader.release()
        shaped = made.reshape(rank if columns != factor.across else end - begin, -1)
        return np.ascontiguousarray(shaped.T) if factor.across else shaped


def _cast(source: int, held: str, out: Bytes, dtype: str) -> None:
    """Elements of dtype ``held`` at an address, to ``dtype``."""
    width, wide = DTYPES[dtype].bits // 8, DTYPES[held].bits // 8
    for first, last in _pieces(0, len(out) // width, _FACTOR):
        piece = bytes_at(source + first * wide, (last - first) * wide)
        out[first * width : last * width] = rounded(widened(piece, held), dtype)


def _boxes(first: int, last: int, columns: int) -> Iterator[Box]:
    """Elements [first, last) of a tensor of so many columns: a rest of a row, rows, a rest."""
    while first < last:
        row, column = divmod(first, columns)
        if column or last - first < columns:
            end = min(columns, column + last - first)
            yield row, row + 1, column, end
            first += end - column
        else:
            rows = (last - first) // columns
            yield row, row + rows, 0, columns
            first += rows * columns


def _strip(rank: int) -> int:
    """Columns of a right matrix that are held at a time: an odd multiple of 64, so that its rows do
    not lie a power of two apart, where they would push each other out of the cache.
    """
    words = _FACTOR // rank // 64
    return 64 * max(1, words - 1 + words % 2)


def _pieces(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    for begin in range(first, last, size):
        yield begin, min(last, begin + size)
